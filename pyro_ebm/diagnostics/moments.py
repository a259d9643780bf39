"""Moments of draws with their standard errors, and what the draws are worth: of chains, weighted draws and grids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.chain_statistics import chain_statistics, ess_bulk, mcse_mean, split_r_hat
from pyro_ebm.estimates import weighted_ess
from pyro_ebm.inference.draws import Draws

__all__ = [
    "MIN_ISLANDS",
    "Moments",
    "Worth",
    "bulk_ess",
    "component_names",
    "components",
    "error_in_se",
    "has_islands",
    "is_exact",
    "moments",
    "worth",
]

MIN_ISLANDS = 4  # fewer say next to nothing about how much islands differ


class Moments(NamedTuple):
    """Means of all scalar components, then means of their squares; with ``se`` and ``sd`` of one draw.

    All three have shape (2 * component,), in float64.
    """

    mean: Tensor
    se: Tensor
    sd: Tensor


class Worth(NamedTuple):
    """What the draws of each component are worth, each (component,); the last two are for ``worst_agreement``."""

    bulk: Tensor
    tail: Tensor
    r_hat: Tensor
    excess: Tensor
    allowance: Tensor


def is_exact(draws: Draws) -> bool:
    """Whether the draws are the points of a grid: weighted, and without Monte Carlo error."""
    return draws.method == "quadrature"


def has_islands(draws: Draws) -> bool:
    """Whether errors come from the variation between islands: weighted draws in four or more chains."""
    return draws.log_weights is not None and draws.num_chains >= MIN_ISLANDS and not is_exact(draws)


def components(draws: Draws, sites: Iterable[str]) -> Tensor:
    """All scalar components of the sites side by side, shape (chain, draw, component), in float64."""
    lead = (draws.num_chains, draws.num_draws)
    return torch.cat([draws.values[site].detach().cpu().double().reshape(*lead, -1) for site in sites], -1)


def component_names(draws: Draws, sites: Iterable[str]) -> list[str]:
    """Names in the order of :func:`components`: ``mu``, ``z[0]``, ``z[1]``, ``w[0, 2]``, ..."""
    names = []
    for site in sites:
        shape = draws.values[site].shape[2:]
        for index in itertools.product(*map(range, shape)):
            names.append(f"{site}[{', '.join(map(str, index))}]" if shape else site)
    return names


def moments(draws: Draws, sites: Iterable[str]) -> Moments:
    r"""Estimate ``E[x]`` and ``E[x^2]`` of every scalar component.

    The standard error is ArviZ's ``mcse_mean`` for chains and zero for a grid. For weighted draws of
    fewer than four chains, taken as independent, it is the root of
    :math:`\sum_i w_i^2 (x_i - \bar x)^2`. With four or more, the chains are islands: independent of each
    other, while the points of one may share ancestors. What they differ by is then the error,

    .. math:: se^2 = \frac{R}{R - 1} \sum_{r=1}^R \Bigl(\sum_{i \in r} w_i (x_i - \bar x)\Bigr)^2,

    known with :math:`R - 1` degrees of freedom. The error is NaN where it cannot be estimated, and zero
    for a component that never changes.

    Reference:
        Owen (2013), Monte Carlo theory, methods and examples, sections 2.7 and 9.2 (ratio estimates).
    """
    x = components(draws, sites)
    parts = [_mean_and_error(draws, part) for part in (x, x**2)]
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def bulk_ess(draws: Draws, x: Tensor) -> Tensor:
    r"""Effective number of draws for the mean of each component.

    ArviZ's ``ess_bulk`` for chains; NaN for a grid. Weighted draws: the variance divided by the squared standard
    error of :func:`moments`, at most :math:`1 / \sum w^2`. On islands the smallest of many components is then on the
    low side: with R islands each has a relative error of :math:`\sqrt{2 / (R - 1)}`.

    Args:
        draws: what ``x`` was made of.
        x: :func:`components` of them, shape (chain, draw, component).

    Returns:
        Shape (component,).
    """
    if is_exact(draws):
        return x.new_full(x.shape[2:], torch.nan)
    if draws.log_weights is None:
        return torch.as_tensor(ess_bulk(x), device=x.device)
    weights = _weights(draws)
    limit = importance_ess(weights.log().flatten())
    if not has_islands(draws):
        return weighted_ess(weights.flatten(), x.flatten(0, 1))
    centered = x - (weights * x).sum((0, 1))
    size = (weights * centered**2).sum((0, 1)) / _squared_error(draws, weights * centered)
    return torch.where(_constant(x), torch.nan, size.clamp(max=limit))


def worth(draws: Draws, x: Tensor) -> Worth:
    r"""Effective numbers of draws for the mean and for the tails of each component, and R-hat.

    ``bulk`` as :func:`bulk_ess`. ``tail`` is the smaller of those for the 5 % and the 95 % quantile, for
    weighted draws :math:`p (1 - p) / se^2` of the weighted share ``p`` of draws below the quantile. R-hat of a
    single chain is that of its halves; NaN for weighted draws.

    Args:
        draws: what ``x`` was made of.
        x: :func:`components` of them, shape (chain, draw, component).
    """
    nothing = x.new_full(x.shape[2:], torch.nan)
    if is_exact(draws):
        return Worth(nothing, nothing, nothing, nothing, nothing)
    if draws.log_weights is not None:
        return Worth(bulk_ess(draws, x), _weighted_tail_ess(draws, x), nothing, nothing, nothing)
    names = ("ess_bulk", "ess_tail", "r_hat", "r_hat_excess", "r_hat_allowance")
    found = chain_statistics(x, *names)
    if len(x) == 1:
        found["r_hat"] = split_r_hat(x)
    return Worth(*(torch.as_tensor(found[name], device=x.device) for name in names))


def _weighted_tail_ess(draws: Draws, x: Tensor) -> Tensor:
    weights = _weights(draws)
    ordered, order = x.flatten(0, 1).sort(0)
    cumulative = weights.flatten()[order].cumsum(0)
    sizes = []
    for prob in (0.05, 0.95):
        index = (cumulative < prob).sum(0).clamp(max=len(ordered) - 1)
        below = (x <= ordered.gather(0, index[None])[0]).double()
        p = (weights * below).sum((0, 1))
        sizes.append(p * (1 - p) / _squared_error(draws, weights * (below - p)))
    smaller = torch.fmin(*sizes)
    if has_islands(draws):
        smaller = smaller.clamp(max=importance_ess(weights.log().flatten()))
    return torch.where(_constant(x), torch.nan, smaller)


def error_in_se(estimate: Moments, reference: Moments) -> Tensor:
    """Differences of the moments in units of their joint standard error, shape (2 * component,).

    Where neither has an error (a grid, a constant) it is zero up to rounding, or else infinite.
    """
    difference = (estimate.mean - reference.mean).abs()
    se = (estimate.se**2 + reference.se**2).sqrt()
    size = reference.mean.abs() + reference.sd.nan_to_num()
    exact = torch.where(difference <= 1e-6 * size, 0.0, torch.inf)
    return torch.where(se > 1e-9 * size, difference / se, torch.where(se.isnan(), torch.nan, exact))


def _mean_and_error(draws: Draws, x: Tensor) -> Moments:
    """Of the components themselves: mean, its standard error, and standard deviation, each (component,)."""
    if draws.log_weights is None:
        flat = x.flatten(0, 1)
        se = torch.where(_constant(x), 0.0, torch.as_tensor(mcse_mean(x), device=x.device))
        sd = flat.std(0) if len(flat) > 1 else torch.full_like(flat[0], torch.nan)
        return Moments(flat.mean(0), se, sd)
    weights = _weights(draws)
    mean = (weights * x).sum((0, 1))
    centered = x - mean
    se = torch.zeros_like(mean) if is_exact(draws) else _squared_error(draws, weights * centered).sqrt()
    return Moments(mean, se, (weights * centered**2).sum((0, 1)).sqrt())


def _weights(draws: Draws) -> Tensor:
    """Normalized weights in float64, shape (chain, draw, 1)."""
    logs: Tensor = draws.log_weights  # type: ignore[assignment]
    logs = logs.detach().cpu().double()
    return logs.flatten().softmax(0).reshape(*logs.shape, 1)


def _squared_error(draws: Draws, residuals: Tensor) -> Tensor:
    """Of a weighted mean with residuals ``w_i (x_i - mean)``, shape (chain, draw, component)."""
    if has_islands(draws):
        count = len(residuals)
        return count / (count - 1) * residuals.sum(1).square().sum(0)
    return residuals.square().sum((0, 1))


def _constant(x: Tensor) -> Tensor:
    return (x == x[:1, :1]).all(0).all(0)
