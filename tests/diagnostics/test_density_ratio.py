"""Density ratios by classification: against ratios known in closed form, and against none at all."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm import DensityRatio, density_ratio


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_normals_in_closed_form():
    """The log ratio of N(1, 1) and N(0, 1) is x - 1/2."""
    numerator, denominator = normal(400, 1, seed=1) + 1.0, normal(400, 1, seed=2)
    found = density_ratio(numerator, denominator)
    x, y = denominator[:, 0].double(), found.log_ratio
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    # The classifier fits what 800 points show: its slope has a standard error of about 0.09, and the ridge shrinks it.
    assert 0.6 < slope < 1.3
    assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.9
    # P(a > b) of draws of the two distributions; its standard error at this size is 0.017.
    exact = 0.5 * (1 + math.erf(1 / math.sqrt(2) / math.sqrt(2)))
    assert abs(found.auc - exact) < 4 * 0.017 + 0.01


def test_weights_undo_the_bias_of_classes():
    """Two far apart classes, 80 to 20 against 50 to 50: weights 0.625 and 2.5."""
    labels = torch.arange(1000) % 5 == 0
    biased = normal(1000, 3, seed=3) * 0.3 + 2.0 * labels[:, None]
    balanced = normal(500, 3, seed=4) * 0.3 + 2.0 * (torch.arange(500) % 2)[:, None]
    weights = density_ratio(balanced, biased).weights()
    assert weights.mean() == pytest.approx(1.0, abs=1e-5)
    # Shares are known as well as 500 reference labels tell them.
    share = float(weights[labels].sum() / weights.sum())
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 500) + 0.02
    assert float(labels.double().mean()) == 0.2


def test_equal_laws_have_nothing_to_tell_apart():
    found = density_ratio(normal(300, 2, seed=5), normal(900, 2, seed=6))
    # Standard error of the AUC under the null: sqrt((m + n + 1) / (12 m n)).
    assert abs(found.auc - 0.5) < 4 * math.sqrt(1201 / (12 * 300 * 900))
    assert found.log_ratio.abs().mean() < 0.3
    assert found.ess() > 0.9 * 900


def test_weights_are_truncated_and_positive():
    log_ratio = torch.cat([torch.zeros(99), torch.tensor([50.0])]).double()
    ratio = DensityRatio(log_ratio, 0.9)
    free, cut, default = ratio.weights(1e9), ratio.weights(5.0), ratio.weights()
    assert float(free[-1]) == pytest.approx(100.0, rel=1e-3) and bool((free > 0).all())
    torch.testing.assert_close(default, ratio.weights(10.0))
    for weights in (free, cut, default):
        assert weights.dtype == torch.float32 and float(weights.mean()) == pytest.approx(1.0, abs=1e-3)
    # With the others at zero, of one weight cut to 5 times the mean the rest of the mean comes from 99.
    assert float(cut.max()) == pytest.approx(5.0, rel=1e-4) and float(default.max()) == pytest.approx(10.0, rel=1e-4)
    torch.testing.assert_close(ratio.weights(1.0), torch.ones(100))
    assert ratio.ess(1e9) == pytest.approx(1.0, abs=0.01) and ratio.ess(1.0) == pytest.approx(100.0, rel=1e-5)
    flat = DensityRatio(torch.full((7,), 3.0).double(), 0.5)
    torch.testing.assert_close(flat.weights(), torch.ones(7))
    assert flat.ess() == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("largest", [1.5, 2.0, 4.0, 30.0])
def test_the_truncated_weights_keep_their_order_and_reach_the_bound(largest):
    ratio = DensityRatio(3.0 * normal(200, seed=9).double(), 0.5)
    free, cut = ratio.weights(1e9).double(), ratio.weights(largest).double()
    assert float(cut.max()) == pytest.approx(min(largest, float(free.max())), rel=1e-4)
    below = cut < cut.max() * (1 - 1e-5)
    scale = cut[below] / free[below]
    assert below.sum() > 50 and float(scale.max() / scale.min()) < 1 + 1e-3


def test_moderate_weights_are_the_ratio_itself():
    log_ratio = torch.tensor([0.5, -0.5, 0.0]).double()
    weights = DensityRatio(log_ratio, 0.5).weights(100.0).double()
    torch.testing.assert_close(weights / weights.sum(), log_ratio.softmax(0), rtol=1e-5, atol=0)


def test_the_seed_decides(rng_untouched):
    a, b = normal(60, 2, seed=7) + 0.5, normal(80, 2, seed=8)
    with rng_untouched():
        first, again, other = (density_ratio(a, b, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.log_ratio, again.log_ratio) and first.auc == again.auc
    assert not torch.equal(first.log_ratio, other.log_ratio)


@pytest.mark.parametrize(
    ("numerator", "denominator", "match"),
    [
        (torch.zeros(9, 2), torch.zeros(20, 2), r"numerator must have shape \(n, \*event_shape\) with n >= 10"),
        (torch.zeros(20), torch.zeros(20, 2), "numerator must have shape"),
        (torch.rand(20, 2), torch.zeros(0, 2), r"denominator must have shape .*got \(0, 2\)"),
        (torch.full((20, 2), math.nan), torch.zeros(20, 2), "numerator must be finite"),
        (torch.rand(20, 2), torch.full((20, 2), math.inf), "denominator must be finite"),
        (torch.rand(20, 3), torch.rand(20, 2), r"one shape, got \(3,\) and \(2,\)"),
        (torch.ones(20, 2), torch.ones(20, 2), "one value only"),
    ],
)
def test_bad_data(numerator, denominator, match):
    with pytest.raises(ValueError, match=match):
        density_ratio(numerator, denominator)


@pytest.mark.parametrize("largest", [0.5, math.nan])
def test_a_bound_below_the_mean(largest):
    with pytest.raises(ValueError, match="largest must be at least 1"):
        DensityRatio(torch.zeros(5).double(), 0.5).weights(largest)
