"""How long a call may take: a limit of time that is looked at wherever work goes on, between steps and within them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from pyro_ebm.errors import InferenceError

__all__ = [
    "STOPS",
    "Limit",
    "OutOfTime",
    "check_seconds",
    "check_time",
    "finishing",
    "interruptions_pass",
    "limited",
    "out_of_time",
    "stopped_by",
    "time_left",
    "time_limit",
]


class OutOfTime(BaseException):  # noqa: N818  (no error: like Ctrl-C, it ends the work and passes those who expect errors)
    """The time allowed is spent: whoever holds draws keeps them, and :func:`limited` tells the user of the rest."""

    word = "max_seconds"


STOPS = (KeyboardInterrupt, OutOfTime)  # what ends the work early; what was done is kept


@dataclass
class Limit:
    """When the work has to end, in seconds of ``time.perf_counter()``, and when the work around it has to."""

    at: float
    outer: float

    def lift(self) -> None:
        """From now on only the limit around this one counts."""
        self.at = self.outer


_current: ContextVar[Limit] = ContextVar("limit of time", default=Limit(math.inf, math.inf))  # noqa: B039  (never changed)


def check_time() -> None:
    """Look at the clock; called for each run of a model and each gradient.

    Raises:
        OutOfTime: where the time allowed is spent.
    """
    if time.perf_counter() > _current.get().at:
        raise OutOfTime


def time_left() -> float:
    """Seconds that are left; infinite without a limit, never negative."""
    return max(_current.get().at - time.perf_counter(), 0.0)


def out_of_time() -> bool:
    """Whether the time allowed is spent."""
    return time.perf_counter() > _current.get().at


def check_seconds(max_seconds: float | None) -> None:
    """A limit of time is a positive number, or None.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(max_seconds, int | float) and not isinstance(max_seconds, bool)
    if max_seconds is not None and not (number and max_seconds > 0):
        raise ValueError(f"max_seconds must be positive, got {max_seconds!r}; give seconds, or None for no limit")


@contextmanager
def time_limit(seconds: float | None, *, began: float | None = None) -> Iterator[Limit]:
    """Within this block :func:`check_time` raises once so many seconds are spent, or the limit around it says so.

    Args:
        seconds: so many; ``None``: no limit of its own.
        began: ``time.perf_counter()`` when they began to run; now by default.
    """
    outer = _current.get().at
    began = time.perf_counter() if began is None else began
    with _within(Limit(outer if seconds is None else min(outer, began + seconds), outer)) as limit:
        yield limit


@contextmanager
def finishing() -> Iterator[None]:
    """Within this block no limit counts: for putting together what was done."""
    with _within(Limit(math.inf, math.inf)):
        yield


@contextmanager
def _within(limit: Limit) -> Iterator[Limit]:
    token = _current.set(limit)
    try:
        yield limit
    finally:
        _current.reset(token)


@contextmanager
def limited(max_seconds: float | None, *, began: float | None = None) -> Iterator[Limit]:
    """:func:`time_limit` for a function that a user calls: time that is spent without a result is an error.

    Raises:
        InferenceError: saying so.
        ValueError: ``max_seconds`` that is no positive number.
    """
    check_seconds(max_seconds)
    try:
        with time_limit(max_seconds, began=began) as limit:
            yield limit
    except OutOfTime as stopped:
        if out_of_time():  # that of a caller is spent, too: it knows what was done
            raise
        where = f" {stopped}" if str(stopped) else ""
        raise InferenceError(
            f"max_seconds={max_seconds:g} was spent{where} and there are no draws yet: allow more, or make the model "
            f"cheaper or its starting points better"
        ) from None


def stopped_by(stop: BaseException) -> str:
    """The word for it in notes, ``"max_seconds"`` or ``"interrupted"``: for whoever catches it and keeps what was done.

    Raises:
        KeyboardInterrupt: within :func:`interruptions_pass`.
    """
    if isinstance(stop, OutOfTime):
        return stop.word
    if _passing.get():
        raise stop
    return "interrupted"


_passing: ContextVar[bool] = ContextVar("whether Ctrl-C ends everything", default=False)


@contextmanager
def interruptions_pass() -> Iterator[None]:
    """Within this block Ctrl-C ends everything: what is half done is no part of a larger whole."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)
