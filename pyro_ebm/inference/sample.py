"""One front door to the samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.hmc import hmc, nuts
from pyro_ebm.inference.importance import importance

__all__ = ["METHODS", "sample"]

METHODS = ("snis", "nuts", "hmc")


def sample(
    model: Callable[..., Any],
    *args: Any,
    method: str,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    num_chains: int = 4,
    seed: int | None = None,
    **options: Any,
) -> Draws:
    """Sample a model's latent sites by the named method.

    Args:
        model: a Pyro model, tilted or not.
        *args: its arguments.
        method: ``"snis"`` (:func:`importance`), ``"nuts"`` or ``"hmc"`` (Pyro's kernels).
        guide: proposal for importance sampling, and for the starting points of chains.
        num_samples: draws per chain; ``"snis"`` makes ``num_samples * num_chains`` weighted ones.
        num_chains: chains.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        **options: further arguments of the method's own function, which rejects unknown ones.

    Returns:
        Draws; the same type whatever the method.

    Raises:
        ValueError: unknown method.
        TypeError: an option that the method does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "snis":
        model_kwargs = options.pop("model_kwargs", None) or {}
        unknown = sorted(set(options) - {"strict"})  # importance() would pass them on to the model
        if unknown:
            raise TypeError(f'method="snis" takes the options strict and model_kwargs, got {unknown}')
        return importance(
            model, guide, *args, num_samples=num_samples * num_chains, seed=seed, **options, **model_kwargs
        )
    sampler = nuts if method == "nuts" else hmc
    return sampler(
        model, *args, guide=guide, num_samples=num_samples, num_chains=num_chains, seed=seed, **options
    )
