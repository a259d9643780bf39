"""Non-centered models: the density of the noise by hand, exact Gaussians, grids; what is left as it was."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    SMC,
    VAE,
    ChEES,
    LinearEnergy,
    LogDensity,
    MLPEnergy,
    Normalizer,
    centered,
    importance,
    noncentered,
    predictive,
    quadrature,
    tilt,
)
from pyro_ebm.chain_statistics import mcse_mean
from pyro_ebm.inference.density import noncentered as module
from pyro_ebm.modules import modules_of
from pyro_ebm.structure import latent_sites, prototype_trace

W = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.4]])
B = torch.tensor([0.5, -1.0, 0.0])
S = 0.3
A = torch.tensor([0.7, -0.3, 0.4])
COVARIANCE = W @ W.T + S**2 * torch.eye(3)
LOG_Z = float(A @ B + 0.5 * A @ COVARIANCE @ A)
MEAN = B + COVARIANCE @ A
UNIT = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def model(x=None):
    with pyro.plate("data", 2 if x is None else len(x), dim=-1):
        z = pyro.sample("z", UNIT)
        return pyro.sample("x", dist.Normal(z @ W.T + B, S).to_event(1), obs=x)


def single():
    z = pyro.sample("z", UNIT)
    return pyro.sample("x", dist.Normal(z @ W.T + B, S).to_event(1))


def x_of(z, noise):
    return z @ W.T + B + S * noise


def standard(u):
    return dist.Normal(0.0, 1.0).log_prob(u).sum(-1)


def test_the_density_is_that_of_the_noise_times_the_tilt():
    energy = MLPEnergy(3)
    density = LogDensity.from_model(noncentered(tilt(model, {"x": energy})), independent="data")
    u = torch.randn(7, 2, 5)
    values = density.constrain(u)
    assert list(values) == ["z_decentered", "x_decentered"]
    expected = standard(u) - energy(x_of(values["z_decentered"], values["x_decentered"]))
    torch.testing.assert_close(density(u), expected)


def test_the_tilt_goes_inside_or_outside():
    energy, u = MLPEnergy(3), torch.randn(5, 10)
    inside = LogDensity.from_model(noncentered(tilt(model, {"x": energy}, normalize=2.0)))
    outside = LogDensity.from_model(tilt(noncentered(model), {"x": energy}))
    assert torch.equal(inside(u), outside(u))


def test_without_a_tilt_all_weights_are_equal():
    weights = importance(noncentered(model), num_samples=100, seed=0).log_weights
    torch.testing.assert_close(weights, torch.full_like(weights, -math.log(100)))


def test_settings_of_the_tilt_are_kept_and_twice_is_once():
    normalizer = Normalizer(num_samples=77)
    tilted = noncentered(tilt(model, {"x": LinearEnergy(A)}, normalize=normalizer))
    assert tilted.normalize is normalizer
    assert noncentered(tilted).base_model is tilted.base_model


def test_log_z_and_means_of_a_linear_tilt_by_importance():
    noise = noncentered(tilt(single, {"x": LinearEnergy(A)}))
    value, se = noise.log_normalizer(num_samples=20_000, seed=0)
    assert abs(value - LOG_Z) < 4 * se
    weighted = importance(noise, num_samples=20_000, seed=0)
    draws = centered(noise, weighted)
    assert list(draws.values) == ["z", "x"]
    assert draws.log_weights is weighted.log_weights and draws.log_z is weighted.log_z
    assert abs(draws.log_z.value - LOG_Z) < 4 * draws.log_z.se
    error = (draws.weights[:, None] * (draws.flat("x") - draws.mean("x"))).square().sum(0).sqrt()
    assert (abs(draws.mean("x") - MEAN) < 4.5 * error).all()


def test_chains_on_the_noise_follow_the_tilted_gaussian():
    noise = noncentered(tilt(single, {"x": LinearEnergy(A)}))
    mcmc = MCMC(ChEES(noise), num_samples=60, warmup_steps=60, num_chains=64, seed=0, progress=False)
    draws = centered(noise, mcmc.run())
    assert (abs(draws.mean("x") - MEAN) < 5 * torch.as_tensor(mcse_mean(draws.values["x"]))).all()
    squares = (draws.values["x"] - MEAN).square()
    error = torch.as_tensor(mcse_mean(squares))
    assert (abs(squares.mean((0, 1)) - COVARIANCE.diagonal()) < 5 * error).all()


def test_particles_are_turned_back_too():
    noise = noncentered(tilt(single, {"x": LinearEnergy(A)}))
    draws = SMC(noise, particles_per_island=100, num_islands=8, seed=0, progress=False).run()
    back = centered(noise, draws)
    z, eps = draws.values["z_decentered"], draws.values["x_decentered"]
    torch.testing.assert_close(back.values["x"], x_of(z, eps))
    torch.testing.assert_close(back.values["z"], z)


def test_values_come_back_chunk_by_chunk(monkeypatch):
    noise = noncentered(model)
    draws = importance(noise, num_samples=20, seed=0)
    whole = centered(noise, draws)
    monkeypatch.setattr(module, "_CHUNK", 7)
    pieces = centered(noise, draws)
    assert whole.values["x"].shape == (1, 20, 2, 3)
    torch.testing.assert_close(pieces.values["x"], whole.values["x"])
    expected = x_of(draws.values["z_decentered"], draws.values["x_decentered"])
    torch.testing.assert_close(whole.values["x"], expected)


def test_observed_sites_stay_observed():
    x = torch.randn(2, 3)
    posterior = noncentered(model)
    trace = prototype_trace(posterior, (x,), {})
    assert list(latent_sites(trace)) == ["z_decentered"]
    both = LogDensity.from_model(posterior, x), LogDensity.from_model(model, x)
    u = torch.randn(4, 4)  # the prior of z is standard: its noise is z itself
    torch.testing.assert_close(both[0](u), both[1](u))


LAWS = {
    "normal": dist.Normal(0.5, 0.3),
    "laplace": dist.Laplace(0.5, 0.3),
    "uniform": dist.Uniform(-1.0, 2.0),
    "log_normal": dist.LogNormal(0.1, 0.4),
    "continuous_bernoulli": dist.ContinuousBernoulli(torch.tensor(0.2)),
    "gamma, which has no noise": dist.Gamma(3.0, 2.0),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_law_agrees_with_a_grid(law):
    def skewed(value):
        return 0.7 * value + (2 * value).sin()

    tilted = tilt(lambda: pyro.sample("x", law), {"x": skewed})
    moved = noncentered(tilted)
    exact, found = quadrature(tilted), quadrature(moved)
    assert abs(found.log_z.value - exact.log_z.value) < 2e-4
    back = centered(moved, found)
    assert abs(back.mean("x") - exact.mean("x")) < 1e-3
    assert abs(back.std("x") - exact.std("x")) < 1e-3


def test_a_law_without_noise_is_left_alone():
    trace = prototype_trace(noncentered(lambda: pyro.sample("x", LAWS["gamma, which has no noise"])), (), {})
    assert list(latent_sites(trace)) == ["x"]


def test_double_precision():
    law = dist.ContinuousBernoulli(torch.tensor([0.2, 0.9], dtype=torch.float64)).to_event(1)
    density = LogDensity.from_model(noncentered(lambda: pyro.sample("x", law)))
    assert density.like.dtype == torch.float64
    assert density(torch.zeros(3, 2, dtype=torch.float64)).dtype == torch.float64


def test_predictive_draws_respect_the_tilt():
    tilted = noncentered(tilt(single, {"x": LinearEnergy(A)}))
    x = predictive(tilted, num_samples=4000, seed=0)["x"]
    # Resampled from a finite pool: an allowance of twice the error of independent draws.
    assert (abs(x.mean(0) - MEAN) < 2 * 4 * COVARIANCE.diagonal().sqrt() / math.sqrt(4000)).all()
    assert (abs(x.mean(0) - B) > 10 * COVARIANCE.diagonal().sqrt() / math.sqrt(4000)).any()


def test_the_modules_behind_the_model_are_found_and_kept_in_their_mode():
    vae = VAE((4,), latent_dim=2, likelihood="gaussian", hidden=(8,))
    noise = noncentered(vae.model)
    assert modules_of(noise) == [vae]
    centered(noise, importance(noise, num_samples=10, seed=0))
    assert vae.training


def test_discrete_data_have_no_chains():
    vae = VAE((4,), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match="site 'x' is discrete"):
        LogDensity.from_model(noncentered(tilt(vae.model, {"x": LinearEnergy(torch.ones(4))})))


def test_errors():
    with pytest.raises(TypeError, match="model must be callable, got int"):
        noncentered(3)
    draws = importance(model, num_samples=10, seed=0)
    with pytest.raises(TypeError, match="must be what noncentered"):
        centered(model, draws)
    with pytest.raises(ValueError, match=r"draws lack the site\(s\) \['z_decentered', 'x_decentered'\]"):
        centered(noncentered(model), draws)
    one = importance(noncentered(single), num_samples=10, seed=0)
    with pytest.raises(ValueError, match=r"do not fit the model, which has \(2, 2\)"):
        centered(noncentered(model), one)
