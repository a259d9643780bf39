"""Samplers side by side, one row each, with a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.checks import finite_numbers
from pyro_ebm.convergence import agreement, superchains_of, worst_agreement
from pyro_ebm.diagnostics.moments import (
    MIN_ISLANDS,
    Moments,
    Worth,
    component_names,
    components,
    error_in_se,
    has_islands,
    is_exact,
    moments,
    worth,
)
from pyro_ebm.inference.draws import Draws
from pyro_ebm.thresholds import MAX_R_HAT, MIN_STARTS, pareto_k_limit

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["compare", "find_reference"]

_NO_COLUMN = {"lp", "energy", "diverging", "acceptance_rate"}  # averages that say nothing, or have a column


class _Thresholds(NamedTuple):
    max_r_hat: float
    min_ess: float
    max_pareto_k: float
    max_divergent: float
    max_error: float


@checked
def compare(
    draws: Mapping[str, Draws],
    *,
    reference: Draws | str | None = None,
    max_r_hat: float = MAX_R_HAT,
    min_ess: float = 400.0,
    max_pareto_k: float | None = None,
    max_divergent: float = 0.001,
    max_error: float = 4.0,
) -> pd.DataFrame:
    r"""Compare samplers of the same sites by their diagnostics.

    One row a sampler; the index holds the names. Columns:

    * ``method``, ``draws`` (per chain), ``chains`` (for ``"smc"``: islands).
    * ``ess_bulk``, ``ess_tail``: minimum over all scalar components of all sites, in draws (summed over
      chains). Weighted draws: ``ess_bulk`` is the variance by the squared standard error of the mean, at
      most :math:`1 / \sum w^2`; ``ess_tail`` is the number of
      independent draws that would know the probability below the 5 % or 95 % quantile as well. Particles of
      one island share ancestors: with four islands or more both come from what islands differ by
      (variance by squared standard error, at most :math:`1 / \sum w^2`); being the smallest of several
      noisy numbers they are conservative, the more so the fewer the islands. Points of a grid (method
      ``"quadrature"``) are no draws: NaN.
    * ``r_hat``: maximum over components; a single chain is cut into halves; NaN for weighted draws.
    * ``mcse_per_sd``: standard error of the mean in posterior standard deviations, maximum.
    * ``pareto_k``: tail of the importance weights. NaN for chains, grids and particles.
    * ``divergences`` (all data together), ``acceptance`` (mean), ``gradients``, ``seconds``: as counted by
      the sampler, warm-up included in the last two; NaN where unknown.
    * ``ess_per_second``, ``ess_per_gradient``: of ``ess_bulk``.
    * ``log_z``, ``log_z_se``: of a tilted model without its own log Z, whatever its ``normalize``; NaN where unknown,
      or where there is one per datum.
    * the mean of every further statistic that some of the samplers recorded (``step_size``, ``n_steps``,
      ``tree_depth``, ...), and ``temperatures``, how many an annealed sampler went through; NaN elsewhere.
    * ``worst_error_in_se``: with a reference, the largest difference of a mean or of a mean square, in
      units of the standard errors of both in quadrature. Of many components some exceed 3 by chance.
      NaN for the reference itself, and for a grid against a grid.
    * ``verdict``: ``"ok"``, or each threshold that fell, for example ``"r_hat 1.08 > 1.01 (z[3])"``. Particles
      and chains fall with fewer than four different starting points (``"starts 1 < 4"``; of draws that do not tell,
      as many as there are chains): R-hat cannot show a mode that all have missed. Particles
      also fall with fewer than four islands (``"islands 1 < 4"``, their error is then unknown), and
      islands where few of them hold the weight (less than half, counted as :math:`1 / \sum W^2`).

    Components that never change (zeros of a Cholesky factor) are left out of the diagnostics of chains.

    Args:
        draws: name -> draws, all of the same sites and shapes.
        reference: exact draws (a quadrature grid) or trusted ones (a long run), or the name of an entry.
        max_r_hat: R-hat above it falls. Many chains, each of which is short, may have a larger one by what their length
            explains (see ``convergence.py``); chains of ``MCMC(superchains=...)`` are held to it by nested R-hat.
        min_ess: bulk or tail ESS below it falls.
        max_pareto_k: Pareto k above it falls; by default what the number of draws allows, at most 0.7.
        max_divergent: divergences fall when they may stand for more than this share of transitions: the
            upper end of a 95 % interval counts. Of 4,000 transitions any that diverges falls, of a million
            about 940 may. Data sampled each on its own are each held to it. With 0 any divergence falls.
        max_error: larger errors against the reference, in standard errors, fall. Where few islands know
            the standard error only roughly, the limit is that of Student's t for the same probability.

    Returns:
        DataFrame with the columns above.

    Raises:
        TypeError: if an entry or the reference is not a ``Draws``.
        ValueError: if there is nothing to compare, sites or shapes differ, no entry has the reference's name, or the
            reference holds NaN or infinity.

    Reference:
        Vehtari et al. (2021), Rank-normalization, folding, and localization, for the R-hat and ESS limits;
        Vehtari et al. (2024), Pareto smoothed importance sampling, for k.
    """
    import pandas as pd

    _check_entries(draws)
    reference = find_reference(draws, reference)
    sites = _shared_sites(draws, reference)
    truth = None if reference is None else moments(reference, sites)
    rows = {}
    for name, each in draws.items():
        comparable = reference is not each and not (is_exact(each) and reference and is_exact(reference))
        error = _error_limit(max_error, each, reference)
        num = each.num_chains * each.num_draws
        max_k = pareto_k_limit(num) if max_pareto_k is None else max_pareto_k
        limits = _Thresholds(max_r_hat, min_ess, max_k, max_divergent, error)
        rows[name] = _row(each, sites, truth if comparable else None, limits)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("sampler")
    extra = pd.DataFrame.from_dict({name: _kernel_stats(each) for name, each in draws.items()}, orient="index")
    for name in sorted(set(extra.columns) - set(table.columns)):
        table.insert(table.columns.get_loc("worst_error_in_se"), name, extra[name])
    return table


def find_reference(draws: Mapping[str, Draws], reference: Draws | str | None) -> Draws | None:
    """The reference itself, or the entry of that name; a ValueError where it holds NaN."""
    if isinstance(reference, str):
        if reference not in draws:
            raise ValueError(f"reference {reference!r} is not among the draws; names: {sorted(draws)}")
        reference = draws[reference]
    if isinstance(reference, Draws):
        compared = {site for each in draws.values() for site in each.values}
        _check_finite(reference, [site for site in reference.values if site in compared])
    return reference


def _check_entries(draws: Mapping[str, Draws]) -> None:
    if not isinstance(draws, Mapping):
        raise TypeError(f"draws must be a mapping {{name: Draws}}, got {type(draws).__name__}")
    if not draws:
        raise ValueError("draws is empty: give at least one sampler's draws")
    for name, each in draws.items():
        if not isinstance(each, Draws):
            raise TypeError(f"draws[{name!r}] must be a Draws, got {type(each).__name__}")


def _shared_sites(draws: Mapping[str, Draws], reference: Draws | None) -> list[str]:
    if reference is not None and not isinstance(reference, Draws):
        raise TypeError(f"reference must be a Draws, a name or None, got {type(reference).__name__}")
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


def _check_finite(reference: Draws, sites: list[str]) -> None:
    """Nothing is an error against a reference with holes: each comparison with it would be left out."""
    for site in sites:
        finite_numbers(f"reference: values of site {site!r}", reference.values[site])
    if bool(reference.weights.isnan().any()):
        raise ValueError("reference: its weights are NaN; draw it anew, or leave reference=None")


def _site_shapes(draws: Draws) -> dict[str, tuple[int, ...]]:
    return {site: tuple(value.shape[2:]) for site, value in sorted(draws.values.items())}


def _row(draws: Draws, sites: list[str], truth: Moments | None, limits: _Thresholds) -> dict[str, Any]:
    x = components(draws, sites)
    own = moments(draws, sites)
    half = len(own.mean) // 2
    names, found = component_names(draws, sites), worth(draws, x)
    ess = _extreme(found.bulk, min)
    gradients = math.nan if draws.num_gradients is None else float(draws.num_gradients)
    log_z, log_z_se = _scalars(draws)
    error, where = _worst_error(own, truth, names)
    row: dict[str, Any] = {
        "method": draws.method,
        "draws": draws.num_draws,
        "chains": draws.num_chains,
        "ess_bulk": ess,
        "ess_tail": _extreme(found.tail, min),
        "r_hat": _extreme(found.r_hat, max),
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
    fallen = ([] if finite else ["draws or weights not finite"]) + _fallen_r_hat(row, draws, found, names, limits)
    fallen += _fallen_ess(row, draws, found, names, limits)
    return {**row, "verdict": _verdict(fallen, row, draws, limits, where)}


def _verdict(fallen: list[str], row: dict[str, Any], draws: Draws, limits: _Thresholds, where: str) -> str:
    fallen = fallen + _fallen_starts(draws) + _fallen_weights(row, draws, limits) + _fallen_divergences(draws, limits)
    if row["worst_error_in_se"] > limits.max_error:
        fallen.append(f"error {row['worst_error_in_se']:.1f} > {limits.max_error:.3g} se ({where})")
    return "; ".join(fallen) or "ok"


def _fallen_r_hat(
    row: dict[str, Any], draws: Draws, found: Worth, names: list[str], limits: _Thresholds
) -> list[str]:
    """Comparisons are written so that NaN, where a number is due, falls too."""
    if draws.log_weights is not None:
        return []
    if (groups := superchains_of(draws)) is not None:
        worst = agreement(draws.values, limits.max_r_hat, groups)
        where = worst.where
    else:
        excess, allowance = found.excess.cpu().numpy(), found.allowance.cpu().numpy()
        worst, index = worst_agreement(excess, allowance, limits.max_r_hat, draws.num_chains)
        where = names[index] if names else ""
    if math.isnan(worst.r_hat):  # a single chain: that of its halves
        worst, where = worst._replace(r_hat=row["r_hat"], limit=limits.max_r_hat), _lowest(-found.r_hat, names)
    if worst.holds:
        return []
    limit = f"{worst.limit:.3f}".rstrip("0").rstrip(".") if worst.limit > limits.max_r_hat else f"{limits.max_r_hat:g}"
    kind = "nested_r_hat" if worst.nested else "r_hat"
    return [f"{kind} {_number(worst.r_hat)} > {limit}{where and f' ({where})'}"]


def _fallen_ess(row: dict[str, Any], draws: Draws, found: Worth, names: list[str], limits: _Thresholds) -> list[str]:
    fallen = []
    for name, sizes in (("ess_bulk", found.bulk), ("ess_tail", found.tail)):
        if not is_exact(draws) and not row[name] >= limits.min_ess:
            where = "" if draws.log_weights is not None else _lowest(sizes, names)
            fallen.append(f"{name} {row[name]:.0f} < {limits.min_ess:g}{where and f' ({where})'}")
    return fallen


def _lowest(values: Tensor, names: list[str]) -> str:
    """The component with the smallest value; none where none has a value."""
    flat = values.flatten()
    return "" if not len(flat) or bool(flat.isnan().all()) else names[int(flat.nan_to_num(nan=math.inf).argmin())]


def _fallen_starts(draws: Draws) -> list[str]:
    """Of chains and particles: where they come from too few points, no comparison of them shows what they missed."""
    if draws.log_weights is not None and not _are_particles(draws):
        return []
    count = draws.notes.get("distinct_starts", draws.num_chains if draws.log_weights is None else MIN_STARTS)
    return [] if count >= MIN_STARTS else [f"starts {count} < {MIN_STARTS}"]


def _fallen_weights(row: dict[str, Any], draws: Draws, limits: _Thresholds) -> list[str]:
    if draws.log_weights is None or is_exact(draws):
        return []
    fallen, count = [], draws.num_chains
    if _are_particles(draws) and count < MIN_ISLANDS:
        fallen.append(f"islands {count} < {MIN_ISLANDS}")
    if has_islands(draws):
        shares = draws.log_weights.detach().cpu().double().logsumexp(1)
        effective = float(importance_ess(shares))
        if effective < count / 2:
            fallen.append(f"weight on {effective:.1f} of {count} islands")
    due = draws.pareto_k is not None or not _are_particles(draws)
    if due and not row["pareto_k"] <= limits.max_pareto_k:
        fallen.append(f"pareto_k {row['pareto_k']:.2f} > {limits.max_pareto_k:.2g}")
    return fallen


def _fallen_divergences(draws: Draws, limits: _Thresholds) -> list[str]:
    """Of the datum that diverges most, where data are sampled each on its own."""
    if "diverging" not in draws.stats:
        return []
    counts = draws.stats["diverging"].flatten(0, 1).sum(0)
    count, total = int(counts.max()), draws.num_chains * draws.num_draws
    # close to the exact upper limit of a Poisson count: 5.7 for 1 (exactly 5.6), 18.5 for 10 (18.4)
    highest = min(1.0, (math.sqrt(count + 1) + 0.98) ** 2 / total)
    if not count or highest <= limits.max_divergent:
        return []
    where = f" of datum {int(counts.argmax())}" if counts.ndim else ""
    return [f"divergences {count} of {total}{where} (up to {highest:.2%} > {100 * limits.max_divergent:.3g}%)"]


def _are_particles(draws: Draws) -> bool:
    """Whether the points of one chain share ancestors."""
    return draws.method == "smc"


def _error_limit(normal_limit: float, *involved: Draws | None) -> float:
    """What a Student's t exceeds as rarely as a normal exceeds ``normal_limit``, where islands are involved."""
    counts = [each.num_chains for each in involved if each is not None and has_islands(each)]
    if not counts:
        return normal_limit
    from scipy import stats

    return float(stats.t.isf(stats.norm.sf(normal_limit), min(counts) - 1))


