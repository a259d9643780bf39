"""Monte Carlo estimates with their errors, and the log-mean-exp that most of them are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BoundedEstimate", "Estimate", "importance_estimate", "log_mean_exp", "weighted_ess"]


class Estimate(NamedTuple):
    """A Monte Carlo estimate and its standard error; unpacks as ``value, se``."""

    value: Tensor
    se: Tensor


class BoundedEstimate(Estimate):
    """An estimate of log Z between bounds; unpacks as ``value, se``.

    Args:
        value: log Z.
        se: its standard error.
        lower: below log Z with the probability asked for.
        upper: above log Z with the probability asked for.
    """

    lower: Tensor
    upper: Tensor

    def __new__(cls, value: Tensor, se: Tensor, lower: Tensor, upper: Tensor) -> BoundedEstimate:
        self = super().__new__(cls, value, se)
        self.lower, self.upper = lower, upper
        return self

    def __getnewargs__(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.value, self.se, self.lower, self.upper)

    def __repr__(self) -> str:
        return f"BoundedEstimate(value={self.value}, se={self.se}, lower={self.lower}, upper={self.upper})"


def log_mean_exp(log_weights: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    """``log mean exp``; exactly zero for zeros, so that a zero energy changes nothing."""
    peak = log_weights.detach().amax(dim, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    return (log_weights - peak).exp().mean(dim).log() + peak.reshape(log_weights.mean(dim).shape)


def importance_estimate(log_weights: Tensor) -> Estimate:
    """``log mean exp`` over the first dimension with its delta-method standard error."""
    value = log_mean_exp(log_weights)
    relative = (log_weights - value).exp()
    return Estimate(value, (relative.var(0) / log_weights.shape[0]).sqrt())


def weighted_ess(weights: Tensor, x: Tensor) -> Tensor:
    r"""What independent weighted draws are worth for the mean of each component, at most :math:`1 / \sum w^2`.

    The variance over the squared standard error, :math:`\sum_i w_i c_i^2 / \sum_i w_i^2 c_i^2` with
    :math:`c = x - \bar x`. Kish's :math:`1 / \sum w^2`, which knows the weights alone, is too large for components
    whose far values are those with large weights.

    Args:
        weights: (draw,), that sum to one.
        x: (draw, component).

    Returns:
        (component,); Kish's number for a component that never changes.

    Reference:
        Owen (2013), Monte Carlo theory, methods and examples, section 9.3.
    """
    kish = 1.0 / weights.square().sum()
    squared = (x - weights @ x) ** 2
    worth = (weights @ squared) / (weights**2 @ squared)
    constant = (x == x[:1]).all(0)
    return torch.where(constant, kish, torch.minimum(worth, kish))
