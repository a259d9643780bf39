"""ContrastiveDivergence: its chains, its gradient, its regularizers, its state, and the tilts it recovers."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    HMC,
    MALA,
    ULA,
    VAE,
    ContrastiveDivergence,
    LinearEnergy,
    MLPEnergy,
    Normalizer,
    QuadraticEnergy,
    ReplayBuffer,
    fit,
    tilt,
)
from pyro_ebm.objectives.contrastive import contrast, squared_slopes
from pyro_ebm.objectives.positives import positives, tilt_loss


def root(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def no_guide(x):
    return None


def found_for(base, values):
    """What positives() says of an observed site with this base."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("v", base, obs=x)

    return positives(tilt(model, {"v": torch.zeros_like}, normalize=False), no_guide, (values,))


# Chains


@pytest.mark.parametrize(
    "kernel, num_steps",
    [(MALA, 60), (HMC, 15), (functools.partial(MALA, step_size=1.0, adapt_mass_matrix=False), 60)],
)
def test_chains_reach_the_tilt(kernel, num_steps):
    """From the prior N(0, I) to N(a, I / (1 + c))."""
    energy = LinearEnergy([1.5, -1.5]) + QuadraticEnergy(1.0)
    found = found_for(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.randn(2000, 2))
    negatives = ContrastiveDivergence(kernel=kernel, num_steps=num_steps).negatives(energy, found)
    mean, sd = torch.tensor([0.75, -0.75]), math.sqrt(0.5)
    assert not negatives.requires_grad
    assert ((negatives.mean(0) - mean).abs() < 4 * sd / math.sqrt(2000)).all()
    assert ((negatives.var(0) - sd**2).abs() < 4 * sd**2 * math.sqrt(2 / 2000)).all()


def test_chains_of_a_positive_site_carry_the_jacobian():
    """Exponential(1) tilted by E = v is Exponential(2)."""
    found = found_for(dist.Exponential(torch.tensor(1.0)), torch.rand(2000) + 0.1)
    negatives = ContrastiveDivergence(num_steps=80).negatives(LinearEnergy(-1.0), found)
    assert negatives.shape == (2000,) and (negatives > 0).all()
    assert abs(negatives.mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)
    assert abs(negatives.var() - 0.25) < 4 * 0.25 * math.sqrt(8 / 2000)  # kurtosis 9


@pytest.mark.parametrize(
    "base, event",
    [
        (dist.Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])).to_event(1), (2,)),
        (dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])), (3,)),
        (dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]])), (2,)),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), (2, 3)),
    ],
)
def test_chains_without_a_tilt_stay_in_the_base(base, event):
    n = 2000
    start = base.sample((n,))
    found = found_for(base, start)
    objective = ContrastiveDivergence(num_steps=15, buffer=ReplayBuffer(capacity=n, fresh=0.0))
    negatives = objective.negatives(QuadraticEnergy(0.0, event_dim=len(event)), found)
    assert negatives.shape == (n, *event) and base.support.check(negatives).all()
    reference = base.sample((100_000,))
    for power in (1, 2):
        values, truth = negatives**power, reference**power
        error = (values.mean(0) - truth.mean(0)) / truth.std(0)
        assert (error.abs() < 4 / math.sqrt(n) + 4 / math.sqrt(100_000)).all()


def test_unadjusted_langevin_has_the_variance_of_its_step():
    """Of N(0, 1): 1 / (1 - eps / 4)."""
    found = found_for(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.randn(2000, 2))
    kernel = functools.partial(ULA, step_size=1.0, adapt_mass_matrix=False, adapt_step_size=False)
    negatives = ContrastiveDivergence(kernel=kernel, num_steps=40).negatives(LinearEnergy([0.0, 0.0]), found)
    assert ((negatives.var(0) - 4 / 3).abs() < 4 * 4 / 3 * math.sqrt(2 / 2000)).all()


def test_chains_start_at_the_data_or_go_on_from_the_buffer():
    x = torch.randn(50, 2) + 5.0
    found = found_for(dist.Normal(torch.zeros(2), 1.0).to_event(1), x)
    tiny = functools.partial(ULA, step_size=1e-10, adapt_step_size=False, adapt_mass_matrix=False)
    energy = LinearEnergy([0.0, 0.0])
    near = ContrastiveDivergence(kernel=tiny, num_steps=2).negatives(energy, found)
    assert ((near - x).abs() < 1e-3).all()
    buffer = ReplayBuffer(capacity=50, fresh=0.0)
    persistent = ContrastiveDivergence(kernel=tiny, num_steps=2, buffer=buffer)
    first = persistent.negatives(energy, found)
    assert (first.abs() < 5).all()  # from the base
    again = persistent.negatives(energy, found)
    assert ((again.sort(0).values - first.sort(0).values).abs() < 1e-3).all()


