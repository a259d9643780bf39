from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from pyro_ebm.diagnostics.compare import compare
from pyro_ebm.diagnostics.moments import moments
from pyro_ebm.inference.draws import Draws, Estimate

COLUMNS = [
    *("method", "draws", "chains", "ess_bulk", "ess_tail", "r_hat", "mcse_per_sd", "pareto_k", "divergences"),
    *("acceptance", "gradients", "seconds", "ess_per_second", "ess_per_gradient", "log_z", "log_z_se"),
    *("worst_error_in_se", "verdict"),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chains(mean: float = 0.0, scale: float = 1.0, *, seed: int = 0, **options) -> Draws:
    """Independent draws of N(mean, scale^2) in two components of one site and one of another."""
    x = mean + scale * normal(4, 1000, 3, seed=seed)
    return Draws({"z": x[..., :2], "s": x[..., 2]}, "nuts", **options)


def weighted(
    proposal_scale: float, *, target_mean: float = 0.0, num: int = 8000, seed: int = 1, **options
) -> Draws:
    x = proposal_scale * normal(1, num, 3, seed=seed).double()
    logs = (Normal(target_mean, 1.0).log_prob(x) - Normal(0.0, proposal_scale).log_prob(x)).sum(-1)
    return Draws({"z": x[..., :2], "s": x[..., 2]}, "snis", log_weights=logs.log_softmax(-1), **options)


def grid(mean: float = 0.0) -> Draws:
    """N(mean, 1) in three dimensions on a grid: its first two moments are exact to rounding."""
    line = torch.linspace(-7, 7, 41, dtype=torch.float64) + mean
    points = torch.cartesian_prod(line, line, line)[None]
    logs = Normal(mean, 1.0).log_prob(points).sum(-1).log_softmax(-1)
    return Draws({"z": points[..., :2], "s": points[..., 2]}, "quadrature", log_weights=logs)


def test_one_row_a_sampler_with_the_columns_in_order():
    stats = {
        "diverging": torch.zeros(4, 1000, dtype=torch.bool),
        "acceptance_rate": torch.full((4, 1000), 0.8),
    }
    good = chains(
        stats=stats, num_gradients=8000, seconds=2.0, log_z=Estimate(torch.tensor(1.0), torch.tensor(0.1))
    )
    table = compare({"mine": good, "grid": grid()})
    assert table.columns.tolist() == COLUMNS
    assert (table.index.tolist(), table.index.name) == (["mine", "grid"], "sampler")
    row = table.loc["mine"]
    assert (row.method, row.draws, row.chains, row.verdict) == ("nuts", 1000, 4, "ok")
    assert (row.divergences, row.gradients, row.seconds, row.log_z) == (0.0, 8000.0, 2.0, 1.0)
    assert row.acceptance == pytest.approx(0.8)
    assert row.log_z_se == pytest.approx(0.1)
    assert 3000 < row.ess_bulk < 5000 and 3000 < row.ess_tail < 5000
    assert row.ess_per_second == pytest.approx(row.ess_bulk / 2)
    assert row.ess_per_gradient == pytest.approx(row.ess_bulk / 8000)
    assert row.r_hat < 1.01
    assert row.mcse_per_sd == pytest.approx(1 / math.sqrt(4000), rel=0.2)
    assert math.isnan(row.pareto_k) and math.isnan(row.worst_error_in_se)


def test_a_grid_is_exact_and_no_chain():
    row = compare({"grid": grid()}).loc["grid"]
    assert row.verdict == "ok"
    assert row.mcse_per_sd == 0.0
    assert all(math.isnan(row[name]) for name in ("ess_bulk", "ess_tail", "r_hat", "pareto_k"))


def test_good_samplers_agree_with_the_grid():
    table = compare({"nuts": chains(), "snis": weighted(1.3), "grid": grid()}, reference=grid())
    assert table.verdict.tolist() == ["ok", "ok", "ok"]
    assert 0.1 < table.worst_error_in_se["nuts"] < 4  # the worst of six
    assert 0.1 < table.worst_error_in_se["snis"] < 4
    assert math.isnan(table.worst_error_in_se["grid"])


def test_one_shifted_chain_falls():
    draws = chains()
    draws.values["z"][0, :, 1] += 0.7
    verdict = compare({"x": draws}).verdict["x"]
    assert verdict.startswith("r_hat 1.0")
    assert "> 1.01; ess_bulk" in verdict and "< 400" in verdict


def test_all_chains_shifted_falls_only_against_a_reference():
    shifted = chains(mean=0.3)
    assert compare({"x": shifted}).verdict["x"] == "ok"
    row = compare({"x": shifted}, reference=grid()).loc["x"]
    # bias 0.3 at se 1 / sqrt(4000): 19 standard errors, and the worst of three lies above
    assert 15 < row.worst_error_in_se < 25
    assert row.verdict.startswith("error ") and "> 4 se (mean of " in row.verdict


def test_a_wrong_variance_falls_by_the_second_moment():
    row = compare({"x": chains(scale=0.85)}, reference=grid()).loc["x"]
    assert "mean square of" in row.verdict
    # 1 - 0.85^2 = 0.28 at se 0.85^2 sqrt(2 / 4000)
    assert row.worst_error_in_se == pytest.approx(0.2775 / (0.7225 * math.sqrt(2 / 4000)), rel=0.25)


def test_a_trusted_run_as_reference_adds_its_own_error():
    estimate, trusted = chains(mean=0.1), chains(seed=5)
    against_grid = compare({"x": estimate}, reference=grid()).worst_error_in_se["x"]
    against_run = compare({"x": estimate, "run": trusted}, reference=trusted).worst_error_in_se
    assert 0.4 < against_run["x"] / against_grid < 1.1  # about 1 / sqrt(2)
    assert math.isnan(against_run["run"])


def test_weighted_draws_have_the_error_that_repetitions_show():
    runs = [moments(weighted(1.4, target_mean=0.5, num=500, seed=seed), ["s", "z"]) for seed in range(200)]
    means = torch.stack([run.mean for run in runs])
    claimed = torch.stack([run.se for run in runs]).mean(0)
    assert torch.allclose(claimed, means.std(0), rtol=0.25)  # 200 repetitions know a spread to 5 %
    exact = torch.tensor([0.5, 0.5, 0.5, 1.25, 1.25, 1.25], dtype=torch.float64)
    assert ((means.mean(0) - exact).abs() < 4 * means.std(0) / math.sqrt(200) + 0.01).all()


def test_ess_of_weighted_draws():
    # equal weights: worth their number; in bulk by 1 / sum w^2, in the tails too
    equal = Draws({"z": normal(1, 4000)}, "snis", log_weights=torch.zeros(1, 4000))
    row = compare({"x": equal}).loc["x"]
    assert row.ess_bulk == pytest.approx(4000)
    assert row.ess_tail == pytest.approx(4000)
    assert math.isnan(row.r_hat) and row.pareto_k == 0.0 and row.verdict == "ok"
    # half of the draws without weight: they count for nothing
    logs = torch.zeros(1, 4000)
    logs[:, ::2] = -math.inf
    row = compare({"x": Draws({"z": normal(1, 4000)}, "snis", log_weights=logs)}).loc["x"]
    assert (row.ess_bulk, row.ess_tail) == (pytest.approx(2000), pytest.approx(2000))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tail_ess_of_weighted_draws_sees_a_tail_on_few_points(sign):
    weights = torch.cat([torch.ones(950), torch.full((5,), 10.0)])
    draws = Draws({"z": sign * torch.arange(955.0)[None]}, "snis", log_weights=(weights / 1000).log()[None])
    # p (1 - p) / se^2 with se^2 = 5 (0.01 * 0.95)^2 + 950 (0.001 * 0.05)^2
    exact = 0.0475 / (5 * 0.0095**2 + 950 * 0.00005**2)
    assert compare({"x": draws}).ess_tail["x"] == pytest.approx(exact, rel=0.03)


def test_order_and_chains_of_weighted_draws_mean_nothing():
    draws = weighted(1.3)
    order = draws.values["s"][0].argsort()
    values = {site: value[:, order].unflatten(1, (4, 2000))[0] for site, value in draws.values.items()}
    other = Draws(values, "snis", log_weights=draws.log_weights[:, order].reshape(4, 2000))
    a, b = (
        compare({"x": each}).drop(columns=["draws", "chains", "method", "verdict"]).loc["x"]
        for each in (draws, other)
    )
    assert a.astype(float).to_numpy() == pytest.approx(b.astype(float).to_numpy(), rel=1e-6, nan_ok=True)


def test_hopeless_weights_fall():
    row = compare({"x": weighted(0.4, target_mean=2.0)}).loc["x"]
    assert row.pareto_k > 0.7
    assert "ess_bulk" in row.verdict and "pareto_k" in row.verdict and "> 0.7" in row.verdict
    stated = compare({"x": weighted(1.3, pareto_k=0.9)}).loc["x"]
    assert stated.verdict == "pareto_k 0.90 > 0.7"


def test_divergences_fall():
    stats = {"diverging": torch.zeros(4, 1000, dtype=torch.bool)}
    stats["diverging"][1, :3] = True
    assert compare({"x": chains(stats=stats)}).verdict["x"] == "divergences 3 > 0"
    assert compare({"x": chains(stats=stats)}, max_divergences=3).verdict["x"] == "ok"


def test_thresholds_can_be_moved():
    draws = {"x": chains()}
    assert compare(draws, min_ess=1e6).verdict["x"].count("< 1e+06") == 2
    assert compare(draws, max_r_hat=1.0).verdict["x"].startswith("r_hat 1.00")
    assert "error" in compare(draws, reference=grid(), max_error=0.01).verdict["x"]


def test_a_single_chain_that_drifts_falls():
    drift = torch.linspace(-2, 2, 4000)[None] + normal(1, 4000)
    assert "r_hat" in compare({"x": Draws({"z": drift}, "hmc")}).verdict["x"]
    assert compare({"x": Draws({"z": normal(1, 4000)}, "hmc")}).verdict["x"] == "ok"


def test_constant_components_are_left_out_but_a_stuck_sampler_falls():
    z = normal(4, 1000, 2)
    z[..., 1] = 0.5
    assert (
        compare({"x": Draws({"z": z}, "nuts")}, reference=Draws({"z": z.clone()}, "nuts")).verdict["x"]
        == "ok"
    )
    stuck = Draws({"z": torch.ones(4, 1000), "s": torch.zeros(4, 1000)}, "hmc")
    assert compare({"x": stuck}).verdict["x"] == "r_hat nan > 1.01; ess_bulk nan < 400; ess_tail nan < 400"
    exact = Draws({"z": normal(1, 500), "s": normal(1, 500)}, "quadrature", log_weights=torch.zeros(1, 500))
    assert compare({"x": stuck}, reference=exact).worst_error_in_se["x"] == math.inf


def test_what_is_not_finite_falls():
    draws = chains()
    draws.values["z"][2, 5, 0] = math.nan
    assert compare({"x": draws}).verdict["x"].startswith("draws or weights not finite")
    broken = Draws({"z": normal(1, 100)}, "snis", log_weights=torch.full((1, 100), math.nan))
    assert "draws or weights not finite" in compare({"x": broken}).verdict["x"]


@pytest.mark.parametrize("num", [1, 3, 5])
def test_very_few_draws_fall_without_failing(num):
    row = compare(
        {"x": Draws({"z": normal(2, num)}, "hmc")}, reference=Draws({"z": normal(4, 100)}, "hmc")
    ).loc["x"]
    assert "ess_bulk" in row.verdict


def test_log_z_per_datum_is_not_one_number():
    per_datum = chains(log_z=Estimate(torch.zeros(5), torch.zeros(5)))
    assert math.isnan(compare({"x": per_datum}).log_z["x"])


def test_bad_input():
    good = chains()
    with pytest.raises(ValueError, match="draws is empty"):
        compare({})
    with pytest.raises(TypeError, match=r"draws must be a mapping \{name: Draws\}, got Draws"):
        compare(good)
    with pytest.raises(TypeError, match=r"draws\['b'\] must be a Draws, got dict"):
        compare({"a": good, "b": {}})
    with pytest.raises(TypeError, match=r"reference must be a Draws or None, got dict"):
        compare({"a": good}, reference={})
    other = Draws({"z": torch.zeros(1, 10, 2)}, "nuts")
    with pytest.raises(ValueError, match=r"same sites and shapes, got \{'a': \{'s': .*, 'b': \{'z': \(2,\)"):
        compare({"a": good, "b": other})
    with pytest.raises(ValueError, match=r"reference must have the draws' sites .* it has \{'z': \(2,\)\}"):
        compare({"a": good}, reference=other)
