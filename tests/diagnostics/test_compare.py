from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from pyro_ebm.diagnostics.compare import compare
from pyro_ebm.diagnostics.moments import moments
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.draws import Draws

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
    assert "> 1.01 (z[1]); ess_bulk" in verdict and "< 400 (z[1])" in verdict


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


def test_order_and_few_chains_of_weighted_draws_mean_nothing():
    draws = weighted(1.3)
    order = draws.values["s"][0].argsort()
    values = {site: value[:, order].unflatten(1, (2, 4000))[0] for site, value in draws.values.items()}
    other = Draws(values, "snis", log_weights=draws.log_weights[:, order].reshape(2, 4000))
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
    row = compare({"x": chains(stats=stats)}).loc["x"]
    assert (row.divergences, row.verdict) == (3.0, "divergences 3 of 4000 (up to 0.22% > 0.1%)")
    assert compare({"x": chains(stats=stats)}, max_divergent=0.003).verdict["x"] == "ok"


@pytest.mark.parametrize(("count", "total", "falls"), [(1, 4000, True), (40, 64_000, False), (60, 64_000, True)])
def test_divergences_are_judged_by_their_share(count, total, falls):
    diverging = torch.zeros(total, dtype=torch.bool)
    diverging[:count] = True
    draws = Draws({"z": normal(4, total // 4)}, "chees", stats={"diverging": diverging.reshape(4, -1)})
    assert compare({"x": draws}).verdict["x"].startswith("divergences") is falls
    assert compare({"x": draws}, max_divergent=0.0).verdict["x"].startswith(f"divergences {count} of {total}")
    none = Draws(draws.values, "chees", stats={"diverging": torch.zeros(4, total // 4)})
    assert compare({"x": none}, max_divergent=0.0).verdict["x"] == "ok"


def test_statistics_by_datum_are_counted_averaged_and_judged_one_datum_at_a_time():
    stats = {"diverging": torch.zeros(4, 1000, 5, dtype=torch.bool), "acceptance_rate": torch.full((4, 1000, 5), 0.6)}
    stats["diverging"][2, :7, 3] = True
    stats["diverging"][0, 0, 1] = True
    stats["acceptance_rate"][:, :, 0] = 0.1
    row = compare({"x": Draws({"z": normal(4, 1000, 5)}, "chees", stats=stats)}).loc["x"]
    assert row.divergences == 8.0
    assert row.acceptance == pytest.approx(0.5)
    assert row.verdict == "divergences 7 of 4000 of datum 3 (up to 0.36% > 0.1%)"


def test_what_a_kernel_alone_records_gets_a_column():
    stats = {"step_size": torch.tensor(0.25).expand(4, 1000), "n_steps": torch.arange(4000).reshape(4, 1000) % 2}
    smc = islands(normal(8, 500, 3), notes={"temperatures": [[0.0, 0.5, 1.0], [0.0, 1.0]]})
    table = compare({"hmc": chains(stats={**stats, "lp": torch.zeros(4, 1000)}), "smc": smc, "grid": grid()})
    assert table.columns.tolist() == [*COLUMNS[:-2], "n_steps", "step_size", "temperatures", *COLUMNS[-2:]]
    assert (table.step_size["hmc"], table.n_steps["hmc"], table.temperatures["smc"]) == (0.25, 0.5, 2.5)
    assert table.loc["grid", ["n_steps", "step_size", "temperatures"]].isna().all()


@pytest.mark.parametrize(("temperatures", "steps"), [(7, 7.0), ([0.0, 0.3, 1.0], 3.0), (torch.zeros(4, 9), 9.0)])
def test_temperatures_are_counted_however_they_are_noted(temperatures, steps):
    assert compare({"x": islands(normal(8, 500, 3), notes={"temperatures": temperatures})}).temperatures["x"] == steps


def islands(x: torch.Tensor, log_shares: torch.Tensor | None = None, method: str = "smc", **options) -> Draws:
    """Particles (island, particle, 3), equally weighted within an island."""
    shares = torch.zeros(len(x)) if log_shares is None else log_shares
    logs = shares[:, None].double().expand(x.shape[:2])
    logs = logs.flatten().log_softmax(0).reshape(logs.shape)
    return Draws({"z": x[..., :2], "s": x[..., 2]}, method, log_weights=logs, **options)


def test_islands_of_identical_particles_are_worth_their_number():
    same = islands(normal(64, 1, 3).expand(64, 500, 3))
    row = compare({"x": same}).loc["x"]
    # variance / se^2 = R - 1 exactly; the share below the 5 % quantile too
    assert row.ess_bulk == pytest.approx(63)
    assert row.ess_tail == pytest.approx(63)
    assert row.mcse_per_sd == pytest.approx(1 / math.sqrt(63))
    assert row.verdict == "ess_bulk 63 < 400; ess_tail 63 < 400"


def test_islands_of_independent_particles_are_worth_about_these():
    sizes = []
    for seed in range(30):
        row = compare({"x": islands(normal(32, 250, 3, seed=seed))}).loc["x"]
        assert row.ess_bulk <= 8000 and row.ess_tail <= 8000
        assert math.isnan(row.pareto_k) and row.verdict == "ok"
        sizes.append(8000 * row.mcse_per_sd**2)  # chi squared of 31 degrees of freedom by 31, largest of 3
    # its mean is about 1 + 0.85 sqrt(2 / 31), and its spread 0.75 sqrt(2 / 31)
    expected, se = 1 + 0.85 * math.sqrt(2 / 31), 0.75 * math.sqrt(2 / 31 / 30)
    assert abs(sum(sizes) / 30 - expected) < 4 * se


def test_islands_that_agree_are_worth_no_more_than_their_particles():
    row = compare({"x": islands(normal(1, 500, 3).expand(8, 500, 3))}).loc["x"]
    assert (row.ess_bulk, row.ess_tail) == (pytest.approx(4000), pytest.approx(4000))


def test_islands_of_unequal_weight_have_the_error_that_repetitions_show():
    def run(seed: int):
        means, shares = normal(16, 1, 1, seed=seed), 0.7 * normal(16, seed=1000 + seed)
        # heavier islands lie higher: the weights matter for the mean, and the particles share their island's place
        x = 0.6 * means + 0.5 * shares[:, None, None] + 0.8 * normal(16, 50, 3, seed=2000 + seed)
        return moments(islands(x, shares), ["s", "z"])

    runs = [run(seed) for seed in range(300)]
    means, claimed = torch.stack([r.mean for r in runs]), torch.stack([r.se**2 for r in runs]).mean(0).sqrt()
    spread = means.std(0)[:3]
    assert torch.allclose(claimed[:3], spread, rtol=0.25)
    # taking the 800 particles as independent would claim 1 / 2.5 of it
    flat = torch.stack([r.sd for r in runs]).mean(0)[:3] / math.sqrt(800)
    assert (flat < 0.5 * spread).all()


@pytest.mark.parametrize(("num_islands", "verdict"), [(1, "islands 1 < 4"), (3, "islands 3 < 4"), (4, "ok")])
def test_particles_of_few_islands_have_no_known_error(num_islands, verdict):
    x = normal(num_islands, 12_000 // num_islands, 3)
    assert compare({"x": islands(x)}, min_ess=100).verdict["x"] == verdict


def test_weight_on_one_island_falls():
    row = compare({"x": islands(normal(8, 1000, 3), torch.tensor([6.0, *[0.0] * 7]))}).loc["x"]
    assert "weight on 1.0 of 8 islands" in row.verdict
    assert row.ess_bulk < 1100  # seven of eight islands hold nothing


def test_a_component_that_never_changes_is_left_out_of_islands():
    x = normal(8, 1000, 3)
    x[..., 1] = 0.1
    row = compare({"x": islands(x)}).loc["x"]
    assert row.ess_bulk > 1000 and row.verdict == "ok"


def test_weighted_chains_of_importance_sampling_keep_their_pareto_k():
    x = 0.4 * normal(4, 2000, 3, seed=1).double()
    logs = (Normal(2.0, 1.0).log_prob(x) - Normal(0.0, 0.4).log_prob(x)).sum(-1)
    draws = Draws({"z": x}, "snis", log_weights=logs.flatten().log_softmax(0).reshape(4, 2000))
    assert compare({"x": draws}).pareto_k["x"] > 0.7
    assert "pareto_k 0.90 > 0.7" in compare({"x": islands(normal(8, 500, 3), pareto_k=0.9)}).verdict["x"]


def test_few_islands_are_held_to_students_t():
    # R = 4, means of islands 0.4, 0.6, 0.4, 0.6 around 0.5: se^2 = 4 / 3 * 4 * (0.1 / 4)^2
    centers = torch.tensor([0.4, 0.6, 0.4, 0.6])[:, None, None]
    noise = normal(1, 500, 3)
    x = centers + torch.cat([noise, -noise], 1)
    row = compare({"x": islands(x)}, reference=grid(), min_ess=0).loc["x"]
    assert row.worst_error_in_se == pytest.approx(0.5 / (0.1 / math.sqrt(3)), rel=1e-3)
    # a t of three degrees of freedom exceeds 32.6 as rarely as a normal exceeds 4
    assert row.verdict == "ok"
    assert "> 5.4 se" in compare({"x": islands(x)}, reference=grid(), min_ess=0, max_error=2.5).verdict["x"]


def test_the_reference_may_be_named():
    draws = {"x": chains(mean=0.3), "exact": grid()}
    named, given = compare(draws, reference="exact"), compare(draws, reference=draws["exact"])
    assert named.worst_error_in_se["x"] == given.worst_error_in_se["x"] > 15
    assert math.isnan(named.worst_error_in_se["exact"])
    with pytest.raises(ValueError, match=r"reference 'grid' is not among the draws; names: \['exact', 'x'\]"):
        compare(draws, reference="grid")


def test_thresholds_can_be_moved():
    draws = {"x": chains()}
    assert compare(draws, min_ess=1e6).verdict["x"].count("< 1e+06") == 2
    assert compare(draws, max_r_hat=1.0).verdict["x"].startswith("r_hat 1.00")
    assert "error" in compare(draws, reference=grid(), max_error=0.01).verdict["x"]


def test_a_single_chain_that_drifts_falls_and_no_single_chain_is_ok():
    drift = torch.linspace(-2, 2, 4000)[None] + normal(1, 4000)
    assert "r_hat" in compare({"x": Draws({"z": drift}, "hmc")}).verdict["x"]
    assert compare({"x": Draws({"z": normal(1, 4000)}, "hmc")}).verdict["x"] == "starts 1 < 4"


@pytest.mark.parametrize(("starts", "verdict"), [(1, "starts 1 < 4"), (3, "starts 3 < 4"), (4, "ok")])
def test_chains_from_few_points_are_not_ok(starts, verdict):
    assert compare({"x": chains(notes={"distinct_starts": starts})}).verdict["x"] == verdict


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
    with pytest.raises(TypeError, match=r"draws must be a mapping, got Draws"):
        compare(good, reference="x")
    with pytest.raises(TypeError, match=r"draws\['b'\] must be a Draws, got dict"):
        compare({"a": good, "b": {}})
    with pytest.raises(TypeError, match=r"reference must be a Draws or text or None, got {}"):
        compare({"a": good}, reference={})
    other = Draws({"z": torch.zeros(1, 10, 2)}, "nuts")
    with pytest.raises(ValueError, match=r"same sites and shapes, got \{'a': \{'s': .*, 'b': \{'z': \(2,\)"):
        compare({"a": good, "b": other})
    with pytest.raises(ValueError, match=r"reference must have the draws' sites .* it has \{'z': \(2,\)\}"):
        compare({"a": good}, reference=other)
