"""Whatever proposes has the density of its draws: masks, scales and guides off the support, by every method."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_ebm import (
    LinearEnergy,
    LogDensity,
    calibrate,
    importance,
    log_likelihood,
    posterior_draws,
    predictive,
    sample,
    tilt,
)
from pyro_ebm.inference.annealing.ais import annealed_importance
from pyro_ebm.inference.chains.starts import chain_starts
from pyro_ebm.structure import outside_support

Y = torch.tensor([1.0, 1.5, 2.0, 1.5])


def likelihood(mu, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked_distribution(y):
    likelihood(pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False)), y)


def masked_below_to_event(y):
    likelihood(pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).mask(False).to_event(1)), y)


def masked_by_handler(y):
    with poutine.mask(mask=False):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    likelihood(mu, y)


def scaled(y):
    with poutine.scale(scale=0.5):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    likelihood(mu, y)


def gaussian(precision):
    """Posterior mean and sd, and log Z, of a prior exp(-precision mu^2 / 2 + constant)."""
    constant = -0.25 * math.log(2 * math.pi) if precision else 0.0
    grid = torch.linspace(-9, 12, 40_001, dtype=torch.float64)
    logs = constant - precision * grid**2 / 2 + dist.Normal(grid[:, None], 1.0).log_prob(Y.double()).sum(1)
    log_z = float(logs.logsumexp(0) + math.log(grid[1] - grid[0]))
    return float(Y.sum()) / (precision + 4), (precision + 4) ** -0.5, log_z


TARGETS = {
    masked_distribution: gaussian(0.0),
    masked_below_to_event: gaussian(0.0),
    masked_by_handler: gaussian(0.0),
    scaled: gaussian(0.5),
}
models = pytest.mark.parametrize("model", TARGETS, ids=lambda model: model.__name__)


def wide(y):
    with poutine.scale(scale=7.0):  # as the density of draws it is what it is
        pyro.sample("mu", dist.Normal(1.0, 2.0).mask(False))


METHODS = {
    "snis": lambda model: sample(model, Y, method="snis", num_samples=4000, num_chains=1, seed=0),
    "guide": lambda model: sample(model, Y, method="snis", guide=wide, num_samples=4000, num_chains=1, seed=0),
    "vmap": lambda model: importance(model, None, Y, num_samples=4000, vectorize="vmap", seed=0),
    "loop": lambda model: importance(model, None, Y, num_samples=150, vectorize="loop", seed=0),
    "auto": lambda model: sample(model, Y, ess=400, seed=0, progress=False),
    "smc": lambda model: sample(model, Y, method="smc", num_samples=500, num_chains=4, seed=0, progress=False),
}


@models
@pytest.mark.parametrize("method", METHODS)
def test_draws_and_log_z(method, model):
    if method == "guide" and model is masked_below_to_event:
        pytest.skip("the guide has another shape")
    draws = METHODS[method](model)
    mean, sd, log_z = TARGETS[model]
    error = sd / math.sqrt(draws.notes.get("ess", 400))
    assert abs(float(draws.mean("mu").squeeze()) - mean) < 4 * error
    assert abs(float(draws.log_z.value) - log_z) < max(4 * float(draws.log_z.se), 0.02)


def test_bounds_on_log_z():
    found = annealed_importance(masked_distribution, Y, seed=0, progress=False, num_temperatures=16)
    assert found.lower - 0.05 < TARGETS[masked_distribution][2] < found.upper + 0.05


@models
def test_starts(model):
    density = LogDensity.from_model(model, Y)
    points, rule = chain_starts(density, 2000, seed=0)
    mean, sd, _ = TARGETS[model]
    assert rule == "importance" and abs(float(points.mean()) - mean) < 0.3 * sd


def test_the_prior_of_what_is_summed_out():
    def model():
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])

    proposal = LogDensity.from_model(model).proposal()
    u = torch.linspace(-2.0, 2.0, 5)[:, None]
    torch.testing.assert_close(proposal(u), dist.Normal(0.0, 1.0).log_prob(u[:, 0]))


def test_each_datum():
    """Scaled and masked in model and guide: the density of the draws of the guide is that of the guide."""
    weight = 0.5

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    logs = weight * dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(Y.double())
    exact = logs.logsumexp(0) + math.log(grid[1] - grid[0])
    found = log_likelihood(model, guide, Y, num_samples=4000, seed=0)
    assert ((found.value - exact).abs() < 4 * found.se).all()
    values, log_weights = posterior_draws(model, guide, Y, num_samples=4000, seed=0)
    means = (log_weights.exp() * values["z"]).sum(1)
    assert ((means - Y / 1.5).abs() < 0.06).all()


def test_padding_counts_nowhere():
    """What a mask hides in a row, and nothing depends on, leaves the weights alone; the rest has its density."""
    keep = torch.tensor([True, True, False])

    def model(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the posterior

    x = torch.tensor([0.5, -1.0, 3.0])
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(x[:2]).sum())
    for vectorize in ("plate", "vmap"):
        draws = importance(model, guide, x, num_samples=200, seed=0, vectorize=vectorize)
        assert float(draws.log_z.value) == pytest.approx(exact, abs=1e-4) and draws.notes["ess"] > 199
    found = log_likelihood(model, guide, x, num_samples=200, seed=0)
    assert float(found.value.sum()) == pytest.approx(exact, abs=1e-4) and float(found.value[2]) == 0.0


def positive(y):
    z = pyro.sample("z", dist.Exponential(1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])


def on_the_line(y):
    pyro.sample("z", dist.Normal(0.0, 1.5))


def within_interval(y):
    z = pyro.sample("z", dist.Uniform(0.0, 2.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])


def angle(y):
    z = pyro.sample("z", dist.VonMises(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])


def exact_mean(log_prior, low, high):
    grid = torch.linspace(low, high, 40_001, dtype=torch.float64)
    weights = (log_prior(grid) + dist.Normal(grid, 1.0).log_prob(Y[0].double())).softmax(0)
    return float(weights @ grid)


OFF = {
    positive: exact_mean(lambda z: -z, 0.0, 15.0),
    within_interval: exact_mean(torch.zeros_like, 0.0, 2.0),
    angle: exact_mean(lambda z: dist.VonMises(0.0, 1.0).log_prob(z), -math.pi, math.pi),
}


@pytest.mark.parametrize("vectorize", ["plate", "vmap", "loop"])
@pytest.mark.parametrize("model", OFF, ids=lambda model: model.__name__)
def test_draws_off_the_support_weigh_nothing(model, vectorize):
    num = 150 if vectorize == "loop" else 6000
    draws = importance(model, on_the_line, Y, num_samples=num, seed=0, vectorize=vectorize)
    assert abs(float(draws.mean("z")) - OFF[model]) < 4 * 0.8 / math.sqrt(draws.notes["ess"])
    weighted = draws.flat("z")[draws.weights > 0]
    assert weighted.abs().max() < math.pi if model is angle else weighted.min() >= 0


@pytest.mark.parametrize("method", ["chees", "smc"])
def test_a_guide_on_another_space_is_named(method):
    with pytest.raises(ValueError, match=r"guide proposes site 'z' from Normal, on Real.*the model has GreaterThan"):
        sample(positive, Y, method=method, guide=on_the_line, num_samples=50, num_chains=4, seed=0, progress=False)


def test_per_datum_off_the_support():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    grid = torch.linspace(0, 15, 20_001, dtype=torch.float64)[:, None]
    exact = (-grid + dist.Normal(grid, 1.0).log_prob(Y.double())).logsumexp(0) + math.log(grid[1] - grid[0])
    found = log_likelihood(model, guide, Y, num_samples=4000, seed=0)
    assert ((found.value - exact).abs() < 4 * found.se).all()
    values, log_weights = posterior_draws(model, guide, Y, num_samples=500, seed=0)
    assert (values["z"][log_weights > -math.inf] >= 0).all()


@pytest.mark.parametrize(
    ("fn", "inside", "outside"),
    [
        (dist.Exponential(torch.ones(2)), [0.0, 3.0], [-0.1, 3.0]),
        (dist.Dirichlet(torch.ones(3)), [0.2, 0.3, 0.50001], [0.2, 0.9, 0.5]),
        (dist.Exponential(torch.ones(2)).to_event(1).mask(True), [0.1, 1.0], [1.0, -1.0]),
        (dist.Poisson(1.0), 3.0, 2.5),
        (dist.Uniform(0.0, torch.tensor([1.0, 2.0])), [1.0, 2.0], [1.5, 1.5]),
        (dist.VonMises(1.0, 1.0), 3.0, 3.2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outside_a_support(fn, inside, outside):
    assert not outside_support(fn, torch.tensor(inside)).any()
    found = outside_support(fn, torch.tensor(outside))
    assert found.any() and found.shape == fn.batch_shape


def test_nothing_lies_outside_the_line():
    assert outside_support(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.full((2,), math.nan)) is None


@pytest.mark.uses_param_store
def test_an_autoguide_starts_chains_and_no_path():
    guide = AutoNormal(positive)
    guide(Y)
    draws = sample(positive, Y, method="chees", guide=guide, num_samples=200, num_chains=8, seed=0, progress=False)
    assert abs(float(draws.mean("z")) - OFF[positive]) < 0.2
    with pytest.raises(ValueError, match=r"site\(s\) \['z'\] from other draws, as Pyro's autoguides do"):
        sample(positive, Y, method="smc", guide=guide, num_samples=50, num_chains=4, seed=0, progress=False)


@pytest.mark.parametrize("model", [masked_distribution, masked_below_to_event, masked_by_handler])
def test_no_draws_of_a_flat_prior(model):
    with pytest.raises(ValueError, match=r"site\(s\) \['mu'\] have a flat prior.*prior predictive"):
        predictive(model, Y, num_samples=10)
    draws = importance(model, None, Y, num_samples=500, seed=0)
    assert predictive(model, Y, draws=draws, seed=0)["y"].mean() > 1.0


@pytest.mark.parametrize(
    ("model", "word"), [(masked_distribution, "flat prior"), (scaled, r"scaled \(poutine.scale\)")]
)
def test_calibration_needs_a_model_that_simulates(model, word):
    sampler = functools.partial(sample, method="snis", num_samples=100)
    with pytest.raises(ValueError, match=rf"site\(s\) \['mu'\].* {word}"):
        calibrate(model, Y, sampler=sampler, num_simulations=2, seed=0, progress=False)


@pytest.mark.parametrize("site", ["mu", "y"])
@pytest.mark.parametrize("model", [masked_distribution, masked_by_handler])
def test_a_tilt_of_a_flat_prior_has_no_log_z(model, site):
    tilted = tilt(model, {site: LinearEnergy(0.5)})
    with pytest.raises(ValueError, match=r"site\(s\) \['mu'\] have a flat prior .* the tilt of \['" + site):
        tilted.log_normalizer(Y)
    if site == "mu" and model is masked_distribution:  # draws of the posterior do not need it
        draws = importance(tilted, None, Y, num_samples=4000, seed=0)
        assert abs(float(draws.mean("mu")) - 1.5 - 0.5 / 4) < 4 * 0.5 / math.sqrt(draws.notes["ess"])


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])


@pytest.mark.parametrize("site", ["mu", "y"])
def test_a_tilt_of_an_improper_prior_has_no_log_z(site):
    with pytest.raises(ValueError, match=r"site\(s\) \['mu'\] have a flat prior \(ImproperUniform\).*normalize=False"):
        tilt(improper, {site: LinearEnergy(0.5)}).log_normalizer(Y)
