"""How steps are cut from the data, and what happens at each: minibatches added up, a learning rate that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any

import torch

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.training.data import Tensors

__all__ = ["Batches", "EachStep", "make_scheduler", "parts_of_steps"]


@checked
@dataclass(frozen=True)
class Batches:
    """Minibatches of which several make a step: ``fit(..., batch_size=Batches(32, accumulate=4))``.

    A step is then that of a minibatch of ``size * accumulate`` data, with the memory of one of ``size``. Losses that
    couple the data of a minibatch (a log Z of their own draws, batch normalization) see the small ones.

    Args:
        size: data of a minibatch; a DataLoader has its own.
        accumulate: minibatches whose gradients make a step.

    Example:
        >>> Batches(32, accumulate=4)
        Batches(size=32, accumulate=4)
    """

    size: int = 128
    _: KW_ONLY
    accumulate: int = 1

    def __post_init__(self) -> None:
        whole_number("size", self.size)
        whole_number("accumulate", self.accumulate)

    @classmethod
    def of(cls, given: int | Batches) -> Batches:
        """What was given; a number as minibatches of that size."""
        return given if isinstance(given, cls) else cls(whole_number("batch_size", given))


@checked
@dataclass(frozen=True)
class EachStep:
    """A learning-rate scheduler that is stepped after each step of the optimizer, and not after each epoch.

    Args:
        make: makes a torch scheduler from the optimizer.

    Example:
        >>> import functools, torch
        >>> warm_up = EachStep(functools.partial(torch.optim.lr_scheduler.LinearLR, total_iters=500))
        >>> # fit(..., scheduler=warm_up)
    """

    make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def make_scheduler(given: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of an optimizer, or None."""
    if given is None:
        return None
    make = given.make if isinstance(given, EachStep) else given
    made = make(optimizer) if callable(make) else make
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler) or made.optimizer is not optimizer:
        raise TypeError(
            f"scheduler must be a function of the optimizer that makes a torch learning-rate scheduler for "
            f"it, got {type(made).__name__}; for instance "
            f"functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)"
        )
    if isinstance(given, EachStep) and isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("scheduler: ReduceLROnPlateau goes by the loss of an epoch; pass it without EachStep")
    return made


def parts_of_steps(batches: Iterable[Tensors], accumulate: int) -> Iterator[tuple[Tensors, ...]]:
    """The minibatches of each step; the last step may have fewer."""
    waiting = iter(batches)
    while parts := tuple(islice(waiting, accumulate)):
        yield parts
