"""Weighted draws for what reads no weights: draws that all weigh the same, the same ones at each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.errors import warn_user
from pyro_ebm.inference.draws import Draws
from pyro_ebm.randomness import fingerprint
from pyro_ebm.thresholds import pareto_k_limit

__all__ = ["Resampled", "resampled", "warn_of_weights", "weigh_the_same"]

_CHAINS = 4  # draws that are independent of each other can be dealt as one likes; ArviZ wants several chains
_OF_A_GRID = 4000  # its points have no Monte Carlo error: as many as of four usual chains
_FEWEST = 100  # 25 a chain; weights that are worth less are warned of
_ROW = "row of the weighted draw"


class Resampled(NamedTuple):
    """Draws that weigh the same, and where they come from.

    Args:
        draws: without weights.
        rows: (draw,), of each its position among the weighted draws, chain after chain; ``None`` where all were kept.
        told: how they came about, for the record; ``""`` for draws that had no weights.
    """

    draws: Draws
    rows: Tensor | None = None
    told: str = ""


def weigh_the_same(draws: Draws) -> bool:
    """Whether there are no weights, or equal ones (particles that were just resampled)."""
    logs = draws.log_weights
    return logs is None or float(logs.max() - logs.min()) <= 1e-6


def resampled(draws: Draws, num_samples: int | None = None) -> Resampled:
    r"""Draws by importance resampling, dealt into four chains where their number allows.

    The seed is a function of the weights, and no generator of the user's moves: the same draws each time, so that
    what is computed from them in two places belongs together. Draws that weigh the same are returned as they are.

    Args:
        draws: weighted or not.
        num_samples: how many of weighted ones. By default what the weights are worth, :math:`1 / \sum w^2`, and 100
            at least: copies would make the standard errors of ArviZ too small. 4,000 of a quadrature grid.
    """
    logs = draws.log_weights
    if logs is None:
        return Resampled(draws)
    if num_samples is None and weigh_the_same(draws):
        return Resampled(dataclasses.replace(draws, log_weights=None), None, "all draws, which weigh the same")
    ess, total = float(importance_ess(logs.flatten().double())), logs.numel()
    num = _number(draws, ess) if num_samples is None else num_samples
    generator = torch.Generator().manual_seed(fingerprint((logs,), "resampled"))
    positions = torch.arange(total, device=logs.device).reshape(logs.shape)
    numbered = dataclasses.replace(draws, stats={**draws.stats, _ROW: positions})
    chosen = numbered.equally_weighted(num, generator=generator)
    rows = chosen.stats[_ROW].flatten()
    stats = {name: value for name, value in chosen.stats.items() if name != _ROW}
    chains = _CHAINS if num % _CHAINS == 0 else 1
    dealt = dataclasses.replace(chosen, values=_dealt(chosen.values, chains), stats=_dealt(stats, chains))
    return Resampled(dealt, rows, f"{num} draws, resampled from {total} weighted ones that are worth {ess:.1f}")


def warn_of_weights(draws: Draws) -> None:
    """Warn where the weights are worth too few draws, or their tail is too heavy, for what is made of them.

    Warns:
        InferenceWarning: with fewer than 100 effective draws, or Pareto k above what their number allows.
    """
    logs = draws.log_weights
    if logs is None or draws.method == "quadrature":
        return
    ess, limit = float(importance_ess(logs.flatten().double())), pareto_k_limit(logs.numel())
    problems = [f"are worth {ess:.1f} of {logs.numel()} draws"] if not ess >= _FEWEST else []
    if draws.pareto_k is not None and not draws.pareto_k <= limit:
        problems.append(f"have Pareto k = {draws.pareto_k:.2f} > {limit:.2g}")
    if problems:
        warn_user(
            f"the weights {' and '.join(problems)}: draws resampled by them are copies of few, and what is computed "
            f'from them is not to be trusted; use more samples, a guide, or MCMC (method="chees")'
        )


def _number(draws: Draws, ess: float) -> int:
    num = _OF_A_GRID if draws.method == "quadrature" else int(max(_FEWEST, ess))  # NaN: 100, which are refused
    return num - num % _CHAINS


def _dealt(tensors: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
    return {name: value.reshape(chains, -1, *value.shape[2:]) for name, value in tensors.items()}