def test_masked_data_and_bounds_stored_for_each_datum():
    """17 of 20 elements of a plate whose distribution has its bounds stored 20 times."""
    mask = torch.arange(20) < 17

    def model(x):
        with pyro.plate("data", 20), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Uniform(torch.zeros(20, 2), torch.ones(20, 2)).to_event(1), obs=x)

    tilted = tilt(model, {"z": LinearEnergy([1.0, 2.0])})
    found = positives(tilted, no_guide, (torch.rand(20, 2),))
    negatives = ContrastiveDivergence(num_steps=2).negatives(tilted.energies["z"], found)
    assert negatives.shape == (17, 2) and ((negatives > 0) & (negatives < 1)).all()


# The loss


def test_contrast_and_its_regularizer():
    down, up = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0])
    assert contrast(down, up) == 3 * (2.0 - 2.0)
    expected = 3 * 0.5 * (14 / 3 + 16 / 2)
    torch.testing.assert_close(contrast(down, up, alpha=0.5), torch.tensor(expected))


def test_gradient_is_data_mean_less_mean_of_the_negatives():
    energy, x = LinearEnergy([0.5, -0.5]), torch.randn(100, 2)
    objective, tilted = ContrastiveDivergence(num_steps=3), tilt(root, {"z": energy})
    torch.manual_seed(1)
    objective(tilted, no_guide, x).backward()
    torch.manual_seed(1)
    negatives = ContrastiveDivergence(num_steps=3).negatives(energy, positives(tilted, no_guide, (x,)))
    torch.testing.assert_close(energy.a.grad, -(x - negatives).sum(0), rtol=1e-4, atol=1e-3)


def test_gradient_penalty_of_a_linear_energy_is_its_squared_slope():
    energy, x = LinearEnergy([3.0, -4.0]), torch.randn(20, 2)
    losses = []
    for weight in (0.0, 0.1):
        torch.manual_seed(2)
        objective = ContrastiveDivergence(num_steps=2, gradient_penalty=weight)
        losses.append(objective(tilt(root, {"z": energy}), no_guide, x))
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(20 * 0.1 * 25.0), rtol=1e-3, atol=1e-3)
    (slope,) = torch.autograd.grad(losses[1] - losses[0], energy.a)
    torch.testing.assert_close(slope, 20 * 0.1 * 2 * energy.a.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3)])
def test_squared_slopes(shape):
    values = torch.randn(shape)
    energy = QuadraticEnergy(2.0, event_dim=len(shape) - 1)
    expected = 4 * values.square().reshape(5, -1).sum(-1)
    torch.testing.assert_close(squared_slopes(energy, values), expected)
    with torch.no_grad():
        assert not squared_slopes(energy, values).requires_grad


def test_regularizers_hold_the_energy_back():
    x, norms = torch.randn(500, 2) + 1.0, {}
    options = {"none": {}, "alpha": {"alpha": 0.5}, "gradient": {"gradient_penalty": 0.5}}
    for name, weights in options.items():
        energy = LinearEnergy([0.0, 0.0])
        train(ContrastiveDivergence(num_steps=2, **weights), energy, x, learning_rate=0.2)
        norms[name] = float(energy.a.detach().norm())
    assert norms["alpha"] < 0.7 * norms["none"] and norms["gradient"] < 0.7 * norms["none"]


def test_validation_is_the_likelihood_and_log_z_does_not_enter_the_loss():
    energy, x = LinearEnergy([0.7, -0.2]), torch.randn(50, 2)
    objective = ContrastiveDivergence(num_steps=2)
    expected = tilt_loss(tilt(root, {"z": energy}), no_guide, x)
    assert torch.equal(objective.validation(tilt(root, {"z": energy}, normalize=False), no_guide, x), expected)
    losses = []
    for normalize in (True, False, 3.0):
        torch.manual_seed(0)
        losses.append(ContrastiveDivergence(num_steps=2)(tilt(root, {"z": energy}, normalize=normalize), no_guide, x))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[1], losses[2])


# State