def _number(value: float) -> str:
    """Two decimals, or as many as it takes to differ from 1."""
    return f"{value:.2f}" if math.isnan(value) or abs(value - 1) >= 0.015 else f"{value:.4f}"


def _worst_error(own: Moments, truth: Moments | None, names: list[str]) -> tuple[float, str]:
    if truth is None:
        return math.nan, ""
    error = error_in_se(own, truth)
    labels = [f"mean of {name}" for name in names] + [f"mean square of {name}" for name in names]
    return _extreme(error, max), labels[int(error.nan_to_num(nan=-1.0, posinf=math.inf).argmax())]


def _pareto_k(draws: Draws) -> float:
    if draws.log_weights is None or is_exact(draws):
        return math.nan
    if draws.pareto_k is not None:
        return float(draws.pareto_k)
    # Resampling has cut the tail of the particles' weights: a fit to it would tell nothing.
    return math.nan if _are_particles(draws) else psis(draws.log_weights.flatten())[1]


def _scalars(draws: Draws) -> tuple[float, float]:
    if draws.log_z is None or torch.as_tensor(draws.log_z.value).numel() != 1:
        return math.nan, math.nan
    return float(draws.log_z.value), float(draws.log_z.se)


def _mean_stat(draws: Draws, name: str) -> float:
    return float(draws.stats[name].double().nanmean()) if name in draws.stats else math.nan


def _kernel_stats(draws: Draws) -> dict[str, float]:
    """What this sampler knows and others need not."""
    known = {name: _mean_stat(draws, name) for name in draws.stats if name not in _NO_COLUMN}
    if "temperatures" in draws.notes:
        known["temperatures"] = _ladder_length(draws.notes["temperatures"])
    return known


def _ladder_length(temperatures: Any) -> float:
    """Of one ladder, or the mean over those of the islands; a number is the length itself."""
    if not isinstance(temperatures, list | tuple | Tensor):
        return float(temperatures)
    lengths = [len(ladder) for ladder in temperatures if isinstance(ladder, list | tuple)]
    if isinstance(temperatures, Tensor):
        return float(temperatures.shape[-1])
    return sum(lengths) / len(lengths) if lengths else float(len(temperatures))


def _extreme(values: Tensor | np.ndarray, choose: Any) -> float:
    """``min`` or ``max`` over the entries that are numbers, NaN when none is."""
    numbers: Iterable[float] = [v for v in values.flatten().tolist() if not math.isnan(v)]
    return float(choose(numbers, default=math.nan))
