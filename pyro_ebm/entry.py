"""What every function does first that runs a model for a user: one thread at a time, out of sight of outer traces."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch.utils import _pytree as pytree

from pyro_ebm.errors import InputError
from pyro_ebm.faults import told_of_data

__all__ = ["alone", "entry"]

_CHANGING = (ConditionMessenger, DoMessenger, LiftMessenger, MaskMessenger, ReparamMessenger, ScaleMessenger)
P = ParamSpec("P")
R = TypeVar("R")


class _Door:
    """A lock that a thread may take again, and that a forked process finds open."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0
        if hasattr(os, "register_at_fork"):  # Windows does not fork
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_door = _Door()


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time: Pyro's handlers, its validation and torch's generators belong to the whole process."""
    with _door.lock:
        _door.depth += 1
        try:
            yield
        finally:
            _door.depth -= 1


@contextmanager
def _stack_of_its_own(of_model: bool, name: str) -> Iterator[None]:
    """Pyro's handlers around the call set aside: a trace sees no site of the runs within.

    Those of the library's own, around a call of a user's within one of its own, stay; only traces see nothing.
    """
    before = list(_PYRO_STACK)
    changing = sorted({type(handler).__name__ for handler in before if isinstance(handler, _CHANGING)})
    if _door.depth == 1 and of_model and changing:
        raise InputError(
            f"{name}() is called within {', '.join(changing)} of Pyro's, which would change its model in some of its "
            f"runs and not in others: put the handler around the model, {name}(pyro.condition(model, data=...), ...)"
        )
    _PYRO_STACK[:] = [] if _door.depth == 1 else [each for each in before if not isinstance(each, TraceMessenger)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = before


@contextmanager
def _grad_mode(gradients: bool) -> Iterator[None]:
    """Whatever the caller's mode: gradients where they are needed, and no inference mode, which forbids them."""
    with ExitStack() as stack:
        enabled = gradients or torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield


def entry(*, gradients: bool = False, of_model: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function that a user calls and that runs a model.

    Calls from several threads wait for each other. A trace of the user's around the call records nothing of it, and
    handlers that change models are refused there.
    ``torch.no_grad`` and ``torch.inference_mode`` around it do no harm; tensors made in inference mode are copied.

    Args:
        gradients: whether it needs them itself, whatever the caller's mode.
        of_model: whether handlers around the call that change models are refused, and not only set aside.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with alone(), _stack_of_its_own(of_model, function.__name__), _grad_mode(gradients):
                given: Any = (args, kwargs)
                if any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(given)):
                    given = pytree.tree_map_only(torch.Tensor, _normal, given)
                try:
                    return function(*given[0], **given[1])
                except (RuntimeError, ValueError) as error:
                    told = told_of_data(error, given)
                    if told is not None:
                        raise InputError(f"{function.__qualname__}: {told}") from error
                    if "nference tensor" not in str(error) or isinstance(error, InputError):
                        raise
                    raise InputError(
                        "the model uses tensors that were made under torch.inference_mode(), which take part in no "
                        "gradient: make data and weights outside of it, or clone() them there"
                    ) from error

        call.entry = True  # type: ignore[attr-defined]
        return call

    return decorate


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
