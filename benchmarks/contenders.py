"""Who takes part, with how many chains and draws, and on how many threads."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One sampler and how its users would run it.

    Args:
        title: in the tables.
        function: ``"module.function"`` in this folder: (target, start, *, warmup, draws, seed, **options) -> Run.
        chains, warmup, draws: of each run; draws per chain.
        options: further arguments.
        needs: package it comes from.
        threads: of torch; None leaves torch's and XLA's own choice, one per core.
        only: the targets it runs on; all when empty.
    """

    title: str
    function: str
    chains: int
    warmup: int
    draws: int
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = "pyro_ebm"
    threads: int | None = None
    only: tuple[str, ...] = ()

    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None

    def resolve(self) -> Callable[..., Any]:
        module, name = self.function.split(".")
        return getattr(importlib.import_module(f"benchmarks.{module}"), name)


# A single chain's tensors are too small for a second thread, which only costs time.
_PYRO = {"chains": 4, "warmup": 500, "draws": 1_000, "needs": "pyro", "threads": 1}
_MANY = {"chains": 1_024, "warmup": 200, "draws": 500}
_SMALL = ("tilted_prior_2d", "gaussian_10d")

CONTENDERS = {
    "pyro-nuts": Contender("Pyro NUTS", "peers_pyro.pyro_nuts", **_PYRO, options={"jit": False}),
    "pyro-nuts-jit": Contender("Pyro NUTS, jit", "peers_pyro.pyro_nuts", **_PYRO, options={"jit": True}),
    "numpyro-nuts": Contender("NumPyro NUTS, vectorized", "peers_jax.numpyro_nuts", 64, 500, 500, needs="numpyro"),
    "numpyro-nuts-1024": Contender(
        "NumPyro NUTS, vectorized", "peers_jax.numpyro_nuts", 1_024, 300, 200, needs="numpyro", only=_SMALL
    ),
    "blackjax-chees": Contender("blackjax ChEES", "peers_jax.blackjax_chees", **_MANY, needs="blackjax"),
    "torchebm-hmc": Contender("torchebm HMC, hand-tuned", "peers_torchebm.torchebm_hmc", **_MANY, needs="torchebm"),
    "ours-chees-eager": Contender("ours: ChEES, eager", "ours.ours_chains", **_MANY, options={"graph": "eager"}),
    "ours-chees": Contender("ours: ChEES, captured", "ours.ours_chains", **_MANY, options={"graph": "captured"}),
    "ours-chees-compiled": Contender(
        "ours: ChEES, compiled", "ours.ours_chains", **_MANY, options={"graph": "compiled"}
    ),
    "ours-hmc": Contender(
        "ours: HMC, captured", "ours.ours_chains", **_MANY, options={"graph": "captured", "kernel": "HMC"}
    ),
    "ours-smc": Contender("ours: SMC", "ours.ours_smc", 16, 0, 1_024, needs="pyro_ebm.inference.annealing.smc"),
    "ours-snis": Contender("ours: importance sampling", "ours.ours_snis", **_MANY),
}

# One chain of the hundred posteriors is a hundred times larger; Pyro's run on them is in the table of images.
_HUNDRED = {"chains": 64, "draws": 250}
_NOT_ON_HUNDRED = ("pyro-nuts", "pyro-nuts-jit", "ours-smc", "ours-snis")


def settings(name: str, target: str, *, quick: bool = False) -> dict[str, int] | None:
    """Chains, warm-up and draws of one contender on one target; None where it does not run."""
    contender = CONTENDERS[name]
    if contender.only and target not in contender.only or target == "posterior_100" and name in _NOT_ON_HUNDRED:
        return None
    chosen = {"chains": contender.chains, "warmup": contender.warmup, "draws": contender.draws}
    if target == "posterior_100":
        chosen |= _HUNDRED
    return {**chosen, "draws": max(chosen["draws"] // 5, 50), "warmup": chosen["warmup"] // 4} if quick else chosen
