"""Samplers side by side: do chains mix, what are the draws worth, are the means right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_ebm.annotations import checked
from pyro_ebm.checks import require_attributes
from pyro_ebm.diagnostics.compare import find_reference
from pyro_ebm.diagnostics.moments import Moments, bulk_ess, component_names, components, error_in_se, moments
from pyro_ebm.inference.draws import Draws
from pyro_ebm.plots.style import INK, MUTED, Look, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["plot_compare"]

_MAX_CHAINS, _MAX_COMPONENTS, _BINS, _PANELS_A_ROW = 8, 12, 20, 5
_LINEAR_TO = 10.0  # errors beyond are drawn on a logarithmic scale
_ENOUGH = 400  # bulk ESS from which R-hat and standard errors can be relied on (Vehtari et al. 2021)


@checked
def plot_compare(
    draws: Mapping[str, Draws],
    *,
    reference: Draws | str | None = None,
    axes: Sequence[Axes] | NDArray[np.object_] | None = None,
) -> NDArray[np.object_]:
    """Rank histograms of the chains, effective sample sizes, and means against a reference.

    Panels, in this order:

    * one for each Markov chain method: ranks of each chain's draws among those of all chains, for the
      component with the smallest bulk ESS. Flat when chains agree; a single chain is cut in halves.
      Of many chains eight are shown, from the one with the lowest mean rank to that with the highest.
    * effective sample size: ``ess_bulk`` as in :func:`compare`.
    * error of each mean and mean square in units of its standard error, ``(estimate - reference) / se``,
      where a band at +-4 holds what chance explains (a little more with few islands of weighted draws);
      beyond 10 the scale is logarithmic. Without a reference: means with +-2 standard errors, relative
      to the average over methods. Of many components those with the largest deviations are shown.

    Args:
        draws: name of the method -> its draws; all with the same sites and shapes.
        reference: exact or trusted draws, for example from ``quadrature``; or the name of an entry.
        axes: as many axes as there are panels; a new figure when ``None``.

    Returns:
        Array of the axes, shape (panels,).

    Reference:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization.
    """
    for each in draws.values():
        require_attributes("draws", each, ("values", "method"), "a mapping of names to Draws")
    yardstick = reference if isinstance(reference, str) else getattr(reference, "method", "")
    reference = find_reference(draws, reference)
    sites, names = _components(draws, reference)
    chained = [name for name in draws if draws[name].log_weights is None]
    panels = _panels(axes, len(chained))
    look = looks(draws, {name: each.method for name, each in draws.items()})
    bulk = {name: bulk_ess(each, components(each, sites)).numpy() for name, each in draws.items()}
    for ax, name in zip(panels, chained, strict=False):
        worst = int(np.argmin(np.nan_to_num(bulk[name], nan=np.inf)))
        _plot_ranks(ax, components(draws[name], sites)[..., worst].numpy(), look[name].color)
        ax.set_title(f"{name}: ranks of {names[worst]}", fontsize="medium")
    _plot_ess(panels[-2], _worth(bulk), look)
    found = {name: moments(each, sites) for name, each in draws.items() if each is not reference}
    if reference is None:
        _plot_means(panels[-1], found, names, look)
    else:
        _plot_errors(panels[-1], found, moments(reference, sites), names, look)
        panels[-1].set_title(rf"error against {yardstick} (band: $\pm$4)", fontsize="medium")
    return panels


def _components(draws: Mapping[str, Draws], reference: Draws | None) -> tuple[list[str], list[str]]:
    """Sites, and names of all their scalar components; both must be shared by all draws."""
    if not draws:
        raise ValueError("draws is empty: give at least one name and its draws")
    names = {method: component_names(each, sorted(each.values)) for method, each in draws.items()}
    method, first = next(iter(names.items()))
    if any(other != first for other in names.values()):
        raise ValueError(f"draws must all have the same sites and shapes, got components {names}")
    sites = sorted(draws[method].values)
    if reference is not None:
        known = component_names(reference, [site for site in sites if site in reference.values])
        if known != first:
            raise ValueError(f"reference must have the components of the draws, {first}; it has {known}")
    return sites, first


def _worth(bulk: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Effective sample size by method, where there is one: the ESS of a grid would say nothing about precision."""
    return {name: float(np.nanmin(sizes)) for name, sizes in bulk.items() if not np.isnan(sizes).all()}


