"""What a run costs beyond its gradients, in time and in memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch

from benchmarks.targets import load
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.inference.kernels.hmc import ChEES

CHAINS = 1_024


@torch.no_grad()
def time_per_gradient(target_name: str, *, repeats: int = 9, draws: int = 40) -> dict[str, Any]:
    """Seconds per gradient in the draws of ChEES over those of the bare captured graph, in turns."""
    target = load(target_name)
    kernel = ChEES(target.model)
    density = kernel.density(*target.args)
    u = torch.from_numpy(target.start(CHAINS, np.random.default_rng(0)))
    chains = Chains(kernel, density, u, generator=torch.Generator().manual_seed(0))
    chains.warm_up(100)
    graph = captured(density.value_and_grad, chains.state.u)
    rows = []
    for _ in range(repeats):
        gradients, seconds = chains.num_gradients, chains.sampling_seconds
        chains.extend(draws)
        calls = (chains.num_gradients - gradients) // CHAINS
        inside = (chains.sampling_seconds - seconds) / calls
        u, begin = chains.state.u, time.perf_counter()
        for _ in range(calls):
            graph(u)
        rows.append((inside, (time.perf_counter() - begin) / calls, calls / draws))
    inside, bare, steps = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "target": target_name, "chains": CHAINS, "repeats": repeats, "ratio": float(np.median(inside / bare)),
        "microseconds_inside": float(np.median(inside) * 1e6), "microseconds_bare": float(np.median(bare) * 1e6),
        "steps_per_draw": float(steps.mean()),
    }  # fmt: skip


def memory(draws: int, *, target_name: str = "tilted_prior_2d") -> dict[str, Any]:
    """Peak memory of a process that keeps so many draws of 1,024 chains, and the bytes it keeps."""
    target = load(target_name)
    mcmc = MCMC(ChEES(target.model), draws, 50, num_chains=CHAINS, seed=0, progress=False)
    found = mcmc.run(*target.args)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*found.values.values(), *found.stats.values()]
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    return {"draws": draws, "chains": CHAINS, "peak_mib": peak, "kept_mib": sum(storages.values()) / 2**20}
