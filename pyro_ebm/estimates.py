"""Monte Carlo estimates with their errors, and the log-mean-exp that most of them are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BoundedEstimate", "Estimate", "importance_estimate", "log_mean_exp"]


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
