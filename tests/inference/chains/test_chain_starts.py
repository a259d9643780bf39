"""Where batched chains start: each rule has its distribution, its fallback and its error."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value

from pyro_ebm import (
    HMC,
    MCMC,
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    compare,
    pyro_hmc,
    pyro_nuts,
    sample,
    tilt,
)
from pyro_ebm.inference.chains.starts import chain_starts, given_starts


def posterior(x):
    """The posterior of z is normal(x / 2, sqrt(1/2)), each datum for itself."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


X = torch.tensor([2.0, -1.0, 0.0])


def starts(density, num_chains=4000, **options):
    return chain_starts(density, num_chains, **options)


def near(u, means, scales):
    scores = (u.mean(0) - torch.as_tensor(means)) / (torch.as_tensor(scales) / len(u) ** 0.5)
    assert (scores.abs() < 5).all(), scores
    torch.testing.assert_close(u.std(0), torch.as_tensor(scales).expand(u.shape[1:]), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("independent", [None, "data"])
@pytest.mark.parametrize("proposal", [None, guide])
def test_importance_starts_follow_the_posterior(independent, proposal):
    density = LogDensity.from_model(posterior, X, independent=independent)
    u, rule = starts(density, 500, guide=proposal)
    assert rule == "importance" and u.shape == (500, *density.batch, density.dim)
    # resampled from a pool of limited size: near, and not exact
    assert (u.reshape(500, 3).mean(0) - X / 2).abs().max() < 0.25
    assert (u.reshape(500, 3).std(0) - 0.5**0.5).abs().max() < 0.2


def test_importance_starts_of_many_data():
    x = torch.randn(300)
    density = LogDensity.from_model(posterior, x, independent="data")
    u, rule = starts(density, 16)
    assert rule == "importance" and u.shape == (16, 300, 1)
    assert float((u[..., 0].mean(0) - x / 2).pow(2).mean().sqrt()) < 0.35


def test_prior_and_guide_starts():
    density = LogDensity.from_model(posterior, X)
    u, rule = starts(density, init="prior")
    assert rule == "prior"
    near(u, torch.zeros(3), 1.0)
    u, rule = starts(density, init="guide", guide=guide)
    assert rule == "guide"
    near(u, X / 2, 0.7)
    u, rule = starts(density, init="prior", guide=guide)
    near(u, torch.zeros(3), 1.0)


def test_uniform_starts():
    density = LogDensity.from_model(posterior, X)
    for each in (density, LogDensity(lambda u: -u.pow(2).sum(-1), 3)):
        u, rule = starts(each, init="uniform")
        assert rule == "uniform" and -2 <= float(u.min()) < -1.9 and 1.9 < float(u.max()) <= 2
    assert starts(LogDensity(lambda u: -u.pow(2).sum(-1), 3), 8)[1] == "uniform"  # nothing to draw from


def test_starts_of_a_tilted_model_come_from_the_untilted_prior():
    model = tilt(lambda: pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1)), {"z": LinearEnergy([1.5])})
    density = LogDensity.from_model(model)
    near(starts(density, init="prior")[0], [0.0], 1.0)
    means = [float(starts(density, 500, seed=seed)[0].mean()) for seed in range(20)]
    assert abs(sum(means) / 20 - 1.5) < 4 * 0.15 / 20**0.5


def test_constrained_sites_and_vmap():
    def model():
        pyro.sample("s", dist.Gamma(3.0, 2.0))
        pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))

    for vectorize in ("plate", "vmap"):
        density = LogDensity.from_model(model, vectorize=vectorize)
        u, rule = starts(density, 1000, init="prior")
        values = density.constrain(u)
        near(torch.cat([values["s"][:, None], values["p"]], -1)[:, :1], [1.5], 0.75**0.5)
        assert (values["p"].mean(0) - torch.tensor([1 / 6, 1 / 3, 1 / 2])).abs().max() < 0.05
        assert starts(density, 8)[1] == "importance"


