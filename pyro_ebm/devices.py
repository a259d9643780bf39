"""Where torch computes, and on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["checked_device", "one_thread", "synchronize"]


def checked_device(name: str | torch.device) -> torch.device:
    """The device of this name, after a look whether a tensor can be made on it.

    Raises:
        ValueError: a name that torch does not know, or a device that this machine lacks.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device={str(name)!r} is not available here ({reason}); try {_available()}") from error
    return device


def _available() -> str:
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return " or ".join(repr(name) for name in names)


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a device: before a clock is read, or the time is that of asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: on tensors of a few numbers a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
