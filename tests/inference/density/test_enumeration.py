"""Discrete sites summed out: densities of the model and of its prior in closed form, and what is built on both."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LogDensity, sample

NOISE, Y = 0.5, torch.tensor(2.5)


def two_states():
    c = pyro.sample("c", dist.Bernoulli(0.3))
    z = pyro.sample("z", dist.Normal(3 * c, 1.0))
    pyro.sample("y", dist.Normal(z, NOISE), obs=Y)


def mixture(values, scale):
    """Log density of the two states' normals at the values."""
    logs = [math.log(p) + dist.Normal(loc, scale).log_prob(values) for p, loc in ((0.7, 0.0), (0.3, 3.0))]
    return torch.stack(logs).logsumexp(0)


@pytest.fixture(scope="module")
def density():
    return LogDensity.from_model(two_states)


def test_density_of_model_and_prior(density):
    """The prior keeps the continuous site, whose value is given, and leaves out the data."""
    u = torch.randn(6, 1)
    prior = mixture(u[:, 0], 1.0)
    assert torch.allclose(density.proposal()(u), prior, atol=1e-5)
    assert torch.allclose(density(u), prior + dist.Normal(u[:, 0], NOISE).log_prob(Y), atol=1e-4)


def test_gradients_of_model_and_prior(density):
    u = torch.randn(6, 1, requires_grad=True)
    (expected,) = torch.autograd.grad(mixture(u[:, 0], 1.0).sum(), u)
    assert torch.allclose(density.proposal().value_and_grad(u)[1], expected, atol=1e-5)


def test_log_z_between_prior_and_model():
    draws = sample(two_states, method="smc", seed=0, progress=False)
    exact = float(mixture(Y, math.hypot(1.0, NOISE)))
    assert abs(float(draws.log_z.value) - exact) < 4 * float(draws.log_z.se) < 0.4
