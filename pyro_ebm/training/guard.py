"""What ends a training run before it does harm: numbers that are not finite, a log Z that rests on one draw."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess

__all__ = ["DegenerateWeightsError", "NonFiniteError", "TrainingStopped", "WeightGuard", "require_finite"]

_FEWEST_STEPS = 50
_REMEDY = (
    "lower the learning rate, pass clip_grad_norm, or look for what is unbounded: an energy unbounded "
    "below (missing log Z), a scale that goes to zero"
)


class TrainingStopped(ArithmeticError):
    """Training cannot go on; the text says where, why, and what to do."""

    reason: ClassVar[str]


class NonFiniteError(TrainingStopped):
    """A loss, a gradient or a weight became NaN or infinite."""

    reason = "non-finite loss"


class DegenerateWeightsError(TrainingStopped):
    """log Z rested on a draw or two for so long that the loss means nothing."""

    reason = "degenerate weights"


def require_finite(values: Sequence[float], names: Sequence[str], where: str) -> None:
    """Raise a NonFiniteError that names the first value which is NaN or infinite."""
    for value, name in zip(values, names, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"the {name} became {value} {where}; {_REMEDY}")


class WeightGuard:
    r"""Notices that log Z has come to rest on one or two of the draws of its base.

    A tilt that runs away from its base keeps a finite loss: ``log mean exp(-E)`` over draws that all lie where
    the energy is high stays behind the true log Z, and the loss falls without end. The sign is the effective
    sample size :math:`(\sum_k w_k)^2 / \sum_k w_k^2` of the weights :math:`w = \exp(-E)`, which goes to 1. One such
    step is no reason to stop; sizes that are mostly below 2 over an epoch, and at least 50 steps, are.

    Args:
        steps_per_epoch: optimizer steps in one epoch.

    Attributes:
        recent: for the last steps, log of the effective sample size over the least that will do.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.recent: deque[float] = deque(maxlen=max(steps_per_epoch, _FEWEST_STEPS))
        self._num_draws = 0
        self._reports: list[tuple[Tensor, int]] = []

    @property
    def doubtful(self) -> bool:
        """Whether the weights were degenerate in the steps just taken, a fifth of what ends a run."""
        return _mostly_degenerate(list(self.recent)[-(self.recent.maxlen or 0) // 5 :])

    def listen(self, log_weights: Tensor) -> None:
        """Take the log weights (draws, *batch) of one estimate of log Z of the current step."""
        # Over independent elements the median: one datum far out is no runaway.
        ess = importance_ess(log_weights.flatten(1).T if log_weights.ndim > 1 else log_weights)
        self._reports.append((ess.median(), len(log_weights)))

    def taken(self) -> tuple[list[Tensor], list[int]]:
        """Effective sample sizes heard since the last call, and of how many draws each."""
        reports, self._reports = self._reports, []
        return [ess for ess, _ in reports], [num for _, num in reports]

    def judge(self, sizes: Sequence[float], draws: Sequence[int], where: str) -> None:
        """Take in one step; raise a DegenerateWeightsError when the weights were degenerate for too long.

        Args:
            sizes: effective sample sizes of the step's estimates of log Z.
            draws: of how many draws each.
            where: the step, in words.
        """
        if not sizes:
            return
        ratio, self._num_draws = min((s / _least_size(n), n) for s, n in zip(sizes, draws, strict=True))
        self.recent.append(math.log(ratio))
        if len(self.recent) == self.recent.maxlen and _mostly_degenerate(self.recent):
            raise DegenerateWeightsError(self.problem(where))

    def problem(self, where: str) -> str:
        """What is wrong and what to do about it, in words."""
        size = math.exp(statistics.median(self.recent)) * _least_size(self._num_draws)
        return (
            f"log Z rests on {size:.1f} of {self._num_draws} draws (median effective sample size of its weights over "
            f"{len(self.recent)} steps) {where}: the tilt has left the draws of its base behind, and a falling loss "
            "means nothing there. Regularize the energy (weight decay, `+ QuadraticEnergy(c)`), lower the learning "
            'rate, take more draws or quasi-random ones (normalize=Normalizer("qmc", num_samples=...)), or a base '
            "nearer to the data"
        )


def _mostly_degenerate(ratios: Iterable[float]) -> bool:
    # Capped at twice the least, so that one good step does not make up for ten bad ones.
    return sum(min(ratio, math.log(2)) for ratio in ratios) < 0


def _least_size(num_draws: int) -> float:
    # Two draws; less where there are few, since an effective size of 2 is a healthy one of four.
    return min(2.0, 1 + num_draws / 64)
