"""Supports that torch describes and has no transform for.

Pyro adds to torch's registry in the same way whenever it is imported; nothing that torch itself knows changes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

__all__ = ["of_mixture"]


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
