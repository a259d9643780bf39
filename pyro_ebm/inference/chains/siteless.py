"""Chains of a potential or a model without values to draw: nothing moves, but the run is one, as in Pyro."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.structure import latent_sites, prototype_trace

__all__ = ["run_without_sites", "without_sites"]


def without_sites(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """The potential of a model that has nothing to draw (all is observed, or collapsed); None of any other."""
    if not callable(model) or isinstance(model, LogDensity | Distribution):
        return None
    trace = prototype_trace(model, args, kwargs)
    return None if latent_sites(trace) else lambda values: -trace.log_prob_sum()


def run_without_sites(
    potential: Callable[[Mapping[str, Tensor]], Any],
    told: Callable[[str, int], None],
    *,
    method: str,
    num_chains: int,
    num_samples: int,
    warmup_steps: int,
) -> Draws:
    """Draws without sites, whose log density is the same number throughout.

    Args:
        potential: minus a log density, of no values.
        told: called with the stage and its number after each step.
        method: name of the kernel.
        num_chains: chains.
        num_samples: draws per chain.
        warmup_steps: steps before.
    """
    log_prob = -torch.as_tensor(potential({})).detach().to(torch.get_default_dtype()).reshape(())
    for stage, steps in (("Warmup", warmup_steps), ("Sample", num_samples)):
        for index in range(steps):
            told(stage, index)
    notes = {"num_samples": num_samples, "warmup_steps": warmup_steps, "interrupted": False}
    return Draws({}, method, {"lp": log_prob.expand(num_chains, num_samples)}, notes=notes)
