"""Starts far from the mass, and coordinates in raw units: chains are there before they learn, and stay apart."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import HMC, MCMC, ChEES, LogDensity
from pyro_ebm.inference.chains.descent import descended
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.kernels.adaptation import initial_tuning
from pyro_ebm.inference.kernels.kernel import State


def state_at(density, u):
    return State(u, *density.value_and_grad(u), initial_tuning(ChEES(density), u))


def after(density, u):
    state = state_at(density, u)
    return state, *descended(density, state, density.value_and_grad, torch.Generator().manual_seed(0))


def regression(x, y, scale):
    a, b = (pyro.sample(name, dist.Normal(0.0, 1000.0)) for name in "ab")
    sigma = pyro.sample("sigma", scale)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


def exact(x, y, scale):
    """Posterior means and standard deviations of a and b: for each sigma of a grid they are Gaussian."""
    design, y = torch.stack([torch.ones_like(x), x], 1).double(), y.double()
    size = float((y - design @ torch.linalg.lstsq(design, y[:, None])[0][:, 0]).std())
    log_sigma = torch.linspace(math.log(size) - 1, math.log(size) + 4, 2001).double()
    sigma = log_sigma.exp()[:, None, None]
    factor = torch.linalg.cholesky(design.mT @ design / sigma**2 + 1e-6 * torch.eye(2).double())
    mean = torch.cholesky_solve((design.mT @ y)[:, None] / sigma**2, factor)[..., 0]
    fit = (y @ y - (mean * (design.mT @ y)).sum(-1)) / sigma[:, 0, 0] ** 2
    log_weights = scale.log_prob(log_sigma.exp()) + log_sigma - len(y) * log_sigma - 0.5 * fit
    log_weights = log_weights - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    weights = log_weights.softmax(0)[:, None]
    first = (weights * mean).sum(0)
    variance = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
    return first, (weights * (variance + (mean - first) ** 2)).sum(0).sqrt()


@pytest.mark.parametrize("raw", ["earnings", pytest.param("scores", marks=pytest.mark.slow)])
def test_a_regression_in_raw_units(raw):
    noise = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    x = 66 + 4 * noise[0] if raw == "earnings" else 100 + 15 * noise[0]
    y = 1300 * x - 60_000 + 19_000 * noise[1] if raw == "earnings" else 26 + 0.6 * x + 18 * noise[1]
    scale = dist.Exponential(1e-3) if raw == "earnings" else dist.HalfCauchy(2.5)
    mcmc = MCMC(ChEES(regression), 40, 100, num_chains=32, seed=0, progress=False)
    draws = mcmc.run(x, y, scale)
    mean, sd = exact(x, y, scale)
    for name, m, s in zip("ab", mean, sd, strict=True):
        chain_means = draws.values[name].double().mean(1)
        assert abs(float(chain_means.mean() - m)) < 4.5 * float(chain_means.std()) / 32**0.5 + 0.02 * float(s)
        assert float(draws.std(name)) == pytest.approx(float(s), rel=0.15)
    assert draws.num_gradients < 300_000  # it was 900 leapfrogs a step


def test_columns_of_all_units():
    units = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])
    density = LogDensity(lambda u: -0.5 * ((u - 3 * units) / units).square().sum(-1), 5)
    u = 1e6 * torch.randn(32, 5)
    mcmc = MCMC(HMC(density), 50, 100, initial_params=u, num_chains=32, seed=0, progress=False)
    draws = mcmc.run()
    scaled = (draws.values["u"] / units - 3).double()
    assert (scaled.mean((0, 1)).abs() < 4.5 / math.sqrt(32 * 10)).all()
    assert ((scaled.std((0, 1)) - 1).abs() < 0.15).all()


def test_starts_that_are_near_are_left_where_they_are():
    density = LogDensity(lambda u: -0.5 * (u / torch.tensor([1.0, 10.0])).square().sum(-1), 2)
    for spread in (1.0, 3.0):
        state, found, gradients = after(density, spread * torch.randn(64, 2) * torch.tensor([1.0, 10.0]))
        assert torch.equal(found.u, state.u) and gradients == 0


def test_chains_keep_their_valleys_and_their_spread():
    """Two far valleys: each chain ends in that on its side, and as wide as the valley is."""

    def log_prob(u):
        x, y = u.unbind(-1)
        return -0.5 * ((x.abs() - 1000.0) / 0.1).square() - 0.5 * (y / 20).square()

    u = torch.stack([torch.linspace(-900, 900, 64), 500.0 * torch.ones(64)], 1)
    state, found, gradients = after(LogDensity(log_prob, 2), u)
    assert torch.equal(found.u[:, 0].sign(), u[:, 0].sign()) and gradients > 0
    off = (found.u - torch.tensor([1000.0, 0.0]) * torch.stack([u[:, 0].sign(), torch.ones(64)], 1))
    assert ((off.std(0) / torch.tensor([0.1, 20.0]) - 1).abs() < 0.35).all()


def test_each_datum_of_an_independent_plate_goes_its_own_way():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e4))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.tensor([-5000.0, 0.0, 7000.0])
    density = LogDensity.from_model(model, x, independent="data")
    _, found, _ = after(density, torch.randn(16, 3, 1))
    assert ((found.u[..., 0] - x).abs() < 0.6).all()


def test_one_chain_gets_its_scales_from_the_curvature():
    density = LogDensity(lambda u: -0.5 * (u / torch.tensor([1e-3, 1e3])).square().sum(-1), 2)
    _, found, _ = after(density, torch.full((1, 2), 50.0))
    torch.testing.assert_close(found.tuning.inverse_mass, torch.tensor([1e-6, 1e6]), rtol=1e-3, atol=0)


def test_where_there_are_no_second_derivatives_chains_go_by_themselves():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return -0.5 * u.square().sum(-1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return -grad[..., None] * ctx.saved_tensors[0]

    density = LogDensity(Once.apply, 2)
    u = 1e4 * torch.ones(4, 2)
    state, found, _ = after(density, u)
    assert torch.equal(found.u, state.u)


def test_a_step_size_that_was_given_and_no_scales_mean_no_descent():
    density = LogDensity(lambda u: -0.5 * u.square().sum(-1), 2)
    u = 1e3 * torch.ones(4, 2)
    kernel = HMC(density, step_size=0.1, adapt_step_size=False, adapt_mass_matrix=False, max_steps=1)
    chains = Chains(kernel, density, u, generator=torch.Generator().manual_seed(0))
    chains.warm_up(1)
    assert float((chains.state.u - u).abs().max()) < 200
