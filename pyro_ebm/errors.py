"""What the library raises and warns with, so that a user can filter by cause."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CheckpointError",
    "ImproperError",
    "InfeasibleError",
    "InferenceError",
    "InferenceWarning",
    "InputError",
    "TrainingWarning",
    "interruption_told",
    "report",
    "warn_user",
]


class InferenceWarning(UserWarning):
    """An inference result that should not be trusted as it is; the text names cause and remedy."""


class InferenceError(RuntimeError):
    """What ``strict=True`` raises where an :class:`InferenceWarning` would be given."""


class ImproperError(InferenceError):
    """A target that seems to have no finite Z: an energy unbounded below, which no sampler can follow."""


class InfeasibleError(ValueError):
    """Means that no tilt of the base has: an answer about the target, not a fault of the call."""


class InputError(ValueError):
    """A model, guide or data that are at fault whatever the method: ``sample(method="auto")`` tries no other one."""


class TrainingWarning(UserWarning):
    """Training stopped before its end; the text says why, and which weights were kept."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another model or another training run."""


@contextmanager
def interruption_told(text: str) -> Iterator[None]:
    """Ctrl-C, whose KeyboardInterrupt says nothing, with a text; one that has a text is left alone."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if str(stopped):
            raise
        raise KeyboardInterrupt(text) from None


def warn_user(message: str, category: type[Warning] = InferenceWarning) -> None:
    """Warn at the line of the user's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def report(problem: str | None, *, strict: bool) -> None:
    """Warn of a result that should not be trusted as it is; nothing where there is no problem.

    Args:
        problem: cause and remedy in words; None or empty where all is well.
        strict: raise instead of warn.

    Raises:
        InferenceError: of a problem, with ``strict``.
    """
    if problem and strict:
        raise InferenceError(problem)
    if problem:
        warn_user(problem)


def _is_ours(module: str) -> bool:
    """Whether it is this package, or what may lie between two of its functions (a decorator, a handler)."""
    return module.split(".")[0] in ("pyro_ebm", "pyro", "torch", "contextlib")
