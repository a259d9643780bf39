"""SamplingBound: exact values by quadrature, a bound for every K, tight for many; its multi-sample estimate."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ebm import LinearEnergy, MLPEnergy, SamplingBound, fit, snis_log_likelihood, tilt

A, NOISE = 1.2, 0.8
VARIANCE = 1 / (1 + 1 / NOISE**2)


class Gaussian(nn.Module):
    """z ~ N(0, 1), x ~ N(z, NOISE^2); the guide is the posterior under the tilt towards A."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = VARIANCE * (A + x / NOISE**2) + self.shift
            pyro.sample("z", dist.Normal(loc, VARIANCE**0.5).to_event(1))


def tilted(net, a=A):
    energy = LinearEnergy([a])
    return tilt(net.model, {"z": energy}, normalize=False), energy


def data_of_the_tilt(num):
    noise = torch.randn(2, num, 1, generator=torch.Generator().manual_seed(11))
    return A + noise[0] + NOISE * noise[1]


def grid():
    points = torch.linspace(-9, 9, 401, dtype=torch.float64)
    return points, points[1] - points[0]


def exact_bound_of_two(x, a, shift):
    """The bound for K = 2 and one datum, both expectations on a grid."""
    z, step = grid()
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    posterior = dist.Normal(VARIANCE * (A + x / NOISE**2) + shift, VARIANCE**0.5).log_prob(z)
    mean_weight = torch.logaddexp(a * z[:, None], a * z[None]) - math.log(2)
    log_prior = prior + a * z - (prior.exp() * mean_weight).sum(1) * step
    likelihood = dist.Normal(z, NOISE).log_prob(torch.tensor(x, dtype=torch.float64))
    return (posterior.exp() * (likelihood + log_prior - posterior)).sum() * step


def repeated(function, num):
    """Mean and standard error over independent calls."""
    values = torch.stack([function().detach() for _ in range(num)])
    return values.mean(0), values.std(0) / math.sqrt(num)


def test_value_and_gradients_for_two_proposals_are_exact():
    net = Gaussian()
    model, energy = tilted(net, 0.7)
    with torch.no_grad():
        net.shift.fill_(0.3)
    a, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.3))
    exact = exact_bound_of_two(0.5, a, shift)
    expected = torch.stack([exact, *torch.autograd.grad(exact, (a, shift))]).detach()

    def sampled():  # 100 data, which share their proposals
        loss = SamplingBound(num_proposals=2)(model, net.guide, torch.full((100, 1), 0.5))
        gradients = torch.autograd.grad(-loss, (energy.a, net.shift))
        return torch.stack([-loss, *(g.sum() for g in gradients)]) / 100

    mean, se = repeated(sampled, 200)
    assert (se < 0.2).all()
    assert ((mean - expected).abs() < 4 * se).all(), (mean, expected, se)


def test_one_proposal_is_the_untilted_elbo():
    net = Gaussian()
    model, energy = tilted(net)
    x = data_of_the_tilt(7)
    losses = {}
    for name, loss_of in {
        "tilted": lambda: SamplingBound(num_proposals=1)(model, net.guide, x),
        "base": lambda: Trace_ELBO().differentiable_loss(net.model, net.guide, x),
    }.items():
        torch.manual_seed(2)
        losses[name] = loss_of()
    assert torch.equal(losses["tilted"], losses["base"])
    (gradient,) = torch.autograd.grad(losses["tilted"], energy.a)
    assert gradient.abs().item() == 0.0


def test_a_bound_that_rises_with_the_proposals_to_the_exact_likelihood():
    """Averaged over data of the tilt itself, no p_K is likelier than the tilt (Gibbs)."""
    net, x = Gaussian(), data_of_the_tilt(100)
    model, _ = tilted(net)
    exact = dist.Normal(A, math.sqrt(1 + NOISE**2)).log_prob(x).mean().item()
    found = {}
    for k in (1, 2, 8, 2000):

        def sampled(k=k):
            return -SamplingBound(num_proposals=k)(model, net.guide, x) / len(x)

        found[k] = repeated(sampled, 300 if k < 2000 else 40)
    values = torch.stack([found[k][0] for k in found])
    errors = torch.stack([found[k][1] for k in found])
    gaps = exact - values
    assert (gaps > -4 * errors).all()
    assert (values.diff() > 3 * (errors[1:] ** 2 + errors[:-1] ** 2).sqrt()).all()
    # log E - E log of a mean of K weights: half their relative variance over K.
    assert gaps[-1].item() < 4 * errors[-1] + math.expm1(A**2) / 2000


def test_a_wild_energy_gains_no_more_than_log_k():
    """Where log Z from draws would fall behind without end, the bound does not."""
    net, x = Gaussian(), torch.full((50, 1), 8.0)
    model, energy = tilted(net, 100.0)
    torch.manual_seed(0)
    wild = SamplingBound(num_proposals=32)(model, net.guide, x)
    torch.manual_seed(0)
    plain = SamplingBound(num_proposals=1)(model, net.guide, x)
    assert (plain - wild).item() == pytest.approx(50 * math.log(32), rel=1e-5)


