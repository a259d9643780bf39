"""With which draws log Z is estimated: new ones at each step of a training, elsewhere the same for the same tilt.

A training says so itself (:func:`log_z_stream`): no weights need be seen to know that they have moved. Elsewhere
the seed of the draws is a function of the tilt. Weights tell what an energy is where all of them are visible; what a
plain function, a callable object or a user's own module depends on may lie in a closure, a list or a global name, so
that there the energies of a few draws of the base, always the same draws, tell it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import fingerprint, forked_rng

__all__ = ["current_stream", "enough", "hides_nothing", "log_z_seed", "log_z_stream", "seen_at_draws"]

NUM_PROBES = 32
_OUR_OWN = ("pyro_ebm", "torch")

_stream: ContextVar[tuple[object, ...]] = ContextVar("which draws estimates of log Z take", default=())
_fewest: ContextVar[int] = ContextVar("how many draws estimates of log Z take at least", default=0)


@contextmanager
def log_z_stream(*salt: object, at_least: int = 0) -> Iterator[None]:
    """Within this block, in this thread, estimates of log Z take the draws that the salt selects, whatever the tilt.

    Args:
        *salt: plain values, others for each step; those of a site are the same throughout the block.
        at_least: how many draws, where the model asks for fewer: a choice between weights that is made on the same few
            draws every time follows these and not the weights.
    """
    tokens = _stream.set(salt), _fewest.set(at_least)
    try:
        yield
    finally:
        _stream.reset(tokens[0])
        _fewest.reset(tokens[1])


def current_stream() -> tuple[object, ...]:
    """The salt of the block around; empty where there is none."""
    return _stream.get()


def enough(num_samples: int) -> int:
    """So many draws, or as many more as the block around wants."""
    return max(num_samples, _fewest.get())


def log_z_seed(tilt: Callable[[], list[Tensor]], *salt: object) -> int:
    """The seed of the draws of one estimate of log Z.

    Args:
        tilt: what the tilt is, in tensors; asked for where no stream was chosen.
        *salt: what else tells this estimate from others: its settings, its site.
    """
    stream = current_stream()
    return fingerprint((), "stream", *stream, *salt) if stream else fingerprint(tilt(), *salt)


def hides_nothing(*modules: nn.Module) -> bool:
    """Whether parameters and buffers are all that modules depend on: they are torch's and our own throughout."""
    for module in (inner for outer in modules for inner in outer.modules()):
        if type(module).__module__.partition(".")[0] not in _OUR_OWN:
            return False
        if isinstance(module, FunctionEnergy) and not isinstance(module.function, nn.Module):
            return False
    return True


def seen_at_draws(energies: list[nn.Module], log_weights: Callable[[int], Tensor]) -> list[Tensor]:
    """What a few draws tell of energies that may depend on more than their own weights; nothing under ``torch.vmap``.

    Args:
        energies: modules that come into play.
        log_weights: ``-E`` at so many draws of torch's global generator.
    """
    with torch.no_grad(), forked_rng(0), evaluation_mode(*energies):
        found = log_weights(NUM_PROBES)
    return [] if is_batchedtensor(found) else [found]
