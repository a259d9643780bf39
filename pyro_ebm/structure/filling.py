"""Sites as samplers need them: entries that a mask hides and nothing depends on, priors without draws."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm.structure.sites import unmasked

__all__ = ["filled", "startable"]


class _Filled(Messenger):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["mask"], msg["fn"] = None, unmasked(msg["fn"])


def filled(model: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """The model with the masks taken off some of its latent sites.

    Where a mask hides entries of a latent site that nothing else depends on (``obs_mask`` draws a value for data that
    are there, and throws it away), any value of theirs is as good as any other: chains drift away in them. With their
    prior they follow it, and all other sites keep their posterior.

    Args:
        model: any model.
        names: of the sites; the model itself where there are none.
    """
    found: Callable[..., Any] = _Filled(names)(model) if names else model
    return found


class _Startable(ImproperUniform):
    """A flat prior with values to start from: between -2 and 2 in unconstrained space."""

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008  (immutable)
        transform = biject_to(self.support)
        value: Tensor = transform(4 * torch.rand(transform.inverse_shape(self.shape(sample_shape))) - 2)
        return value


class _Starts(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is ImproperUniform:
            msg["fn"] = _Startable(fn.support, fn.batch_shape, fn.event_shape)


def startable(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with values to start from at its flat priors, for kernels of Pyro's that draw all sites once."""
    found: Callable[..., Any] = _Starts()(model)
    return found
