"""Whether chains agree: no right answer called bad, no wrong one called good, whatever the length of the chains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_ebm import MCMC, ChEES, Draws, LogDensity, compare, nested_r_hat, sample
from pyro_ebm.chain_statistics import chain_statistics, ess_bulk, r_hat
from pyro_ebm.convergence import agreement
from pyro_ebm.inference.until import Target, judged
from pyro_ebm.thresholds import MAX_R_HAT


def autoregressive(chains, draws, rho, columns=8):
    """Stationary chains of standard normal columns, (chain, draw, column)."""
    x = torch.randn(chains, draws, columns, dtype=torch.float64)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho * rho) * x[:, t]
    return x


@pytest.mark.parametrize(("draws", "rho"), [(100, 0.0), (100, 0.25), (200, 0.5), (500, 0.75)])
def test_many_chains_of_few_draws_that_are_right_are_ok(draws, rho):
    for _ in range(4):
        x = autoregressive(64, draws, rho)
        assert 3000 < ess_bulk(x).min() < 8000
        values = {"x": x}
        assert agreement(values, MAX_R_HAT).holds
        assert compare({"x": Draws(values, "chees")}).verdict["x"] == "ok"
        assert judged(values, Target(1000.0))["stopped"] == "target"
    if rho >= 0.5:
        assert r_hat(x).max() > 1.01  # the classical limit cries wolf


@pytest.mark.parametrize("draws", [100, 500])
@pytest.mark.parametrize(("astray", "by"), [(1, 4.0), (2, 2.5), (32, 0.6)])
def test_chains_that_stay_elsewhere_are_not_ok(draws, astray, by):
    x = autoregressive(64, draws, 0.25)
    x[:astray, :, 3] += by
    found = agreement({"mu": torch.zeros(64, draws), "x": x}, MAX_R_HAT)
    assert found.disagrees and found.where == "x[3]" and found.told().endswith("at x[3]")
    assert "(x[3])" in compare({"x": Draws({"x": x}, "chees")}).verdict["x"]
    assert judged({"x": x}, Target(10.0))["stopped"] != "target"


def test_one_chain_astray_among_hundreds_is_seen():
    x = autoregressive(256, 100, 0.25)
    assert agreement({"x": x}, MAX_R_HAT).holds
    x[0, :, 0] += 4
    assert agreement({"x": x}, MAX_R_HAT).disagrees


@pytest.mark.parametrize(("draws", "rho"), [(50, 0.9), (100, 0.9), (500, 0.97)])
def test_chains_that_hardly_move_are_not_ok(draws, rho):
    """They have forgotten nothing of where they started, however many there are."""
    x = autoregressive(64, draws, rho)
    assert agreement({"x": x}, MAX_R_HAT).disagrees
    assert chain_statistics(x, "r_hat_allowance")["r_hat_allowance"].max() <= 0.1  # that of ten effective draws


def test_drifts_and_rare_jumps_are_not_ok():
    drift = autoregressive(64, 200, 0.3) + torch.linspace(-0.5, 0.5, 200)[None, :, None]
    assert agreement({"x": drift}, MAX_R_HAT).disagrees
    side = (torch.rand(64, 1) < 0.5) ^ ((torch.rand(64, 300) < 0.01).cumsum(1) % 2 == 1)
    assert agreement({"x": autoregressive(64, 300, 0.3, 1) + 8 * side[..., None]}, MAX_R_HAT).disagrees


def test_four_chains_have_the_classical_limit():
    for rho in (0.3, 0.9):
        x = autoregressive(4, 1000, rho)
        found = agreement({"x": x}, MAX_R_HAT)
        assert found.limit == MAX_R_HAT and found.r_hat == pytest.approx(r_hat(x).max())


@pytest.mark.parametrize("groups", [4, 3, 12, [0, 1, 2] * 4])
def test_nested_r_hat_is_arviz_s(groups):
    x = np.random.default_rng(0).normal(size=(12, 51, 2, 2)) + np.linspace(0, 0.5, 12)[:, None, None, None]
    found = nested_r_hat(torch.as_tensor(x), groups)
    assert found.shape == (2, 2)
    statistics = pytest.importorskip("arviz_stats.base").array_stats
    if not hasattr(statistics, "rhat_nested"):
        pytest.skip("this ArviZ has no rhat_nested")
    ids = np.arange(12) * groups // 12 if isinstance(groups, int) else np.array(groups)
    for place in np.ndindex(2, 2):
        theirs = statistics.rhat_nested(x[(..., *place)], superchain_ids=ids, chain_axis=0, draw_axis=1)
        assert found[place] == pytest.approx(float(theirs), rel=1e-9)


def test_nested_r_hat_in_closed_form():
    """Two groups a distance apart: sqrt(1 + B / W) with B half its square; normal scores stretch it a little."""
    x = torch.randn(64, 400, dtype=torch.float64)
    assert nested_r_hat(x, 8) == pytest.approx(1.0, abs=1e-3)
    x[:32] += 0.5
    assert nested_r_hat(x, 2) == pytest.approx(math.sqrt(1 + 0.125 / (1 + 0.0)), rel=0.02)
    assert math.isnan(nested_r_hat(torch.zeros(4, 10), 2)) and math.isnan(nested_r_hat(torch.randn(4, 3), 2))


@pytest.mark.parametrize("groups", [5, 1, [0, 0, 0, 1], [0, 1]])
def test_groups_that_do_not_fit_are_refused(groups):
    with pytest.raises(ValueError, match="superchains must be two groups of chains or more, all of one size"):
        nested_r_hat(torch.randn(4, 10), groups)


def test_superchains_start_together_and_are_judged_by_nested_r_hat():
    density = LogDensity(lambda u: -u.square().sum(-1) / 2, 2)
    run = {"num_samples": 30, "warmup_steps": 60, "num_chains": 64, "seed": 0, "progress": False}
    mcmc = MCMC(ChEES(density), **run, superchains=8, keep_warmup=True)
    draws = mcmc.run()
    assert (draws.notes["superchains"], draws.notes["distinct_starts"]) == (8, 8)
    assert compare({"x": draws}, min_ess=0).verdict["x"] == "ok"
    assert nested_r_hat(draws.values["u"], 8).max() < 1.01 < r_hat(draws.values["u"]).max()
    draws.values["u"][:8, :, 1] += 2
    assert "nested_r_hat" in (told := compare({"x": draws}, min_ess=0).verdict["x"]) and "(u[1])" in told
    assert "superchains" not in draws.of_chains([0, 1, 2]).notes


def test_superchains_of_sample_of_given_points_and_of_what_does_not_fit():
    density = LogDensity(lambda u: -u.square().sum(-1) / 2, 2)
    run = {"num_samples": 100, "warmup_steps": 60, "num_chains": 16, "seed": 0, "progress": False}
    draws = sample(density, method="chees", superchains=4, initial_params=torch.randn(4, 2), ess=200, **run)
    assert draws.notes["distinct_starts"] == 4 and draws.notes["init"] == "given"
    with pytest.raises(ValueError, match="superchains=5 must divide num_chains=16"):
        MCMC(ChEES(density), **run, superchains=5).run()
    with pytest.raises(ValueError, match="superchains must be a whole number of at least 2"):
        MCMC(ChEES(density), **run, superchains=1).run()
