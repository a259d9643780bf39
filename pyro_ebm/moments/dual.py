"""The dual of a moment problem on weighted draws that stay fixed: Newton's method, and errors by the jackknife."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.estimates import log_mean_exp
from pyro_ebm.thresholds import pareto_k_limit

__all__ = ["Cloud", "Optimum", "group_error", "minimize"]

_MAX_STEPS = 200
_DECREMENT = 1e-14  # squared distance from the optimum, in units of a standard deviation of the features
_HALVINGS = 30


class Cloud(NamedTuple):
    """Weighted draws in groups that share none; the mean of all weights is Z at ``reference``.

    Args:
        features: (groups, num, k), double precision.
        log_weights: (groups, num).
        reference: (k,) the multipliers that the log weights belong to.
        method: ``"exact"``, ``"importance"``, ``"qmc"`` or ``"smc"``.
    """

    features: Tensor
    log_weights: Tensor
    reference: Tensor
    method: str

    def at(self, multipliers: Tensor) -> Tensor:
        """Log weights at other multipliers, (groups, num)."""
        return self.log_weights + self.features @ (multipliers - self.reference)

    def ess(self, multipliers: Tensor) -> float:
        """Effective sample size per draw."""
        log_weights = self.at(multipliers).flatten()
        return float(importance_ess(log_weights)) / len(log_weights)

    def pareto_k(self, multipliers: Tensor) -> float:
        return 0.0 if self.method == "exact" else psis(self.at(multipliers).flatten())[1]

    @property
    def k_limit(self) -> float:
        """The Pareto k up to which so many weights can be trusted."""
        return pareto_k_limit(self.log_weights.numel())

    def moments(self, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (k,) and covariance (k, k) of the features."""
        weights, flat = self.at(multipliers).flatten().softmax(0), self.features.flatten(0, 1)
        mean = weights @ flat
        centered = flat - mean
        return mean, (weights[:, None] * centered).T @ centered


class Optimum(NamedTuple):
    """Where Newton's method came to, whether the gradient vanished there, and in how many steps."""

    multipliers: Tensor
    converged: bool
    num_iterations: int


def minimize(cloud: Cloud, basis: Tensor, target: Tensor, *, start: Tensor, least_ess: float = 0.0) -> Optimum:
    r"""Minimize :math:`\log Z(\lambda) - \lambda \cdot target` by damped Newton steps.

    Args:
        cloud: draws that log Z is estimated from.
        basis: (k, r) the directions that lambda may move in.
        target: (k,) means wanted.
        start: (k,) first multipliers.
        least_ess: share of the draws that weights must stay worth; the descent ends there.
    """
    lam = start
    if cloud.ess(lam) < least_ess:
        return Optimum(lam, False, 0)
    for iteration in range(_MAX_STEPS):
        mean, covariance = cloud.moments(lam)
        gradient, hessian = basis.T @ (mean - target), basis.T @ covariance @ basis
        ridge = 1e-12 * hessian.diagonal().mean() + 1e-300
        step = -torch.linalg.solve(hessian + ridge * torch.eye(len(hessian)).to(hessian), gradient)
        decrement = float(-(gradient @ step))
        if not decrement < torch.inf:
            return Optimum(lam, False, iteration)
        if decrement < _DECREMENT:
            return Optimum(lam, True, iteration)
        moved = _line_search(cloud, target, lam, basis @ step, decrement, least_ess)
        if moved is None:  # the weights are used up, or rounding ends the descent
            return Optimum(lam, decrement < 1e3 * _DECREMENT, iteration)
        lam = moved
    return Optimum(lam, False, _MAX_STEPS)


def _line_search(
    cloud: Cloud, target: Tensor, start: Tensor, step: Tensor, decrement: float, least_ess: float
) -> Tensor | None:
    def dual(multipliers: Tensor) -> float:
        return float(cloud.at(multipliers).flatten().logsumexp(0) - multipliers @ target)

    before = dual(start)
    for halving in range(_HALVINGS):
        size = 0.5**halving
        lam = start + size * step
        if dual(lam) <= before - 0.1 * size * decrement and cloud.ess(lam) >= least_ess:
            return lam
    return None


def group_error(
    cloud: Cloud, multipliers: Tensor, statistic: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A statistic of all groups, and its covariance by the jackknife that leaves out a group at a time.

    Args:
        cloud: the draws.
        multipliers: (k,) where their weights are taken.
        statistic: maps the mean weight (), the mean of weight times features (k,), and log Z over that of the base
            before the tilt (), to (m,).

    Returns:
        (m,) and (m, m); zero covariance of a single group.
    """
    log_weights = cloud.at(multipliers)
    shift = log_weights.max()
    relative = (log_weights - shift).exp()
    weights, sums = relative.mean(1), (relative[..., None] * cloud.features).mean(1)
    # Draws of the base estimate the Z before the tilt as well; log weights of SMC are those of one Z alone.
    before = torch.ones_like(weights) if cloud.method == "smc" else log_mean_exp(cloud.log_weights, 1).exp()

    def value(weight: Tensor, total: Tensor, start: Tensor) -> Tensor:
        return statistic(weight, total, weight.log() + shift - start.log())

    whole = value(weights.mean(0), sums.mean(0), before.mean(0))
    count = len(weights)
    if count == 1:
        return whole, whole.new_zeros(len(whole), len(whole))
    parts = [[(part.sum(0) - part[g]) / (count - 1) for part in (weights, sums, before)] for g in range(count)]
    without = torch.stack([value(*part) for part in parts])
    off = without - without.mean(0)
    return whole, (count - 1) / count * off.T @ off
