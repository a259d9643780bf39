"""The debias study as one figure: balance and fit of each method against the size of the reference set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_ebm.annotations import checked
from pyro_ebm.plots.style import INK, MUTED, class_style, color

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["plot_debias_study"]

_BALANCE = {"tv": "total variation distance\nfrom balanced classes"}
_GAIN = {"log_likelihood_gain": "log likelihood gained over the\nbiased VAE (nats per test image)"}
_LIKELIHOOD = {"log_likelihood": "log likelihood per\nbalanced test image (nats)"}
# A method keeps its color and marker whichever others are shown.
_LOOKS = {
    "biased": (INK, "o"), "reference_only": (color(4), "v"), "fine_tuned": (color(1), "s"),
    "importance_weighted": (color(3), "D"), "tilt": (color(0), "o"), "constraint": (color(2), "^"),
}  # fmt: skip
# Of a log likelihood further below the best than so many times the median is, only the direction is shown.
_ROOM_BELOW = 12.0
_ROOM_FOR_ARROWS = 0.18  # of the height that the points take


@checked
def plot_debias_study(
    summary: pd.DataFrame, *, axes: NDArray[np.object_] | None = None
) -> NDArray[np.object_]:
    """Total variation distance and held-out log likelihood against reference size, a column for each latent dimension.

    Points are means over seeds, with one standard error where there are several seeds. Methods that use no reference
    images are horizontal lines. The log likelihood is what it gains over the biased VAE of the same seed, where that
    one was studied too; far below all others it is an arrow at the lower edge with its value.

    Args:
        summary: what :meth:`StudyResult.summary` returns: indexed by latent dimension, reference size and method,
            with columns ``tv``, ``log_likelihood_gain``, ``log_likelihood`` and their standard errors, ``tv_se``, ...
        axes: (2, latent dimensions); a new figure when ``None``.

    Returns:
        The axes, (2, latent dimensions).

    Raises:
        ValueError: no rows, or axes of another shape.
    """
    table = summary.reset_index()
    dims = sorted(table["latent_dim"].unique())
    if not dims:
        raise ValueError("summary has no rows: nothing to plot")
    axes = _axes(axes, len(dims))
    methods = list(dict.fromkeys(table["method"]))
    sizes = sorted(size for size in table["reference_size"].unique() if size > 0)
    gains = "log_likelihood_gain" in table and table["log_likelihood_gain"].notna().any()
    for row, (metric, label) in enumerate((_BALANCE | (_GAIN if gains else _LIKELIHOOD)).items()):
        for column, dim in enumerate(dims):
            ax, rows = axes[row, column], table[table["latent_dim"] == dim]
            floor = _floor(table[metric]) if metric != "tv" else -math.inf
            for i, method in enumerate(methods):
                _draw(ax, rows[rows["method"] == method], metric, i, floor)
            _finish(ax, sizes)
            ax.set_ylabel(label if column == 0 else "")
        axes[row, 0].figure.align_ylabels(axes[:, 0])
    for column, dim in enumerate(dims):
        axes[0, column].set(title=f"{dim} latent dimension{'s' if dim > 1 else ''}", ylim=(0.0, None), xlabel="")
    _share_limits(axes)
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, -1].legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return axes


def _axes(axes: Any, num_dims: int) -> NDArray[np.object_]:
    if axes is None:
        from matplotlib import pyplot as plt

        size = (1.8 + 2.7 * num_dims, 6.0)
        return plt.subplots(2, num_dims, figsize=size, squeeze=False, layout="constrained")[1]
    given = np.asarray(axes, dtype=object)
    if given.shape != (2, num_dims):
        raise ValueError(f"axes must have shape (2, {num_dims}), a column for each latent dimension, got {given.shape}")
    return given


def _draw(ax: Axes, rows: pd.DataFrame, metric: str, index: int, floor: float) -> None:
    """One method in one panel."""
    method = rows["method"].iloc[0] if len(rows) else ""
    tone, marker = _LOOKS.get(method, class_style(index))
    rows = rows[rows[metric].notna()].sort_values("reference_size")
    label = method.replace("_", " ")
    errors = rows[f"{metric}_se"].fillna(0.0)
    for value, error in zip(rows[metric][rows["reference_size"] == 0], errors, strict=False):
        ax.axhline(value, color=tone, linestyle=(0, (5, 2)), linewidth=1.6, label=label)
        ax.axhspan(value - error, value + error, color=tone, alpha=0.15, linewidth=0)
    shown = (rows["reference_size"] > 0) & (rows[metric] >= floor)
    if (rows["reference_size"] > 0).any():
        points = rows[shown]
        ax.errorbar(
            points["reference_size"], points[metric], yerr=errors[shown], color=tone, marker=marker,
            markersize=5, linewidth=1.6, capsize=2.5, label=label,
        )  # fmt: skip
    for size, value in zip(*(rows[rows[metric] < floor][name] for name in ("reference_size", metric)), strict=True):
        arrow = ax.annotate(
            f"{value:.1f}", (size, 0.0), (size, 0.11), xycoords=("data", "axes fraction"), ha="center", color=tone,
            fontsize="small", arrowprops={"arrowstyle": "->", "color": tone},
        )  # fmt: skip
        arrow.set_in_layout(False)  # it lies within the axes, but not yet while the layout is tried


def _floor(values: pd.Series) -> float:
    """Below it a log likelihood would squeeze all others together."""
    known = values.dropna()
    if known.empty:
        return -math.inf
    top, middle = known.max(), known.median()
    return top - _ROOM_BELOW * max(top - middle, 1e-9)


def _finish(ax: Axes, sizes: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    if sizes:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    ax.set_xlabel("reference images")
    ax.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _share_limits(axes: NDArray[np.object_]) -> None:
    """One scale for all panels of a row, so that dimensions can be compared."""
    for row in axes:
        limits = np.array([ax.get_ylim() for ax in row])
        low, high = limits[:, 0].min(), limits[:, 1].max()
        if any(ax.texts for ax in row):  # room for the arrows, below all points
            low -= _ROOM_FOR_ARROWS * (high - low)
        for ax in row:
            ax.set_ylim(low, high)