def test_the_step_size_follows_the_acceptance_rate():
    x, tilted = torch.randn(200, 2), tilt(root, {"z": LinearEnergy([0.0, 0.0])})
    for first in (0.1, 30.0):
        objective = ContrastiveDivergence(kernel=functools.partial(MALA, step_size=first), num_steps=2)
        for _ in range(60):
            objective(tilted, no_guide, x)
        assert abs(objective.acceptance_rate - 0.574) < 0.1
    fixed = functools.partial(MALA, step_size=0.3, adapt_step_size=False)
    objective = ContrastiveDivergence(kernel=fixed, num_steps=2)
    objective(tilted, no_guide, x)
    assert objective.step_size is None


def test_a_small_last_batch_moves_in_the_scales_of_the_one_before():
    """Data of scale 0.1: with unit scales and that step nothing would be accepted."""
    base, x = dist.Normal(torch.zeros(2), 0.1).to_event(1), 0.1 * torch.randn(200, 2)
    energy = LinearEnergy([0.0, 0.0])
    kernel = functools.partial(MALA, step_size=1.0, adapt_step_size=False)
    objective = ContrastiveDivergence(kernel=kernel, num_steps=4)
    rates = []
    for values in (x, x[:3]):
        objective.negatives(energy, found_for(base, values))
        rates.append(objective.acceptance_rate)
    objective = ContrastiveDivergence(kernel=kernel, num_steps=4)
    objective.negatives(energy, found_for(base, x[:3]))
    assert min(rates) > 0.5 > 0.1 > objective.acceptance_rate


def test_without_gradients_nothing_is_kept():
    x, tilted = torch.randn(20, 2), tilt(root, {"z": LinearEnergy([0.0, 0.0])})
    objective = ContrastiveDivergence(num_steps=2, buffer=ReplayBuffer(capacity=50), gradient_penalty=0.1)
    with torch.no_grad():
        loss = objective(tilted, no_guide, x)
    assert not loss.requires_grad and len(objective.buffer) == 0 and objective.step_size is None
    assert objective(tilted, no_guide, x).requires_grad
    assert len(objective.buffer) == 20 and objective.step_size is not None


