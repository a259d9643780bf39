"""torchebm's Hamiltonian Monte Carlo: its step size and number of steps are the user's to find."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from torchebm.core import BaseModel
from torchebm.samplers import HamiltonianMonteCarlo

from benchmarks.measure import Run
from benchmarks.targets import Target

# Step size and leapfrog steps, found by hand (a grid of both, the most effective draws a second); not timed.
TUNED = {
    "tilted_prior_2d": (0.35, 6),
    "tilted_prior_32d": (0.6, 3),
    "posterior_1": (0.2, 3),
    "posterior_100": (0.1, 6),
    "gaussian_10d": (1.6, 5),
    "eight_schools": (0.4, 6),
    "logistic_25": (0.06, 3),
}


class _Energy(BaseModel):
    """Minus the log density, in torchebm's shape."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.log_prob = target.log_prob

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_prob(x)


def torchebm_hmc(target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int) -> Run:
    """Hand-tuned HMC; the first ``warmup`` draws are thrown away, half of them with a quarter of the step size.

    Without that, chains that start far out, where the density is steep, would never move.
    """
    step_size, steps = TUNED[target.name]
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    careful, sampler = (
        HamiltonianMonteCarlo(_Energy(target), step_size=size, n_leapfrog_steps=steps)
        for size in (step_size / 4, step_size)
    )
    x = careful.sample(torch.from_numpy(start), n_steps=warmup // 2, generator=generator)
    x = sampler.sample(x, n_steps=warmup - warmup // 2, generator=generator)
    began = time.perf_counter()
    kept = sampler.sample(x, n_steps=draws, return_trajectory=True, generator=generator)
    end = time.perf_counter()
    notes = {"step_size": step_size, "steps per draw": steps}
    gradients = float(draws * len(start) * 2 * steps)  # it takes both halves of a leapfrog step anew
    return Run(target.constrain(kept.numpy()), end - begin, end - began, gradients, warmup, notes=notes)


def torchebm_hmc_cost(target: Target, start: np.ndarray, *, step_size: float, steps: int, draws: int) -> float:
    """Seconds per draw of all chains."""
    sampler = HamiltonianMonteCarlo(_Energy(target), step_size=step_size, n_leapfrog_steps=steps)
    x = torch.from_numpy(start)
    sampler.sample(x, n_steps=3)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        sampler.sample(x, n_steps=draws, return_trajectory=True)
        best = min(best, time.perf_counter() - begin)
    return best / draws
