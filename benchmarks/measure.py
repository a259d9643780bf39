"""What one sampler did on one target, and the numbers that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyro_ebm.chain_statistics import ess_bulk, mcse_mean, r_hat


@dataclass(frozen=True, eq=False)
class Run:
    """What a contender returns.

    Args:
        values: (chain, draw, dim) on the constrained scale, sites flattened and in the target's order.
        seconds: from the first call to the last draw: set-up, compilation, warm-up and draws.
        sampling_seconds: of the draws alone.
        gradients: gradient evaluations of the draws, over all chains; NaN where not counted.
        warmup: warm-up steps per chain.
        planned: draws per chain that were asked for; more than there are where a time limit ended the run.
        log_weights: (chain, draw) of importance sampling or of particles.
        islands: chains are independent repetitions whose draws depend on each other in ways that no
            autocorrelation shows, as particles do: the effective sample size comes from their spread.
        notes: settings worth a line in the table.
    """

    values: np.ndarray
    seconds: float
    sampling_seconds: float
    gradients: float = math.nan
    warmup: int = 0
    planned: int | None = None
    log_weights: np.ndarray | None = None
    islands: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reference:
    """The truth: means and second moments about those means, with the standard errors of both."""

    kind: str
    mean: np.ndarray
    variance: np.ndarray
    mean_se: np.ndarray
    variance_se: np.ndarray


def measures(run: Run, reference: Reference | None) -> dict[str, Any]:
    """One row of the table: see the columns in ``report.py``."""
    chains, draws, dim = run.values.shape
    row: dict[str, Any] = {"chains": chains, "draws": draws, "warmup": run.warmup, "dim": dim, "notes": run.notes}
    smallest, worst = _ess_and_r_hat(run)
    stretch = 1.0 if run.planned is None else max(run.planned / draws, 1.0)
    all_in = run.seconds + (stretch - 1) * run.sampling_seconds
    row |= {
        "ess": smallest,
        "r_hat": worst,
        "seconds": run.seconds,
        "sampling_seconds": run.sampling_seconds,
        # A run that its time limit ended is carried on, at its own pace, to the number of draws planned.
        "extrapolated": stretch > 1,
        "planned": run.planned or draws,
        "ess_per_second": smallest * stretch / all_in,
        "ess_per_second_draws": smallest / run.sampling_seconds,
        "gradients": _plain(run.gradients),
        "ess_per_gradient": _plain(smallest / run.gradients) if run.gradients else None,
    }
    if reference is not None:
        worst, compared = _largest_error(run, reference)
        row |= {"error": worst, "compared": compared, "reference": reference.kind}
    return row


def _ess_and_r_hat(run: Run) -> tuple[float, float | None]:
    """The smallest ESS over the coordinates, and the largest R-hat where chains are Markov chains."""
    if run.islands:
        return _island_ess(run), None
    if run.log_weights is not None:
        return float(1 / np.square(_weights(run)).sum()), None
    worst = float(np.nan_to_num(r_hat(run.values), nan=np.inf).max())
    return float(np.nan_to_num(ess_bulk(run.values)).min()), worst


def _island_means(run: Run, values: np.ndarray) -> np.ndarray:
    """The mean of each island, (island, dim)."""
    logs = np.zeros(values.shape[:2]) if run.log_weights is None else run.log_weights.astype(np.float64)
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return np.einsum("cd,cdk->ck", weights / weights.sum(1, keepdims=True), values)


def _island_ess(run: Run) -> float:
    """Variance of the target over the variance of the mean of all islands; the least of the coordinates."""
    means = _island_means(run, run.values)
    spread = _island_means(run, (run.values - means.mean(0)) ** 2).mean(0)
    return float((len(means) * spread / means.var(0, ddof=1)).min())


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _weights(run: Run) -> np.ndarray:
    assert run.log_weights is not None
    logs = run.log_weights.astype(np.float64).ravel()
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def _largest_error(run: Run, reference: Reference) -> tuple[float, int]:
    """The largest error of a mean or a variance, in standard errors of both sides, and how many were looked at."""
    squared = (run.values - reference.mean) ** 2
    if run.islands:
        islands = [_island_means(run, x) for x in (run.values, squared)]
        means = [x.mean(0) for x in islands]
        ses = [x.std(0, ddof=1) / np.sqrt(len(x)) for x in islands]
    elif run.log_weights is None:
        means, ses = [x.mean((0, 1)) for x in (run.values, squared)], [mcse_mean(x) for x in (run.values, squared)]
    else:
        weights, flat = _weights(run), [x.reshape(-1, x.shape[-1]) for x in (run.values, squared)]
        means = [weights @ x for x in flat]
        ses = [np.sqrt(np.square(weights) @ (x - m) ** 2) for x, m in zip(flat, means, strict=True)]
    truth = ((reference.mean, reference.mean_se), (reference.variance, reference.variance_se))
    errors = [
        np.abs(found - exact) / np.sqrt(np.nan_to_num(se, nan=0.0) ** 2 + exact_se**2 + 1e-24)
        for found, se, (exact, exact_se) in zip(means, ses, truth, strict=True)
    ]
    joined = np.concatenate(errors)
    return float(joined.max()), len(joined)


def expected_largest(num: int) -> float:
    """What the largest of ``num`` independent standard errors comes to for a sampler without any bias, on average."""
    generator = np.random.default_rng(0)
    return float(np.abs(generator.standard_normal((2_000, num))).max(1).mean())
