"""Which ArviZ there is, and its Pareto-smoothed importance sampling, the same on 0.23 and 1.x."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_ebm.checks import real_numbers
from pyro_ebm.imports import whole_import

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "arviz_is_1x",
    "importance_ess",
    "psis",
    "quiet_import",
]

_MIN_WEIGHTS = 25  # five in the tail, what a generalized Pareto fit needs


@functools.cache
def arviz_is_1x() -> bool:
    """Whether the installed ArviZ is 1.x (DataTree) and not 0.x (InferenceData)."""
    return int(importlib.metadata.version("arviz").split(".")[0]) >= 1


def quiet_import(name: str) -> ModuleType:
    """Import a module without the announcements ArviZ makes on import (a FutureWarning once a day)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return whole_import(name)


def psis(log_weights: Tensor | NDArray[Any]) -> tuple[Tensor, float]:
    """Pareto-smoothed importance weights and the shape k of their tail.

    Args:
        log_weights: (draw,), log importance ratios, unnormalized; ``-inf`` is a weight of zero.

    Returns:
        Smoothed log weights, shape (draw,), ``exp`` of which sum to one; and k. Trust estimates up to
        ``thresholds.pareto_k_limit(draw)``. k is 0 where all weights of the tail are equal (bounded, nothing
        to fit), ``inf`` with fewer than 25 positive weights (too few to tell), NaN where weights are NaN or infinite.
        Where they take too few values for a fit, k is 0 if they are worth 25 draws and ``inf`` if not.

    Raises:
        ValueError: if ``log_weights`` is not one-dimensional.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    original = log_weights.detach() if isinstance(log_weights, Tensor) else torch.from_numpy(log_weights)
    if original.ndim != 1 or original.numel() == 0:
        raise ValueError(f"log_weights must have shape (draw,) with draw >= 1, got {tuple(original.shape)}")
    logs = real_numbers("log_weights", original).to("cpu", torch.float64)
    normalized = logs - logs.logsumexp(0)
    positive = logs > -math.inf
    if not torch.isfinite(logs[positive]).all() or logs.isnan().any() or not positive.any():
        return torch.full_like(original, math.nan), math.nan
    kept = normalized[positive]
    enough = len(kept) >= _MIN_WEIGHTS
    tail = logs[positive].sort().values[-_tail_length(len(kept)) :] if enough else logs[positive]
    if tail.max() - tail.min() < _rounding(tail, original.dtype):  # a fit raises on ArviZ 1.x, is inf on 0.23
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
    peak = log_weights.amax(-1, keepdim=True)  # taken off: log weights of a thousand nats would be rounded
    logs = log_weights - torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    return (2 * logs.logsumexp(-1) - (2 * logs).logsumexp(-1)).exp()


def _rounding(tail: Tensor, dtype: torch.dtype) -> float:
    """Differences within the tail, of sums of larger terms, that are below what their precision can tell."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(1e-6, 8 * eps * float(tail.abs().max()))


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
    return torch.as_tensor(smoothed, dtype=log_weights.dtype, device="cpu"), float(k)


@contextmanager
def _silent() -> Iterator[None]:
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
