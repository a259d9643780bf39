"""FirstOrder: its loss, that it is no bound and runs away, and what its regularizers make of it."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import VAE, Energy, FirstOrder, LinearEnergy, MLPEnergy, Normalizer, fit, tilt
from pyro_ebm.objectives.positives import tilt_loss


def root(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


P, COUNTS = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([200, 500, 300])
Q, CATEGORIES = COUNTS / 1000, torch.arange(3).repeat_interleave(COUNTS).float()


def categorical(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(P), obs=x)


def no_guide(x):
    return None


class Table(Energy):
    """One number for each value of a discrete site."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(3))

    def forward(self, value):
        return self.values[value.long()]


def train(objective, energy, x, *, model=root, epochs=40, learning_rate=0.2, **options):
    options = {"validation": None, "patience": None, **options}
    return fit(
        tilt(model, {"z": energy}, normalize=options.pop("normalize", True)),
        no_guide,
        x,
        objective=objective,
        train=energy,
        optimizer=functools.partial(torch.optim.SGD, lr=learning_rate),
        epochs=epochs,
        batch_size=500,
        seed=0,
        progress=False,
        **options,
    )


def test_loss_in_closed_form():
    """-a.(mean of the data - mean of the draws), whose expectation is -a.m."""
    energy, x = LinearEnergy([1.0, -2.0]), torch.randn(100, 2) + 1.0
    loss = FirstOrder(num_samples=20_000)(tilt(root, {"z": energy}, normalize=False), no_guide, x).detach()
    expected = -100 * float(x.mean(0) @ energy.a.detach())
    assert loss.ndim == 0
    assert abs(loss - expected) < 4 * 100 * math.sqrt(5 / 20_000)


def test_its_value_lies_above_the_log_likelihood():
    """Log Z >= E_p[-E]: by |a|^2 / 2 a datum here."""
    x = torch.randn(200, 2) + 0.5
    for scale in (0.5, 1.0, 2.0):
        tilted = tilt(root, {"z": LinearEnergy([scale, scale])})
        with torch.no_grad():
            value = -FirstOrder(num_samples=20_000)(tilted, no_guide, x) / 200
            log_likelihood = -tilt_loss(tilted, no_guide, x) / 200
        exact = scale * float(x.mean(0).sum()) - scale**2
        assert value > log_likelihood + 0.5 * scale**2 > exact - 0.5 * scale**2
        assert abs(value - exact - scale**2) < 4 * scale * math.sqrt(2 / 20_000)


def test_it_runs_away():
    """The gradient never shrinks: after t steps a = t * rate * m, and the loss falls below any bound."""
    x, scales, losses = torch.randn(1000, 2) + 1.0, [], []
    for epochs in (10, 20, 40):
        energy = LinearEnergy([0.0, 0.0])
        result = train(FirstOrder(num_samples=5000), energy, x, epochs=epochs, learning_rate=0.5)
        scales.append(energy.a.detach().norm() / (2 * epochs * 0.5))  # two batches an epoch
        losses.append(result.train_loss[-1])
    speed = x.mean(0).norm()
    noise = math.sqrt(2 / 5000 + 2 / 500)  # of the draws and of the batch, in one step
    assert all(abs(scale - speed) < 4 * noise for scale in scales)
    # No tilt can gain more than |m|^2 / 2 a datum, which is 1 here; the last epoch claims 40 |m|^2 or so.
    assert losses[0] > losses[1] > losses[2] and losses[2] < -30 * float(speed) ** 2
    with torch.no_grad():
        assert tilt_loss(tilt(root, {"z": energy}), no_guide, x) > 0  # worse than no tilt at all


def test_validation_tells_when_to_stop():
    """With held-out data fit keeps the weights that fit best, on the way."""
    x, energy = torch.randn(1000, 2) + 0.7, LinearEnergy([0.0, 0.0])
    options = {"validation": 0.5, "normalize": Normalizer("qmc", 8192)}
    result = train(FirstOrder(num_samples=5000), energy, x, epochs=24, learning_rate=0.1, **options)
    assert result.best_epoch < 20 and result.train_loss[-1] < result.train_loss[result.best_epoch - 1]
    # 0.1 from one epoch to the next, 4 standard errors of the mean of 500 held-out data; the last epoch is at 1.4
    assert (energy.a.detach() - 0.7).norm() < 0.1 + 4 * math.sqrt(2 / 500)
    tilted = tilt(root, {"z": energy})
    assert torch.equal(FirstOrder().validation(tilted, no_guide, x), tilt_loss(tilted, no_guide, x))


