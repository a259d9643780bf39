"""TiltLikelihood against the log likelihood ratio of linear Gaussian models, exact."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LinearEnergy, MLPEnergy, Normalizer, QuadraticEnergy, TiltELBO, TiltLikelihood, tilt

D, N, K = 2, 6, 4000
LOC = torch.linspace(-1, 1, N * D).reshape(N, D)
SCALE = 0.6
BASE = dist.Normal(torch.zeros(D), 1.0).to_event(1)
A = [0.5, -0.3]


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", BASE)


def posterior(x):
    """Stands for p(z | x): its distribution is all that the objective sees of the base model."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, SCALE).to_event(1))


def equal_weights(num=K):
    return torch.full((N, num), -math.log(num))


def draws(num=K):
    return LOC[:, None] + SCALE * torch.randn(N, num, D, generator=torch.Generator().manual_seed(0))


def exact_gain(a):
    """sum_i log E_{N(loc_i, SCALE^2)}[exp(a.z)] - |a|^2 / 2."""
    return (LOC @ a).sum() + N * (SCALE**2 - 1) * a.square().sum() / 2


@pytest.mark.parametrize("normalize", [Normalizer("importance", 20_000), Normalizer("qmc", 4096)])
def test_value_and_gradient_of_a_linear_tilt(normalize):
    energy = LinearEnergy(A)
    tilted = tilt(model, {"z": energy}, normalize=normalize)
    loss = TiltLikelihood(BASE)(tilted, None, draws(), equal_weights())
    (gradient,) = torch.autograd.grad(loss, [energy.a])
    exact = -exact_gain(energy.a)
    (exact_gradient,) = torch.autograd.grad(exact, [energy.a])
    a = energy.a.detach()
    # Relative variances of exp(a.z): under the posteriors, and under the base for log Z (N times the same).
    posteriors = N * (math.exp(SCALE**2 * a.square().sum()) - 1) / K
    of_log_z = N**2 * (math.exp(a.square().sum()) - 1) / normalize.num_samples
    se = math.sqrt(posteriors + of_log_z)
    assert loss.ndim == 0
    assert abs(loss.item() - exact.item()) < 4 * se
    # A tilted mean has at most about 1 / sqrt(ess) of error in each coordinate.
    assert ((gradient - exact_gradient).abs() < 4 * (se + math.sqrt(N / K + N**2 / normalize.num_samples))).all()
    assert abs(exact.item()) > 8 * se if normalize.method == "qmc" else True


def test_weighted_draws_count_by_their_weights():
    """Draws of a wider proposal, weighted, stand for the same posterior as draws of its own."""
    energy = LinearEnergy(A)
    tilted = tilt(model, {"z": energy}, normalize=Normalizer("qmc", 4096))
    wide = dist.Normal(LOC[:, None], 1.0).to_event(1)
    values = LOC[:, None] + torch.randn(N, K, D, generator=torch.Generator().manual_seed(0))
    right = dist.Normal(LOC[:, None], SCALE).to_event(1)
    log_weights = (right.log_prob(values) - wide.log_prob(values)).log_softmax(-1)
    loss = TiltLikelihood(BASE)(tilted, None, values, log_weights)
    ess = 1 / log_weights.exp().square().sum(-1).min()
    se = math.sqrt(N * (math.exp(energy.a.square().sum().item()) - 1) / ess) + N * 1e-3
    assert abs(loss.item() + exact_gain(energy.a).item()) < 4 * se
    wrong = TiltLikelihood(BASE)(tilted, None, values, equal_weights())
    assert abs(wrong.item() + exact_gain(energy.a).item()) > 4 * se


def test_it_is_the_sum_over_the_batch():
    tilted = tilt(model, {"z": MLPEnergy(D, hidden=(4,))})
    loss, values, log_weights = TiltLikelihood(BASE), draws(50), equal_weights(50)
    parts = sum(loss(tilted, None, values[i : i + 1], log_weights[i : i + 1]) for i in range(N))
    torch.testing.assert_close(loss(tilted, None, values, log_weights), parts)


def test_it_is_tighter_than_the_elbo():
    """By the variance of the energy under the posterior, over two, for a linear energy."""
    energy = LinearEnergy(A)
    tilted = tilt(model, {"z": energy}, normalize=Normalizer("qmc", 4096))
    likelihood = TiltLikelihood(BASE)(tilted, None, draws(), equal_weights()).item()
    x = LOC.repeat(2000, 1)
    elbo = TiltELBO()(tilted, posterior, x).item() / 2000
    gap = N * SCALE**2 * energy.a.square().sum().item() / 2
    se = math.sqrt(N * SCALE**2 * energy.a.square().sum().item()) * (1 / math.sqrt(K) + 1 / math.sqrt(2000))
    assert gap > 4 * se
    assert abs(elbo - likelihood - gap) < 4 * se


def test_zero_energy_costs_nothing():
    tilted = tilt(model, {"z": LinearEnergy([0.0, 0.0])})
    assert abs(TiltLikelihood(BASE)(tilted, None, draws(), equal_weights()).item()) < 1e-4


def test_scalar_sites():
    base, energy = dist.Normal(0.0, 1.0), QuadraticEnergy(0.5, event_dim=0)

    def scalar(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", base)

    tilted = tilt(scalar, {"z": energy}, normalize=Normalizer("qmc", 4096))
    values = SCALE * torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    loss = TiltLikelihood(base)(tilted, None, values, torch.full((3, K), -math.log(K)))
    # log E[exp(-c z^2 / 2)] = -log(1 + c s^2) / 2
    exact = 3 * 0.5 * (math.log1p(0.5 * SCALE**2) - math.log1p(0.5))
    assert loss.item() == pytest.approx(exact, abs=4 * math.sqrt(3 / K) * 0.2)


def test_errors():
    loss, energy, args = TiltLikelihood(BASE), LinearEnergy(A), (None, draws(5), equal_weights(5))
    with pytest.raises(TypeError, match=r"model must be what tilt\(\) returns, got function"):
        loss(model, *args)
    with pytest.raises(ValueError, match="must estimate its log Z: without it the energy runs away"):
        loss(tilt(model, {"z": energy}, normalize=False), *args)

    def two(x):
        model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("y", BASE)

    with pytest.raises(ValueError, match=r"must have one tilted site, got \['y', 'z'\]"):
        loss(tilt(two, {"z": energy, "y": LinearEnergy(A)}), *args)
    with pytest.raises(ValueError, match=r"energy of site 'z' must return one number per batch element"):
        loss(tilt(model, {"z": lambda z: z}), *args)