def _panels(axes: Sequence[Axes] | NDArray[np.object_] | None, num_chained: int) -> NDArray[np.object_]:
    if axes is not None:
        given = np.asarray(axes, dtype=object).ravel()
        if given.size != num_chained + 2:
            raise ValueError(
                f"axes must hold {num_chained + 2} axes (one for each of {num_chained} chain methods, one "
                f"for ESS, one for means), got {given.size}"
            )
        return given
    from matplotlib import pyplot as plt

    height = math.ceil(num_chained / _PANELS_A_ROW)
    columns = math.ceil(num_chained / max(height, 1))
    figure = plt.figure(figsize=(max(9.0, 3.2 * columns), 3.4 + 3.0 * height), layout="constrained")
    grid = figure.add_gridspec(height + 1, 1)
    upper = [grid[row].subgridspec(1, columns) for row in range(height)]
    cells = [upper[i // columns][0, i % columns] for i in range(num_chained)]
    lower = grid[-1].subgridspec(1, 2, width_ratios=(1, 1.5))
    return np.array([figure.add_subplot(cell) for cell in [*cells, lower[0, 0], lower[0, 1]]], dtype=object)


def _plot_ranks(ax: Axes, column: NDArray[np.float64], tone: str) -> None:
    """Rank histogram of each chain of a (chain, draw) array, one above the other."""
    halves = column.shape[0] == 1
    if halves:
        column = column[:, : column.shape[1] // 2 * 2].reshape(2, -1)
    count, length = column.shape
    ranks = column.ravel().argsort(kind="stable").argsort(kind="stable").reshape(count, length) / column.size
    by_mean = np.arange(count) if count <= _MAX_CHAINS else ranks.mean(1).argsort(kind="stable")
    shown = by_mean[np.linspace(0, count - 1, min(count, _MAX_CHAINS)).round().astype(int)]
    bins = max(2, min(_BINS, length // 10))
    edges = np.linspace(0.0, 1.0, bins + 1)
    for row, chain in enumerate(shown):
        # 1 where the chain agrees with the others
        height = np.histogram(ranks[chain], edges)[0] * bins / length
        ax.stairs(row + 0.4 * height.clip(max=2.2), edges, baseline=row, fill=True, color=tone, alpha=0.75)
        ax.hlines(row + 0.4, 0.0, 1.0, color=INK, linestyle=(0, (4, 2)), linewidth=0.9)
    ax.set_yticks(
        np.arange(len(shown)) + 0.2, ["first half", "second half"] if halves else [str(c) for c in shown]
    )
    ax.set_ylabel(
        "" if halves else "chain" if len(shown) == count else f"chain ({len(shown)} of {count}, by mean rank)"
    )
    ax.set(xlabel="rank among all draws (fraction)", xlim=(0.0, 1.0), ylim=(-0.1, len(shown)))


def _plot_ess(ax: Axes, worth: dict[str, float], look: dict[str, Look]) -> None:
    for row, (name, value) in enumerate(worth.items()):
        ax.barh(row, value, height=0.6, color=look[name].color)
        # On white, because the dashed line may run through it.
        ax.annotate(
            f"{value:,.0f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center", zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    highest = max([_ENOUGH, *worth.values()])
    ax.axvline(_ENOUGH, color=INK, linestyle=(0, (4, 2)), linewidth=1.0)
    ax.set_xscale("log")
    ax.set_xlim(min([_ENOUGH, *worth.values()]) / 4, highest * 6)
    ax.set_yticks(range(len(worth)), list(worth))
    ax.invert_yaxis()
    ax.set_xlabel("draws, for the worst component")
    ax.set_title(f"effective sample size (dashed: {_ENOUGH})", fontsize="medium")


def _plot_errors(
    ax: Axes, found: dict[str, Moments], truth: Moments, names: list[str], look: dict[str, Look]
) -> None:
    scores = {}
    for name, each in found.items():
        signed = ((each.mean - truth.mean).sign() * error_in_se(each, truth)).numpy()
        scores[name] = np.where(np.isfinite(signed), signed, np.nan)
    ax.axhspan(-4.0, 4.0, color=MUTED, alpha=0.2, linewidth=0)
    _by_component(ax, scores, {}, [*names, *(f"{name}$^2$" for name in names)], look)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -5.0), max(high, 5.0))
    if max(-low, high) > 2 * _LINEAR_TO:
        _compress(ax)
    ax.set_ylabel("error / standard error")


def _compress(ax: Axes) -> None:
    """One method far off must not hide how the others compare with the band."""
    low, high = (limit * (1.6 if abs(limit) > _LINEAR_TO else 1.0) for limit in ax.get_ylim())
    ax.set_yscale("symlog", linthresh=_LINEAR_TO, linscale=2.0)
    ax.set_ylim(low, high)
    decades = [10.0**power for power in range(1, math.ceil(math.log10(max(-low, high))) + 1)]
    marks = [0.0, 4.0, *decades, *(3 * decade for decade in decades)]
    ticks = [tick for tick in sorted({*marks, *(-mark for mark in marks)}) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)


def _plot_means(ax: Axes, found: dict[str, Moments], names: list[str], look: dict[str, Look]) -> None:
    means = {name: each.mean[: len(names)].numpy() for name, each in found.items()}
    center = np.mean([*means.values()], axis=0) if len(means) > 1 else 0.0
    values = {name: mean - center for name, mean in means.items()}
    errors = {name: 2.0 * each.se[: len(names)].numpy() for name, each in found.items()}
    _by_component(ax, values, errors, names, look)
    ax.set_ylabel(r"mean $-$ average over methods" if len(means) > 1 else "mean")
    ax.set_title(r"means $\pm$ 2 standard errors", fontsize="medium")


def _by_component(
    ax: Axes,
    values: dict[str, NDArray[np.float64]],
    errors: dict[str, NDArray[np.float64]],
    names: list[str],
    look: dict[str, Look],
) -> None:
    """Points by component, methods next to each other; only the largest deviations where there are many."""
    size = np.nan_to_num(np.abs(np.array([*values.values()]).reshape(len(values), -1)), nan=0.0)
    largest = np.argsort(-size.max(0, initial=0.0), kind="stable")[:_MAX_COMPONENTS]
    shown = np.sort(largest)
    ax.axhline(0.0, color=INK, linewidth=0.8)
    for i, (name, value) in enumerate(values.items()):
        where = np.arange(len(shown)) + 0.5 * ((i + 0.5) / len(values) - 0.5)
        error = errors[name][shown] if name in errors else None
        ax.errorbar(
            where, value[shown], yerr=error, fmt=look[name].marker, color=look[name].color, markersize=6, capsize=3,
            label=name,
        )  # fmt: skip
    ax.set_xticks(range(len(shown)), [names[i] for i in shown], rotation=45 if len(shown) > 6 else 0)
    ax.set_xlim(-0.5, len(shown) - 0.5)
    ax.set_xlabel(
        "component" if len(shown) == len(names) else f"component ({len(shown)} largest of {len(names)})"
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
