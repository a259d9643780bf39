"""A tilted model behind a callable: its base model, and the same tilt without log Z."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

from pyro.poutine.messenger import _bound_partial, _context_wrap

__all__ = ["Tilted", "TiltedCall", "tilt_of", "tilted_call", "unnormalized", "untilted"]

Model = Callable[..., Any]


class Tilted(Protocol):
    """What a tilted model has: :class:`TiltedModel`, whose module stands below this one."""

    base_model: Model
    normalize: Any

    @property
    def energies(self) -> Mapping[str, Any]:
        """Site name -> energy."""

    def unnormalized(self) -> Model:
        """The same tilt without log Z."""

    def structure(self, *args: Any, **kwargs: Any) -> Any:
        """Dependencies between the sites of the base model."""

    def log_normalizer(self, *args: Any, num_samples: int = ..., seed: int | None = ..., **kwargs: Any) -> Any:
        """Log Z for these arguments of the model."""


class TiltedCall(NamedTuple):
    """A tilted model and the arguments that it gets."""

    tilted: Tilted
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _is_tilted(value: Any) -> TypeGuard[Tilted]:
    """Not by ``isinstance``: Python 3.12 does not see attributes that are modules' submodules."""
    return callable(getattr(type(value), "unnormalized", None)) and hasattr(value, "base_model")


def untilted(model: Model) -> Model:
    """The model without its tilt; a model that has none is returned as it is.

    Looks through ``functools.partial``, ``forward`` as a bound method, Pyro's handlers (``condition``, ``scale``, ...)
    and wrappers with an attribute ``fn``, and puts the same around the base model.
    """
    return _replaced(model, lambda tilted: tilted.base_model)


def unnormalized(model: Model) -> Model:
    """The model with its tilt but without log Z, as :func:`untilted` looks for it: for densities up to a constant."""
    return _replaced(model, lambda tilted: tilted.unnormalized())


def tilted_call(model: Model, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> TiltedCall | None:
    """The tilted model that a call ends in, as :func:`untilted` looks for it; None where there is none."""
    bound = dict(kwargs or {})
    while not _is_tilted(model):
        wrapper = _wrapper(model)
        if wrapper is None:
            return None
        model, args, bound = wrapper.inside, (*wrapper.args, *args), {**wrapper.kwargs, **bound}
    return TiltedCall(model, args, bound)


def tilt_of(model: Model) -> Tilted | None:
    """The tilted model behind a callable, as :func:`untilted` looks for it; None where there is none."""
    call = tilted_call(model)
    return call.tilted if call else None


def _replaced(model: Model, change: Callable[[Tilted], Model]) -> Model:
    """The model with ``change`` made to the tilted model in it."""
    if _is_tilted(model):
        return change(model)
    wrapper = _wrapper(model)
    if wrapper is None:
        return model
    new = _replaced(wrapper.inside, change)
    return model if new is wrapper.inside else wrapper.around(new)


class _Wrapper(NamedTuple):
    """What lies around a model: how to put the same around another, and the arguments it adds."""

    inside: Model
    around: Callable[[Model], Model]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def _wrapper(model: Model) -> _Wrapper | None:
    if isinstance(model, _bound_partial):  # what a Pyro handler around a model is
        return _Wrapper(model.func, lambda new: new)
    if isinstance(model, functools.partial):
        if model.func is _context_wrap:
            return _Wrapper(model.args[1], model.args[0])
        around = functools.partial(_partial, args=model.args, kwargs=model.keywords)
        return _Wrapper(model.func, around, model.args, model.keywords)
    owner = getattr(model, "__self__", None)
    if _is_tilted(owner) and getattr(model, "__name__", "") in ("forward", "__call__"):
        return _Wrapper(cast(Model, owner), lambda new: new)
    inside = vars(model).get("fn") if hasattr(model, "__dict__") else None
    return _Wrapper(inside, functools.partial(_with_fn, model)) if callable(inside) else None


def _partial(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Model:
    return functools.partial(model, *args, **kwargs)


def _with_fn(model: Any, fn: Model) -> Model:
    other = copy.copy(model)
    other.fn = fn
    return other
