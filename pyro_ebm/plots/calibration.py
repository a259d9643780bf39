"""Simulation-based calibration as a figure: how far ranks of true values are from uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_ebm.annotations import checked
from pyro_ebm.diagnostics.ranks import Calibration, uniform_band, uniform_ecdf
from pyro_ebm.plots.style import INK, MUTED, color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["plot_calibration"]

_MAX_PANELS, _COLUMNS = 12, 4
_X_LABEL, _Y_LABEL = "rank / (draws + 1)", "ECDF $-$ uniform"
_FINE, _FALLEN = color(0), color(1)


@checked
def plot_calibration(
    calibration: Calibration,
    *,
    quantities: str | Sequence[str] | None = None,
    prob: float = 0.95,
    axes: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
) -> NDArray[np.object_]:
    """ECDF of the ranks minus that of uniform ranks, one panel a quantity, with simultaneous bands.

    An exact sampler's curve stays inside the dark band with probability ``prob``, and all curves of the
    calibration, shown or not, inside the light one (Bonferroni). A curve that leaves the light band is
    drawn in orange, with dots where it is outside, and its title says how the draws are wrong.

    Args:
        calibration: from :func:`calibrate`.
        quantities: which, in this order; ``None``: all, or of more than twelve those with the smallest p-values.
        prob: of the bands.
        axes: as many as there are panels; a new figure when ``None``.

    Returns:
        Array of the axes, shape (panels,).

    Reference:
        Sailynoja, Buerkner, Vehtari (2022), Graphical test for discrete uniformity.
    """
    names, note = _chosen(calibration, quantities)
    panels = _panels(axes, len(names), note)
    count = len(calibration.ranks)
    levels = [prob] if count == 1 else [1 - (1 - prob) / count, prob]
    bands = [uniform_band(calibration.num_simulations, calibration.num_draws, level) for level in levels]
    points = bands[0].points.numpy()
    edges = np.concatenate([[0.0], points, [1.0]])
    limits = [[_closed(side.numpy() - points) for side in (band.lower, band.upper)] for band in bands]
    table = calibration.summary(prob)
    for ax, name in zip(panels, names, strict=True):
        for (lower, upper), alpha in zip(limits, (0.22, 0.28) if count > 1 else (0.4,), strict=True):
            ax.fill_between(edges, lower, upper, color=MUTED, alpha=alpha, linewidth=0)
        ecdf = _closed(uniform_ecdf(calibration.ranks[name], calibration.num_draws).numpy() - points)
        row = table.loc[name]
        _curve(ax, edges, ecdf, limits[0], fallen=row["verdict"] != "ok")
        words = "" if row["verdict"] == "ok" else f"\n{row['verdict']}"
        ax.set_title(f"{name}  (p = {_p_text(row['p_value'])}){words}", fontsize="medium")
    return panels


def _chosen(calibration: Calibration, quantities: str | Sequence[str] | None) -> tuple[list[str], str]:
    """Names of the panels, and what the figure must say about those left out."""
    known = list(calibration.ranks)
    if quantities is not None:
        names = [quantities] if isinstance(quantities, str) else list(quantities)
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise ValueError(f"quantities must name some of {known}, got {quantities!r}")
        return names, ""
    if len(known) <= _MAX_PANELS:
        return known, ""
    worst = sorted(known, key=lambda name: calibration.p_values[name])[:_MAX_PANELS]
    return worst, f"the {_MAX_PANELS} of {len(known)} quantities with the smallest p-values"


def _panels(axes: Axes | Sequence[Axes] | NDArray[np.object_] | None, count: int, note: str) -> NDArray[np.object_]:
    if axes is not None:
        given = np.asarray(axes, dtype=object).ravel()
        if given.size != count:
            raise ValueError(f"axes must hold {count} axes, one for each quantity, got {given.size}")
        for ax in given:
            ax.set(xlabel=_X_LABEL, ylabel=_Y_LABEL)
        return given
    from matplotlib import pyplot as plt

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (5.0, 3.4) if count == 1 else (0.6 + 2.9 * columns, 0.4 + 2.3 * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in grid.ravel()[count:]:
        ax.remove()
    for index, ax in enumerate(grid.ravel()[:count]):
        lowest = index + columns >= count  # nothing below it, though perhaps not in the last row
        ax.tick_params(labelbottom=lowest)
        ax.set(xlabel=_X_LABEL if lowest else "", ylabel="" if index % columns else _Y_LABEL)
    if note:
        figure.suptitle(note, fontsize="medium")
    return grid.ravel()[:count]


def _closed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences of distribution functions are zero at both ends."""
    return np.concatenate([[0.0], values, [0.0]])


def _curve(
    ax: Axes,
    edges: NDArray[np.float64],
    ecdf: NDArray[np.float64],
    limits: Sequence[NDArray[np.float64]],
    *,
    fallen: bool,
) -> None:
    tone = _FALLEN if fallen else _FINE
    ax.axhline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.plot(edges, ecdf, color=tone, linewidth=1.6)
    outside = (ecdf < limits[0] - 1e-9) | (ecdf > limits[1] + 1e-9)
    if outside.any():
        ax.plot(edges[outside], ecdf[outside], linestyle="none", marker="o", markersize=3.5, color=tone)
    ax.set(xlim=(0.0, 1.0), xticks=(0.0, 0.25, 0.5, 0.75, 1.0), xticklabels=("0", "", "0.5", "", "1"))


def _p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"
