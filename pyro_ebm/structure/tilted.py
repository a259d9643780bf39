"""A tilted model behind a callable: its base model, and the same tilt without log Z."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from pyro.poutine.messenger import _bound_partial, _context_wrap

__all__ = ["Tilted", "tilt_of", "unnormalized", "untilted"]


@runtime_checkable
class Tilted(Protocol):
    """What a tilted model has: :class:`TiltedModel`, without its module (which stands below this one)."""

    base_model: Callable[..., Any]

    @property
    def energies(self) -> Mapping[str, Callable[..., Any]]:
        """Site name -> energy."""

    def unnormalized(self) -> Callable[..., Any]:
        """The same tilt without log Z."""


def untilted(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model without its tilt; a model that has none is returned as it is.

    Looks through ``functools.partial``, ``forward`` as a bound method, Pyro's handlers (``condition``, ``scale``, ...)
    and wrappers with an attribute ``fn``, and puts the same around the base model.
    """
    return _replaced(model, lambda tilted: tilted.base_model)


def unnormalized(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its tilt but without log Z, as :func:`untilted` looks for it: for densities up to a constant."""
    return _replaced(model, lambda tilted: tilted.unnormalized())


def tilt_of(model: Callable[..., Any]) -> Tilted | None:
    """The tilted model behind a callable, as :func:`untilted` looks for it; None where there is none."""
    found: list[Tilted] = []

    def keep(tilted: Tilted) -> Callable[..., Any]:
        found.append(tilted)
        return tilted.base_model

    _replaced(model, keep)
    return found[0] if found else None


def _replaced(model: Callable[..., Any], change: Callable[[Tilted], Callable[..., Any]]) -> Callable[..., Any]:
    """The model with ``change`` made to the tilted model in it."""
    if isinstance(model, Tilted):
        return change(model)
    owner = getattr(model, "__self__", None)
    if isinstance(owner, Tilted) and getattr(model, "__name__", "") in ("forward", "__call__"):
        return change(owner)
    if isinstance(model, _bound_partial):  # what a Pyro handler around a model is
        new = _replaced(model.func, change)
        return model if new is model.func else new
    if isinstance(model, functools.partial):
        handled = model.func is _context_wrap  # of a handler and a model
        inner = model.args[1] if handled else model.func
        new = _replaced(inner, change)
        if new is inner:
            return model
        return model.args[0](new) if handled else functools.partial(new, *model.args, **model.keywords)
    inner = vars(model).get("fn") if hasattr(model, "__dict__") else None
    if not callable(inner):
        return model
    new = _replaced(inner, change)
    if new is inner:
        return model
    outer = copy.copy(model)
    outer.fn = new  # type: ignore[attr-defined]
    return outer