def test_proposals_are_shared_by_the_batch():
    """The same datum and the same z give the same factor: their only difference would be their proposals."""
    seen = []

    class Recording(MLPEnergy):
        def forward(self, value):
            seen.append(tuple(value.shape))
            return super().forward(value)

    net = Gaussian()
    model = tilt(net.model, {"z": Recording(1, hidden=(4,))})
    SamplingBound(num_proposals=17)(model, net.guide, torch.zeros(30, 1))
    assert sorted(seen[-2:]) == [(16, 1), (30, 1)]


def test_laws_that_differ_get_proposals_of_their_own():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + A, 1.0).to_event(1))

    # Each datum's log p_K(z) - log q(z), whose limit is zero: guide and tilt agree.
    x = torch.tensor([[-5.0], [0.0], [5.0]])
    bound, se = repeated(
        lambda: -SamplingBound(num_proposals=3000)(tilt(model, {"z": LinearEnergy([A])}), guide, x), 40
    )
    assert abs(bound) < 4 * se + 3 * math.expm1(A**2) / 3000


# --------------------------------------------------------------------------------- several samples per datum


@functools.cache
def exact_log_likelihood_of_two(x, a):
    z, step = grid()
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    weight = (a * z[:, None] - torch.logaddexp(a * z[:, None], a * z[None]) + math.log(2)).exp()
    law = prior.exp() * (prior.exp() * weight).sum(1) * step
    assert law.sum() * step == pytest.approx(1.0, abs=1e-6)
    return (law * dist.Normal(z, NOISE).log_prob(torch.tensor(x, dtype=torch.float64)).exp()).sum().mul(step).log()


def test_the_likelihood_of_two_proposals_is_exact():
    net = Gaussian()
    x = [-1.0, 0.5, 3.0]
    found = snis_log_likelihood(
        tilted(net)[0], net.guide, torch.tensor(x)[:, None], num_samples=8000, num_proposals=2, seed=0
    )
    expected = torch.stack([exact_log_likelihood_of_two(v, A) for v in x])
    assert (found.se < 0.1).all() and (found.ess > 500).all()
    assert ((found.value - expected).abs() < 4 * found.se).all(), (found, expected)


def test_the_likelihood_of_many_proposals_is_that_of_the_tilt():
    net, x = Gaussian(), data_of_the_tilt(6)
    found = snis_log_likelihood(
        tilted(net)[0], net.guide, x, num_samples=1000, num_proposals=4000, seed=0, batch_size=4
    )
    exact = dist.Normal(A, math.sqrt(1 + NOISE**2)).log_prob(x).squeeze(-1)
    # Particles share 65 sets of proposals, whose error is common to them: their relative variance is known.
    common = math.sqrt(math.expm1(A**2) / 4000)
    assert ((found.value - exact).abs() < 4 * (found.se + common)).all()
    assert found.value.shape == found.pareto_k.shape == (6,)


def test_seed_and_generator(rng_untouched):
    net, x = Gaussian(), data_of_the_tilt(3)
    model = tilted(net)[0]
    with rng_untouched():
        first, second = (snis_log_likelihood(model, net.guide, x, num_samples=50, seed=4) for _ in range(2))
    assert torch.equal(first.value, second.value)


# ------------------------------------------------------------------------------------------------ training


def test_fit_finds_the_tilt_and_the_guide_together():
    net = Gaussian()
    with torch.no_grad():
        net.shift.fill_(1.5)
    model, energy = tilted(net, 0.0)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    x = data_of_the_tilt(1000)
    fit(model, net.guide, x, objective=SamplingBound(num_proposals=500), optimizer=adam, train=[energy, net],
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20), epochs=20, batch_size=100,
        validation=None, patience=None, seed=0, progress=False)  # fmt: skip
    # The likeliest tilt of these data, and its posterior.
    assert energy.a.item() == pytest.approx(x.mean().item(), abs=0.25)
    assert net.shift.item() == pytest.approx(VARIANCE * (energy.a.item() - A), abs=0.1)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("number", [0, 1.5, True, None])
def test_numbers_are_checked(number):
    with pytest.raises(ValueError, match=f"num_proposals must be a whole number of at least 1, got {number!r}"):
        SamplingBound(num_proposals=number)
    with pytest.raises(ValueError, match="num_particles must be a whole number"):
        SamplingBound(num_particles=number)


def test_models_it_cannot_bound():
    net, x = Gaussian(), torch.zeros(3, 1)
    with pytest.raises(TypeError, match=r"model must be what tilt\(\) returns, got method"):
        SamplingBound()(net.model, net.guide, x)
    with pytest.raises(TypeError, match="got method"):
        snis_log_likelihood(net.model, net.guide, x)

    def chain(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("k", dist.Bernoulli(0.3))

    with pytest.raises(ValueError, match=r"site without random parents, but 'z' has \['y'\]; use pyro"):
        SamplingBound()(tilt(chain, {"z": LinearEnergy(1.0)}), chain, x)
    with pytest.raises(ValueError, match="values of site 'k' can be listed and its log Z summed exactly"):
        SamplingBound()(tilt(chain, {"k": LinearEnergy(1.0)}), chain, x)
