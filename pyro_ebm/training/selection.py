"""Which epoch's weights a training run keeps: the best, the last, or a running average of them."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.annotations import checked

__all__ = ["Average", "Moving", "keep_of", "within_error"]

KEEP = ("best", "last", "average")
# Of the difference between two epochs, in standard errors of some eight draws; the best of many epochs was lucky too.
_ERRORS = 3.5
# So many that all of them agree is no chance.
_AGREEING = 8
# Twice the log likelihood ratio of two fits that are the same is a chi-squared variable: 95 % of it lie below four.
_NATS = 2.0


@checked
@dataclass(frozen=True)
class Average:
    """Keep a moving average of the weights: ``fit(..., keep=Average(0.99))``; ``keep="average"`` has the default.

    After step ``t`` the average moves to the weights by ``1 - min(decay, (1 + t) / (10 + t))``. It, and not the weights
    of the last step, is validated, told to callbacks and kept. Buffers, as of batch normalization, are the last ones.

    Args:
        decay: how much of the average stays at each step, in (0, 1): it reaches back about ``1 / (1 - decay)`` steps.

    Reference:
        Polyak and Juditsky (1992), Acceleration of Stochastic Approximation by Averaging.

    Example:
        >>> Average(0.99).decay
        0.99
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 < self.decay < 1:
            raise ValueError(f"decay must be a number between 0 and 1, got {self.decay!r}")


def keep_of(keep: object, *, validated: bool, changing: bool) -> str | Average:
    """What ``fit`` keeps, by its argument: by itself the best where there is something to choose by, else the last."""
    choosable = validated and not changing
    if keep is None:
        return "best" if choosable else "last"
    if isinstance(keep, Average):
        return keep
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {KEEP}, an Average(decay) or None, got {keep!r}")
    if keep == "best" and not choosable:
        why = (
            "the objective changes with the epoch, so its losses cannot be compared; give it a method "
            "validation(model, guide, *batch) that does not change"
            if validated
            else "a train loss is of weights that moved meanwhile and of single draws, its lowest value is luck; pass "
            "validation="
        )
        raise ValueError(f'keep="best" has nothing to choose by: {why}, or keep="last"')
    return Average() if keep == "average" else str(keep)


def within_error(
    loss: float, parts: Sequence[float], best_loss: float, best_parts: Sequence[float], *, nats: float | None
) -> bool:
    """Whether a loss is no worse than the best one by more than their difference is known.

    Args:
        loss: mean over the parts.
        parts: losses per datum of parts of the validation, each with noise of its own, the same at each epoch.
        best_loss: the lowest so far.
        best_parts: its parts.
        nats: how many data the difference per datum stands for, where the loss is in nats; else None.
    """
    difference = loss - best_loss
    if difference <= 0 or (nats is not None and difference * nats <= _NATS):
        return True
    if len(parts) != len(best_parts) or len(parts) < 2:
        return False
    differences = [new - old for new, old in zip(parts, best_parts, strict=True)]
    if len(differences) >= _AGREEING and min(differences) > 0:
        return False
    return difference <= _ERRORS * statistics.stdev(differences) / math.sqrt(len(differences))


class Moving:
    """A moving average of parameters.

    Args:
        parameters: averaged, from their values now on.
        decay: at most so much of the average stays at a step.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        stays = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - stays)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average meanwhile."""
        own = [p.detach().clone() for p in self.parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, object]:
        """A copy of the average, for checkpoints."""
        return {"values": copy.deepcopy(self.values), "steps": self.steps}

    def load_state(self, state: dict[str, object]) -> None:
        """Put a copy made by :meth:`state` back."""
        for value, saved in zip(self.values, state["values"], strict=True):  # type: ignore[call-overload]
            value.copy_(saved)
        self.steps = int(state["steps"])  # type: ignore[call-overload]
