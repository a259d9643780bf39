"""CapturedLoss: the bits of an uncaptured run, from a graph where that is certain, and a reason where it is not."""

from __future__ import annotations

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm import (
    VAE,
    Batches,
    CapturedLoss,
    Checkpoint,
    MLPEnergy,
    TrainingWarning,
    Weighted,
    fit,
    tilt,
)
from pyro_ebm.training import capture
from tests.training.capture_models import (
    Asks,
    Counts,
    CountsElsewhere,
    Discrete,
    Holds,
    Lists,
    Masks,
    Net,
    Reads,
    Replaces,
    Rolls,
    RollsItsOwn,
    RollsNumpy,
    Seeded,
    Writes,
)

pytestmark = [pytest.mark.uses_param_store, pytest.mark.uses_global_rng]  # of VAE; of models that roll Python's dice
X = torch.rand(60, 4, generator=torch.Generator().manual_seed(3))  # 7 minibatches of 8 and one of 4


def run(make, captured, *, epochs=4, data=X, **options):
    """What a run leaves: the weights, the losses, and the CapturedLoss."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    made = make()
    loss = CapturedLoss(options.pop("loss", None)) if captured else options.pop("loss", None)
    settings = {"epochs": epochs, "batch_size": 8, "validation": None, "seed": 1, "progress": False} | options
    if "callbacks" in settings:
        settings["callbacks"] = [functools.partial(each, made) for each in settings["callbacks"]]
    result = fit(made.model, made.guide, data, objective=loss, **settings)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    return state, result, loss


def same(first, second):
    (weights, result, _), (others, other, _) = first, second
    assert result.train_loss == other.train_loss and result.stopped == other.stopped
    assert result.validation_loss == other.validation_loss
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def noisier(net, state):
    net.inner[1].p = 0.1 * state.epoch


def louder(vae, state):
    vae.beta = 1.0 + state.epoch


class Tuple(Net):
    """Follows what no one can see: a number in a tuple."""

    hidden, limit = (0,), 2

    def weight(self, x):
        return 1.0 + (self.hidden[0] > self.limit)


def hidden_epoch(net, state):
    net.hidden = (state.epoch,)


class Params:
    """Parameters in Pyro's store."""

    def __init__(self):
        pyro.get_param_store().clear()

    def model(self, x):
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(4))
            scale = pyro.param("scale", torch.ones(4), constraint=dist.constraints.positive)
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            slope = pyro.param("slope", torch.zeros(()))
            pyro.sample("z", dist.Normal(slope * x, 0.5).to_event(1))

    def state_dict(self):
        return {name: value.detach() for name, value in pyro.get_param_store().named_parameters()}


class Global:
    """One weight for all data, with an autoguide."""

    def __init__(self):
        self.guide = AutoNormal(self.model)
        self.state_dict = self.guide.state_dict

    @staticmethod
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


CAPTURED = {
    "vae": (functools.partial(VAE, (4,), 1, hidden=(6,)), {"validation": 0.2}),
    "gaussian": (functools.partial(VAE, (4,), 1, "gaussian", beta=2.0, hidden=(6,)), {"clip_grad_norm": 0.5}),
    "global site": (Net, {}),
    "dropout": (lambda: Net(nn.Dropout(0.3)), {"validation": 0.2}),
    "batch norm": (lambda: Net(nn.BatchNorm1d(6)), {"validation": 0.2}),
    "spectral norm": (lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), {}),
    "accumulated": (lambda: Net(nn.Dropout(0.3)), {"batch_size": Batches(4, accumulate=2)}),
    "particles": (Net, {"loss": Trace_ELBO(num_particles=2)}),
    "a function": (Net, {"loss": lambda model, guide, x: (model.__self__.outer(x) ** 2).sum(), "train": None}),
    "another dropout by epoch": (lambda: Net(nn.Dropout(0.3)), {"callbacks": [noisier]}),
    "another beta by epoch": (functools.partial(VAE, (4,), 1, hidden=(6,)), {"callbacks": [louder]}),
    "pyro.param": (Params, {}),
    "an autoguide": (Global, {}),
}


SLOW = ("particles", "accumulated", "another dropout by epoch", "spectral norm")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CAPTURED])
def test_a_captured_run_is_the_same_bit_for_bit(case):
    make, options = CAPTURED[case]
    captured = run(make, True, **options)
    assert captured[2].problem is None
    assert captured[2].steps >= 5
    same(captured, run(make, False, **options))


REFUSED = {
    "reads": (Reads, {}, "reads values in Python"),
    "lists": (Lists, {}, "reads values in Python"),
    "counts": (Counts, {}, "changes something in Python"),
    "holds": (Holds, {}, "changes something in Python"),
    "replaces": (Replaces, {}, "changes something in Python"),
    "asks": (Asks, {}, "reads values in Python"),
    "writes": (Writes, {}, "no buffer"),
    "rolls": (Rolls, {}, "changes something in Python"),
    "rolls with numpy": (RollsNumpy, {}, "changes something in Python"),
    "rolls a generator of numpy": (lambda: RollsItsOwn(np.random.default_rng(0)), {}, "changes something in Python"),
    "rolls a generator of Python": (lambda: RollsItsOwn(random.Random(0)), {}, "changes something in Python"),
    "rolls a generator of torch": (lambda: RollsItsOwn(torch.Generator()), {}, "changes something in Python"),
    "counts elsewhere": (CountsElsewhere, {}, "changes something in Python"),
    "seeded": (Seeded, {}, "other numbers|Generator"),
    "masks": (Masks, {}, "depend on values"),
    "discrete": (Discrete, {}, "without reparametrization"),
    "weights": (Net, {"data": Weighted(X, torch.linspace(0.5, 1.5, 60))}, "data have weights"),
}


