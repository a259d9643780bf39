"""Who hears of the log Z of a model while it is estimated, and who changes it.

Training watches these estimates, wherever in a user's model they are made: in a tilted model, in a
``TiltedDistribution`` that the model builds at each call, in several of them. No object that could be handed along
reaches all of these, so two context variables do, each for the time of a ``with`` block, in its own thread only:

* ``weights_reported_to(listener)``: ``fit`` lets its ``WeightGuard`` see the log weights of each estimate of a step;
  nothing changes.
* ``log_z_through(control)``: ``RunningControl`` puts its function between each log Z and the loss, and changes the
  gradient of log Z by it.

Both act in ``reported_log_mean_exp`` and nowhere else: what is summed exactly, and estimates for their own sake
(``log_normalizer``), do not pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from pyro_ebm.estimates import log_mean_exp

__all__ = ["log_z_through", "reported_log_mean_exp", "weights_reported_to"]

_listener: ContextVar[Callable[[Tensor], None] | None] = ContextVar("listener to the weights of log Z", default=None)
_control: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("what log Z goes through", default=None)


def reported_log_mean_exp(log_weights: Tensor) -> Tensor:
    """``log mean exp`` of the log weights (draws, *batch) of a log Z, told to whoever listens to these."""
    if (listener := _listener.get()) is not None:
        listener(log_weights.detach())
    value, control = log_mean_exp(log_weights), _control.get()
    return value if control is None else control(value)


def weights_reported_to(listener: Callable[[Tensor], None]) -> AbstractContextManager[None]:
    """Within this block ``listener`` gets the log weights (draws, *batch) of each log Z that is sampled for a model."""
    return _during(_listener, listener)


def log_z_through(control: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Within this block each log Z that is sampled for a model, (*batch), is what ``control`` makes of it."""
    return _during(_control, control)


@contextmanager
def _during(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
