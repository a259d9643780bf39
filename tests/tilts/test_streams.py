"""With which draws log Z is estimated, for energies whose parameters lie wherever people put them."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    Checkpoint,
    Energy,
    MLPEnergy,
    MomentEnergy,
    Normalizer,
    ObservedTiltLikelihood,
    TiltedDistribution,
    TiltELBO,
    TrainingWarning,
    fit,
    tilt,
)
from pyro_ebm.tilts.streams import hides_nothing, log_z_stream

DRAWS = 200  # of log Z: no other number of values is asked for here


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


class Callable_:
    def __init__(self, net):
        self.net = net

    def __call__(self, z):
        return self.net(z).squeeze(-1)

    def energy(self, z):
        return self(z)


class Hidden(Energy):
    """A module that does not know its own weights."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nets

    def forward(self, z):
        net = self.nets["net"] if isinstance(self.nets, dict) else self.nets[0]
        return net(z).squeeze(-1)


def nested(net):
    inner = lambda z: net(z)  # noqa: E731

    def outer(z):
        return inner(z).squeeze(-1)

    return outer


def of_tensors(net):
    weights = [p.data for p in net.parameters()]  # they do not even ask for gradients
    return lambda z: ((z @ weights[0].T + weights[1]).tanh() @ weights[2].T + weights[3]).squeeze(-1)


def visible(net):
    energy = MLPEnergy(2)
    energy.net = net
    return energy


HIDING = {
    "closure": lambda net: lambda z: net(z).squeeze(-1),
    "closure in a closure": nested,
    "partial of a function": lambda net: functools.partial(lambda nets, z: nets["e"](z).squeeze(-1), {"e": net}),
    "callable object": Callable_,
    "bound method": lambda net: Callable_(net).energy,
    "module in a dict": lambda net: Hidden({"net": net}),
    "module in a list": lambda net: Hidden([net]),
    "part of a sum": lambda net: MLPEnergy(2, hidden=(3,)) + Hidden([net]),
    "scaled": lambda net: 2.0 * Hidden([net]),
    "features": lambda net: MomentEnergy(lambda z: net(z), [1.0]),
    "tensors": of_tensors,
}
ALL = {"module": visible, **HIDING}


def at_root(x):
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def with_parent(x):
    with pyro.plate("data", len(x), dim=-1):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1), obs=x)


def guide_of_parent(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("loc", dist.Normal(x / 2, 1.0).to_event(1))


def factor(model, x):
    """Log Z of a tilted model that estimates it, as the model uses it."""
    trace = pyro.poutine.trace(pyro.condition(model, {"loc": torch.zeros(3, 2)})).get_trace(x)
    return -trace.nodes["z_tilt"]["fn"].log_factor - model.energies["z"](x)


def of_model(base):
    def log_z(energy):
        tilted = tilt(base, {"z": energy}, normalize=Normalizer(num_samples=DRAWS))
        x = torch.zeros(3, 2)
        return lambda: factor(tilted, x)[0]

    return log_z


def of_distribution(energy):
    tilted = TiltedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), energy, normalizer=Normalizer(num_samples=DRAWS)
    )
    return lambda: tilted.unnormalized_log_prob(torch.zeros(2)) - tilted.log_prob(torch.zeros(2))


PLACES = {"root": of_model(at_root), "forward": of_model(with_parent), "distribution": of_distribution}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ALL)
def test_another_tilt_another_log_z_from_other_draws(kind, place, grad, rng_untouched):
    """Also where it has been asked for before, and no parameter is in sight. The same tilt: the same number."""
    net = network()
    value, bias = PLACES[place](ALL[kind](net)), list(net.parameters())[-1]
    before = bias.detach().clone()
    factor = {"scaled": 2.0, "features": -1.0}.get(kind, 1.0)
    with torch.set_grad_enabled(grad), rng_untouched():
        first = value()
        assert torch.equal(value(), first)
        # On the same draws, log Z would move by just what the energy is shifted by.
        bias.data.add_(0.5)
        assert 1e-5 < (first - value() - 0.5 * factor).abs() < 0.5
        bias.data.copy_(before)
        assert torch.equal(value(), first)


@pytest.mark.parametrize("kind", ALL)
def test_what_hides_nothing(kind):
    energy = ALL[kind](network())
    energy = energy if isinstance(energy, nn.Module) else tilt(at_root, {"z": energy}).energies["z"]
    assert hides_nothing(energy) == (kind == "module")


