"""ObservedTiltLikelihood against the exact log likelihood ratio of a linear Gaussian model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LinearEnergy, MLPEnergy, Normalizer, ObservedTiltLikelihood, fit, tilt

W = torch.tensor([[0.6], [-0.4]])
B = torch.tensor([0.3, -0.2])
COVARIANCE = W @ W.T + 0.25 * torch.eye(2)
A = torch.tensor([0.5, -0.7])
N, K = 50, 4096


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + B, 0.5).to_event(1), obs=x)


def guide(x):
    raise AssertionError("no guide is asked")


def data(num=N):
    return dist.MultivariateNormal(B + COVARIANCE @ A, COVARIANCE).sample((num,))


def exact_loss(a, x):
    return -(x @ a).sum() + len(x) * (a @ B + 0.5 * a @ COVARIANCE @ a)


def tilted(energy, num_samples=K):
    return tilt(model, {"x": energy}, normalize=Normalizer(num_samples=num_samples))


def test_value_and_gradient_of_a_linear_tilt():
    energy, x = LinearEnergy(A), data()
    loss = ObservedTiltLikelihood()(tilted(energy), guide, x)
    (gradient,) = torch.autograd.grad(loss, [energy.a])
    exact = exact_loss(energy.a, x)
    (exact_gradient,) = torch.autograd.grad(exact, [energy.a])
    # exp(a.x) is log-normal of variance v = a'Ca; its relative variance is exp(v) - 1.
    variance = float(A @ COVARIANCE @ A)
    se = N * math.sqrt(math.expm1(variance) / K)
    assert loss.ndim == 0
    assert abs(loss.item() - exact.item()) < 4 * se
    ess = K * math.exp(-variance)
    assert (abs(gradient - exact_gradient) < 4.5 * N * COVARIANCE.diagonal().sqrt() / math.sqrt(ess / 2)).all()


def test_a_zero_energy_gains_nothing():
    assert ObservedTiltLikelihood()(tilted(LinearEnergy(torch.zeros(2))), guide, data()).item() == 0


def test_a_scaled_site_has_a_scaled_tilt():
    x = data()

    def halved(x):
        with pyro.poutine.scale(scale=0.5):
            model(x)

    energy = LinearEnergy(A)
    whole, half = (
        ObservedTiltLikelihood()(tilt(each, {"x": energy}, normalize=0.3), guide, x) for each in (model, halved)
    )
    torch.testing.assert_close(half, whole / 2)


def test_fit_finds_the_maximum_of_the_likelihood():
    energy, x = LinearEnergy(torch.zeros(2)), data(400)
    fit(
        tilted(energy, 1024),
        guide,
        x,
        objective=ObservedTiltLikelihood(),
        train=energy,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        epochs=60,
        batch_size=400,
        validation=None,
        patience=None,
        seed=0,
        progress=False,
    )
    best = COVARIANCE.inverse() @ (x.mean(0) - B)
    # What is lost by being off the maximum, in nats per datum: of the order of (dimension) / (draws).
    off = energy.a.detach() - best
    assert 0.5 * off @ COVARIANCE @ off < 0.01
    assert 0.5 * best @ COVARIANCE @ best > 0.05


def test_errors():
    objective = ObservedTiltLikelihood()
    with pytest.raises(TypeError, match="needs the model that tilt"):
        objective(model, guide, data())
    with pytest.raises(ValueError, match="needs log Z"):
        objective(tilt(model, {"x": LinearEnergy(A)}, normalize=False), guide, data())
    with pytest.raises(ValueError, match=r"the tilted site\(s\) \['z'\] are not observed; use TiltELBO"):
        objective(tilt(model, {"z": MLPEnergy(1)}), guide, data())