def test_importance_falls_back_where_no_draw_has_positive_density():
    """Ten standard deviations out, the prior never meets the target; it is finite, so the prior still serves."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z.abs() < 1e-5, 0.0, -torch.inf))

    def finite():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("far", -1e4 * (z - 30) ** 2)

    with pytest.raises(ValueError, match="no other way to start works either: check the model, its data and its"):
        starts(LogDensity.from_model(model), 8)
    u, rule = starts(LogDensity.from_model(finite), 8)
    assert rule == "importance" and u.isfinite().all()


def test_bad_draws_are_drawn_anew():
    """Half of the prior has no density."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("half", torch.where(z[..., 0] > 0, 0.0, -torch.inf))

    density = LogDensity.from_model(model)
    for init in ("prior", "uniform", "importance"):
        u, rule = starts(density, 300, init=init)
        assert rule == init and (u[:, 0] > 0).all() and density(u).isfinite().all()


# Given values


def test_given_values_are_those_of_the_sites():
    def model():
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    density = LogDensity.from_model(model)
    values = {"z": torch.randn(5, 2), "s": torch.rand(5) + 0.1}
    u, rule = starts(density, 5, init=values)
    assert rule == "given"
    torch.testing.assert_close(density.constrain(u), {"s": values["s"], "z": values["z"]})
    assert given_starts(density, 5, u.double()).dtype == torch.float32


@pytest.mark.parametrize(
    "values, message",
    [
        ({"z": torch.zeros(4, 3)}, r"init\['z'\] must have 5 rows, one a chain, got shape \(4, 3\)"),
        ({"z": torch.tensor(0.0)}, r"init\['z'\] must have 5 rows, one a chain, got shape \(\)"),
        ({"z": torch.zeros(5, 2)}, r"values\['z'\] must have shape \(\*chains, 3\), got \(5, 2\)"),
        ({"x": torch.zeros(5, 3)}, r"values lacks the site\(s\) \['z'\]"),
    ],
)
def test_given_values_of_the_wrong_shape(values, message):
    with pytest.raises(ValueError, match=message):
        starts(LogDensity.from_model(posterior, X), 5, init=values)


@pytest.mark.parametrize("shape", [(5, 2), (4, 3), (5, 3, 1), (3,)])
def test_given_points_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"initial_params must be points of shape \(5, 3\), one row a chain, got \("):
        given_starts(LogDensity.from_model(posterior, X), 5, torch.zeros(shape))


# A density that is zero or not finite


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_bad_starts_name_the_chains_and_what_works(bad):
    density = LogDensity(lambda u: torch.where(u[..., 0] > 2.5, bad, -u.pow(2).sum(-1)), 1)
    u = torch.zeros(20, 1)
    u[[3, 17]] = 5.0
    message = r"zero or not finite at the starting points of chain\(s\) 3, 17, as given; start elsewhere: init=.uniform"
    with pytest.raises(ValueError, match=message):
        given_starts(density, 20, u)
    with pytest.raises(ValueError, match=r"chain\(s\) 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... \(20 in all\)"):
        given_starts(density, 20, torch.full((20, 1), 9.0))


def test_bad_data_are_named_too():
    with pytest.raises(ValueError, match="the data of site 'x' hold NaN in 1 of 3 numbers"):
        LogDensity.from_model(posterior, torch.tensor([0.0, torch.nan, 1.0]), independent="data")


def test_where_nothing_works_the_model_is_to_be_checked():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", torch.tensor(-torch.inf))

    with pytest.raises(ValueError, match="no other way to start works either: check the model, its data and its en"):
        starts(LogDensity.from_model(model), 2)


def test_values_of_unknown_sites_and_of_numbers():
    density = LogDensity.from_model(posterior, X)
    with pytest.raises(ValueError, match=r"init names the site\(s\) \['typo'\]; the latent sites are \['z'\]"):
        starts(density, 2, init={"typo": torch.zeros(2, 3)})
    u, rule = starts(density, 2, init={"z": [[0.0, 1.0, 2.0]] * 2, "x": X.expand(2, 3)})
    assert rule == "given" and u.tolist() == [[0.0, 1.0, 2.0]] * 2


def near_zero_only():
    z = pyro.sample("z", dist.Normal(50.0, 1.0))
    pyro.factor("near", torch.where(z.abs() < 10, 0.0, -torch.inf))


