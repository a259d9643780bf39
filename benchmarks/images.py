"""A hundred posteriors: how long until EVERY image has R-hat < 1.01 and 400 effective draws."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.ours import flat
from benchmarks.targets import Target, posterior
from pyro_ebm.chain_statistics import ess_bulk, r_hat
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import ChEES

R_HAT, ESS = 1.01, 400.0
CHAINS, SEED = 4, 5


def satisfied(values: np.ndarray) -> np.ndarray:
    """Which images are done; values (chain, draw, images * 2)."""
    good = (ess_bulk(values) >= ESS) & (r_hat(values) < R_HAT)
    return good.reshape(-1, 2).all(-1)


def ours(
    *, num_images: int = 100, chains: int = CHAINS, warmup: int = 100, piece: int = 250, most: int = 8_000
) -> dict[str, Any]:
    """All images at once, each (chain, image) a chain of its own; looks at the criterion every ``piece`` draws."""
    target = posterior(num_images)
    plate, _ = target.independent or ("", 1)
    begin = time.perf_counter()
    mcmc = MCMC(
        ChEES(target.model, independent=plate), piece, warmup, num_chains=chains, guide=target.guide, seed=SEED,
        progress=False,
    )  # fmt: skip

    def until_done(running: Chains) -> Mapping[str, Any]:
        done = np.zeros(num_images, bool)
        while not done.all() and len(running.record) < most:
            running.extend(piece)
            u = torch.stack(running.record.u, 1)
            done = satisfied(u.flatten(2).double().numpy())
        return {"done": int(done.sum())}

    found = mcmc.run_with(until_done, target.args, {})
    values = flat(target, found)
    return {
        "seconds": time.perf_counter() - begin, "done": found.notes["done"], "images": num_images, "chains": chains,
        "draws": found.num_draws, "warmup": warmup, "r_hat": float(r_hat(values).max()),
        "ess": float(ess_bulk(values).min()), "gradients": found.num_gradients,
    }  # fmt: skip


def pyro_joint(*, num_images: int = 100, warmup: int = 300, limit: float = 120.0, jit: bool = True) -> dict[str, Any]:
    """Stock NUTS on all images as one density of two dimensions each: one step size, one accept step for all."""
    target = posterior(num_images)
    return {"images": num_images, **_pyro(target, warmup=warmup, limit=limit, jit=jit)}


def pyro_single(*, images: list[int], warmup: int = 300, limit: float = 30.0, jit: bool = True) -> dict[str, Any]:
    """Stock NUTS on some images, one after another."""
    found = []
    for index in images:
        target = posterior(1, first=index)
        found.append(_pyro(target, warmup=warmup, limit=limit, jit=jit))
    seconds = [row["seconds"] for row in found]
    return {
        "images": len(images), "done": sum(row["done"] for row in found), "warmup": warmup, "chains": CHAINS,
        "seconds_each": seconds, "seconds": float(np.sum(seconds)), "hundred": float(100 * np.mean(seconds)),
        "draws": int(np.mean([row["draws"] for row in found])),
    }  # fmt: skip


def _pyro(target: Target, *, warmup: int, limit: float, jit: bool) -> dict[str, Any]:
    """Seconds until all is well, found afterwards: looking at the criterion costs Pyro nothing here."""
    from benchmarks.peers_pyro import timeline

    starts = target.start(CHAINS, np.random.default_rng(SEED))  # as ours; what it takes is not counted
    values, seconds = timeline(target, starts, warmup=warmup, draws=4_000, seed=SEED, jit=jit, limit=limit)
    done, draws = 0, values.shape[1]
    for draws in range(min(100, values.shape[1]), values.shape[1] + 1, 50):
        done = int(satisfied(values[:, :draws]).sum())
        if done == target.dim // 2:
            break
    part = values[:, :draws]
    return {
        "seconds": float(seconds[draws - 1]), "done": done, "draws": draws, "warmup": warmup, "chains": CHAINS,
        "r_hat": float(r_hat(part).max()), "ess": float(ess_bulk(part).min()),
    }  # fmt: skip
