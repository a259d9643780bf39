"""From supports to unconstrained space: mixtures, angles, and what has no transform or no density, refused by name.

Pyro adds to torch's registry in the same way whenever it is imported; nothing that torch itself knows changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta, ImproperUniform, SineBivariateVonMises, SineSkewed, VonMises
from pyro.distributions.constraints import sphere
from torch import Tensor
from torch.distributions import MixtureSameFamily, Transform, TransformedDistribution, biject_to, constraints
from torch.distributions.transforms import IndependentTransform

from pyro_ebm.errors import InputError

__all__ = ["NoPriorDrawsError", "Wrapped", "check_drawable", "is_periodic", "leaf_of", "of_mixture", "transform_of"]

_REMEDIES = (
    (constraints.positive_definite, "a covariance as scales times an LKJCholesky factor, dist.LKJCholesky"),
    (sphere, "a direction as normal numbers divided by their norm, dist.Normal(...).to_event(1)"),
    (constraints.MixtureSameFamilyConstraint, "with components that share one support"),
)


class NoPriorDrawsError(ValueError, NotImplementedError):
    """A prior that cannot be drawn from."""


class Wrapped(Transform):
    """A line around the circle: any number to the angle between -pi and pi that it stands for.

    A density of angles repeats itself on the line, so that its integral there is infinite; what moves on the line by
    that density and is read through this transform follows the density of the angle.
    """

    domain = constraints.real
    codomain = constraints.interval(-math.pi, math.pi)
    bijective = True  # from one turn
    sign = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wrapped)

    def _call(self, x: Tensor) -> Tensor:
        return torch.remainder(x + math.pi, 2 * math.pi) - math.pi

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def leaf_of(fn: Any) -> Any:
    """The distribution below ``to_event``, ``expand`` and ``mask``."""
    while (inner := vars(fn).get("base_dist")) is not None and not isinstance(fn, TransformedDistribution):
        fn = inner
    return fn


def is_periodic(fn: Any) -> bool:
    """Whether a distribution is one of angles, whose density repeats itself after each turn."""
    leaf = leaf_of(fn)
    if isinstance(leaf, MixtureSameFamily):
        return is_periodic(leaf.component_distribution)
    return isinstance(leaf, VonMises | SineBivariateVonMises | SineSkewed)


def transform_of(name: str, fn: Any) -> Transform:
    """The transform from unconstrained space to the values of a site, with its event dims.

    Args:
        name: of the site.
        fn: its distribution.

    Raises:
        InputError: naming the site, where there is none, or no density.
    """
    leaf, kind = leaf_of(fn), type(leaf_of(fn)).__name__
    if isinstance(leaf, Delta):
        raise InputError(
            f"site {name!r} is a point (Delta) and has no density to sample: write pyro.deterministic({name!r}, value)"
        )
    # Subclasses that write their own, as HalfCauchy, know their density.
    if isinstance(leaf, TransformedDistribution) and type(leaf).log_prob is TransformedDistribution.log_prob:
        if not all(transform.bijective for transform in leaf.transforms):
            raise InputError(
                f"site {name!r} is a transform of a distribution that is not one to one, so that its density is not "
                f"known; sample the distribution and transform its draws in the model, or take another (HalfNormal, "
                f"FoldedDistribution, Dirichlet)"
            )
        if is_periodic(leaf.base_dist):
            raise InputError(
                f"site {name!r} is a transform of an angle ({type(leaf_of(leaf.base_dist)).__name__}), whose density "
                f"repeats itself; sample the angle and transform it in the model"
            )
    if is_periodic(fn):
        event_dim = len(fn.event_shape)
        return IndependentTransform(Wrapped(), event_dim) if event_dim else Wrapped()
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        inner = fn.support
        while isinstance(inner, constraints.independent):
            inner = inner.base_constraint
        kinds = [(type(known) if not isinstance(known, type) else known, how) for known, how in _REMEDIES]
        how = next((how for known, how in kinds if isinstance(inner, known)), "on a support that biject_to knows")
        raise InputError(
            f"site {name!r} ({kind}) has a support that no transform to unconstrained space is known for, "
            f"{fn.support}; sample it in another form ({how})"
        ) from error


def check_drawable(sites: Mapping[str, Mapping[str, Any]], what: str, remedy: str) -> None:
    """Priors must have draws, where what is asked for begins with them.

    Args:
        sites: the latent ones of a trace.
        what: is asked for.
        remedy: in words.

    Raises:
        NoPriorDrawsError: naming the sites.
    """
    flat = [name for name, site in sites.items() if isinstance(leaf_of(site["fn"]), ImproperUniform)]
    if flat:
        raise NoPriorDrawsError(
            f"the latent site(s) {flat} have a flat prior (ImproperUniform), which has no draws for {what} to begin "
            f"with: {remedy}"
        )


@biject_to.register(constraints.MixtureSameFamilyConstraint)
def of_mixture(support: Any) -> Transform:
    """The transform to the support of a mixture whose components all have the same.

    Raises:
        NotImplementedError: components with bounds of their own.
    """
    inner = support.base_constraint
    if _has_bounds_of_its_own(inner):
        raise NotImplementedError("the components of the mixture have supports of their own")
    return biject_to(inner)


def _has_bounds_of_its_own(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return any(isinstance(value, Tensor) and value.numel() > 1 for value in vars(support).values())