def test_the_rule_that_works_is_offered_where_another_one_was_asked_for_and_taken_where_none_was():
    density = LogDensity.from_model(near_zero_only)
    with pytest.raises(ValueError, match=r'found by init=\'prior\'; start elsewhere: init="uniform" works here'):
        starts(density, 4, init="prior")
    u, rule = starts(density, 4)
    assert rule == "uniform" and density(u).isfinite().all()


def two_modes():
    """Modes at 5 and -5 in each of five dimensions, where the prior is wide: one of its draws holds the weight."""
    x = pyro.sample("x", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    pyro.factor("modes", torch.stack([dist.Normal(m, 1.0).log_prob(x).sum(-1) for m in (-5.0, 5.0)]).logsumexp(0))


@pytest.mark.parametrize("seed", range(3))
def test_starts_reach_both_modes_of_a_wide_prior(seed):
    density = LogDensity.from_model(two_modes)
    u, _ = starts(density, 64, seed=seed)
    assert len(u.unique(dim=0)) >= 20
    assert 0.2 < float((u.mean(-1) > 0).float().mean()) < 0.8


@pytest.mark.parametrize("method", ["chees", "mala", "ula"])
def test_chains_in_two_modes_are_never_ok(method):
    options = {"num_samples": 30, "warmup_steps": 60, "seed": 0, "progress": False}
    with pytest.warns(InferenceWarning, match="chains disagree"):
        draws = sample(two_modes, method=method, **options)
    right = float((draws.values["x"][..., 0] > 0).float().mean())
    assert 0.2 < right < 0.8 and draws.notes["distinct_starts"] >= 20
    assert "r_hat" in compare({method: draws}).verdict[method]


@pytest.mark.parametrize("rule", ["initial_params", "init", "guide", "median"])
def test_chains_from_one_point_say_so(rule):
    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    given = {
        "initial_params": {"initial_params": {"z": torch.zeros(8, 3)}},
        "init": {"init": {"z": torch.zeros(8, 3)}},
        "guide": {"init": "guide", "guide": point},
        "median": {"init": init_to_value(values={"z": torch.zeros(3)})},
    }[rule]
    with pytest.warns(InferenceWarning, match="all 8 chains started at 1 point .fewer than 4., so that R-hat"):
        draws = MCMC(HMC(posterior), 200, 50, num_chains=8, seed=0, progress=False, **given).run(X)
    assert draws.notes["distinct_starts"] == 1
    assert "starts 1 < 4" in compare({"x": draws}).verdict["x"]


@pytest.mark.parametrize("kernel", [pyro.infer.NUTS, pyro.infer.HMC])
def test_stock_chains_count_their_starts(kernel):
    run = {"num_samples": 4, "warmup_steps": 0, "num_chains": 4, "seed": 0, "progress": False}
    same = {"initial_params": {"z": torch.zeros(4, 3)}}
    with pytest.warns(InferenceWarning, match="started at 1 point"):
        assert MCMC(kernel(posterior), **run, **same).run(X).notes["distinct_starts"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        assert MCMC(kernel(posterior), **run).run(X).notes["distinct_starts"] == 4
        for init, count in (("importance", 4), ({"z": torch.zeros(4, 3)}, 1)):
            sampler = pyro_nuts if kernel is pyro.infer.NUTS else pyro_hmc
            draws = sampler(posterior, X, init=init, **run)
            assert draws.notes["distinct_starts"] == count


def test_unknown_rules():
    density = LogDensity.from_model(posterior, X)
    with pytest.raises(ValueError, match=r"init must be one of \('importance', 'prior', 'guide', 'uniform'\) or a map"):
        starts(density, init="map")
    with pytest.raises(ValueError, match='init="guide" needs a guide'):
        starts(density, init="guide")
    with pytest.raises(ValueError, match=r"guide does not propose the latent site\(s\) \['z'\]"):
        starts(density, guide=lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize("init", ["importance", "prior", "uniform"])
def test_seeds(init, rng_untouched):
    density = LogDensity.from_model(posterior, X)
    with rng_untouched():
        first, again, other = (starts(density, 6, init=init, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
