"""ShortRun on a linear Gaussian model, where the distribution of a chain after any number of steps is known."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import VAE, LinearEnergy, MLPEnergy, ShortRun, fit, tilt

A, NOISE, WEIGHT = 0.9, 0.7, 1.5


class Linear(nn.Module):
    """z ~ N(0, I_2), x ~ N(w z, NOISE^2); a guide with a free location and scale."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(WEIGHT))
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, NOISE).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def tilted(net):
    energy = LinearEnergy([A, -A])
    return tilt(net.model, {"z": energy}), energy


def law_after(steps, step_size, precision, pull, mean=0.0, variance=1.0):
    """Mean and variance of unadjusted Langevin on a Gaussian of this precision and precision times mean."""
    for _ in range(steps):
        mean = mean - step_size / 2 * (precision * mean - pull)
        variance = (1 - step_size * precision / 2) ** 2 * variance + step_size
    return mean, variance


def assert_normal(draws, mean, variance):
    """First two moments within four standard errors."""
    num = len(draws)
    assert abs(draws.mean() - mean) < 4 * math.sqrt(variance / num)
    assert abs(draws.var() - variance) < 4 * variance * math.sqrt(2 / num)


X = (0.8, -0.3)
PRECISION = 1 + WEIGHT**2 / NOISE**2


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("start", ["base", "guide"])
def test_the_law_of_the_chains_is_known(steps, start):
    net = Linear()
    with torch.no_grad():
        net.loc.fill_(2.0)
        net.log_scale.fill_(-1.0)
    model, _ = tilted(net)
    objective = ShortRun(
        prior_steps=steps, prior_step_size=0.3, posterior_steps=steps, posterior_step_size=0.1, start=start
    )
    posterior, prior = objective.chains(model, net.guide, (torch.tensor(X).expand(4000, 2),))
    assert posterior.shape == prior.shape == (4000, 2) and not (posterior.requires_grad or prior.requires_grad)
    first = (2.0, math.exp(-2.0)) if start == "guide" else (0.0, 1.0)
    for axis, a in enumerate((A, -A)):
        assert_normal(prior[:, axis], *law_after(steps, 0.3, 1.0, a))
        pull = a + WEIGHT * X[axis] / NOISE**2
        assert_normal(posterior[:, axis], *law_after(steps, 0.1, PRECISION, pull, *first))


def test_gradients_are_those_the_law_of_the_chains_gives():
    """Energy: E[z+] - E[z-], within 0.05 of that of log p(x); decoder: E[grad log p(x | z+)]."""
    net, num = Linear(), 4000
    model, energy = tilted(net)
    objective = ShortRun(prior_steps=60, prior_step_size=0.1, posterior_steps=60, posterior_step_size=0.02)
    x = torch.tensor(X).expand(num, 2)
    down, slope = torch.autograd.grad(objective(model, net.guide, x) / num, [energy.a, net.w])
    slopes, exact_down = 0.0, []
    for axis, a in enumerate((A, -A)):
        mean, variance = law_after(60, 0.02, PRECISION, a + WEIGHT * X[axis] / NOISE**2)
        prior_mean, prior_variance = law_after(60, 0.1, 1.0, a)
        assert abs(down[axis] - (prior_mean - mean)) < 4 * math.sqrt((variance + prior_variance) / num)
        exact_down.append(a - (a + WEIGHT * X[axis] / NOISE**2) / PRECISION)
        assert prior_mean - mean == pytest.approx(exact_down[-1], abs=0.05)
        z = mean + math.sqrt(variance) * torch.randn(20_000)
        slopes = slopes - (X[axis] - WEIGHT * z) * z / NOISE**2
    assert abs(slope - slopes.mean()) < 4 * slopes.std() * math.sqrt(1 / num + 1 / 20_000)
    assert slope > 1.0


def test_the_guide_learns_the_posterior_and_nothing_else_from_its_term():
    net, x = Linear(), torch.tensor(X).expand(50, 2)
    model, energy = tilted(net)
    found = []
    for guide in (net.guide, lambda x: None):
        torch.manual_seed(3)
        loss = ShortRun(prior_steps=2, posterior_steps=2)(model, guide, x)
        found.append(torch.autograd.grad(loss, [energy.a, net.w, net.loc], allow_unused=True))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2].abs().sum() > 0.1 and found[1][2] is None


def test_the_model_s_modules_stand_still_while_chains_run():
    net, seen = Linear(), []

    class Recording(MLPEnergy):
        def forward(self, value):
            seen.append((self.training, value.requires_grad))
            return super().forward(value)

    model = tilt(net.model, {"z": Recording(2, hidden=(4,))})
    ShortRun(prior_steps=3, posterior_steps=3)(model, net.guide, torch.zeros(5, 2))
    assert set(seen[:-2]) == {(False, True)} and seen[-2:] == [(True, False)] * 2
    assert net.training and net.w.requires_grad


