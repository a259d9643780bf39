"""TiltELBO: the gradient of Trace_ELBO, without running the likelihood; TiltLikelihood: the exact ratio."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ebm import LinearEnergy, MLPEnergy, Normalizer, TiltELBO, TiltLikelihood, tilt

D = 2
X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Net(nn.Module):
    """A small VAE that counts its decodings."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(D, 3), nn.Linear(3, D)
        self.decodings = 0

    def model(self, x, *, num_data=None):
        with pyro.plate("data", num_data or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            y = pyro.sample("y", dist.Normal(z.sum(-1), 1.0))
            self.decodings += 1
            pyro.sample("x", dist.Normal(self.decoder(z) + y[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x, *, num_data=None):
        with pyro.plate("data", num_data or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 0.7))


def gradients(loss_of, tilted, seed=3):
    torch.manual_seed(seed)
    parameters = [p for energy in tilted.energies.values() for p in energy.parameters()]
    return torch.autograd.grad(loss_of(), parameters)


@pytest.mark.parametrize("normalize", [True, Normalizer("qmc", 256), 0.3])
@pytest.mark.parametrize("wrap", ["plain", "scaled", "masked"])
def test_gradient_is_that_of_trace_elbo(normalize, wrap):
    net, energy = Net(), MLPEnergy(D, hidden=(4,))
    tilted = tilt(net.model, {"z": energy}, normalize=normalize)
    handler = {
        "plain": lambda: poutine.scale(scale=1.0),
        "scaled": lambda: poutine.scale(scale=2.5),
        "masked": lambda: poutine.mask(mask=torch.tensor([True, False, True, True])),
    }[wrap]

    def ours():
        with handler():
            return TiltELBO()(tilted, net.guide, X)

    def theirs():
        with handler():
            return Trace_ELBO().differentiable_loss(tilted, net.guide, X)

    expected = gradients(theirs, tilted)
    for ours_grad, theirs_grad in zip(gradients(ours, tilted), expected, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-5)
    assert expected[0].abs().sum() > 0.1


@pytest.mark.parametrize("sites", [("y",), ("z", "y"), ("y", "z")])
def test_sites_with_parents_and_several_sites(sites):
    net = Net()
    energies = {"z": LinearEnergy([0.3, -0.2]), "y": LinearEnergy(0.4)}
    tilted = tilt(net.model, {site: energies[site] for site in sites}, normalize=Normalizer(num_samples=64))
    ours = gradients(lambda: TiltELBO()(tilted, net.guide, X), tilted)
    theirs = gradients(lambda: Trace_ELBO().differentiable_loss(tilted, net.guide, X), tilted)
    assert len(ours) == len(sites)
    for ours_grad, theirs_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-5)


def test_a_subsampled_plate_counts_for_all_data():
    """A minibatch of 4 out of 40 weighs ten times."""
    net, energy = Net(), LinearEnergy([0.3, -0.2])
    tilted = tilt(lambda x: net.model(x, num_data=40), {"z": energy}, normalize=0.065)

    def guide(x):
        return net.guide(x, num_data=40)

    torch.manual_seed(0)
    z = poutine.trace(guide).get_trace(X).nodes["z"]["value"]
    torch.manual_seed(0)
    loss = TiltELBO()(tilted, guide, X)
    torch.testing.assert_close(loss, -10 * (z @ energy.a - 0.065).sum())
    assert loss.ndim == 0


def test_value_is_the_tilt_s_part_of_the_elbo():
    net, energy = Net(), LinearEnergy([0.3, -0.2])
    tilted = tilt(net.model, {"z": energy})
    losses = {}
    for name, model in (("tilted", tilted), ("base", net.model)):
        torch.manual_seed(1)
        losses[name] = Trace_ELBO().loss(model, net.guide, X)
    torch.manual_seed(1)
    part = TiltELBO()(tilted, net.guide, X).detach()
    assert part == pytest.approx(losses["tilted"] - losses["base"], abs=1e-4)


def test_the_likelihood_is_not_run_and_the_base_gets_no_gradient():
    net, energy = Net(), MLPEnergy(D, hidden=(4,))
    tilted = tilt(net.model, {"z": energy})
    TiltELBO()(tilted, net.guide, X)  # the first call looks at the model
    before = net.decodings
    for _ in range(3):
        TiltELBO()(tilted, net.guide, X).backward()
    assert net.decodings == before
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in energy.parameters())


def test_handlers_are_left_in_order():
    net = Net()
    tilted = tilt(net.model, {"z": LinearEnergy([0.3, -0.2])})
    TiltELBO()(tilted, net.guide, X)
    trace = poutine.trace(tilted).get_trace(X)  # a plate left open would make its name a duplicate
    assert "x" in trace.nodes


