"""How a training run is judged: the validation loss averaged over noise that is the same at each epoch, and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.randomness import fingerprint, forked_rng
from pyro_ebm.tilts.streams import log_z_stream
from pyro_ebm.training.minibatch import Shares, num_data_of
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.sources import Source

__all__ = ["Judge", "Judgment", "Metric", "Validation", "judged_size"]

Metric = Callable[..., Any]
_LOG_Z_DRAWS = 1024  # at least, of each log Z


@checked
@dataclass(frozen=True)
class Validation:
    """What a training run is judged by: ``fit(..., validation=Validation(0.2, metrics={"accuracy": accuracy}))``.

    Args:
        data: share of the data held apart, or other data in the form of the training data.
        num_draws: the loss is the mean over at least so many parts with noise of their own: minibatches of the
            validation data or, where these are few, the same data again. The scatter of the parts says how well the
            losses of two epochs can be told apart.
        metrics: name -> function ``(model, guide, *batch)`` that returns one number, a mean over the batch. Told by
            ``FitResult.metrics`` and to callbacks.
        monitor: ``"loss"`` or the name of a metric: by which the best epoch is found and patience counts.
        higher_is_better: whether a higher value of what is monitored is better.

    Raises:
        ValueError, TypeError: an argument out of its range.

    Example:
        >>> Validation(0.2, num_draws=16).monitor
        'loss'
    """

    data: Any = 0.1
    _: KW_ONLY
    num_draws: int = 8
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    monitor: str = "loss"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, Mapping) or not all(callable(metric) for metric in self.metrics.values()):
            raise TypeError(
                f"metrics must map names to functions (model, guide, *batch) -> number, got {self.metrics!r}"
            )
        if "loss" in self.metrics:
            raise ValueError("metrics: the name 'loss' is taken by the objective; choose another")
        if self.monitor != "loss" and self.monitor not in self.metrics:
            raise ValueError(f"monitor must be one of {['loss', *self.metrics]}, got {self.monitor!r}")
        if self.monitor == "loss" and self.higher_is_better:
            raise ValueError("higher_is_better=True is for a metric: a lower loss is better")
        if self.data is None:
            raise ValueError("data must be a share or data; for no validation pass validation=None to fit")

    @classmethod
    def of(cls, given: Any) -> Validation | None:
        """What was given; a share or data made one; None where nothing is to be held apart."""
        if given is None or isinstance(given, cls):
            return given
        none = isinstance(given, int | float) and not isinstance(given, bool) and given == 0
        return None if none else cls(given)


@dataclass(frozen=True)
class Judgment:
    """What validation found at the end of an epoch.

    Attributes:
        loss: per datum.
        metrics: name -> mean.
        score: what is monitored, the lower the better.
        parts: its parts, each with noise of its own.
    """

    loss: float
    metrics: dict[str, float]
    score: float
    parts: list[float]


def judged_size(wanted: Validation, source: Source, batch_size: int) -> int:
    """How many data to validate on at a time."""
    num = source.num_data()
    pieces = 0 if num is None else num // wanted.num_draws
    # Two data at least: a batch of one is a special case to many a model.
    return min(batch_size, pieces) if pieces >= 2 else batch_size


class Judge:
    """Takes the validation loss and metrics of the weights of the moment.

    Args:
        wanted: what is to be told.
        source: data to validate on.
        loss: its measure of fit is taken.
        shares: what a minibatch counts for.
        batch_size: most data at a time.
        seed: of the noise, which is the same each time.
        device: where to compute.
    """

    def __init__(
        self, wanted: Validation, source: Source, loss: Objective, shares: Shares, *,
        batch_size: int, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.wanted, self.source, self.loss, self.shares = wanted, source, loss, shares
        self.seed, self.device = seed, device
        num, self.size = source.num_data(), judged_size(wanted, source, batch_size)
        self.repeats = math.ceil(wanted.num_draws / source.num_batches(self.size))
        self.nats = num if loss.in_nats and wanted.monitor == "loss" else None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which epoch is the best."""
        wanted = self.wanted
        return {"num_draws": wanted.num_draws, "monitor": wanted.monitor, "metrics": list(wanted.metrics)}

    def __call__(self, epoch: int) -> Judgment:
        """The loss and the metrics now, in the epoch of that number."""
        sizes: list[int] = []
        values: list[list[float]] = []
        for repeat in range(self.repeats):
            if repeat >= 2 and _repeats_itself(values):
                break  # nothing is random here
            for index, batch in enumerate(self.source.batches(self.size, self.device)):
                sizes.append(num_data_of(batch))
                values.append(self._part(batch, epoch, (self.seed, "validation", repeat, index)))
        columns = zip(*values, strict=True)
        means = [sum(n * v for n, v in zip(sizes, column, strict=True)) / sum(sizes) for column in columns]
        told = dict(zip(["loss", *self.wanted.metrics], means, strict=True))
        sign = -1 if self.wanted.higher_is_better else 1
        index = list(told).index(self.wanted.monitor)
        score, parts = sign * means[index], [sign * value[index] for value in values]
        return Judgment(told.pop("loss"), told, score, parts)

    def _part(self, batch: tuple[Tensor, ...], epoch: int, noise: tuple[object, ...]) -> list[float]:
        log_z = log_z_stream(*noise, at_least=_LOG_Z_DRAWS)
        with forked_rng(fingerprint((), *noise)), log_z:
            arguments = self.shares.arguments(batch)
            with self.shares.counting(batch):
                loss = self.loss.validation(*arguments, epoch=epoch) / self.shares.divisor(batch)
            with torch.no_grad():
                return [loss, *(_number(*item, self.loss.args, arguments) for item in self.wanted.metrics.items())]


def _number(name: str, metric: Metric, args: tuple[Any, ...], batch: tuple[Tensor, ...]) -> float:
    value = metric(*args, *batch)
    if isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"metrics[{name!r}] must return one number, the mean over the batch, got {got}; add .mean()")


def _repeats_itself(values: list[list[float]]) -> bool:
    half = len(values) // 2
    return values[:half] == values[half:]