def test_seed_and_generator(rng_untouched):
    vae, x = VAE((4,), 2, hidden=(5,)), torch.rand(40, 4)
    energy = MLPEnergy(2, hidden=(4,))
    before = {name: value.clone() for name, value in [*vae.state_dict().items(), *energy.state_dict().items()]}
    results = []
    for _ in range(2):
        vae.load_state_dict({k: v for k, v in before.items() if k in vae.state_dict()})
        energy.load_state_dict({k: v for k, v in before.items() if k in energy.state_dict()})
        with rng_untouched():
            results.append(fit(
                tilt(vae.model, {"z": energy}), vae.guide, x, objective=ShortRun(prior_steps=3, posterior_steps=3),
                epochs=2, batch_size=16, seed=0, progress=False,
            ))  # fmt: skip
    assert results[0].train_loss == results[1].train_loss
    assert results[0].validation_loss == results[1].validation_loss


def test_fit_finds_tilt_decoder_and_guide():
    torch.manual_seed(0)
    net, energy = Linear(), LinearEnergy([0.0, 0.0])
    z = torch.tensor([A, -A]) + torch.randn(500, 2)
    x = WEIGHT * z + NOISE * torch.randn(500, 2)
    with torch.no_grad():
        net.w.fill_(1.0)
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    result = fit(
        tilt(net.model, {"z": energy}), net.guide, x, train=[net, energy], epochs=10, batch_size=100, optimizer=adam,
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10), seed=0, progress=False,
        objective=ShortRun(prior_steps=15, prior_step_size=0.5, posterior_steps=15, posterior_step_size=0.1),
    )  # fmt: skip
    # x ~ N(w a, w^2 + NOISE^2): both are known from the moments of x, and approached slowly, as by EM.
    w = math.sqrt(x.var(0).mean().item() - NOISE**2)
    assert net.w.item() == pytest.approx(w, abs=0.35)
    assert (net.w * energy.a).tolist() == pytest.approx(x.mean(0).tolist(), abs=0.4)
    assert result.validation_loss[-1] < result.validation_loss[0]


def test_validation_is_the_negative_elbo():
    net, x = Linear(), torch.randn(20, 2)
    model, energy = tilted(net)
    values = []
    for loss in (ShortRun().validation, pyro.infer.Trace_ELBO().differentiable_loss):
        torch.manual_seed(1)
        values.append(loss(model, net.guide, x).item())
    assert values[0] == values[1]
    without = tilt(net.model, {"z": energy}, normalize=False)
    torch.manual_seed(1)
    assert ShortRun().validation(without, net.guide, x).item() == pytest.approx(values[0], rel=1e-4)
    with pytest.raises(ValueError, match="the guide must draw the tilted site; give such a guide .*validation=None"):
        ShortRun().validation(model, lambda x: None, x)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prior_steps": 0}, "prior_steps must be a whole number of at least 1, got 0"),
        ({"posterior_steps": 1.5}, "posterior_steps must be a whole number"),
        ({"prior_step_size": 0.0}, "prior_step_size must be a finite number above zero, got 0.0"),
        ({"posterior_step_size": math.inf}, "posterior_step_size must be a finite"),
        ({"start": "data"}, r"start must be one of \('base', 'guide'\), got 'data'"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        ShortRun(**options)


def test_models_it_cannot_treat():
    net, x = Linear(), torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"model must be what tilt\(\) returns, got method"):
        ShortRun()(net.model, net.guide, x)

    def two(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0))

    with pytest.raises(ValueError, match=r"has the latent site\(s\) \['x', 'y'\], tilts \['y'\] and nests 1 plate"):
        ShortRun()(tilt(two, {"y": LinearEnergy(1.0)}), two, x)

    def positive(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def no_data(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="needs data: the model observes no site"):
        ShortRun()(tilt(no_data, {"y": LinearEnergy(1.0)}), no_data, x)
    with pytest.raises(ValueError, match="the whole real line, but the support of 'y' is .*use ContrastiveDivergence"):
        ShortRun()(tilt(positive, {"y": LinearEnergy(-1.0)}), positive, x[:, 0])


def test_a_step_too_long_for_the_posterior_is_survived():
    """Where a step leads to an infinite density, or far down, the chain stays; nothing turns NaN."""
    net, x = Linear(), torch.zeros(10, 2)
    posterior, prior = ShortRun(prior_step_size=50.0, posterior_step_size=50.0).chains(tilted(net)[0], net.guide, (x,))
    assert posterior.isfinite().all() and prior.isfinite().all()