def test_training_reaches_the_closed_form():
    """q(z|x) = N(m, s^2) for all data: the best linear tilt has a = E_q[z]."""
    mean, energy = torch.tensor([0.7, -0.4]), LinearEnergy([0.0, 0.0])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 0.5).to_event(1))

    tilted = tilt(model, {"z": energy})
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.05)
    x, losses = torch.zeros(256, 1), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = TiltELBO()(tilted, guide, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / len(x))
    assert (energy.a.detach() - mean).abs().max() < 0.1
    # at the optimum: -E_q[a.z] + |a|^2 / 2 = -|m|^2 / 2
    tail = torch.tensor(losses[-20:])
    assert abs(tail.mean() + 0.5 * mean.square().sum()) < 4 * tail.std() / math.sqrt(20) + 0.01


def test_errors():
    net, energy = Net(), LinearEnergy([0.3, -0.2])
    with pytest.raises(TypeError, match=r"needs the model that tilt\(\) returns, got method"):
        TiltELBO()(net.model, net.guide, X)
    with pytest.raises(ValueError, match="needs log Z: without it the energy runs away"):
        TiltELBO()(tilt(net.model, {"z": energy}, normalize=False), net.guide, X)
    tilted = tilt(net.model, {"x": LinearEnergy([0.1, 0.1, 0.1])})
    with pytest.raises(
        ValueError, match=r"does not draw the tilted site\(s\) \['x'\]; use pyro.infer.Trace_ELBO"
    ):
        TiltELBO()(tilted, net.guide, X)


# TiltLikelihood: the exact ratio, from weighted posterior draws


def posterior_particles(n=64, k=512, s=0.6):
    """Draws of z | x_i ~ N(m_i, s^2 I) made from a wider proposal, with the weights that correct it."""
    m = torch.tensor([0.4, -0.3]) + 0.3 * torch.randn(n, 1, D)
    values = m + 0.8 * torch.randn(n, k, D)
    log_weights = (dist.Normal(m, s).log_prob(values) - dist.Normal(m, 0.8).log_prob(values)).sum(-1)
    return m[:, 0], s, values, log_weights.log_softmax(-1)


def standard():
    return dist.Normal(torch.zeros(D), 1.0).to_event(1)


def root():
    with pyro.plate("data", 4):
        pyro.sample("z", standard())


def test_tilt_likelihood_against_the_closed_form():
    m, s, values, log_weights = posterior_particles()
    a = torch.tensor([0.5, -0.4])
    truth = (m @ a + 0.5 * s**2 * a.square().sum() - 0.5 * a.square().sum()).sum()
    truth_grad = m.sum(0) + len(m) * (s**2 - 1) * a
    losses, found = [], []
    for seed in range(16):
        energy = LinearEnergy(a)
        tilted = tilt(root, {"z": energy}, normalize=Normalizer("qmc", 1024, seed))
        loss = TiltLikelihood(standard())(tilted, None, values, log_weights)
        assert loss.ndim == 0
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, energy.a)[0])
    # the draws of the posteriors are the same each time: their error, by the delta method, comes on top
    ratio = (log_weights + values @ a).softmax(-1)
    noise = (((ratio / log_weights.exp() - 1) * log_weights.exp()).square().sum(-1)).sum().sqrt()
    assert abs(torch.stack(losses).mean() + truth) <= 4 * (noise + torch.stack(losses).std() / 4)
    tilted_mean = (ratio[..., None] * values).sum(1, keepdim=True)
    grad_noise = (ratio[..., None] * (values - tilted_mean)).square().sum((0, 1)).sqrt()
    error = torch.stack(found).mean(0) + truth_grad
    assert (error.abs() <= 4 * (grad_noise + torch.stack(found).std(0) / 4)).all()
    assert noise < 0.1 * truth.abs() and (grad_noise < 0.3).all()


def test_tilt_likelihood_of_no_tilt_is_zero():
    _, _, values, log_weights = posterior_particles(n=8)
    tilted = tilt(root, {"z": LinearEnergy([0.0, 0.0])})
    assert abs(TiltLikelihood(standard())(tilted, None, values, log_weights).detach()) < 1e-4


def test_tilt_likelihood_errors():
    _, _, values, log_weights = posterior_particles(n=2, k=4)
    objective = TiltLikelihood(standard())
    energies = {"z": LinearEnergy([0.1, 0.1])}
    with pytest.raises(TypeError, match=r"model must be what tilt\(\) returns, got function"):
        objective(root, None, values, log_weights)
    for normalize in (False, 0.01):
        with pytest.raises(ValueError, match="must estimate its log Z: without it the energy runs away"):
            objective(tilt(root, energies, normalize=normalize), None, values, log_weights)
    both = tilt(Net().model, energies | {"y": LinearEnergy(0.1)})
    with pytest.raises(ValueError, match=r"model must have one tilted site, got \['y', 'z'\]"):
        objective(both, None, values, log_weights)
    wrong = tilt(root, {"z": lambda value: value})
    with pytest.raises(
        ValueError, match=r"energy of site 'z' .* shape \(2, 4\) for a value of shape \(2, 4, 2\)"
    ):
        objective(wrong, None, values, log_weights)
