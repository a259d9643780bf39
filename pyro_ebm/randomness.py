"""Randomness that belongs to the call: forked generators, seeds, streams, and fingerprints of values as seeds."""

from __future__ import annotations

import hashlib
import operator
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from pyro_ebm.checks import is_whole_number
from pyro_ebm.entry import alone

__all__ = ["fingerprint", "forked_rng", "numpy_seed", "one_source", "random_seed", "random_stream", "streams"]

_PIECE = 2**16  # bytes


def fingerprint(tensors: Iterable[torch.Tensor], *salt: object) -> int:
    """A 63-bit number that is the same for the same bits and, in practice, differs otherwise.

    A function of shapes, dtypes and values alone: the same in any process, on any device, with any number of threads.
    All bytes are read each time. Version counters would spare frozen weights that, but do not see writes through
    ``.data`` or a shared array, and a stale number is a tilt trained on the draws of other weights.
    """
    digest = hashlib.blake2b(repr(salt).encode(), digest_size=8)
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        for part in _parts(tensor):
            digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1


def _parts(tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a small tensor; checksums, several times faster, of the pieces of a large one."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # expanded: even a single element may have a stride that no view of its bytes can have
        flat = flat.clone(memory_format=torch.contiguous_format)
    data: memoryview = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    if len(data) <= _PIECE:
        yield data
        return
    # A change confined to one number is always seen, any other missed once in four thousand million times.
    for start in range(0, len(data), _PIECE):
        yield zlib.crc32(data[start : start + _PIECE]).to_bytes(4, "little")


@contextmanager
def forked_rng(seed: int | None) -> Iterator[None]:
    """Draw from a stream of its own: the global torch generators are afterwards as they were before.

    ``seed=None`` continues from the global state of the moment (and still restores it).
    """
    seed = None if seed is None else _checked(seed)
    on_gpu = torch.cuda.is_initialized()
    # The generators are those of all threads: another one would draw from this stream, and lose its own.
    with alone(), torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        if seed is not None:
            # Not torch.manual_seed: before CUDA is initialized it leaves a seed there that outlives the fork.
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed_all(seed)
        yield


def random_stream(seed: int | None) -> AbstractContextManager[None]:
    """``None``: the global generator, which advances; a number: a stream of its own that starts there."""
    return nullcontext() if seed is None else forked_rng(seed)


def _checked(seed: int) -> int:
    if not is_whole_number(seed, at_least=-(2**63)):
        raise ValueError(f"seed must be a whole number or None, got {seed!r}")
    return operator.index(seed)


def one_source(seed: int | None, generator: torch.Generator | None) -> None:
    """Refuse a seed and a generator at once, and a seed that is none."""
    if seed is not None:
        _checked(seed)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator both given: one source of randomness, please")


def numpy_seed(seed: int) -> int:
    """A seed as numpy and scikit-learn take it: none below zero or beyond 32 bits; those between stay as they are."""
    return seed % 2**32


def random_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed; or one drawn from the generator, or from torch's global one."""
    if seed is not None:
        return _checked(seed)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def streams(seed: int, generator: torch.Generator | None, device: torch.device) -> tuple[int, torch.Generator]:
    """A seed for the draws of the base, and a generator for everything after: streams that share no numbers."""
    if generator is None or generator.device != device:
        generator = torch.Generator(device).manual_seed(fingerprint((), "moves", seed))
    return fingerprint((), "base", seed), generator
