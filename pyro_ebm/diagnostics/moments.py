"""First and second moments of draws with their standard errors: of chains, weighted draws and grids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.inference.draws import Draws
from pyro_ebm.statistics import mcse_mean

__all__ = ["Moments", "component_names", "components", "error_in_se", "is_exact", "moments"]


class Moments(NamedTuple):
    """Means of all scalar components, then means of their squares; with ``se`` and ``sd`` of one draw.

    All three have shape (2 * component,), in float64.
    """

    mean: Tensor
    se: Tensor
    sd: Tensor


def is_exact(draws: Draws) -> bool:
    """Whether the draws are the points of a grid: weighted, and without Monte Carlo error."""
    return draws.method == "quadrature"


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

    The standard error is ArviZ's ``mcse_mean`` for chains, zero for a grid, and for weighted draws
    :math:`\sqrt{\sum_i w_i^2 (x_i - \bar x)^2}` (Owen 2013, Monte Carlo theory, section 9.2). It is NaN
    where it cannot be estimated, and zero for a component that never changes.
    """
    x = components(draws, sites)
    x = torch.cat([x, x**2], -1)
    if draws.log_weights is None:
        flat = x.flatten(0, 1)
        se = torch.as_tensor(mcse_mean(x))
        constant = (flat == flat[:1]).all(0)
        sd = flat.std(0) if len(flat) > 1 else torch.full_like(flat[0], torch.nan)
        return Moments(flat.mean(0), torch.where(constant, 0.0, se), sd)
    weights = draws.log_weights.detach().cpu().double().flatten().softmax(0)[:, None]
    x = x.flatten(0, 1)
    mean = (weights * x).sum(0)
    centred = (x - mean) ** 2
    se = torch.zeros_like(mean) if is_exact(draws) else (weights**2 * centred).sum(0).sqrt()
    return Moments(mean, se, (weights * centred).sum(0).sqrt())


def error_in_se(estimate: Moments, reference: Moments) -> Tensor:
    """Differences of the moments in units of their joint standard error, shape (2 * component,).

    Where neither has an error (a grid, a constant) it is zero up to rounding, or else infinite.
    """
    difference = (estimate.mean - reference.mean).abs()
    se = (estimate.se**2 + reference.se**2).sqrt()
    size = reference.mean.abs() + reference.sd.nan_to_num()
    exact = torch.where(difference <= 1e-6 * size, 0.0, torch.inf)
    return torch.where(se > 1e-9 * size, difference / se, torch.where(se.isnan(), torch.nan, exact))
