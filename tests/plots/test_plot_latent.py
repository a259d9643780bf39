"""Clouds of latent points: the plane they are drawn in, and what the lines of the overlay enclose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from pyro_ebm import plots  # noqa: E402


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scatter_of_many_dimensions_finds_the_wide_directions_and_says_so() -> None:
    z = normal(300, 4) * torch.tensor([0.1, 5.0, 0.1, 2.0])
    ax = plots.plot_latent_scatter(z, torch.zeros(300), ax=Figure().subplots())
    drawn = np.asarray(ax.collections[0].get_offsets())
    assert abs(np.corrcoef(drawn[:, 0], z[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(drawn[:, 1], z[:, 3])[0, 1]) > 0.99
    assert ax.get_xlabel().startswith("principal component 1")


def test_scatter_draws_at_most_max_points() -> None:
    ax = plots.plot_latent_scatter(
        normal(100, 2), torch.arange(100) % 2, max_points=30, ax=Figure().subplots()
    )
    assert sum(len(cloud.get_offsets()) for cloud in ax.collections) == 30


def test_overlay_projects_all_clouds_on_the_same_plane() -> None:
    z = normal(50, 3)
    ax = plots.plot_latent_overlay(z, z, z, ax=Figure().subplots())
    points, prior, tilted = ax.collections
    lines = [path.vertices for path in prior.get_paths()]
    assert all(np.array_equal(a, b.vertices) for a, b in zip(lines, tilted.get_paths(), strict=True))
    low, high = lines[0].min(0), lines[0].max(0)
    inside = ((points.get_offsets() > low) & (points.get_offsets() < high)).all(-1)
    assert inside.mean() > 0.7


def test_overlay_lines_enclose_half_and_nine_tenths_of_the_draws() -> None:
    ax = plots.plot_latent_overlay(normal(9, 2), normal(20_000, 2, seed=1), normal(9, 2), ax=Figure().subplots())
    outer, inner = (path.vertices for path in ax.collections[1].get_paths())
    # |z|^2 is chi squared with two degrees of freedom; smoothing widens it by one bin or so
    assert np.hypot(*inner.T).mean() == pytest.approx(np.sqrt(-2 * np.log(0.5)), abs=0.1)
    assert np.hypot(*outer.T).mean() == pytest.approx(np.sqrt(-2 * np.log(0.1)), abs=0.15)


def test_overlay_of_points_that_are_all_the_same() -> None:
    plots.plot_latent_overlay(*(torch.ones(5, 2) for _ in range(3))).figure.canvas.draw()
