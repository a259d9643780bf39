"""Models as kernels of Pyro's need them, where a site has no prior, a masked one, or is an angle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pyro import poutine
from pyro.distributions import ImproperUniform
from torch.distributions import Transform

from pyro_ebm.inference.density.model_target import ModelTarget
from pyro_ebm.inference.density.site import check_support, describe
from pyro_ebm.structure import (
    DoesNotBroadcast,
    check_posterior,
    filled,
    is_periodic,
    latent_masks,
    latent_sites,
    leaf_of,
    prototype_trace,
    startable,
    transform_of,
)

__all__ = ["prepared"]

_ANOTHER = 1_000_003  # a seed of none of the attempts at the first run


def prepared(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: poutine.Trace
) -> tuple[Callable[..., Any], dict[str, Transform] | None]:
    """The model, and site -> transform to unconstrained space where Pyro's own will not do.

    Args:
        model: of the kernel.
        args: its arguments.
        kwargs: its keyword arguments.
        trace: of one run.

    Raises:
        InputError: a subsampled plate, data that nothing explains, a site that has no density, or one whose support
            moves with the values of others.
    """
    check_posterior(trace)
    sites = {name: site for name, site in latent_sites(trace).items() if not site["fn"].support.is_discrete}
    transforms = {name: transform_of(name, site["fn"]).inv for name, site in sites.items()}
    _check_supports(sites, prototype_trace(model, args, kwargs, seed=_ANOTHER))
    flat = any(isinstance(leaf_of(site["fn"]), ImproperUniform) for site in sites.values())
    if flat or latent_masks(trace):
        with suppress(DoesNotBroadcast):  # then nothing is known of what depends on what
            target = ModelTarget(model, args, kwargs)
            target.choose_way()
            model = filled(model, target.filled)
    angles = any(is_periodic(site["fn"]) for site in sites.values())
    return startable(model) if flat else model, transforms if angles else None


def _check_supports(sites: Mapping[str, Any], other: poutine.Trace) -> None:
    """Pyro's transforms are those of one run: the chains would stay where the supports of that run are."""
    for name, site in latent_sites(other).items():
        if name in sites and site["value"].shape == sites[name]["value"].shape:
            check_support(describe(name, sites[name], None, {}), site["fn"], site["value"])
