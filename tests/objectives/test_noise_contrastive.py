"""NoiseContrastive: its loss, its optimum (the ratio of densities, log Z = 0), and the errors that theory gives it."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import VAE, Energy, LinearEnergy, MLPEnergy, NoiseContrastive, fit, tilt
from pyro_ebm.objectives.positives import tilt_loss


def root(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def no_guide(x):
    return None


class Constant(Energy):
    """E(v) = b, which lets log Z be anything."""

    def __init__(self, b=0.0):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, value):
        return self.b.expand(value.shape[:-1])


class Table(Energy):
    """One number for each value of a discrete site."""

    def __init__(self, size):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, value):
        return self.values[value.long()]


def train(objective, energy, x, *, model=root, steps=60, learning_rate=2.0, batch_size=500, seed=0):
    epochs = max(steps * batch_size // len(x), 1)
    return fit(
        tilt(model, {"z": energy}),
        no_guide,
        x,
        objective=objective,
        train=energy,
        optimizer=functools.partial(torch.optim.SGD, lr=learning_rate),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
        batch_size=batch_size,
        validation=None,
        patience=None,
        seed=seed,
        progress=False,
    )


@pytest.mark.parametrize("ratio", [0.5, 1, 4])
def test_loss_of_a_constant_energy(ratio):
    x, b = torch.randn(10, 2), 0.3
    loss = NoiseContrastive(num_noise=ratio)(tilt(root, {"z": Constant(b)}), no_guide, x)
    expected = 10 * (math.log1p(ratio * math.exp(b)) + ratio * math.log1p(math.exp(-b) / ratio))
    assert loss.ndim == 0
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))


def test_a_ratio_that_is_no_whole_number_counts_the_noise_there_is():
    """round(0.4 * 3) = 1 draw: the ratio is 1 / 3."""
    loss = NoiseContrastive(num_noise=0.4)(tilt(root, {"z": Constant()}), no_guide, torch.randn(3, 2))
    torch.testing.assert_close(loss.detach(), torch.tensor(3 * (math.log1p(1 / 3) + math.log1p(3.0) / 3)))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ratio", [1, 3])
def test_gradient_is_zero_on_average_at_the_true_tilt(ratio, normalize):
    """E = -a.z + |a|^2 / 2, so that log Z = 0; with normalize any constant will do."""
    a, n = torch.tensor([0.6, -0.3]), 20_000
    constant = Constant(5.0 if normalize else float(0.5 * a.square().sum()))
    energy, x = LinearEnergy(a) + constant, torch.randn(n, 2) + a
    tilted = tilt(root, {"z": energy}, normalize=0.0 if not normalize else True)
    objective = NoiseContrastive(num_noise=ratio, normalize=normalize)
    parameters = [energy.terms[0].a] if normalize else [energy.terms[0].a, constant.b]
    gradients = []
    for part in x.split(1000):
        found = torch.autograd.grad(objective(tilted, no_guide, part), parameters)
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    gradients = torch.stack(gradients)
    assert (gradients.mean(0).abs() < 5 * gradients.std(0) / math.sqrt(len(gradients))).all()
    assert (gradients.std(0) > 0).all()


def asymptotic_errors(a, ratio, num=100_000):
    """Standard errors times sqrt(n) of (a, b), after Gutmann and Hyvaerinen (2012), theorem 3."""
    z = torch.randn(num, 2) + a
    log_ratio = z @ a - 0.5 * a.square().sum()
    weight = torch.sigmoid(math.log(ratio) - log_ratio)
    g = torch.cat([z, -torch.ones(num, 1)], 1)
    information = (weight[:, None, None] * g[:, :, None] * g[:, None]).mean(0)
    mean = (weight[:, None] * g).mean(0)
    inverse = torch.linalg.inv(information)
    covariance = inverse - (1 + 1 / ratio) * torch.outer(inverse @ mean, inverse @ mean)
    return covariance.diagonal().sqrt()


@pytest.mark.parametrize("ratio, n", [(1, 500), (4, 500), (4, 5000)])
def test_a_linear_tilt_is_recovered_with_the_errors_of_theory(ratio, n):
    """With E = -a.z + b, log Z = |a|^2 / 2 - b; all within 5 standard errors, which shrink with n."""
    a = torch.tensor([1.0, -0.5])
    linear, constant = LinearEnergy([0.0, 0.0]), Constant()
    train(NoiseContrastive(num_noise=ratio), linear + constant, torch.randn(n, 2) + a, batch_size=n // 2)
    errors = torch.cat([linear.a.detach() - a, constant.b.detach()[None] - 0.5 * a.square().sum()])
    se = asymptotic_errors(a, ratio) / math.sqrt(n)
    assert (errors.abs() < 5 * se).all()
    assert (se * math.sqrt(n) < 4).all()
    log_z = 0.5 * linear.a.square().sum() - constant.b
    assert abs(log_z.detach()) < 5 * float(se[2] + (a.abs() * se[:2]).sum())


def test_an_energy_without_a_constant_needs_the_estimate_of_log_z():
    """Maximum likelihood: the mean of the data, with standard error 1 / sqrt(n)."""
    n, a = 1000, torch.tensor([1.5, 0.0])
    x, found = torch.randn(n, 2) + a, {}
    for normalize in (False, True):
        energy = LinearEnergy([0.0, 0.0])
        train(NoiseContrastive(num_noise=4, normalize=normalize), energy, x)
        found[normalize] = energy.a.detach()
    se = asymptotic_errors(a, 4)[:2] / math.sqrt(n)
    assert ((found[True] - a).abs() < 5 * se).all()
    assert abs(found[False][0] - 1.5) > 5 * se[0]


def test_a_discrete_site_is_learned_exactly():
    """Q against p over three values: E = -log(q / p) for any ratio of noise."""
    p, counts = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([200, 500, 300])
    x = torch.arange(3).repeat_interleave(counts).float()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(p), obs=x)

    energy = Table(3)
    train(NoiseContrastive(num_noise=4), energy, x, model=model, steps=60, learning_rate=4.0, batch_size=1000)
    expected = -(counts / 1000 / p).log()
    # the noise's own error: 4,000 draws in each of the last steps
    se = (1 / (4000 * p)).sqrt()
    assert ((energy.values.detach() - expected).abs() < 4 * se).all()


def test_a_site_with_parents_the_data_against_draws_of_the_model():
    """X ~ N(0, 2) by the model and N(1, 2) in truth: E = -x / 2 + 1 / 4."""
    n = 1000

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("y", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("z", dist.Normal(z, 1.0).to_event(1), obs=x)

    linear, constant = LinearEnergy([0.0]), Constant()
    x = 1.0 + math.sqrt(2.0) * torch.randn(n, 1)
    train(NoiseContrastive(num_noise=4), linear + constant, x, model=model, learning_rate=1.0)
    # In units of the base's standard deviation the tilt is a = 1 / sqrt(2).
    se = asymptotic_errors(torch.tensor([1 / math.sqrt(2), 0.0]), 4)[0] / math.sqrt(2 * n)
    assert abs(float(linear.a.detach()) - 0.5) < 5 * se


def test_data_space_tilt_of_a_vae_runs_through_fit():
    vae, energy = VAE((4,), latent_dim=2, hidden=(8,)), MLPEnergy(4, hidden=(8,))
    before = [p.clone() for p in vae.parameters()]
    tilted = tilt(vae.model, {"x": energy}, normalize=False)
    x = (torch.rand(64, 4) > 0.2).float()
    options = {"objective": NoiseContrastive(), "train": energy}
    result = fit(tilted, vae.guide, x, **options, epochs=5, batch_size=32, seed=0, progress=False)
    assert result.validation_loss[-1] < result.validation_loss[0] < 2 * math.log(2) + 0.2
    assert all(torch.equal(p, q) for p, q in zip(before, vae.parameters(), strict=True))


def test_log_z_enters_only_where_it_is_asked_for():
    energy, x = LinearEnergy([0.5, 0.5]), torch.randn(30, 2)
    losses = {}
    for normalize in (True, False, 2.0):
        torch.manual_seed(0)
        losses[normalize] = NoiseContrastive()(tilt(root, {"z": energy}, normalize=normalize), no_guide, x)
    assert torch.equal(losses[True], losses[False]) and torch.equal(losses[False], losses[2.0])
    torch.manual_seed(0)
    with_log_z = NoiseContrastive(normalize=True)(tilt(root, {"z": energy}), no_guide, x)
    assert abs(with_log_z - losses[True]).detach() > 0.01


@pytest.mark.parametrize("value", [0, -1, math.inf, "4", True])
def test_constructor_errors(value):
    with pytest.raises((ValueError, TypeError), match="num_noise must be a (finite )?number"):
        NoiseContrastive(num_noise=value)


@pytest.mark.slow
def test_the_density_of_a_network_is_as_good_as_by_maximum_likelihood():
    """Four fifths of the left half of a Gaussian taken away: divergence from the truth on a grid."""
    torch.manual_seed(0)
    z = torch.randn(4000, 2)
    x = z[(z[:, 0] > 0) | (torch.rand(4000) < 0.2)][:2000]  # the density ratio is a step of 5 to 1
    axis = torch.linspace(-4, 4, 121)
    grid = torch.cartesian_prod(axis, axis)
    base = dist.Normal(torch.zeros(2), 1.0).log_prob(grid).sum(-1)
    truth = (base + torch.where(grid[:, 0] > 0, 0.0, math.log(0.2))).log_softmax(0)
    divergence = {}
    for name, objective in {"nce": NoiseContrastive(num_noise=4), "ml": tilt_loss}.items():
        energy = MLPEnergy(2, hidden=(32, 32))
        fit(
            tilt(root, {"z": energy}), no_guide, x, objective=objective, train=energy,
            optimizer=functools.partial(torch.optim.Adam, lr=5e-3), epochs=20, batch_size=200, seed=0, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            found = (base - energy(grid)).log_softmax(0)
            log_z = (base.log_softmax(0) - energy(grid)).logsumexp(0)
        divergence[name] = float((truth.exp() * (truth - found)).sum())
        if name == "nce":
            assert abs(log_z) < 0.15
    untilted = float((truth.exp() * (truth - base.log_softmax(0))).sum())
    assert divergence["nce"] < 0.2 * untilted
    assert divergence["nce"] < 2 * divergence["ml"] + 0.005
