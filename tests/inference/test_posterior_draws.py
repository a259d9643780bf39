"""posterior_draws: its weighted draws have the moments of the exact posterior of each datum."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import VAE, LinearEnergy, log_likelihood, posterior_draws, tilt

W = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.6]])
NOISE = 0.5
SPREAD = torch.linalg.inv(torch.eye(2) + W @ W.T / NOISE**2)
GAIN = W.T @ SPREAD / NOISE**2
X = torch.tensor([[1.0, 0.2, -0.5], [-0.4, 1.1, 0.0], [0.3, -0.9, 0.8]])
K = 8000


def model(x, *, num_data=None):
    with pyro.plate("data", num_data or len(x), subsample_size=len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)


def guide(x, *, num_data=None):
    """Too wide, off the mark, and without the correlation."""
    with pyro.plate("data", num_data or len(x), subsample_size=len(x), dim=-1):
        pyro.sample("z", dist.Normal(x @ GAIN + 0.2, 1.5 * SPREAD.diagonal().sqrt()).to_event(1))


def expectation(log_weights, values):
    """Self-normalized estimate (n, ...) and its standard error, from (n, num_samples, ...)."""
    weights = log_weights.exp().reshape(*log_weights.shape, *[1] * (values.ndim - 2))
    mean = (weights * values).sum(1)
    return mean, (weights * (values - mean[:, None])).square().sum(1).sqrt()


def assert_covered(found, exact):
    mean, se = found
    assert ((mean - exact).abs() < 4 * se).all(), ((mean - exact) / se).tolist()
    assert (se < 0.1 * (1 + mean.abs())).all()


def assert_posterior(values, log_weights, loc):
    z = values["z"]
    assert_covered(expectation(log_weights, z), loc)
    centered = z - loc[:, None]
    products = centered[..., :, None] * centered[..., None, :]
    assert_covered(expectation(log_weights, products), SPREAD.expand(len(loc), 2, 2))


def test_mean_covariance_and_an_exponential():
    values, log_weights = posterior_draws(model, guide, X, num_samples=K, seed=0)
    assert values["z"].shape == (3, K, 2) and log_weights.shape == (3, K)
    assert values["z"].is_contiguous() and log_weights.is_contiguous()
    torch.testing.assert_close(log_weights.logsumexp(-1), torch.zeros(3), atol=1e-4, rtol=0.0)
    loc = X @ GAIN
    assert_posterior(values, log_weights, loc)
    # what TiltLikelihood takes from them: E[exp(a.z)]
    a = torch.tensor([0.7, -0.4])
    exact = (loc @ a + a @ SPREAD @ a / 2).exp()
    assert_covered(expectation(log_weights, (values["z"] @ a).exp()), exact)
    # The draws without their weights are those of the guide.
    mean, se = expectation(torch.full((3, K), -math.log(K)), values["z"])
    assert ((mean - loc - 0.2).abs() < 4 * se).all()


def test_the_exact_posterior_as_guide_has_equal_weights():
    def exact(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(x @ GAIN, SPREAD))

    _, log_weights = posterior_draws(model, exact, X, num_samples=200, seed=0)
    torch.testing.assert_close(log_weights, torch.full((3, 200), -math.log(200)), atol=1e-3, rtol=0.0)


def test_a_tilt_moves_the_posterior():
    a = torch.tensor([1.0, -0.5])
    values, log_weights = posterior_draws(
        tilt(model, {"z": LinearEnergy(a)}), guide, X, num_samples=K, seed=0
    )
    assert_posterior(values, log_weights, X @ GAIN + SPREAD @ a)


def test_a_plate_that_subsamples_weighs_each_datum_once():
    """SVI counts a datum of a minibatch for those left out; its own posterior must not."""
    values, log_weights = posterior_draws(
        lambda x: model(x, num_data=300), lambda x: guide(x, num_data=300), X, num_samples=K, seed=0
    )
    assert_posterior(values, log_weights, X @ GAIN)
    found = log_likelihood(
        lambda x: model(x, num_data=300), lambda x: guide(x, num_data=300), X, num_samples=2000, seed=0
    )
    exact = dist.MultivariateNormal(torch.zeros(3), W.T @ W + NOISE**2 * torch.eye(3)).log_prob(X)
    assert ((found.value - exact).abs() < 4 * found.se).all() and (found.se < 0.1).all()


def test_masked_data_count_for_nothing():
    """Where the likelihood is masked, the posterior is the prior."""

    def masked(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)

    def wide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.2).to_event(1))

    values, log_weights = posterior_draws(masked, wide, X, num_samples=K, seed=0)
    exact = torch.stack([X[0] @ GAIN, torch.zeros(2), X[2] @ GAIN])
    assert_covered(expectation(log_weights, values["z"]), exact)


def test_several_latent_sites():
    def two(x):
        with pyro.plate("data", len(x), dim=-1):
            scale = pyro.sample("scale", dist.Gamma(3.0, 3.0))
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(scale), obs=x)

    def prior(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("scale", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    counts = torch.tensor([0.0, 2.0, 5.0])
    values, log_weights = posterior_draws(two, prior, counts, num_samples=K, seed=0)
    assert values["scale"].shape == (3, K) and values["z"].shape == (3, K, 2)
    assert_covered(expectation(log_weights, values["scale"]), (3 + counts) / 4)  # conjugate


def test_a_beta_vae_is_weighted_as_it_was_defined():
    """Beta is a weight of training; the posterior is that of the model."""
    torch.manual_seed(0)
    plain = VAE((4,), 2, hidden=(5,))
    weighted = VAE((4,), 2, beta=4.0, hidden=(5,))
    weighted.load_state_dict(plain.state_dict())
    x = torch.rand(3, 4)
    results = [posterior_draws(vae.model, vae.guide, x, num_samples=50, seed=0) for vae in (plain, weighted)]
    assert torch.equal(results[0][1], results[1][1])
    assert weighted.training and all(p.grad is None for p in weighted.parameters())


def test_seed_and_batches(rng_untouched):
    with rng_untouched():
        runs = [
            posterior_draws(model, guide, X, num_samples=500, seed=seed, batch_size=size)
            for seed, size in ((1, 3), (1, 3), (2, 3), (1, 2))
        ]
    (first, weights), (again, same_weights), (other, _), (parts, part_weights) = runs
    assert torch.equal(first["z"], again["z"]) and torch.equal(weights, same_weights)
    assert not torch.equal(first["z"], other["z"])
    assert parts["z"].shape == first["z"].shape
    assert_covered(expectation(part_weights, parts["z"]), X @ GAIN)
    torch.manual_seed(5)
    without = posterior_draws(model, guide, X, num_samples=10)[0]["z"]
    assert not torch.equal(without, posterior_draws(model, guide, X, num_samples=10)[0]["z"])


def test_models_it_is_not_for():
    def grouped(x):
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one plate at dim -1, one row of x each, but the model has 2 nested"):
        posterior_draws(grouped, grouped, X, num_samples=5)

    def lacking(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"guide does not propose the latent site\(s\) \['z'\]"):
        posterior_draws(model, lacking, X, num_samples=5)
