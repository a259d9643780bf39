"""The marginal density of a VAE's data: exact in linear Gaussian models, by grids, and unbiased for any encoder."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import MCMC, VAE, ChEES, LinearEnergy, QuadraticEnergy, marginal_density, quadrature
from pyro_ebm.chain_statistics import mcse_mean

W = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.4]])
B = torch.tensor([0.5, -1.0, 0.0])
S = 0.5
A = torch.tensor([0.4, -0.2, 0.3])
COVARIANCE = W @ W.T + S**2 * torch.eye(3)
DATA = dist.MultivariateNormal(B, COVARIANCE)
# W with orthogonal rows would make the posterior diagonal; here its own axes do.
PRECISION = torch.eye(2) + W.T @ W / S**2


class LinearVAE(torch.nn.Module):
    """x | z ~ N(Wz + b, s^2), with an encoder that is the posterior's mean and, times ``width``, a diagonal scale."""

    def __init__(self, weight=W, width=1.0, shift=0.0):
        super().__init__()
        self.weight, self.width, self.shift = weight, width, shift
        self.precision = torch.eye(2) + weight.T @ weight / S**2
        self.prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def encode(self, x):
        loc = (x - B) @ self.weight @ self.precision.inverse() / S**2 + self.shift
        scale = self.width * self.precision.inverse().diagonal().sqrt()
        return dist.Normal(loc, scale.expand_as(loc)).to_event(1)

    def decode(self, z):
        return dist.Normal(z @ self.weight.T + B, S).to_event(1)


ORTHOGONAL = torch.tensor([[1.0, 0.0], [0.0, 0.7], [0.0, 0.0]])


def standard(noise):
    return dist.Normal(0.0, 1.0).log_prob(noise).sum((-2, -1))


@pytest.mark.parametrize("num_particles", [1, 5])
def test_with_the_exact_posterior_as_encoder_it_is_the_exact_density(num_particles):
    energy = QuadraticEnergy(0.7)
    density = marginal_density(LinearVAE(ORTHOGONAL), energy, num_particles=num_particles)
    u = torch.randn(4, 6, density.dim)
    values = density.constrain(u)
    exact = dist.MultivariateNormal(B, ORTHOGONAL @ ORTHOGONAL.T + S**2 * torch.eye(3))
    expected = exact.log_prob(values["x"]) - energy(values["x"]) + standard(values["noise"])
    torch.testing.assert_close(density(u), expected)
    flat = {name: value.flatten(0, 1) for name, value in values.items()}
    torch.testing.assert_close(density.unconstrain(flat), u.flatten(0, 1))


def estimates(vae, x, num_particles, num=20_000, **options):
    """Log of the estimates of p(x), (num,), for independent noise."""
    density = marginal_density(vae, num_particles=num_particles, **options)
    noise = torch.randn(num, num_particles, 2)
    u = density.unconstrain({"x": x.expand(num, 3), "noise": noise})
    return density(u) - standard(noise)


@pytest.mark.parametrize("vae", [LinearVAE(width=1.5), LinearVAE(width=1.5, shift=0.1)], ids=["wide", "wide, off"])
@pytest.mark.parametrize("num_particles", [1, 8])
def test_the_density_of_x_is_unbiased_whatever_the_encoder(vae, num_particles):
    x = torch.tensor([0.3, 0.4, -0.6])
    ratio = (estimates(vae, x, num_particles) - DATA.log_prob(x)).exp().double()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 3  # an error bar that means something


def test_the_elbo_lies_below_by_the_divergence():
    vae, x = LinearVAE(width=1.5, shift=0.1), torch.tensor([0.3, 0.4, -0.6])
    gap = DATA.log_prob(x) - estimates(vae, x, 1)
    q = vae.encode(x)
    posterior = dist.MultivariateNormal(q.mean - 0.1, precision_matrix=PRECISION)
    wide = dist.MultivariateNormal(q.mean, q.base_dist.scale.square().diag())
    divergence = torch.distributions.kl_divergence(wide, posterior)
    assert abs(gap.mean() - divergence) < 4 * gap.std() / math.sqrt(len(gap))
    assert divergence > 20 * gap.std() / math.sqrt(len(gap))  # the bias is there to be seen


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian_shared", "continuous_bernoulli"])
def test_any_vae_integrates_to_one(likelihood):
    torch.manual_seed(0)
    vae = VAE((1,), latent_dim=1, likelihood=likelihood, hidden=(8,))
    found = quadrature(marginal_density(vae, num_particles=1), num_points=1025)
    assert abs(found.log_z.value) < 1e-3


def test_log_z_of_a_tilt_by_a_grid():
    torch.manual_seed(0)
    vae = VAE((1,), latent_dim=1, likelihood="continuous_bernoulli", hidden=(8,))
    energy = LinearEnergy([1.5])
    found = quadrature(marginal_density(vae, energy, num_particles=1)).log_z.value
    x = vae.model(num_data=40_000).detach()
    weights = (-energy(x)).detach().double().exp()
    assert abs(math.exp(found) - weights.mean()) < 4 * weights.std() / math.sqrt(len(weights))


def test_chains_follow_the_tilted_gaussian_although_the_encoder_is_wrong():
    vae = LinearVAE(width=1.5, shift=0.1)
    density = marginal_density(vae, LinearEnergy(A), num_particles=2)
    init = {"x": DATA.sample((64,)), "noise": torch.randn(64, 2, 2)}
    mcmc = MCMC(ChEES(density), num_samples=50, warmup_steps=50, num_chains=64, seed=0, init=init, progress=False)
    x = mcmc.run().values["x"]
    assert (abs(x.mean((0, 1)) - (B + COVARIANCE @ A)) < 5 * torch.as_tensor(mcse_mean(x))).all()
    squares = (x - (B + COVARIANCE @ A)).square()
    assert (abs(squares.mean((0, 1)) - COVARIANCE.diagonal()) < 5 * torch.as_tensor(mcse_mean(squares))).all()


def test_images_keep_their_shape():
    vae = VAE((1, 4, 4), latent_dim=3, likelihood="gaussian_shared", hidden=(8,))
    density = marginal_density(vae, QuadraticEnergy(1.0, event_dim=3), num_particles=2)
    u = torch.randn(5, 16 + 6)
    assert density(u).shape == (5,)
    assert {name: value.shape[1:] for name, value in density.constrain(u).items()} == {"x": (1, 4, 4), "noise": (2, 3)}
    assert vae.training


def test_errors():
    with pytest.raises(ValueError, match="Bernoulli likelihood are discrete"):
        marginal_density(VAE((4,), latent_dim=2, hidden=(8,)))
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 1, got 0"):
        marginal_density(LinearVAE(), num_particles=0)
    strange = SimpleNamespace(
        prior=LinearVAE().prior, decode=LinearVAE().decode, encode=lambda x: dist.Laplace(x[..., :2], 1.0).to_event(1)
    )
    with pytest.raises(TypeError, match="must return a diagonal normal, got Laplace"):
        marginal_density(strange)
    with pytest.raises(ValueError, match=r"values\['noise'\] must have shape \(\*chains, \(8, 2\)\), got nothing"):
        marginal_density(LinearVAE()).unconstrain({"x": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="sum over the rightmost 1 dimension"):
        marginal_density(LinearVAE(), lambda x: x)(torch.zeros(2, 19))