def test_within_a_stream_the_draws_are_those_of_the_stream(rng_untouched):
    value = PLACES["root"](MLPEnergy(2, hidden=(3,)))
    with rng_untouched(), torch.no_grad():
        outside = value()
        with log_z_stream(1):
            first = value()
            with log_z_stream(2):
                second = value()
            assert torch.equal(value(), first)
        assert len({float(each) for each in (outside, first, second)}) == 3
        assert torch.equal(value(), outside)


def recorded(energy):
    """The energy, and the sets of draws of log Z it was asked for."""
    seen = []

    def watched(z):
        if z.numel() >= 2 * DRAWS:
            seen.append(z.detach().clone())
        return energy(z)

    return watched, seen


@pytest.mark.parametrize("kind", ["module", "closure", "callable object", "module in a list", "features"])
@pytest.mark.parametrize("base, guide", [(at_root, lambda x: None), (with_parent, guide_of_parent)])
def test_each_step_of_a_training_sees_draws_of_its_own(base, guide, kind):
    """And each validation those of the one before."""
    net, x = network(), torch.randn(40, 2)
    energy, seen = recorded(ALL[kind](net))
    tilted = tilt(base, {"z": energy}, normalize=Normalizer(num_samples=DRAWS))
    options = {"objective": ObservedTiltLikelihood(), "train": net, "batch_size": 16, "seed": 0, "progress": False}
    fit(tilted, guide, x, epochs=3, **options)
    kinds = [float(z.sum()) for z in seen]
    steps = 3 * 3  # 36 data
    once = [each for each in kinds if kinds.count(each) == 1]
    assert steps <= len(once) <= steps + 1  # fit may look at the loss once before
    assert len(set(kinds)) - len(once) - 8 in (1, 2)  # the eight draws of validation, and those of fit's first looks


def test_validation_moves_no_more_than_the_weights():
    """On the same draws, a change of 1e-6 in the weights is one of 1e-6 in the loss."""
    net, x, losses = network(), torch.randn(40, 2), []
    for _ in range(2):
        tilted = tilt(at_root, {"z": lambda z: net(z).squeeze(-1)}, normalize=Normalizer(num_samples=DRAWS))
        options = {"objective": ObservedTiltLikelihood(), "train": net, "epochs": 1, "seed": 0, "progress": False}
        make = functools.partial(torch.optim.SGD, lr=1e-7)
        losses += fit(tilted, lambda x: None, x, optimizer=make, **options).validation_loss
        with torch.no_grad():
            next(iter(net.parameters())).add_(1e-6)
    assert abs(losses[0] - losses[1]) < 1e-5


def test_a_tilt_of_hidden_parameters_is_fitted_and_resumed(tmp_path):
    """N(0, I) to N(a, I); a run that was stopped goes on bit for bit."""
    x = torch.tensor([0.8, -0.5]) + torch.randn(300, 2)
    nets = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())

    def run(net, epochs, checkpoint=None):
        def model(x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x / 1.01, 0.0995).to_event(1))

        tilted = tilt(model, {"z": lambda z: -net(z).squeeze(-1)})
        return fit(
            tilted, guide, x, objective=TiltELBO(), train=net, epochs=epochs, seed=0, progress=False, patience=None,
            optimizer=functools.partial(torch.optim.Adam, lr=0.05), validation=None, checkpoint=checkpoint,
        )  # fmt: skip

    whole = run(nets[0], 40)
    run(nets[1], 25, tmp_path / "run.pt")
    resumed = run(nets[1], 40, Checkpoint(tmp_path / "run.pt", resume=True))
    assert resumed.train_loss == whole.train_loss and torch.equal(nets[0].weight, nets[1].weight)
    assert (nets[0].weight[0] - x.mean(0) / 1.01).abs().max() < 0.15


def test_a_runaway_of_hidden_parameters_is_seen():
    """On frozen draws the loss falls without end and nothing warns; on fresh ones the guard sees the weights."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 1))
    x = 6.0 + torch.randn(60, 6)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(6), 1.0).to_event(1), obs=x)

    tilted = tilt(model, {"x": lambda z: net(z).squeeze(-1)}, normalize=Normalizer(num_samples=64))
    make = functools.partial(torch.optim.Adam, lr=0.05)
    with pytest.warns(TrainingWarning, match="log Z rests on"):
        fit(
            tilted, lambda x: None, x, objective=ObservedTiltLikelihood(), train=net, optimizer=make, epochs=150,
            patience=None, seed=0, progress=False,
        )  # fmt: skip
