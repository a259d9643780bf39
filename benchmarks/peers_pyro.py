"""Stock Pyro's NUTS through pyro.infer.MCMC, chains one after another in this process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.infer.mcmc.api
import pyro.ops.integrator
import torch
from torch import Tensor

from benchmarks.measure import Run
from benchmarks.targets import Target


class _TimeUp(Exception):
    """The time limit of the draws is spent."""


@dataclass
class _Chain:
    """What the hook of pyro.infer.MCMC sees: draws of one chain, when each came, and gradients so far."""

    limit: float
    draws: list[np.ndarray] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    began: float = 0.0
    gradients: int = 0

    def hook(self, kernel: Any, params: Mapping[str, Tensor], stage: str, index: int) -> None:
        now = time.perf_counter()
        if stage.lower().startswith("warmup"):
            self.began, self.gradients = now, _Gradients.count
            return
        self.draws.append(np.concatenate([value.detach().numpy().ravel() for value in params.values()]))
        self.times.append(now)
        if now - self.began > self.limit:
            raise _TimeUp


class _Gradients:
    """Counts calls of the function that Pyro takes gradients with."""

    count = 0
    _stock = staticmethod(pyro.ops.integrator.potential_grad)

    @classmethod
    def counted(cls, potential: Any, z: Any) -> Any:
        cls.count += 1
        return cls._stock(potential, z)


def pyro_nuts(
    target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int, jit: bool, limit: float = 60.0
) -> Run:
    """Stock NUTS; warm-up always in full, the draws for at most ``limit`` seconds over all chains."""
    begin = time.perf_counter()
    chains = [chain for chain, _ in _run(target, start, warmup, draws, seed, jit, limit / len(start))]
    seconds = time.perf_counter() - begin
    length = min(len(chain.draws) for chain in chains)
    values = target.constrain(np.stack([np.stack(chain.draws[:length]) for chain in chains]))
    # Chains that a time limit left longer than the shortest are cut: count what was used.
    spent = sum(chain.times[length - 1] - chain.began for chain in chains)
    unused = sum(chain.times[-1] - chain.times[length - 1] for chain in chains)
    gradients = sum(chain.gradients * length / len(chain.draws) for chain in chains)
    return Run(values, seconds - unused, spent, gradients, warmup, planned=draws)


def timeline(
    target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int, jit: bool, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws (chain, draw, dim), and the seconds (draw,) that all chains together needed to have so many each."""
    begin, chains, lead = time.perf_counter(), [], 0.0
    for chain, end in _run(target, start, warmup, draws, seed, jit, limit / len(start)):
        chains.append(chain)
        lead += chain.began - begin
        begin = end
    length = min(len(chain.draws) for chain in chains)
    values = target.constrain(np.stack([np.stack(chain.draws[:length]) for chain in chains]))
    seconds = lead + sum(np.array(chain.times[:length]) - chain.began for chain in chains)
    return values, seconds


def _run(target: Target, start: np.ndarray, warmup: int, draws: int, seed: int, jit: bool, limit: float) -> Any:
    """One chain after another, each with the time it ended at."""
    pyro.ops.integrator.potential_grad = _Gradients.counted
    torch.manual_seed(seed)  # Pyro takes no generator; this process does nothing else
    for row in start:
        chain, _Gradients.count = _Chain(limit), 0
        # One object for each chain is what MCMC does itself where it runs chains in sequence.
        kernel = pyro.infer.NUTS(target.model, jit_compile=jit, ignore_jit_warnings=True)
        mcmc = pyro.infer.MCMC(
            kernel, num_samples=draws, warmup_steps=warmup, initial_params=_by_site(target, row),
            hook_fn=chain.hook, disable_progbar=True,
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit's deprecation notices
                mcmc.run(*target.args)
        except _TimeUp:
            pass
        chain.gradients = _Gradients.count - chain.gradients
        yield chain, time.perf_counter()


def _by_site(target: Target, row: np.ndarray) -> dict[str, Tensor]:
    sizes = [int(np.prod(shape)) for shape in target.sites.values()]
    parts = np.split(row, np.cumsum(sizes)[:-1])
    return {
        name: torch.tensor(part).reshape(shape) for (name, shape), part in zip(target.sites.items(), parts, strict=True)
    }
