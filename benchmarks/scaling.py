"""How the cost of a draw grows with chains, dimensions and images: HMC with five fixed steps in every library."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from benchmarks.targets import Target, load, posterior

CHAINS = (1, 4, 16, 64, 256, 1_024, 4_096)
DIMENSIONS = (2, 8, 32, 128)
IMAGES = (1, 10, 100, 1_000)
STEPS, STEP_SIZE, DRAWS = 5, 0.05, 20
CONTENDERS = {
    "ours, captured": ("ours.ours_hmc_cost", {}),
    "ours, eager": ("ours.ours_hmc_cost", {"graph": "eager"}),
    "blackjax": ("peers_jax.blackjax_hmc_cost", {}),
    "torchebm": ("peers_torchebm.torchebm_hmc_cost", {}),
}


def measure(axis: str, name: str, *, quick: bool = False) -> dict[str, Any]:
    """Milliseconds a draw of all chains, by size: ``axis`` is "chains", "dimensions" or "images"."""
    sizes = {"chains": CHAINS, "dimensions": DIMENSIONS, "images": IMAGES}[axis]
    found = {}
    for size in sizes[:3] if quick else sizes:
        target, chains = _setting(axis, size)
        found[str(size)] = 1e3 * _cost(name, target, chains, independent=axis == "images")
    return {"axis": axis, "name": name, "milliseconds": found}


def _setting(axis: str, size: int) -> tuple[Target, int]:
    if axis == "chains":
        return load("tilted_prior_2d"), size
    return (load(f"gaussian_{size}d"), 1_024) if axis == "dimensions" else (posterior(size), 16)


def _cost(name: str, target: Target, chains: int, *, independent: bool) -> float:
    function, options = CONTENDERS[name]
    module, attribute = function.split(".")
    start = target.start(chains, np.random.default_rng(0))
    more = {"independent": independent} if module == "ours" else {}
    cost = getattr(importlib.import_module(f"benchmarks.{module}"), attribute)
    return float(cost(target, start, step_size=STEP_SIZE, steps=STEPS, draws=DRAWS, **options, **more))
