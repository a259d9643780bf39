"""This package's samplers as contenders: ChEES (eager, captured, compiled), SMC, importance sampling."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import torch

from benchmarks.measure import Run
from benchmarks.targets import Target
from pyro_ebm.errors import InferenceWarning
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import importance
from pyro_ebm.inference.kernels.hmc import HMC, ChEES


def ours_chains(
    target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int, graph: str, kernel: str = "ChEES"
) -> Run:
    """A kernel at its defaults from the given points; the images of a batch of posteriors are targets of their own."""
    begin = time.perf_counter()
    plate, copies = target.independent or (None, 1)
    points = torch.from_numpy(start)
    if plate is not None:
        points = points.reshape(len(points), copies, -1)
    mcmc = MCMC(
        {"ChEES": ChEES, "HMC": HMC}[kernel](target.model, independent=plate), draws, warmup, points, len(points),
        seed=seed, compile=graph == "compiled", capture=graph != "eager", progress=False,
    )  # fmt: skip
    found = _quietly(mcmc.run, *target.args)
    # Until the draws are there; the look at R-hat that follows has no counterpart in the peers.
    seconds = min(found.seconds, time.perf_counter() - begin)
    steps = found.stats["n_steps"].double()
    notes = {"steps per draw": float(steps.mean()), "graph": found.notes["graph"]}
    return Run(flat(target, found), seconds, found.sampling_seconds, float(steps.sum()), warmup, notes=notes)


def ours_smc(target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int) -> Run:
    """Sequential Monte Carlo: one island a chain of the table, one particle a draw; ``warmup`` has no meaning here."""
    from pyro_ebm.inference.annealing.smc import SMC

    found = _quietly(
        SMC(target.model, particles_per_island=draws, num_islands=len(start), seed=seed, progress=False).run,
        *target.args,
    )
    weights = None if found.log_weights is None else found.log_weights.numpy()
    gradients = math.nan if found.num_gradients is None else float(found.num_gradients)
    return Run(
        flat(target, found), found.seconds, found.seconds, gradients, log_weights=weights, islands=True
    )  # fmt: skip


def ours_snis(target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int) -> Run:
    """Importance sampling from the prior (or the guide), as many draws as the chains make together."""
    begin = time.perf_counter()
    found = _quietly(importance, target.model, target.guide, *target.args, num_samples=draws * len(start), seed=seed)
    seconds = time.perf_counter() - begin
    assert found.log_weights is not None
    return Run(flat(target, found), seconds, seconds, log_weights=found.log_weights.numpy())


def flat(target: Target, found: Draws) -> np.ndarray:
    """Values (chain, draw, dim), the sites in the target's order."""
    parts = [found.values[site].flatten(2) if shape else found.values[site][..., None]
             for site, shape in target.sites.items()]  # fmt: skip
    return torch.cat(parts, -1).double().numpy()


def _quietly(function, *args, **kwargs):  # type: ignore[no-untyped-def]
    """What a warning would say is in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return function(*args, **kwargs)


def fixed_chains(
    target: Target, start: np.ndarray, *, step_size: float, steps: int, graph: str = "captured",
    independent: bool = False,
) -> Chains:  # fmt: skip
    """Chains of HMC with a fixed step size and number of steps, ready to draw."""
    plate, copies = target.independent if independent and target.independent else (None, 1)
    kernel = HMC(
        target.model, num_steps=steps, step_size=step_size, adapt_step_size=False, adapt_mass_matrix=False,
        independent=plate,
    )  # fmt: skip
    density: LogDensity = kernel.density(*target.args)
    u = torch.from_numpy(start)
    u = u.reshape(len(u), copies, -1) if plate else u
    return Chains(kernel, density, u, generator=torch.Generator().manual_seed(0), graph=graph)


def ours_hmc_cost(
    target: Target, start: np.ndarray, *, step_size: float, steps: int, draws: int, graph: str = "captured",
    independent: bool = False,
) -> float:  # fmt: skip
    """Seconds per draw of all chains."""
    chains = fixed_chains(target, start, step_size=step_size, steps=steps, graph=graph, independent=independent)
    chains.extend(3)
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        chains.extend(draws)
        best = min(best, time.perf_counter() - begin)
    return best / draws
