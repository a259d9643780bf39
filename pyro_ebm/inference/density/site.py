"""How one latent site sits in the unconstrained vector of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.errors import InputError
from pyro_ebm.structure import is_periodic, leaf_of, transform_of

__all__ = ["Site", "check_known", "check_support", "describe", "to_site"]


@dataclass(frozen=True)
class Site:
    """How one latent site sits in the unconstrained vector."""

    name: str
    shape: torch.Size  # of its value, without chains
    unconstrained_shape: torch.Size
    event_dim: int
    transform: Transform
    data_axis: int | None  # axis of `shape` that holds the independent plate
    dtype: torch.dtype
    support: Constraint
    periodic: bool = False  # an angle
    flat: bool = False  # without a prior

    @property
    def size(self) -> int:
        copies = 1 if self.data_axis is None else self.shape[self.data_axis]
        return self.unconstrained_shape.numel() // copies


def describe(name: str, site: Mapping[str, Any], data_dim: int | None, transforms: Mapping[str, Transform]) -> Site:
    """The site of a trace; with the transform given for it, or that of its support."""
    fn, value = site["fn"], site["value"]
    transform = transforms[name].inv if name in transforms else transform_of(name, fn)
    axis = None if data_dim is None else value.ndim - len(fn.event_shape) + data_dim
    shape = torch.Size(transform.inverse_shape(value.shape))
    flat = isinstance(leaf_of(fn), ImproperUniform)
    return Site(
        name, value.shape, shape, len(fn.event_shape), transform, axis, value.dtype, fn.support, is_periodic(fn), flat
    )


def check_support(site: Site, fn: Any, value: Tensor) -> None:
    """The support found here must be the one the transform was made for."""
    u = biject_to(site.support).inv(value)
    here = biject_to(fn.support)(u)
    if here.shape != value.shape or not torch.allclose(here, value, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"the support of site {site.name!r} ({type(fn).__name__}) depends on other latent sites, which no fixed "
            f"transform to unconstrained space can follow; sample it on a fixed support and transform it in the "
            f"model, for example b * pyro.sample({site.name!r}, dist.Uniform(0, 1))"
        )


def to_site(part: Tensor, site: Site) -> Tensor:
    """(chains, [n,] size) -> (chains, *unconstrained_shape)."""
    if site.data_axis is None:
        return part.reshape(part.shape[0], *site.unconstrained_shape)
    rest = [s for axis, s in enumerate(site.unconstrained_shape) if axis != site.data_axis]
    return part.reshape(*part.shape[:2], *rest).movedim(1, 1 + site.data_axis)


def check_known(site: Site, unknown: Tensor) -> None:
    """Something must be known of each entry of a site that has no prior: else its posterior has no density.

    Args:
        site: without a prior, wholly or in part.
        unknown: its coordinates, (size,), on which the log density of the model does not depend.

    Raises:
        InputError: naming the site.
    """
    inner = site.support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    bounded = site.periodic or isinstance(inner, constraints.interval | type(constraints.simplex))
    bounded = bounded or isinstance(inner, type(constraints.corr_cholesky))
    if not bounded and bool(unknown.any()):
        raise InputError(
            f"site {site.name!r} has {int(unknown.sum())} of {site.size} entries with a flat prior (improper or "
            f"masked) that no data depend on: the posterior has no density, and chains would drift away; give them a "
            f"proper prior, or leave them out"
        )
