"""Clouds of latent points: encodings by class, and encodings against prior and tilted draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.plots.style import INK, MUTED, TILTED, axes_or_new, class_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_latent_overlay", "plot_latent_scatter"]

_SHARES = (0.5, 0.9)  # of the draws, inside the lines of the overlay
_BINS = 100


@checked
def plot_latent_scatter(z: Tensor, labels: Any, *, max_points: int = 5000, ax: Axes | None = None) -> Axes:
    """Latent means colored by class.

    Args:
        z: latent points, shape (n, d) with d >= 2; for d > 2 their first two principal components are drawn.
        labels: class of each, shape (n,).
        max_points: points drawn at most, taken at even spacing.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    labels = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels).ravel()
    plane = _Plane.of(z, "z")
    if labels.shape[0] != z.shape[0]:
        raise ValueError(f"labels must hold one class for each of {z.shape[0]} points, got {labels.shape[0]}")
    keep = _thinned(z.shape[0], max_points)
    points, kept = plane.project(z)[keep], labels[keep]
    ax = axes_or_new(ax, (6.0, 5.0))
    for i, label in enumerate(np.unique(labels)):
        tone, marker = class_style(i)
        mine = points[kept == label]
        ax.scatter(
            mine[:, 0], mine[:, 1], s=16, color=tone, marker=marker, alpha=0.7, linewidths=0, label=str(label)
        )
    return _finish(ax, plane, "class")


@checked
def plot_latent_overlay(
    encodings: Tensor, prior: Tensor, tilted: Tensor, *, max_points: int = 1500, ax: Axes | None = None
) -> Axes:
    """Where data are encoded, where the prior draws, and where the tilted prior draws.

    Encodings are points; the lines enclose 50 % and 90 % of the draws of the prior and of the tilted prior, where
    they lie densest (a smoothed histogram).

    Args:
        encodings: encoded data, shape (n, d) with d >= 2; for d > 2 everything is projected on the first
            two principal components of these.
        prior: draws of the prior, shape (m, d).
        tilted: draws of the tilted prior, shape (k, d); resample weighted draws first.
        max_points: points drawn at most of the encodings, taken at even spacing.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    plane = _Plane.of(encodings, "encodings")
    clouds = {"encodings": encodings, "prior": prior, "tilted": tilted}
    for name, cloud in clouds.items():
        if cloud.ndim != 2 or cloud.shape[1] != encodings.shape[1]:
            raise ValueError(f"{name} must have shape (n, {encodings.shape[1]}), got {tuple(cloud.shape)}")
    drawn = {name: plane.project(cloud) for name, cloud in clouds.items()}
    points = drawn["encodings"][_thinned(encodings.shape[0], max_points)]
    limits = _limits(drawn.values())
    ax = axes_or_new(ax, (6.2, 4.8))
    ax.scatter(points[:, 0], points[:, 1], s=12, color=MUTED, alpha=0.6, linewidths=0, label="encodings")
    for name, tone, style in (("prior", INK, (0, (3, 2))), ("tilted", TILTED, "solid")):
        _draw_regions(ax, drawn[name], limits, colors=tone, linestyles=[style])
        ax.plot([], [], color=tone, linestyle=style, label=name)
    half, most = (f"{100 * share:g} %" for share in _SHARES)
    ax.set_title(f"lines enclose {half} (bold) and {most} of the draws", fontsize="medium")
    return _finish(ax, plane, None)


def _limits(clouds: Iterable[np.ndarray]) -> np.ndarray:
    """Low and high of both axes, with room for the lines around the outermost points, (2, 2)."""
    points = np.concatenate([*clouds])
    low, high = points.min(0), points.max(0)
    room = np.maximum(0.3 * (high - low), 1e-3 * (1.0 + np.abs(high)))
    return np.stack([low - room, high + room], axis=1)


def _around(marked: np.ndarray) -> slice:
    """From one before the first that is marked to one after the last."""
    where = np.flatnonzero(marked)
    return slice(max(where[0] - 1, 0), where[-1] + 2)


def _draw_regions(ax: Axes, points: np.ndarray, limits: np.ndarray, **look: Any) -> None:
    """Lines around the regions where the given shares of the points lie densest."""
    from scipy.ndimage import gaussian_filter

    counts, *edges = np.histogram2d(points[:, 0], points[:, 1], bins=_BINS, range=limits)
    # Silverman's bandwidth in two dimensions, in bins; one bin at least where all points are the same.
    bandwidth = points.std(0) * len(points) ** (-1 / 6) / (np.diff(limits, axis=1)[:, 0] / _BINS)
    density = gaussian_filter(counts, bandwidth.clip(min=1.0), mode="constant")
    descending = np.sort(density.ravel())[::-1]
    cumulative = np.cumsum(descending) / descending.sum()
    levels = sorted({float(descending[np.searchsorted(cumulative, share)]) for share in _SHARES})
    x, y = ((edge[1:] + edge[:-1]) / 2 for edge in edges)
    # Only the part with lines in it, or the axes would make room for all of the grid.
    column, row = (_around((density >= levels[0]).any(axis)) for axis in (1, 0))
    widths = (1.2, 2.4)  # the inner line is the bold one
    ax.contour(x[column], y[row], density.T[row, column], levels=levels, linewidths=widths, **look)


class _Plane(NamedTuple):
    """The plane points are drawn in: the first two axes, or two principal components."""

    center: Tensor
    axes: Tensor
    names: tuple[str, str]

    @classmethod
    def of(cls, z: Tensor, name: str) -> _Plane:
        if z.ndim != 2 or z.shape[0] == 0 or z.shape[1] < 2:
            raise ValueError(f"{name} must have shape (n, d) with n >= 1 and d >= 2, got {tuple(z.shape)}")
        points = z.detach().cpu().double()
        if points.shape[1] == 2:
            return cls(torch.zeros(2).double(), torch.eye(2).double(), ("$z_1$", "$z_2$"))
        # Not torch.pca_lowrank: it draws from the global generator, and so would change what runs next.
        center = points.mean(0)
        variances, vectors = torch.linalg.eigh((points - center).T @ (points - center))
        axes = vectors[:, [-1, -2]]
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)
        shares = 100 * variances[[-1, -2]] / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
        first, second = (f"principal component {i + 1} ({shares[i]:.0f} % of variance)" for i in (0, 1))
        return cls(center, axes, (first, second))

    def project(self, z: Tensor) -> np.ndarray:
        return ((z.detach().cpu().double() - self.center) @ self.axes).numpy()


def _thinned(count: int, max_points: int) -> np.ndarray:
    whole_number("max_points", max_points)
    return np.unique(np.linspace(0, count - 1, min(count, max_points)).round().astype(int))


def _finish(ax: Axes, plane: _Plane, legend_title: str | None) -> Axes:
    ax.set(xlabel=plane.names[0], ylabel=plane.names[1])
    # Data limits give way, not the box: constrained layout would clip the labels of a shrunken box.
    ax.set_aspect("equal", adjustable="datalim")
    ax.legend(title=legend_title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=1.8)
    return ax