@pytest.mark.filterwarnings("ignore:the density of the site")  # said of what rolls dice of its own
@pytest.mark.parametrize("case", REFUSED)
def test_a_loss_that_no_graph_gives_stays_as_it_is_and_says_why(case):
    make, options, why = REFUSED[case]
    with pytest.warns(TrainingWarning, match=f"not captured: .*({why})"):
        captured = run(make, True, **options)
    assert captured[2].problem and captured[2].steps == 0
    same(captured, run(make, False, **options))


def test_what_changed_unseen_is_found_at_the_next_epoch_and_told_with_its_steps():
    options = {"callbacks": [hidden_epoch], "epochs": 5}
    with pytest.warns(TrainingWarning, match=r"other numbers \(the last \d steps were made from it\)"):
        captured = run(Tuple, True, **options)
    same(captured, run(Tuple, False, **options))


def test_a_later_comparison_within_an_epoch_finds_it_too(monkeypatch):
    monkeypatch.setattr(capture, "_EVERY", 3)

    nets = []

    def make():
        nets.append(Tuple())
        nets[-1].limit = 12
        return nets[-1]

    def optimizer(parameters):
        made = torch.optim.Adam(parameters)
        made.register_step_post_hook(lambda *_: setattr(nets[-1], "hidden", (nets[-1].hidden[0] + 1,)))
        return made

    # The 10th step is recorded, the 11th compared, the 12th to 14th played back, of which two should see the change.
    with pytest.warns(TrainingWarning, match="the last 3 steps were made from it"):
        run(make, True, optimizer=optimizer)


def test_log_z_by_draws_of_their_own_is_left_to_itself():
    with pytest.warns(TrainingWarning, match="samples log Z"):
        captured = run_tilted(CapturedLoss())
    same(captured, run_tilted(None))


def run_tilted(loss):
    torch.manual_seed(5)
    vae = VAE((4,), 1, hidden=(6,))
    model = tilt(vae.model, {"z": MLPEnergy(1, hidden=(4,))})
    result = fit(model, vae.guide, X, objective=loss, epochs=3, batch_size=8, validation=None, seed=1, progress=False)
    return {name: value.clone() for name, value in model.state_dict().items()}, result, loss


def test_a_run_goes_on_captured_from_where_it_stood_uncaptured(tmp_path):
    make = lambda: Net(nn.Dropout(0.3))  # noqa: E731
    whole = run(make, False, epochs=5)
    run(make, False, epochs=2, checkpoint=tmp_path / "run.pt")
    rest = run(make, True, epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert rest[2].steps > 0
    same(whole, rest)


@pytest.mark.parametrize("captured", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_as_ever(captured):
    with pytest.warns(TrainingWarning, match="became (inf|nan) in epoch 3 at step 2|invalid values"):
        _, result, _ = run(Explodes, captured)
    assert result.stopped == "non-finite loss" and result.epochs == 2


class Explodes(Net):
    """Its loss is infinite as soon as the third epoch has made a step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def weight(self, x):
        with torch.no_grad():
            self.steps.add_(1.0 * self.training)
        return torch.where(self.steps > 17.0, torch.inf, 1.0)


class Bounded(Net):
    """Its 19th step has a probability above one, of which torch makes a finite density where it does not look."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def model(self, x):
        super().model(x)
        with torch.no_grad():
            self.steps.add_(1.0 * self.training)
        pyro.sample("b", dist.Bernoulli(torch.where(self.steps > 18.0, 1.5, 0.5)), obs=torch.ones(()))


def test_arguments_out_of_bounds_are_refused_at_the_step_that_has_them():
    loss = CapturedLoss()
    with pytest.raises(ValueError, match="Expected parameter probs"):
        run(Bounded, False, loss=loss)
    # Of 8 steps an epoch: the 12th to the 15th, and the 18th; the 17th begins an epoch.
    assert loss.steps == 5


@pytest.mark.parametrize("objective", [RenyiELBO(), lambda model, guide, x, epoch: x.sum()])
def test_what_cannot_be_captured_by_its_nature_is_refused_at_once(objective):
    with pytest.raises(ValueError, match="CapturedLoss takes"):
        run(Net, True, loss=objective)


def test_groups_in_turn_have_graphs_of_their_own():
    def turns(loss):
        torch.manual_seed(5)
        net = Net(nn.Dropout(0.3))
        options = {"epochs": 4, "batch_size": 8, "validation": None, "seed": 1, "progress": False}
        result = fit(net.model, net.guide, X, objective=loss, train=[[net.inner], [net.outer]], **options)
        return net.state_dict(), result, loss

    captured = turns(CapturedLoss())
    assert captured[2].problem is None and captured[2].steps >= 10
    same(captured, turns(None))
