"""The figure of the debias study: what each panel shows, and what is too far away to show."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt  # noqa: E402

from pyro_ebm.plots import plot_debias_study  # noqa: E402


def summary(dims: tuple[int, ...] = (2, 10), lowest: float = -101.0) -> pd.DataFrame:
    rows = [
        (dim, size, method, tv, 0.01, fit, 0.5)
        for dim in dims
        for size, method, tv, fit in (
            (0, "biased", 0.2, -101.0), (50, "tilt", 0.1, -100.0), (250, "tilt", 0.05, -99.5),
            (50, "reference_only", 0.15, lowest), (250, "reference_only", 0.12, -100.5),
        )
    ]  # fmt: skip
    columns = ["latent_dim", "reference_size", "method", "tv", "tv_se", "log_likelihood", "log_likelihood_se"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:3])


def test_a_column_for_each_dimension_and_a_curve_for_each_method():
    axes = plot_debias_study(summary())
    assert axes.shape == (2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["2 latent dimensions", "10 latent dimensions"]
    tilt = next(c for c in axes[0, 1].containers if c.get_label() == "tilt")
    np.testing.assert_allclose(tilt.lines[0].get_xydata(), [[50, 0.1], [250, 0.05]])
    assert [line.get_ydata()[0] for line in axes[0, 0].lines if line.get_label() == "biased"] == [0.2]
    names = [text.get_text() for text in axes[0, -1].get_legend().get_texts()]
    assert sorted(names) == ["biased", "reference only", "tilt"]
    assert {ax.get_ylim() for ax in axes[1]} == {axes[1, 0].get_ylim()}


def test_a_log_likelihood_far_below_is_an_arrow_with_its_value():
    axes = plot_debias_study(summary((2,), lowest=-400.0))
    assert [text.get_text() for text in axes[1, 0].texts] == ["-400.0"]
    assert axes[1, 0].get_ylim()[0] > -130
    near = plot_debias_study(summary((2,)))
    assert not near[1, 0].texts


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_layout_holds_with_arrows_and_many_dimensions(num_dims):
    axes = plot_debias_study(summary((2, 10, 32, 64)[:num_dims], lowest=-400.0))
    figure = axes[0, 0].figure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    legend = axes[0, -1].get_legend().get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    boxes = [ax.get_tightbbox() for ax in axes[0]]
    assert all(left.x1 <= right.x0 + 1 for left, right in zip(boxes, boxes[1:], strict=False))


def test_gain_over_the_biased_vae_is_shown_where_it_is_known():
    """In one dimension of z a nat is what it is in another, whatever their log likelihoods."""
    table = summary()
    assert "log likelihood per" in plot_debias_study(table)[1, 0].get_ylabel()
    table["log_likelihood_gain"] = table["log_likelihood"] + 101.0
    table["log_likelihood_gain_se"] = 0.1
    table["log_likelihood"] -= 3 * table.index.get_level_values(0)
    axes = plot_debias_study(table)
    assert "gained over the" in axes[1, 0].get_ylabel()
    for ax in axes[1]:
        tilt = next(c for c in ax.containers if c.get_label() == "tilt")
        np.testing.assert_allclose(tilt.lines[0].get_xydata(), [[50, 1.0], [250, 1.5]])
        assert not ax.texts


def test_unknown_values_are_left_out():
    table = summary((2,))
    table.loc[(2, 50, "tilt")] = math.nan
    axes = plot_debias_study(table)
    tilt = next(c for c in axes[0, 0].containers if c.get_label() == "tilt")
    np.testing.assert_allclose(tilt.lines[0].get_xydata(), [[250, 0.05]])


def test_axes_that_are_given_are_used():
    given = plt.subplots(2, 1, squeeze=False)[1]
    assert plot_debias_study(summary((2,)), axes=given)[0, 0] is given[0, 0]
    with pytest.raises(ValueError, match=r"axes must have shape \(2, 2\)"):
        plot_debias_study(summary(), axes=given)
    with pytest.raises(ValueError, match="no rows"):
        plot_debias_study(summary().iloc[:0])
