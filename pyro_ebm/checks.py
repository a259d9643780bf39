"""Checks of arguments that many functions share."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "file_path",
    "finite_numbers",
    "is_number",
    "is_whole_number",
    "number",
    "real_numbers",
    "require_attributes",
    "whole_number",
]

_MOST = 2**53
_BOOLEANS = ("bool", "bool_", "torch.bool")


def whole_number(name: str, value: Any, *, at_least: int = 1) -> int:
    """The value as a Python int, or a ValueError that names the argument, the limit, what came and what to give.

    Whole numbers are Python's, numpy's and those of 0-d integer tensors. Floats are none, ``3.0`` included (a count
    that was computed as a float is a rounding error away from another count), and neither are booleans.

    Args:
        name: of the argument.
        value: what was given for it.
        at_least: the smallest that will do.

    Example:
        >>> whole_number("num_samples", 3)
        3
    """
    if not is_whole_number(value, at_least=at_least):
        fix = "" if _as_int(value) is not None else f"; give {name}={_meant(value, at_least)}"
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}{fix}")
    if operator.index(value) > _MOST:
        raise ValueError(f"{name} must be a whole number that a machine can count to, got {value!r}")
    return operator.index(value)


def is_whole_number(value: Any, *, at_least: int = 1) -> bool:
    """Whether it is a whole number, in the sense of :func:`whole_number`, and large enough."""
    number = _as_int(value)
    return number is not None and number >= at_least


def number(
    name: str, value: Any, *, at_least: float = -math.inf, at_most: float = math.inf, within: bool = False
) -> float:
    """The value as a Python float, or an error that names the argument, its limits and what came.

    Numbers are Python's, numpy's and those of 0-d tensors; neither booleans nor complex ones, and never NaN.

    Args:
        name: of the argument.
        value: what was given for it.
        at_least: the smallest that will do.
        at_most: the largest.
        within: the limits themselves will not do.

    Example:
        >>> number("fraction", 0.5, at_least=0, at_most=1)
        0.5
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    found = float(value)
    if not (at_least < found < at_most if within else at_least <= found <= at_most):
        limits = f"between {at_least:g} and {at_most:g}{', both excluded' if within else ''}"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    return found


def is_number(value: Any) -> bool:
    """Whether it is one real number, in the sense of :func:`number`; NaN is one that lies between no limits."""
    if str(getattr(value, "dtype", type(value).__name__)) in _BOOLEANS:
        return False
    scalar = getattr(value, "ndim", 1) == 0 and hasattr(value, "item")
    return isinstance(value.item() if scalar else value, Real)


def require_attributes(name: str, value: Any, attributes: Iterable[str], words: str) -> None:
    """A TypeError unless a value has the attributes of what it must be."""
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name} must be {words}, got {type(value).__name__}")


def file_path(name: str, value: Any) -> Path:
    """The path of a file or folder, or an error that names the argument.

    Raises:
        TypeError: neither text nor a path.
        ValueError: no text, or a character that no path can have.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path (text or pathlib.Path), got {type(value).__name__}")
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be the path of a file or folder, got {text!r}")
    return Path(text)


def real_numbers(name: str, values: Tensor) -> Tensor:
    """The values, or a TypeError that names them where they are complex: a cast would drop the imaginary part.

    Args:
        name: of the argument.
        values: any tensor.
    """
    if values.is_complex():
        raise TypeError(
            f"{name} must be real numbers, got {values.dtype} of shape {tuple(values.shape)}; give the real and the "
            f"imaginary part as two numbers each (torch.view_as_real), or the absolute value"
        )
    return values


def finite_numbers(name: str, values: Tensor) -> Tensor:
    """The values, or an error that names them where they are complex, NaN or infinite.

    Raises:
        TypeError: complex numbers.
        ValueError: NaN or infinity, with how many and where the first is.
    """
    bad = ~real_numbers(name, values).detach().isfinite()
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        where = f", the first at {first if len(first) > 1 else first[0]}" if first else ""
        raise ValueError(f"{name} must be finite, got NaN or infinity for {int(bad.sum())} of {bad.numel()}{where}")
    return values


def _as_int(value: Any) -> int | None:
    if str(getattr(value, "dtype", type(value).__name__)) in _BOOLEANS:
        return None  # True is 1 to Python; to whoever wrote it, it is an answer to another question
    try:
        return operator.index(value)
    except TypeError:
        return None


def _meant(value: Any, at_least: int) -> int:
    """The whole number that somebody probably had in mind."""
    try:
        return max(round(float(value)), at_least)
    except (TypeError, ValueError, OverflowError):
        return at_least
