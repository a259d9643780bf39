"""ArviZ's statistics on plain arrays, the same on ArviZ 0.23 and 1.x; ArviZ is imported when first used."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "arviz_is_1x",
    "ess_bulk",
    "ess_tail",
    "importance_ess",
    "mcse_mean",
    "psis",
    "quiet_import",
    "r_hat",
]

_TAIL = (0.05, 0.95)
_MIN_WEIGHTS = 25  # five in the tail, what a generalized Pareto fit needs
_MIN_DRAWS = 4  # ArviZ's own limit, checked here because ArviZ logs to stderr when it is not met


@functools.cache
def arviz_is_1x() -> bool:
    """Whether the installed ArviZ is 1.x (DataTree) and not 0.x (InferenceData)."""
    return int(importlib.metadata.version("arviz").split(".")[0]) >= 1


def quiet_import(name: str) -> ModuleType:
    """Import a module without the announcements ArviZ makes on import (a FutureWarning once a day)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def ess_bulk(x: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    """Effective sample size of the rank-normalized draws: the precision of means and medians.

    Args:
        x: (chain, draw, *shape).

    Returns:
        float64 array of ``shape``, in draws summed over chains; NaN for constant or non-finite columns.

    Reference:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization.
    """
    return _by_column(x, _statistic("ess", method="bulk"), min_chains=1)


def ess_tail(x: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    """Effective sample size of the 5 % and 95 % quantiles (the smaller); arguments as :func:`ess_bulk`."""
    return _by_column(x, _statistic("ess", method="tail", prob=_TAIL), min_chains=1)


def r_hat(x: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    """Rank-normalized split R-hat: 1 when chains agree, do not trust above 1.01; NaN for a single chain.

    Arguments, shape of the result and reference as in :func:`ess_bulk`.
    """
    return _by_column(x, _statistic("rhat", method="rank"), min_chains=2)


def mcse_mean(x: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    """Monte Carlo standard error of the mean, in units of ``x``; arguments as :func:`ess_bulk`."""
    return _by_column(x, _statistic("mcse", method="mean"), min_chains=1)


def psis(log_weights: Tensor | NDArray[Any]) -> tuple[Tensor, float]:
    """Pareto-smoothed importance weights and the shape k of their tail.

    Args:
        log_weights: (draw,), log importance ratios, unnormalized; ``-inf`` is a weight of zero.

    Returns:
        Smoothed log weights, shape (draw,), ``exp`` of which sum to one; and k. Trust estimates up to
        k = 0.7. k is 0 where all weights of the tail are equal (bounded, nothing to fit), ``inf`` with
        fewer than 25 positive weights (too few to tell), NaN where weights are NaN or infinite. Where
        they take too few values for a fit, k is 0 if they are worth 25 draws and ``inf`` if not.

    Raises:
        ValueError: if ``log_weights`` is not one-dimensional.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    original = torch.as_tensor(log_weights).detach()
    if original.ndim != 1 or original.numel() == 0:
        raise ValueError(f"log_weights must have shape (draw,) with draw >= 1, got {tuple(original.shape)}")
    logs = original.to("cpu", torch.float64)
    normalized = logs - logs.logsumexp(0)
    positive = logs > -math.inf
    if not torch.isfinite(logs[positive]).all() or logs.isnan().any() or not positive.any():
        return torch.full_like(original, math.nan), math.nan
    kept = normalized[positive]
    enough = len(kept) >= _MIN_WEIGHTS
    tail = kept.sort().values[-_tail_length(len(kept)) :] if enough else kept
    if tail.max() - tail.min() < _rounding(original):  # fitting would raise on ArviZ 1.x and return inf on 0.23
        return normalized.to(original), 0.0
    if not enough:
        return normalized.to(original), math.inf
    smoothed, k = _psislw(kept)
    if math.isnan(k):
        return normalized.to(original), 0.0 if importance_ess(kept) >= _MIN_WEIGHTS else math.inf
    normalized[positive] = smoothed
    return normalized.to(original), k


def importance_ess(log_weights: Tensor) -> Tensor:
    r"""Kish's effective sample size of importance weights, along the last axis.

    .. math:: (\sum_i w_i)^2 / \sum_i w_i^2

    Args:
        log_weights: (*batch, draw), normalized or not.

    Returns:
        (*batch,), between 1 and the number of draws.
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def _rounding(log_weights: Tensor) -> float:
    """Differences of log weights, sums of larger terms, that are below what their precision can tell."""
    finite = log_weights[log_weights.isfinite()].abs()
    eps = torch.finfo(log_weights.dtype).eps if log_weights.is_floating_point() else 0.0
    return max(1e-6, 8 * eps * float(finite.max()))


def _tail_length(num_draws: int) -> int:
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _psislw(log_weights: Tensor) -> tuple[Tensor, float]:
    array = log_weights.numpy()
    with _silent():
        if arviz_is_1x():
            # ArviZ 1.x takes log likelihoods and negates them, where 0.23 takes log weights
            smoothed, k = quiet_import("arviz_stats.base").array_stats.psislw(-array)
        else:
            smoothed, k = quiet_import("arviz").psislw(array)
    return torch.as_tensor(smoothed, dtype=log_weights.dtype), float(k)


def _statistic(name: str, **options: Any) -> Callable[[NDArray[np.float64]], float]:
    """One of ArviZ's statistics as a function of a (chain, draw) array."""
    if arviz_is_1x():
        function = getattr(quiet_import("arviz_stats.base").array_stats, name)
        return functools.partial(function, chain_axis=0, draw_axis=1, **options)
    return functools.partial(getattr(quiet_import("arviz"), name), **options)


def _by_column(
    x: Tensor | NDArray[Any], statistic: Callable[[NDArray[np.float64]], float], *, min_chains: int
) -> NDArray[np.float64]:
    import numpy as np

    array = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    if array.ndim < 2:
        raise ValueError(f"x must have shape (chain, draw, *shape), got {array.shape}")
    out = np.full(array.shape[2:], np.nan)
    if array.shape[0] < min_chains or array.shape[1] < _MIN_DRAWS:
        return out
    with _silent():
        for index in np.ndindex(out.shape):
            column = array[(slice(None), slice(None), *index)]
            if np.isfinite(column).all() and np.ptp(column) > 0:
                out[index] = float(statistic(column))
    return out


@contextmanager
def _silent() -> Iterator[None]:
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
