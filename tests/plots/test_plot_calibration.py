"""The calibration figure: what is drawn is the test, panel by panel, on the axes that were given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pyro_ebm.diagnostics.ranks import Calibration, uniform_ecdf  # noqa: E402
from pyro_ebm.plots.calibration import plot_calibration  # noqa: E402
from pyro_ebm.plots.style import color  # noqa: E402


def calibration(good: int = 1, bad: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(good + bad, 100, generator=generator)
    ranks = {f"good[{i}]": (100 * u[i]).long() for i in range(good)}
    ranks |= {f"bad[{i}]": (100 * u[good + i] ** 2).long() for i in range(bad)}
    return Calibration(ranks, 99, torch.full((100,), 99))


def curve(ax: Any) -> Any:
    return max(ax.lines, key=lambda line: len(line.get_xdata()))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 12])
def test_one_panel_a_quantity_in_one_figure(count: int) -> None:
    found = calibration(count)
    panels = plot_calibration(found)
    assert len(plt.get_fignums()) == 1
    assert [ax.get_title().split("  ")[0] for ax in panels] == list(found.ranks)
    assert list(panels[0].figure.axes) == list(panels)
    panels[0].figure.canvas.draw()
    assert panels[0].get_ylabel()
    columns = min(count, 4)
    for index, ax in enumerate(panels):
        assert bool(ax.get_xlabel()) == (index + columns >= count)


def test_the_curve_is_the_ecdf_minus_uniform() -> None:
    found = calibration()
    (ax,) = plot_calibration(found, axes=[Figure().subplots()])
    x, y = curve(ax).get_data()
    np.testing.assert_allclose(x, np.arange(101) / 100)
    np.testing.assert_allclose(y[1:-1], uniform_ecdf(found.ranks["good[0]"], 99).numpy() - x[1:-1])
    assert y[0] == y[-1] == 0


def test_a_quantity_that_fails_is_orange_with_dots_outside_the_band_and_words() -> None:
    fine, fallen = plot_calibration(calibration(1, 1))
    assert to_hex(curve(fine).get_color()) == color(0).lower()
    assert to_hex(curve(fallen).get_color()) == color(1).lower()
    assert not any(line.get_marker() == "o" for line in fine.lines)
    assert any(line.get_marker() == "o" for line in fallen.lines)
    assert fallen.get_title().endswith("\ndraws too high")


def test_the_outer_band_is_for_all_quantities_together() -> None:
    def height(collection: Any) -> float:
        return float(np.ptp(collection.get_paths()[0].vertices[:, 1]))

    (alone,) = plot_calibration(calibration(1))
    assert len(alone.collections) == 1
    panels = plot_calibration(calibration(6))
    outer, inner = panels[0].collections
    assert height(inner) == pytest.approx(height(alone.collections[0]))
    assert height(outer) > height(inner)


def test_of_many_quantities_the_worst_are_shown() -> None:
    found = calibration(14, 3)
    panels = plot_calibration(found)
    assert len(panels) == 12
    assert {ax.get_title().split("  ")[0] for ax in panels[:3]} == {"bad[0]", "bad[1]", "bad[2]"}
    assert "12 of 17 quantities" in panels[0].figure.get_suptitle()


def test_quantities_are_shown_in_the_order_asked_for() -> None:
    panels = plot_calibration(calibration(3), quantities=["good[2]", "good[0]"])
    assert [ax.get_title().split("  ")[0] for ax in panels] == ["good[2]", "good[0]"]


def test_given_axes_are_used_and_no_figure_opened() -> None:
    axes = Figure().subplots(1, 2)
    panels = plot_calibration(calibration(2), axes=axes)
    assert list(panels) == list(axes)
    assert plt.get_fignums() == []
    single = Figure().subplots()
    assert plot_calibration(calibration(2), quantities="good[1]", axes=single)[0] is single


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"quantities must name some of \['good\[0\]'\], got \['z'\]"):
        plot_calibration(calibration(), quantities=["z"])
    with pytest.raises(ValueError, match="quantities must name some of"):
        plot_calibration(calibration(), quantities=[])
    with pytest.raises(ValueError, match="axes must hold 2 axes, one for each quantity, got 1"):
        plot_calibration(calibration(2), axes=[Figure().subplots()])
    with pytest.raises(ValueError, match="prob must lie between 0 and 1"):
        plot_calibration(calibration(), prob=95)
