"""Modules that are loaded when first needed, whole or not at all."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType

__all__ = ["interruptions_wait", "whole_import"]


def whole_import(name: str) -> ModuleType:
    """Import a module; Ctrl-C waits for its end: one that is loaded in part fails whoever needs it from then on."""
    if name in sys.modules:
        return importlib.import_module(name)
    with interruptions_wait():
        return importlib.import_module(name)


@contextmanager
def interruptions_wait() -> Iterator[None]:
    """Within this block Ctrl-C is kept, and given to its handler afterwards; only the main thread ever sees it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    kept: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: kept.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if kept:
        handler(signal.SIGINT, kept[-1])
