"""Samplers side by side, one row each, with a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics.moments import Moments, component_names, components, error_in_se, is_exact, moments
from pyro_ebm.inference.draws import Draws
from pyro_ebm.statistics import ess_bulk, ess_tail, importance_ess, psis, r_hat

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["compare"]


class _Thresholds(NamedTuple):
    max_r_hat: float
    min_ess: float
    max_pareto_k: float
    max_divergences: int
    max_error: float


def compare(
    draws: Mapping[str, Draws],
    *,
    reference: Draws | None = None,
    max_r_hat: float = 1.01,
    min_ess: float = 400.0,
    max_pareto_k: float = 0.7,
    max_divergences: int = 0,
    max_error: float = 4.0,
) -> pd.DataFrame:
    r"""Compare samplers of the same sites by their diagnostics.

    One row a sampler; the index holds the names. Columns:

    * ``method``, ``draws`` (per chain), ``chains``.
    * ``ess_bulk``, ``ess_tail``: minimum over all scalar components of all sites, in draws (summed over
      chains). Weighted draws: ``ess_bulk`` is :math:`1 / \sum w^2`; ``ess_tail`` is the number of
      independent draws that would know the probability below the 5 % or 95 % quantile as well. Points of
      a grid (method ``"quadrature"``) are no draws: NaN.
    * ``r_hat``: maximum over components; a single chain is cut into halves; NaN for weighted draws.
    * ``mcse_per_sd``: standard error of the mean in posterior standard deviations, maximum.
    * ``pareto_k``: tail of the importance weights. NaN for chains and grids.
    * ``divergences``, ``acceptance`` (mean), ``gradients``, ``seconds``: as counted by the sampler,
      warm-up included in the last two; NaN where unknown.
    * ``ess_per_second``, ``ess_per_gradient``: of ``ess_bulk``.
    * ``log_z``, ``log_z_se``: NaN where unknown, or where there is one per datum.
    * ``worst_error_in_se``: with a reference, the largest difference of a mean or of a mean square, in
      units of the standard errors of both in quadrature. Of many components some exceed 3 by chance.
      NaN for the reference itself, and for a grid against a grid.
    * ``verdict``: ``"ok"``, or each threshold that fell, for example ``"r_hat 1.08 > 1.01"``.

    Components that never change (zeros of a Cholesky factor) are left out of the diagnostics of chains.

    Args:
        draws: name -> draws, all of the same sites and shapes.
        reference: exact draws (a quadrature grid) or trusted ones (a long run).
        max_r_hat: R-hat above it falls.
        min_ess: bulk or tail ESS below it falls.
        max_pareto_k: Pareto k above it falls.
        max_divergences: more divergences than this fall.
        max_error: larger errors against the reference, in standard errors, fall.

    Returns:
        DataFrame with the columns above.

    Raises:
        TypeError: if an entry or the reference is not a ``Draws``.
        ValueError: if there is nothing to compare, or sites or shapes differ.

    Reference:
        Vehtari et al. (2021), Rank-normalization, folding, and localization, for the R-hat and ESS limits;
        Vehtari et al. (2024), Pareto smoothed importance sampling, for k.
    """
    import pandas as pd

    sites = _checked_sites(draws, reference)
    limits = _Thresholds(max_r_hat, min_ess, max_pareto_k, max_divergences, max_error)
    truth = None if reference is None else moments(reference, sites)
    rows = {}
    for name, each in draws.items():
        comparable = reference is not each and not (is_exact(each) and reference and is_exact(reference))
        rows[name] = _row(each, sites, truth if comparable else None, limits)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sampler")


def _checked_sites(draws: Mapping[str, Draws], reference: Draws | None) -> list[str]:
    if not isinstance(draws, Mapping):
        raise TypeError(f"draws must be a mapping {{name: Draws}}, got {type(draws).__name__}")
    if not draws:
        raise ValueError("draws is empty: give at least one sampler's draws")
    for name, each in draws.items():
        if not isinstance(each, Draws):
            raise TypeError(f"draws[{name!r}] must be a Draws, got {type(each).__name__}")
    if reference is not None and not isinstance(reference, Draws):
        raise TypeError(f"reference must be a Draws or None, got {type(reference).__name__}")
    shapes = {name: _site_shapes(each) for name, each in draws.items()}
    first = next(iter(shapes.values()))
    if any(each != first for each in shapes.values()):
        raise ValueError(f"draws must all have the same sites and shapes, got {shapes}")
    if reference is not None:
        known = _site_shapes(reference)
        wrong = [site for site in first if known.get(site) != first[site]]
        if wrong:
            raise ValueError(
                f"reference must have the draws' sites with their shapes, {first}; it has {known}"
            )
    return sorted(first)


def _site_shapes(draws: Draws) -> dict[str, tuple[int, ...]]:
    return {site: tuple(value.shape[2:]) for site, value in sorted(draws.values.items())}


def _row(draws: Draws, sites: list[str], truth: Moments | None, limits: _Thresholds) -> dict[str, Any]:
    x = components(draws, sites)
    own = moments(draws, sites)
    half = len(own.mean) // 2
    ess, tail = _effective_sizes(draws, x)
    gradients = math.nan if draws.num_gradients is None else float(draws.num_gradients)
    log_z, log_z_se = _scalars(draws)
    error, where = _worst_error(own, truth, component_names(draws, sites))
    row: dict[str, Any] = {
        "method": draws.method,
        "draws": draws.num_draws,
        "chains": draws.num_chains,
        "ess_bulk": ess,
        "ess_tail": tail,
        "r_hat": _worst_r_hat(x) if draws.log_weights is None else math.nan,
        "mcse_per_sd": _extreme((own.se / own.sd)[:half], max),
        "pareto_k": _pareto_k(draws),
        "divergences": float(draws.stats["diverging"].sum()) if "diverging" in draws.stats else math.nan,
        "acceptance": _mean_stat(draws, "acceptance_rate"),
        "gradients": gradients,
        "seconds": float(draws.seconds),
        "ess_per_second": ess / draws.seconds if draws.seconds > 0 else math.nan,
        "ess_per_gradient": ess / gradients if gradients > 0 else math.nan,
        "log_z": log_z,
        "log_z_se": log_z_se,
        "worst_error_in_se": error,
    }
    finite = bool(torch.isfinite(x).all()) and not bool(draws.weights.isnan().any())
    return {**row, "verdict": _verdict(row, draws, limits, finite=finite, where=where)}


def _verdict(row: dict[str, Any], draws: Draws, limits: _Thresholds, *, finite: bool, where: str) -> str:
    """Comparisons are written so that NaN, where a number is due, falls too."""
    fallen = [] if finite else ["draws or weights not finite"]
    if draws.log_weights is None and not row["r_hat"] <= limits.max_r_hat:
        fallen.append(f"r_hat {_number(row['r_hat'])} > {limits.max_r_hat:g}")
    if not is_exact(draws):
        for name in ("ess_bulk", "ess_tail"):
            if not row[name] >= limits.min_ess:
                fallen.append(f"{name} {row[name]:.0f} < {limits.min_ess:g}")
    if draws.log_weights is not None and not is_exact(draws) and not row["pareto_k"] <= limits.max_pareto_k:
        fallen.append(f"pareto_k {row['pareto_k']:.2f} > {limits.max_pareto_k:g}")
    if row["divergences"] > limits.max_divergences:
        fallen.append(f"divergences {row['divergences']:.0f} > {limits.max_divergences}")
    if row["worst_error_in_se"] > limits.max_error:
        fallen.append(f"error {row['worst_error_in_se']:.1f} > {limits.max_error:g} se ({where})")
    return "; ".join(fallen) or "ok"


def _number(value: float) -> str:
    """Two decimals, or as many as it takes to differ from 1."""
    return f"{value:.2f}" if math.isnan(value) or abs(value - 1) >= 0.015 else f"{value:.4f}"


def _effective_sizes(draws: Draws, x: Tensor) -> tuple[float, float]:
    if is_exact(draws):
        return math.nan, math.nan
    if draws.log_weights is None:
        return _extreme(ess_bulk(x), min), _extreme(ess_tail(x), min)
    logs = draws.log_weights.detach().cpu().double().flatten()
    return float(importance_ess(logs)), _extreme(_weighted_tail_ess(logs.softmax(0), x.flatten(0, 1)), min)


def _weighted_tail_ess(weights: Tensor, x: Tensor) -> Tensor:
    r"""``p (1 - p) / se^2`` of the weighted share ``p`` below the 5 % and the 95 % quantile, each component.

    With ``se^2 = sum_i w_i^2 (1[x_i <= q] - p)^2``. Shape (2, component).
    """
    ordered, order = x.sort(0)
    w = weights[order]
    cumulative = w.cumsum(0)
    sizes = []
    for prob in (0.05, 0.95):
        index = (cumulative < prob).sum(0).clamp(max=len(x) - 1)
        below = (ordered <= ordered.gather(0, index[None])).double()
        p = (w * below).sum(0)
        se2 = (w**2 * (below - p) ** 2).sum(0)
        sizes.append(p * (1 - p) / se2)
    return torch.stack(sizes)


def _worst_r_hat(x: Tensor) -> float:
    if len(x) == 1:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half], x[:, -half:]]) if half else x
    return _extreme(r_hat(x), max)


def _worst_error(own: Moments, truth: Moments | None, names: list[str]) -> tuple[float, str]:
    if truth is None:
        return math.nan, ""
    error = error_in_se(own, truth)
    labels = [f"mean of {name}" for name in names] + [f"mean square of {name}" for name in names]
    return _extreme(error, max), labels[int(error.nan_to_num(nan=-1.0, posinf=math.inf).argmax())]


def _pareto_k(draws: Draws) -> float:
    if draws.log_weights is None or is_exact(draws):
        return math.nan
    return psis(draws.log_weights.flatten())[1] if draws.pareto_k is None else float(draws.pareto_k)


def _scalars(draws: Draws) -> tuple[float, float]:
    if draws.log_z is None or torch.as_tensor(draws.log_z.value).numel() != 1:
        return math.nan, math.nan
    return float(draws.log_z.value), float(draws.log_z.se)


def _mean_stat(draws: Draws, name: str) -> float:
    return float(draws.stats[name].double().mean()) if name in draws.stats else math.nan


def _extreme(values: Tensor | np.ndarray, choose: Any) -> float:
    """``min`` or ``max`` over the entries that are numbers, NaN when none is."""
    numbers: Iterable[float] = [v for v in torch.as_tensor(values).flatten().tolist() if not math.isnan(v)]
    return float(choose(numbers, default=math.nan))
