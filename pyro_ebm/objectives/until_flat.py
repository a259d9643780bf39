"""A learning rate that is held while the loss falls, and falls to zero once it does not."""

from __future__ import annotations

import math
import statistics
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["UntilFlat"]

_FEWEST = 24  # losses, of which the last third is looked at
_NEXT_LOOK = 1.1


class UntilFlat(ReduceLROnPlateau):
    r"""Holds the learning rate until the loss stops falling by more than its error, then a cosine takes it to zero.

    The loss of the last sixth of the epochs is held against that of the sixth before. The windows grow with the
    run, so that their error shrinks while a slow fall adds up: noise hides no trend for long. The fall of the rate
    takes a third as many epochs again, and the last quarter of all at the latest.

    torch tells classes of this kind the loss after each epoch; all state is plain numbers, which checkpoints keep.

    Args:
        optimizer: whose rate it is.
        epochs: the most there are.
        tolerance: a fall of the loss from sixth to sixth that does not matter.
        fewest: epochs before the first look.

    Attributes:
        flat_after: the epoch after which the rate began to fall; 0 before.
        ends_after: the epoch after which it is zero.
        moving: by how much the loss was falling when it was last looked at, and the error of that.
    """

    def __init__(self, optimizer: Optimizer, *, epochs: int, tolerance: float, fewest: int = _FEWEST) -> None:
        super().__init__(optimizer)
        self.losses: list[float] = []
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.tolerance, self.next_look = tolerance, float(max(fewest, _FEWEST))
        self.last = max(math.ceil(0.75 * epochs), 1)
        self.flat_after, self.ends_after = 0, epochs
        self.moving = [math.inf, 0.0]

    @property
    def finished(self) -> bool:
        """Whether the rate has come down to zero."""
        return bool(self.flat_after) and len(self.losses) >= self.ends_after

    @property
    def still_moves(self) -> bool:
        """Whether the loss was falling when the rate had to."""
        fall, error = self.moving
        return bool(self.flat_after) and fall > max(2 * error, self.tolerance)

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take in the loss of an epoch."""
        self.losses.append(float(metrics))
        num = len(self.losses)
        if not self.flat_after and (num >= self.next_look or num >= self.last):
            self.next_look = _NEXT_LOOK * num
            self.moving = list(_fall(self.losses)) if num >= 6 else self.moving
            flat = num >= _FEWEST and self.moving[0] <= max(self.moving[1], self.tolerance)
            if flat or num >= self.last:
                self.flat_after = num
                self.ends_after = min(self.ends_after, num + math.ceil(num / 3))
        share = 1.0 if not self.flat_after else self._share(num)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def _share(self, num: int) -> float:
        past = (num - self.flat_after) / max(self.ends_after - self.flat_after, 1)
        return 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


def _fall(losses: list[float]) -> tuple[float, float]:
    """By how much the mean loss fell from the last sixth but one to the last, and the standard error of that."""
    size = len(losses) // 6
    before, after = losses[-2 * size : -size], losses[-size:]
    # From one to the next the trend is nothing, so that what remains is noise.
    steps = [(b - a) ** 2 for a, b in zip(losses[-2 * size :], losses[1 - 2 * size :], strict=False)]
    variance = statistics.fmean(steps) / 2 if steps else 0.0
    return statistics.fmean(before) - statistics.fmean(after), math.sqrt(2 * variance / size)
