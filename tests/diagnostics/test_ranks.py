"""The test of uniform ranks: exact by enumeration, ArviZ's band, the right words for each way of being wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_ebm.arviz_statistics import arviz_is_1x
from pyro_ebm.diagnostics.ranks import Calibration, uniform_band, uniform_ecdf, uniform_p_value


def random_ranks(count: int, num_draws: int, *, seed: int = 0, power: float = 1.0) -> Tensor:
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (u**power * (num_draws + 1)).long()


def symmetric_ranks(count: int, num_draws: int, scale: float) -> Tensor:
    """Ranks of standard normals among draws whose standard deviation is 1 / scale of theirs."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    x = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return (normal.cdf(scale * x) * (num_draws + 1)).long()


def calibration(**ranks: Tensor) -> Calibration:
    count = len(next(iter(ranks.values())))
    return Calibration(ranks, 99, torch.full((count,), 99))


@pytest.mark.parametrize(("count", "num_draws"), [(1, 4), (3, 3), (4, 4), (5, 2)])
def test_p_values_are_exact(count: int, num_draws: int) -> None:
    outcomes = list(itertools.product(range(num_draws + 1), repeat=count))
    p = np.array([uniform_p_value(torch.tensor(outcome), num_draws) for outcome in outcomes])
    shares = (p[None, :] <= p[:, None] + 1e-9).mean(1)
    np.testing.assert_allclose(p, shares, rtol=1e-6)
    assert len(set(p.round(9))) > 1


def test_p_value_below_one_minus_prob_means_outside_the_band() -> None:
    band = uniform_band(40, 19, 0.9)
    outside = []
    for seed in range(200):
        ranks = random_ranks(40, 19, seed=seed, power=1.2)
        ecdf = uniform_ecdf(ranks, 19)
        outside.append(bool(((ecdf < band.lower - 1e-9) | (ecdf > band.upper + 1e-9)).any()))
        assert outside[-1] == (uniform_p_value(ranks, 19) <= 0.1)
    assert 20 < sum(outside) < 180


@pytest.mark.parametrize(("count", "num_draws"), [(25, 99), (100, 99), (60, 400)])
def test_band_is_that_of_arviz(count: int, num_draws: int) -> None:
    band = uniform_band(count, num_draws, 0.95)
    points = band.points.numpy()
    if arviz_is_1x():
        from arviz_stats.ecdf_utils import get_pointwise_confidence_band, simulate_confidence_bands

        rng = np.random.default_rng(0)
        level = simulate_confidence_bands(count, 1, points, 0.95, 3000, rng)
        expected = get_pointwise_confidence_band(level, count, points)
    else:
        from arviz.stats.ecdf_utils import ecdf_confidence_band

        expected = ecdf_confidence_band(count, points, points, prob=0.95, method="optimized")
    for found, theirs in zip(band[1:], expected, strict=True):
        # levels lie between atoms of a discrete distribution, and theirs is approximate: one count apart at most
        assert (np.abs(found.numpy() - theirs) * count).max() < 1.01


def test_band_widens_with_prob_and_narrows_with_simulations() -> None:
    width = {key: float((uniform_band(*key).upper - uniform_band(*key).lower).mean()) for key in
             [(50, 99, 0.5), (50, 99, 0.99), (300, 99, 0.99)]}
    assert width[300, 99, 0.99] < width[50, 99, 0.5] < width[50, 99, 0.99]


def test_ecdf_counts_the_ranks_below_each_point() -> None:
    ecdf = uniform_ecdf(torch.tensor([0, 0, 2, 3]), 3)
    assert torch.equal(ecdf, torch.tensor([0.5, 0.5, 0.75], dtype=torch.float64))
    assert torch.allclose(uniform_band(4, 3).points, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))


def test_many_draws_are_looked_at_in_a_hundred_points() -> None:
    points = uniform_band(30, 4999).points
    assert len(points) == 100
    assert points[0] == 1 / 5000
    assert points[-1] == 4999 / 5000


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (random_ranks(300, 99), "ok"),
        (random_ranks(300, 99, power=0.7), "draws too low"),
        (random_ranks(300, 99, power=1.4), "draws too high"),
        (symmetric_ranks(300, 99, 1.6), "draws too narrow"),
        (symmetric_ranks(300, 99, 0.6), "draws too wide"),
        (10 * random_ranks(300, 9), "draws too high"),
    ],
)
def test_summary_says_how_the_draws_are_wrong(ranks: Tensor, words: str) -> None:
    found = calibration(z=ranks)
    assert found.summary().loc["z", "verdict"] == words
    assert found.verdict() == ("ok" if words == "ok" else f"z: {words}")


def test_ranks_neither_shifted_nor_spread_are_not_uniform() -> None:
    spikes = torch.tensor([20, 79]).repeat(60)  # with the mean and the variance of uniform ranks
    assert calibration(z=spikes).verdict() == "z: ranks not uniform"


def test_joint_p_value_counts_the_quantities() -> None:
    # a p-value that falls alone, but not as one of twenty
    seed = next(s for s in range(500) if 0.01 < uniform_p_value(random_ranks(80, 99, seed=s), 99) < 0.04)
    bad = random_ranks(80, 99, seed=seed)
    assert calibration(z=bad).verdict() != "ok"
    fine = next(r for r in (random_ranks(80, 99, seed=s) for s in range(500)) if uniform_p_value(r, 99) > 0.5)
    many = calibration(z=bad, **{f"w{i}": fine for i in range(19)})
    assert many.p_value == pytest.approx(20 * many.p_values["z"])
    assert many.verdict() == "ok"
    assert many.summary()["p_adjusted"].max() == 1.0


def test_scores_are_standard_normal_under_uniform_ranks() -> None:
    table = calibration(**{f"z{i}": random_ranks(50, 99, seed=i) for i in range(60)}).summary()
    for column in ("shift", "spread"):
        assert abs(table[column].mean()) < 4 / np.sqrt(60)
        assert table[column].std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * 59))


def test_a_single_draw_and_a_single_simulation() -> None:
    found = Calibration({"z": torch.tensor([1])}, 1, torch.tensor([1]))
    assert found.p_value == 1.0
    assert found.verdict() == "ok"
    assert repr(found) == "Calibration(1 simulations, 1 quantities, 1 draws, joint p = 1)"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "ranks is empty"),
        ({"z": torch.tensor([0, 1])}, r"ranks\['z'\] must have shape \(simulation,\) = \(3,\)"),
        ({"z": torch.tensor([0, 1, 12])}, r"integers from 0 to num_draws = 9"),
        ({"z": torch.tensor([0, -1, 2])}, r"integers from 0 to num_draws = 9"),
        ({"z": torch.zeros(3)}, r"integers from 0 to num_draws = 9"),
    ],
)
def test_ranks_are_checked(ranks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(ranks, 9, torch.full((3,), 9))


@pytest.mark.parametrize("prob", [0.0, 1.0, 95])
def test_prob_is_checked(prob: float) -> None:
    with pytest.raises(ValueError, match="prob must lie between 0 and 1"):
        uniform_band(10, 9, prob)
    with pytest.raises(ValueError, match="prob must lie between 0 and 1"):
        calibration(z=random_ranks(10, 9)).summary(prob)
