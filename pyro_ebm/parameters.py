"""The parameters behind a callable: which modules own them, who wants to learn them, are they the same."""

from __future__ import annotations

import functools
import hashlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn

__all__ = [
    "evaluation_mode",
    "fingerprint",
    "forked_rng",
    "frozen",
    "modules_of",
    "one_thread",
    "random_stream",
    "register_for_svi",
]

_instance_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def modules_of(*callables: Any) -> list[nn.Module]:
    """The outermost modules behind models and guides, each once.

    Looks through bound methods (``vae.model``), ``functools.partial`` (its arguments too) and decorated
    functions. What a plain function reaches by a closure or a global name cannot be seen.
    """
    found: list[nn.Module] = []
    for item in callables:
        if isinstance(item, nn.Module):
            candidates = [item]
        elif isinstance(item, functools.partial):  # also what most Pyro handlers used as decorators return
            candidates = modules_of(item.func, *item.args, *item.keywords.values())
        elif isinstance(getattr(item, "__self__", None), nn.Module):
            candidates = [item.__self__]
        elif hasattr(item, "fn"):  # what poutine.trace(model) returns
            candidates = modules_of(item.fn)
        elif hasattr(item, "__wrapped__"):
            candidates = modules_of(item.__wrapped__)
        else:
            candidates = []
        found += [module for module in candidates if not any(module is seen for seen in found)]
    return found


def register_for_svi(module: nn.Module, prefix: str) -> None:
    """Tell ``pyro.infer.SVI`` about a module's parameters, under a name no other instance has.

    Does nothing unless something is collecting parameters just now, so that sampling, ``fit`` and
    plain calls leave Pyro's global parameter store alone. Frozen parameters stay out of it.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
        number = _instance_numbers.setdefault(module, next(_counter))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*because requires_grad=False")
            pyro.module(f"{prefix}_{number}", module)


def fingerprint(tensors: Iterable[torch.Tensor], *salt: object) -> int:
    """A 63-bit number that is the same for the same values and, in practice, differs otherwise."""
    digest = hashlib.blake2b(repr(salt).encode(), digest_size=8)
    summaries = [part for tensor in tensors if tensor.numel() for part in _summary(tensor.detach())]
    if summaries:
        digest.update(torch.stack([part.cpu().double() for part in summaries]).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _summary(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.flatten() if tensor.device.type == "mps" else tensor.flatten().double()
    # The second sum depends on the order of the values too: data in another order are other data.
    places = torch.arange(1, flat.numel() + 1, dtype=flat.dtype, device=flat.device).sqrt()
    return flat.norm(), flat @ places


@contextmanager
def forked_rng(seed: int | None) -> Iterator[None]:
    """Draw from a stream of its own: the global torch generators are afterwards as they were before.

    ``seed=None`` continues from the global state of the moment (and still restores it).
    """
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        if seed is not None:
            # Not torch.manual_seed: before CUDA is initialised it leaves a seed there that outlives the fork.
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed_all(seed)
        yield


def random_stream(seed: int | None) -> AbstractContextManager[None]:
    """``None``: the global generator, which advances; a number: a stream of its own that starts there."""
    return nullcontext() if seed is None else forked_rng(seed)


@contextmanager
def evaluation_mode(*callables: Callable[..., Any]) -> Iterator[None]:
    """Put the modules behind the callables into ``eval`` mode, and each back into its own mode after."""
    submodules = [sub for module in modules_of(*callables) for sub in module.modules()]
    modes = [(sub, sub.training) for sub in submodules]
    try:
        for sub in submodules:
            sub.training = False
        yield
    finally:
        for sub, mode in modes:
            sub.training = mode


@contextmanager
def frozen(*callables: Callable[..., Any]) -> Iterator[None]:
    """``evaluation_mode``, and no parameter behind the callables asks for gradients (each restored after)."""
    parameters = [p for module in modules_of(*callables) for p in module.parameters() if p.requires_grad]
    with evaluation_mode(*callables):
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: on tensors of a few numbers a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