def test_state_dict_round_trip():
    x, tilted = torch.randn(20, 2), tilt(root, {"z": LinearEnergy([0.4, 0.0])})

    def make():
        return ContrastiveDivergence(num_steps=2, buffer=ReplayBuffer(capacity=50))

    first, second = make(), make()
    for _ in range(3):
        first(tilted, no_guide, x)
    second.load_state_dict(first.state_dict())
    losses = []
    for objective in (first, second, make()):
        torch.manual_seed(7)
        losses.append(float(objective(tilted, no_guide, x).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_the_energy_s_modes_and_flags_are_left_alone():
    energy = MLPEnergy(2, hidden=(4,))
    energy.net[0].eval()
    energy.net[2].weight.requires_grad_(False)
    modes = [module.training for module in energy.modules()]
    ContrastiveDivergence(num_steps=2)(tilt(root, {"z": energy}), no_guide, torch.randn(5, 2)).backward()
    assert [module.training for module in energy.modules()] == modes
    assert not energy.net[2].weight.requires_grad and energy.net[0].weight.grad is not None


# What it recovers


def train(objective, energy, x, *, steps=40, learning_rate=0.5, batch_size=500, seed=0):
    epochs = max(steps * batch_size // len(x), 1)
    return fit(
        tilt(root, {"z": energy}, normalize=False),
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


CONSISTENT = {
    "CD-1": lambda: ContrastiveDivergence(num_steps=1),
    "CD-5": lambda: ContrastiveDivergence(num_steps=5),
    "persistent MALA": lambda: ContrastiveDivergence(num_steps=5, buffer=ReplayBuffer(capacity=2500)),
    "persistent HMC": lambda: ContrastiveDivergence(kernel=HMC, num_steps=2, buffer=ReplayBuffer(capacity=2500)),
    "ULA": lambda: ContrastiveDivergence(kernel=functools.partial(ULA, step_size=0.1, adapt_step_size=False)),
}


@pytest.mark.parametrize(
    "name, n", [*((name, 500) for name in CONSISTENT), ("CD-1", 5000), ("persistent HMC", 5000)]
)
def test_a_linear_tilt_is_recovered(name, n):
    """The mean of n draws of N(a, I) estimates a by maximum likelihood, with standard error 1 / sqrt(n)."""
    a = torch.tensor([1.0, -0.5])
    x, energy = torch.randn(n, 2) + a, LinearEnergy([0.0, 0.0])
    # The negatives' own noise, averaged over the last steps, is smaller than that of the data.
    train(CONSISTENT[name](), energy, x, learning_rate=0.5 if "-5" in name or "HMC" in name else 1.0, batch_size=n // 2)
    assert ((energy.a.detach() - x.mean(0)).abs() < 3 / math.sqrt(n)).all()
    assert ((energy.a.detach() - a).abs() < 5 / math.sqrt(n)).all()


@pytest.mark.parametrize("name, n", [("CD-1", 500), ("persistent MALA", 500), ("CD-1", 5000)])
def test_a_quadratic_tilt_is_recovered(name, n):
    """N(0, I / (1 + c)): the maximum-likelihood c is 1 / mean square - 1, with standard error (1 + c) / sqrt(n)."""
    c = 1.0
    x, energy = torch.randn(n, 2) / math.sqrt(1 + c), QuadraticEnergy(0.0)
    train(CONSISTENT[name](), energy, x, learning_rate=1.0, batch_size=n // 2)
    se = (1 + c) / math.sqrt(n)
    assert abs(energy.c.detach() - (1 / x.square().mean() - 1)) < 3 * se
    assert abs(energy.c.detach() - c) < 5 * se


# Refusals


def test_constructor_errors():
    with pytest.raises(TypeError, match="kernel must make a kernel from its target, got str"):
        ContrastiveDivergence(kernel="mala")
    with pytest.raises(TypeError, match=r"got MALA; pass a class such as MALA, or functools.partial"):
        ContrastiveDivergence(kernel=MALA(root))
    with pytest.raises(TypeError, match="kernel must return MALA, ULA or HMC, it returned Tensor"):
        ContrastiveDivergence(kernel=lambda target: torch.zeros(()))
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1, got 0"):
        ContrastiveDivergence(num_steps=0)
    with pytest.raises(TypeError, match="buffer must be a ReplayBuffer or None, got int"):
        ContrastiveDivergence(buffer=100)
    for name in ("alpha", "gradient_penalty"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least zero, got -1"):
            ContrastiveDivergence(**{name: -1.0})


def test_a_discrete_site_and_one_with_parents_are_refused():
    def coin(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)), obs=x)

    with pytest.raises(ValueError, match="moves chains along gradients, but site 'z' is discrete"):
        ContrastiveDivergence()(tilt(coin, {"z": LinearEnergy(1.0)}), no_guide, torch.ones(3))
    vae = VAE((4,), latent_dim=2, hidden=(4,))
    with pytest.raises(ValueError, match="'x' has random parents; use NoiseContrastive or FirstOrder"):
        ContrastiveDivergence()(tilt(vae.model, {"x": MLPEnergy(4)}), vae.guide, torch.rand(3, 4))


def test_a_state_with_and_without_a_buffer():
    plain, persistent = ContrastiveDivergence(), ContrastiveDivergence(buffer=ReplayBuffer())
    with pytest.raises(ValueError, match="saved without a ReplayBuffer, here the objective is with one"):
        persistent.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="saved with a ReplayBuffer, here the objective is without one"):
        plain.load_state_dict(persistent.state_dict())


# Beyond exponential families


MODES = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
AXIS = torch.linspace(-4, 4, 161)
GRID = torch.cartesian_prod(AXIS, AXIS)


def divergence_of(name, seed=0):
    """KL divergence of a trained tilt from the truth, two modes at weights 0.7 and 0.3, on a grid."""
    n = 1000
    torch.manual_seed(seed)  # the same data and first weights for all
    x = MODES[(torch.rand(n) < 0.3).long()] + 0.4 * torch.randn(n, 2)
    parts = dist.Normal(MODES, 0.4).to_event(1).log_prob(GRID[:, None]) + torch.tensor([0.7, 0.3]).log()
    truth = parts.logsumexp(-1).log_softmax(0)
    base = dist.Normal(torch.zeros(2), 1.0).log_prob(GRID).sum(-1)
    energy = MLPEnergy(2, hidden=(32, 32))
    if name != "untilted":
        fit(
            tilt(root, {"z": energy}, normalize=Normalizer("qmc", 1024)), no_guide, x,
            objective=tilt_loss if name == "maximum likelihood" else CONSISTENT[name](),
            train=energy, optimizer=functools.partial(torch.optim.Adam, lr=1e-2), epochs=25, batch_size=100,
            validation=None, patience=None, seed=0, progress=False,
            scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=25),
        )  # fmt: skip
    with torch.no_grad():
        found = (base - energy(GRID)).log_softmax(0)
    return float((truth.exp() * (truth - found)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CD-5", "persistent MALA"])
def test_the_density_of_a_network_is_nearly_as_good_as_by_maximum_likelihood(name):
    found = divergence_of(name)
    assert found < 3 * divergence_of("maximum likelihood") + 0.03
    assert found < 0.15 * divergence_of("untilted")
