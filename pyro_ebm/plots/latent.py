"""Clouds of latent points: encodings by class, and encodings against prior and tilted draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.plots.style import MUTED, axes_or_new, class_style, color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_latent_overlay", "plot_latent_scatter"]


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
            mine[:, 0], mine[:, 1], s=9, color=tone, marker=marker, alpha=0.55, linewidths=0, label=str(label)
        )
    return _finish(ax, plane, "class")


def plot_latent_overlay(
    encodings: Tensor, prior: Tensor, tilted: Tensor, *, max_points: int = 1500, ax: Axes | None = None
) -> Axes:
    """Where data are encoded, where the prior draws, and where the tilted prior draws.

    Args:
        encodings: encoded data, shape (n, d) with d >= 2; for d > 2 everything is projected on the first
            two principal components of these.
        prior: draws of the prior, shape (m, d).
        tilted: draws of the tilted prior, shape (k, d); resample weighted draws first.
        max_points: points drawn at most of each, taken at even spacing.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    plane = _Plane.of(encodings, "encodings")
    clouds = {"encodings": encodings, "prior": prior, "tilted": tilted}
    for name, cloud in clouds.items():
        if cloud.ndim != 2 or cloud.shape[1] != encodings.shape[1]:
            raise ValueError(f"{name} must have shape (n, {encodings.shape[1]}), got {tuple(cloud.shape)}")
    looks: dict[str, dict[str, Any]] = {
        "encodings": {"s": 32, "color": MUTED, "alpha": 0.35},
        "prior": {"s": 7, "color": color(0), "alpha": 0.7, "marker": "^"},
        "tilted": {"s": 5, "color": color(1), "alpha": 0.8, "marker": "s"},
    }
    drawn = {name: plane.project(c)[_thinned(c.shape[0], max_points)] for name, c in clouds.items()}
    ax = axes_or_new(ax, (6.2, 4.8))
    for name, points in drawn.items():
        ax.scatter(points[:, 0], points[:, 1], linewidths=0, label=name, **looks[name])
    return _finish(ax, plane, None)


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
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    return np.unique(np.linspace(0, count - 1, min(count, max_points)).round().astype(int))


def _finish(ax: Axes, plane: _Plane, legend_title: str | None) -> Axes:
    ax.set(xlabel=plane.names[0], ylabel=plane.names[1])
    # Data limits give way, not the box: constrained layout would clip the labels of a shrunken box.
    ax.set_aspect("equal", adjustable="datalim")
    ax.legend(title=legend_title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=1.5)
    return ax