def test_squared_energies_settle_it_on_something_else_than_the_tilt():
    """-(q - p) / (2 alpha (q + p)) for each value of a discrete site, where the tilt is -log(q / p)."""
    alpha, energy = 0.5, Table()
    draws = 20_000
    objective = FirstOrder(num_samples=draws, alpha=alpha)
    train(objective, energy, CATEGORIES, model=categorical, epochs=150, learning_rate=0.5)
    expected = -(Q - P) / (2 * alpha * (Q + P))
    # Relative errors of p and q in one step of 500 data, to first order in both.
    se = (P * Q / (alpha * (Q + P) ** 2)) * (1 / (P * draws) + 1 / (Q * 500)).sqrt()
    found = energy.values.detach()
    assert ((found - expected).abs() < 4 * se).all()
    assert ((found + (Q / P).log()).abs() > 4 * se).any()
    assert (expected.abs() < 1 / (2 * alpha)).all()


def test_the_gradient_penalty_settles_it_at_slope_one_and_a_bit():
    """Of a linear energy: (|a| - 1)^2 weight = |a| |m| is stationary at |a| = 1 + |m| / (2 weight)."""
    x, energy = torch.randn(1000, 2) + 1.0, LinearEnergy([0.0, 0.01])
    draws, weight = 5000, 2.0
    train(FirstOrder(num_samples=draws, gradient_penalty=weight), energy, x, epochs=60, learning_rate=0.1)
    m = x.mean(0)
    expected = m / m.norm() * (1 + m.norm() / (2 * weight))
    noise = math.sqrt(1 / draws + 1 / 500)
    # Across the slope the penalty does not hold: the direction follows the noise of about ten steps.
    assert abs(energy.a.detach().norm() - expected.norm()) < 4 * noise
    assert ((energy.a.detach() - expected).abs() < 8 * noise).all()


def test_regularizers_add_up():
    energy, x = LinearEnergy([3.0, -4.0]), torch.randn(50, 2)
    tilted, losses = tilt(root, {"z": energy}), {}
    for name, options in {"plain": {}, "penalty": {"gradient_penalty": 0.1}}.items():
        torch.manual_seed(0)
        losses[name] = FirstOrder(**options)(tilted, no_guide, x)
    torch.testing.assert_close(losses["penalty"] - losses["plain"], torch.tensor(50 * 0.1 * 16.0), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert not FirstOrder(gradient_penalty=0.1)(tilted, no_guide, x).requires_grad


def test_the_penalty_has_a_gradient_where_the_slope_is_zero():
    energy = LinearEnergy([0.0, 0.0])
    FirstOrder(gradient_penalty=1.0)(tilt(root, {"z": energy}), no_guide, torch.randn(5, 2)).backward()
    assert energy.a.grad.isfinite().all()


def test_a_site_with_parents_through_fit():
    vae, energy = VAE((4,), latent_dim=2, hidden=(8,)), MLPEnergy(4, hidden=(8,))
    tilted, x = tilt(vae.model, {"x": energy}), (torch.rand(40, 4) > 0.2).float()
    options = {"objective": FirstOrder(alpha=0.1), "train": energy}
    result = fit(tilted, vae.guide, x, **options, epochs=2, batch_size=20, seed=0, progress=False)
    assert result.stopped == "epochs" and all(map(math.isfinite, result.validation_loss))


def test_constructor_errors():
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 0"):
        FirstOrder(num_samples=0)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 1.5"):
        FirstOrder(num_samples=1.5)
    with pytest.raises(ValueError, match="alpha must be a number, got nan"):
        FirstOrder(alpha=math.nan)
    with pytest.raises(TypeError, match="gradient_penalty must be a number, got '1'"):
        FirstOrder(gradient_penalty="1")
