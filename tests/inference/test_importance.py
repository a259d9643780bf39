"""Importance sampling: moments and log Z meet quadrature, weights that cannot be trusted say so."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    VAE,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    QuadraticEnergy,
    importance,
    quadrature,
    tilt,
)
from pyro_ebm.structure import DoesNotBroadcast


def prior():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def bent(z):
    """A skewed tilt, bounded like that of a small network."""
    return 2 * torch.tanh(2 * z[..., 0] + z[..., 1]) - 1.5 * torch.tanh(z[..., 1] - z[..., 0] - 1)


def small_vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = VAE((6,), 2, hidden=(8,))
        for parameter in vae.decoder.parameters():
            parameter.data *= 3
        return vae, torch.rand(1, 6)


def standard_error(draws, f):
    """Of the self-normalized mean of ``f`` (delta method), and that mean."""
    w, values = draws.weights, f(draws.flat("z").reshape(-1, 2))
    mean = w @ values
    return ((w[:, None] * (values - mean)) ** 2).sum(0).sqrt(), mean


def agree(draws, exact):
    for f in (lambda z: z, lambda z: z**2, lambda z: z[:, :1] * z[:, 1:]):
        se, mean = standard_error(draws, f)
        _, truth = standard_error(exact, f)
        assert ((mean - truth).abs() < 4 * se).all(), ((mean - truth) / se).tolist()
        assert (se < 0.1).all()
    assert abs(draws.log_z.value - exact.log_z.value) < 4 * draws.log_z.se
    assert 0 < draws.log_z.se < 0.1


def test_tilted_prior_meets_quadrature():
    tilted = tilt(prior, {"z": bent})
    draws = importance(tilted, num_samples=20_000, seed=0)
    agree(draws, quadrature(tilted))
    assert draws.method == "snis" and draws.values["z"].shape == (1, 20_000, 2)
    assert draws.pareto_k < 0.5
    assert draws.notes["proposal"] == "prior"
    assert 1000 < draws.notes["ess"] < 20_000


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_posterior_of_an_image_meets_quadrature(tilted, guided):
    vae, image = small_vae()
    model = tilt(vae.model, {"z": bent}) if tilted else vae.model

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(torch.tensor([-0.3, 0.3]), 1.3).to_event(1))

    draws = importance(model, guide if guided else None, image, num_samples=20_000, seed=1)
    agree(draws, quadrature(model, image))
    assert draws.notes["proposal"] == ("guide" if guided else "prior")
    assert draws.values["z"].shape == (1, 20_000, 1, 2)
    assert draws.observed.keys() == {"x"} and torch.equal(draws.observed["x"], image)


def test_log_z_of_a_normal_model_and_its_lp():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.tensor(0.8)
    draws = importance(model, None, y, num_samples=10_000, seed=0)
    exact = float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(y))
    assert abs(draws.log_z.value - exact) < 4 * draws.log_z.se
    z = draws.values["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(y)
    torch.testing.assert_close(draws.stats["lp"], expected)


def test_weights_are_normalized():
    draws = importance(tilt(prior, {"z": bent}), num_samples=5000, seed=0)
    assert draws.log_weights.shape == (1, 5000)
    assert float(draws.log_weights.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    expected = (-bent(draws.values["z"])).log_softmax(-1)
    torch.testing.assert_close(draws.log_weights, expected)


def test_an_equal_proposal_gives_equal_weights():
    draws = importance(tilt(prior, {"z": LinearEnergy([0.0, 0.0])}), num_samples=1000, seed=0)
    assert torch.equal(draws.weights, torch.full((1000,), draws.weights[0].item()))
    assert draws.pareto_k <= 0.1
    assert draws.log_z == (0.0, 0.0)
    assert draws.notes["ess"] == pytest.approx(1000)


def test_the_exact_posterior_as_guide_gives_equal_weights():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))

    y = torch.tensor(1.5)
    draws = importance(model, guide, y, num_samples=500, seed=0)
    assert draws.notes["ess"] == pytest.approx(500, rel=1e-3)
    assert draws.log_z.value == pytest.approx(float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(y)), abs=1e-5)


@pytest.mark.parametrize("energy", [LinearEnergy([4.0, 4.0]), QuadraticEnergy(-1.5)], ids=["far", "unbounded"])
def test_far_targets_warn_or_raise(energy):
    model = tilt(prior, {"z": energy})
    with pytest.warns(InferenceWarning, match=r"Pareto k = .* > 0.7.*draw more, give a better guide, or use MCMC"):
        draws = importance(model, num_samples=4000, seed=0)
    assert draws.pareto_k > 0.7
    with pytest.raises(InferenceError, match="Pareto k"):
        importance(model, num_samples=4000, seed=0, strict=True)


def test_a_better_guide_is_the_remedy():
    def guide():
        pyro.sample("z", dist.Normal(torch.full((2,), 4.0), 1.2).to_event(1))

    draws = importance(tilt(prior, {"z": LinearEnergy([4.0, 4.0])}), guide, num_samples=4000, seed=0)
    assert draws.pareto_k < 0.7
    assert abs(draws.log_z.value - 16.0) < 4 * draws.log_z.se


@pytest.mark.parametrize("num_samples", [257, 500, 512])
def test_chunks_change_nothing_but_memory(monkeypatch, num_samples):
    whole = importance(tilt(prior, {"z": bent}), num_samples=num_samples, seed=0)
    monkeypatch.setattr("pyro_ebm.inference.importance_sampler.CHUNK", 256)
    parts = importance(tilt(prior, {"z": bent}), num_samples=num_samples, seed=0)
    assert parts.values["z"].shape == whole.values["z"].shape == (1, num_samples, 2)
    assert parts.stats["lp"].shape == parts.log_weights.shape == (1, num_samples)
    expected = (-bent(parts.values["z"])).log_softmax(-1)
    torch.testing.assert_close(parts.log_weights, expected)
    spread = math.hypot(whole.log_z.se, parts.log_z.se)
    assert abs(whole.log_z.value - parts.log_z.value) < 4 * spread


def test_sites_in_plates_and_outside_have_their_own_shapes():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("b", dist.Dirichlet(torch.ones(4)))
                pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(3, 2))

    draws = importance(model, num_samples=300, seed=0)
    shapes = {site: tuple(value.shape) for site, value in draws.values.items()}
    assert shapes == {"mu": (1, 300), "a": (1, 300, 3, 1), "b": (1, 300, 3, 2, 4)}
    mu, a = draws.values["mu"][0], draws.values["a"][0]
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[:, None, None], 1.0).log_prob(a).sum((1, 2))
    expected = expected + 6 * math.log(6) + 2 * dist.Normal(a, 1.0).log_prob(torch.tensor(0.0)).sum((1, 2))
    torch.testing.assert_close(draws.stats["lp"][0], expected)


def test_discrete_sites_are_sampled():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(3 * k, 1.0), obs=y)

    y = torch.tensor(2.0)
    draws = importance(model, None, y, num_samples=4000, seed=0)
    odds = [0.7 * math.exp(-2.0), 0.3 * math.exp(-0.5)]
    truth = odds[1] / sum(odds)
    se = float(((draws.weights * (draws.flat("k") - truth)) ** 2).sum().sqrt())
    assert abs(float(draws.mean("k")) - truth) < 4 * se


# Energies that misbehave


def test_infinite_energy_is_a_weight_of_zero():
    half = tilt(prior, {"z": lambda z: torch.where(z[..., 0] > 0, 0.0, math.inf)})
    draws = importance(half, num_samples=4000, seed=0)
    assert torch.equal(draws.weights > 0, draws.flat("z")[:, 0] > 0)
    assert abs(draws.log_z.value - math.log(0.5)) < 4 * draws.log_z.se
    assert draws.pareto_k <= 0.1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("threshold", [1.0, -9.0], ids=["some", "all"])
def test_energies_that_are_nan_or_unbounded(value, threshold):
    broken = tilt(prior, {"z": lambda z: torch.where(z[..., 0] > threshold, value, z[..., 0])})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = importance(broken, num_samples=1000, seed=0)
    assert [w.category for w in caught] == [InferenceWarning]
    assert "are not finite for" in str(caught[0].message) and "bound the energy" in str(caught[0].message)
    assert draws.pareto_k == math.inf
    assert not math.isfinite(draws.log_z.value)
    with pytest.raises(InferenceError, match="not finite"):
        importance(broken, num_samples=1000, seed=0, strict=True)


def test_all_weights_zero():
    nowhere = tilt(prior, {"z": lambda z: torch.full_like(z[..., 0], math.inf)})
    with pytest.warns(InferenceWarning, match="all 100 importance weights are zero"):
        draws = importance(nowhere, num_samples=100, seed=0)
    assert draws.log_z.value == -math.inf
    assert draws.log_weights.isnan().all()


def test_an_energy_of_the_wrong_shape():
    with pytest.raises(ValueError, match="must return one number per batch element"):
        importance(tilt(prior, {"z": lambda z: z}), num_samples=100)


# State, errors


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.modes = []

    def model(self):
        self.modes.append(self.training)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = self.drop(self.norm(z.reshape(-1, 2))).reshape(z.shape)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(2))


def test_modules_are_evaluated_and_left_as_they_were():
    network = Dropping()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws = importance(tilt(network.model, {"z": bent}), num_samples=1000, seed=0)
    z = draws.values["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - bent(z)
    expected = expected + dist.Normal(z / (1 + 1e-5) ** 0.5, 1.0).log_prob(torch.tensor(1.0)).sum(-1)
    torch.testing.assert_close(draws.stats["lp"], expected)
    assert network.training and network.drop.training and not any(network.modes)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(5)
    first = importance(prior, num_samples=10)
    second = importance(prior, num_samples=10)
    torch.manual_seed(5)
    again = importance(prior, num_samples=10)
    assert torch.equal(first.values["z"], again.values["z"])
    assert not torch.equal(first.values["z"], second.values["z"])


def test_a_guide_that_lacks_a_site():
    def guide():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"guide does not propose the latent site\(s\) \['z'\] \(it has \['w'\]\)"):
        importance(prior, guide)


def test_no_latent_sites():
    with pytest.raises(ValueError, match="no latent sample sites"):
        importance(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))


@pytest.mark.parametrize("num_samples", [0, 1])
def test_too_few_draws(num_samples):
    with pytest.raises(ValueError, match=f"num_samples must be a whole number of at least [12], got {num_samples}"):
        importance(prior, num_samples=num_samples)


def test_a_model_that_sums_over_all_draws():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("pull", (0.5 * z).sum())  # the sum of all draws, the same for each: weights would come out equal

    with pytest.raises(DoesNotBroadcast, match="the model does not broadcast: .* sum over dim=-1"):
        importance(model, None, num_samples=100, seed=0, vectorize="plate")
    for way in ("auto", "loop"):
        draws = importance(model, None, num_samples=1000, seed=0, vectorize=way)
        assert draws.notes["vectorize"] == ("vmap" if way == "auto" else "loop")
        assert abs(draws.log_z.value - 0.375) < 4 * draws.log_z.se


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_every_way_gives_the_same_weights(way):
    """Of the guide's draws: its own log density taken off, whatever way ran."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0])
    plate = importance(model, guide, x, num_samples=500, seed=0)
    other = importance(model, guide, x, num_samples=500, seed=0, vectorize=way)
    assert (plate.notes["vectorize"], other.notes["vectorize"]) == ("plate", way)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    for draws in (plate, other):
        assert abs(draws.log_z.value - exact) < 4 * draws.log_z.se
        z = draws.values["z"][0]
        expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        expected = (expected - dist.Normal(x / 2, 0.8).log_prob(z)).sum(-1).log_softmax(0)
        torch.testing.assert_close(draws.log_weights[0], expected, atol=1e-5, rtol=1e-4)
