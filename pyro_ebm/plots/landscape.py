"""The tilted density over a two-dimensional latent space."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pyro_ebm.annotations import checked
from pyro_ebm.checks import number
from pyro_ebm.plots.style import INK, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributions import Distribution

__all__ = ["plot_energy_landscape"]

_DEPTH = 12.0  # nats below the peak where the colors end: what lies deeper is never sampled


@checked
def plot_energy_landscape(
    energy: Callable[[Tensor], Tensor],
    base: Distribution | None = None,
    draws: Tensor | None = None,
    *,
    limits: tuple[float, ...] = (-4.0, 4.0),
    num_points: int = 121,
    prob: float | Sequence[float] = (0.5, 0.8, 0.95),
    ax: Axes | None = None,
) -> Axes:
    """Log density of the tilt of a two-dimensional base, with its highest-density regions.

    ``log p_theta(z) = -E(z) + log p(z) - log Z``, drawn relative to its highest point on the grid, so
    that ``log Z`` is not needed. Lines enclose the smallest regions that hold a given probability.

    Args:
        energy: (*batch, 2) -> (*batch,).
        base: distribution with event_shape (2,); the standard normal when ``None``.
        draws: samples to scatter on top, shape (*sample, 2); resample weighted draws first.
        limits: (low, high) of both axes, or (x_low, x_high, y_low, y_high).
        num_points: grid points along each axis.
        prob: one or several, of the highest-density regions, computed on the grid.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    several = prob if isinstance(prob, Sequence | np.ndarray) else [prob]
    prob = [number("prob", share, at_least=0, at_most=1, within=True) for share in several]
    x, y, log_density = _log_density(energy, base, _four(limits), num_points)
    relative = np.maximum(log_density - log_density.max(), -_DEPTH)
    points = None if draws is None else _points(draws)
    ax = axes_or_new(ax, (6.0, 4.9))
    filled = ax.contourf(x, y, relative, levels=np.linspace(-_DEPTH, 0.0, 25), cmap="viridis")
    bar = ax.figure.colorbar(filled, ax=ax, ticks=np.arange(-_DEPTH, 1.0, 3.0))
    bar.set_label(r"$-E(z) + \log p(z)$, relative to the peak (nats)")
    if points is not None:
        ax.scatter(*points, s=7, color="white", edgecolors=INK, linewidths=0.4, alpha=0.6)
    # A set, because regions share a contour when the density is concentrated on few grid points.
    levels = sorted(set(_levels(relative, prob)))
    ax.contour(x, y, relative, levels=levels, colors=INK, linewidths=1.3, linestyles="solid")
    shares = ", ".join(f"{100 * share:g} %" for share in sorted(prob))
    ax.set_title(f"lines enclose {shares} of the probability", fontsize="medium")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    return ax


def _log_density(
    energy: Callable[[Tensor], Tensor], base: Distribution | None, limits: tuple[float, ...], num_points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unnormalized log density on the grid: x (num_points,), y (num_points,), values (y, x)."""
    x, y = (
        torch.linspace(low, high, num_points, dtype=torch.float64) for low, high in (limits[:2], limits[2:])
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2).to(_like(energy))
    if base is None:
        base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(grid[0]), 1.0), 1)
    if tuple(base.event_shape) != (2,):
        raise ValueError(
            f"base must have event_shape (2,) to be drawn in the plane, got {tuple(base.event_shape)}"
        )
    with torch.no_grad():
        energies = energy(grid)
        if tuple(energies.shape) != (grid.shape[0],):
            raise ValueError(
                f"energy must return one number per point, shape ({grid.shape[0]},), "
                f"got {tuple(energies.shape)}"
            )
        values = (-energies + base.log_prob(grid)).double().cpu()
    if values.isnan().any() or not values.max().isfinite():
        raise ValueError(
            "energy must give a finite log density on the grid; got NaN or infinity: narrow the limits"
        )
    return x.numpy(), y.numpy(), values.reshape(num_points, num_points).numpy()


def _levels(log_density: np.ndarray, prob: Sequence[float]) -> list[float]:
    """Log densities above which the given shares of the grid's probability lie."""
    descending = np.sort(log_density.ravel())[::-1]
    cumulative = np.cumsum(np.exp(descending))
    return [float(descending[np.searchsorted(cumulative, share * cumulative[-1])]) for share in prob]


def _like(energy: object) -> Tensor:
    """A tensor with the energy's own dtype and device, so that the grid can meet it there."""
    if isinstance(energy, nn.Module):
        for tensor in itertools.chain(energy.parameters(), energy.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(())


def _four(limits: tuple[float, ...]) -> tuple[float, ...]:
    four = tuple(limits) * 2 if len(limits) == 2 else tuple(limits)
    if len(four) != 4 or not (four[0] < four[1] and four[2] < four[3]):
        raise ValueError(f"limits must be (low, high) or (x_low, x_high, y_low, y_high), got {limits}")
    return four


def _points(draws: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if draws.shape[-1:] != (2,):
        raise ValueError(f"draws must have shape (*sample, 2), got {tuple(draws.shape)}")
    flat = draws.detach().cpu().reshape(-1, 2).numpy()
    return flat[:, 0], flat[:, 1]
