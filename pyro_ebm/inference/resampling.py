"""Weighted points chosen again: weights tempered until many points count, systematic choice, how many differ."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apart", "effective", "next_step", "number_of_distinct", "systematic", "tempered"]

_LEAST_STEP = 1e-12
_BISECTIONS = 18
_ITERATIONS = 8  # towards the leading direction, which need not be exact


def effective(log_weights: Tensor) -> Tensor:
    """What weights (points, *batch) are worth in points, ``(sum w)^2 / sum w^2``, (*batch)."""
    weights = (log_weights - log_weights.amax(0)).exp()
    return weights.sum(0).square() / weights.square().sum(0)


def next_step(log_ratio: Tensor, rest: Tensor, target_ess: float | Tensor) -> Tensor:
    """How far to go: the largest step at which weights ``exp(step * log_ratio)`` are worth ``target_ess``.

    Of the points at which the target is not zero: the others are lost however small the step.

    Args:
        log_ratio: (points, *batch).
        rest: the largest step allowed, (*batch); zero where there is nothing to do.
        target_ess: share of the points.
    """
    wanted = target_ess * (log_ratio > -torch.inf).sum(0)

    def enough(step: Tensor) -> Tensor:
        return effective(torch.where(step > 0, step * log_ratio, 0.0)) >= wanted

    low, high = (torch.full_like(rest, _LEAST_STEP).log(), rest.clamp(min=_LEAST_STEP).log())
    at_once = enough(rest)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        keep = enough(middle.exp())
        low, high = torch.where(keep, middle, low), torch.where(keep, high, middle)
    return torch.where(at_once, rest, torch.minimum(low.exp(), rest))


def tempered(log_weights: Tensor, least: int) -> Tensor:
    """The weights to the largest power, at most 1, that leaves them worth ``least`` points.

    Where few points carry all the weight, whatever is chosen by it stands at those few: a mode that they miss is lost.

    Args:
        log_weights: (points, *batch), minus infinity where there is none.
        least: number of points; as many as have weight where those are fewer.
    """
    alive = (log_weights > -torch.inf).sum(0)
    centered = (log_weights - log_weights.amax(0)).double()
    # Not quite all of those alive: their weights need not become equal.
    share = torch.clamp(least / alive, max=0.9)
    step = next_step(centered, torch.ones_like(centered[0]), share)
    return torch.where(centered > -torch.inf, step * centered, -torch.inf)


def systematic(log_weights: Tensor, generator: torch.Generator | None, num: int | None = None) -> Tensor:
    """Systematic resampling: which point each place gets, (num, *batch); all keep theirs for equal weights.

    A point is chosen as often as its weight asks for, rounded up or down: none twice before its share is a whole place.

    Args:
        log_weights: (points, *batch).
        generator: source of randomness; the global torch generator when ``None``.
        num: places; one for each point when ``None``.
    """
    size = len(log_weights)
    places = size if num is None else num
    rows = log_weights.reshape(size, -1).T.double().softmax(-1).cumsum(-1)
    shift = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64, device=rows.device)
    steps = (torch.arange(places, device=rows.device) + shift) / places
    index = torch.searchsorted(rows, steps * rows[:, -1:]).clamp(max=size - 1)
    index = index.T.reshape(places, *log_weights.shape[1:])
    if places != size:
        return index
    equal = (log_weights == log_weights[:1]).all(0)
    return torch.where(equal, torch.arange(size, device=index.device).reshape(-1, *[1] * equal.ndim), index)


def apart(points: Tensor, log_weights: Tensor, num: int) -> Tensor:
    """Points chosen by their weights so that they lie apart, in random order: (num, *batch), torch's global generator.

    Systematic resampling along the direction in which the weighted points vary most: of two modes with half of the
    weight each, four places go to two points in either, where chance would leave one empty once in eight times.

    Args:
        points: (points, *batch, dim).
        log_weights: (points, *batch).
        num: places.
    """
    order = _along(points, log_weights.softmax(0)).argsort(0)
    place = systematic(log_weights.gather(0, order), None, num)[torch.randperm(num, device=points.device)]
    return order.gather(0, place)


def _along(points: Tensor, weights: Tensor) -> Tensor:
    """Coordinates of the points along their leading direction, each column in units of its spread: (points, *batch)."""
    weights = weights[..., None].double()
    x = points.double().nan_to_num(posinf=0.0, neginf=0.0)
    x = x - (weights * x).sum(0)
    x = x / (weights * x.square()).sum(0).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    direction = torch.ones_like(x[0])
    direction[..., 1::2] = 0.7  # neither along nor across any one axis
    for _ in range(_ITERATIONS):
        direction = (weights * (x * direction).sum(-1, keepdim=True) * x).sum(0)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return (x * direction).sum(-1)


def number_of_distinct(points: Tensor, batch: int = 0) -> int:
    """How many of the points differ, of the datum where fewest do.

    Args:
        points: (points, *batch, ...).
        batch: number of dimensions of the batch.
    """
    flat = points.reshape(len(points), points.shape[1 : 1 + batch].numel(), -1).double()
    if not flat.numel():
        return min(len(points), 1)
    # Points that differ in one coordinate have different sums of coordinates times irrational numbers.
    factors = torch.arange(1, flat.shape[-1] + 1, dtype=torch.float64, device=flat.device).sqrt()
    ordered = ((flat - flat[:1]) * factors).sum(-1).sort(0).values
    return 1 + int((ordered[1:] != ordered[:-1]).sum(0).min())
