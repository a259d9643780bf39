"""fit(): groups that take turns, an objective for each, measures of fit and states that objectives bring along."""

from __future__ import annotations

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pyro_ebm import VAE, Checkpoint, CheckpointError, MLPEnergy, TiltELBO, TrainingWarning, fit, tilt
from pyro_ebm.datasets.digits import digits

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Sum(nn.Module):
    """y = a + b + noise of scale one, with a and b in modules of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Constant(), Constant()

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.a() + self.b(), 1.0), obs=y)

    def guide(self, y):
        pass


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.modes = []

    def forward(self):
        self.modes.append(self.training)
        return self.value


Y = torch.linspace(0, 4, 32)


def run(module, **options):
    settings = {"epochs": 3, "batch_size": 16, "validation": None, "patience": None, "seed": 0}
    settings |= {"progress": False, "optimizer": SGD}
    return fit(module.model, module.guide, options.pop("data", Y), **{**settings, **options})


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------- groups in turn


@pytest.mark.parametrize("objective", [Trace_ELBO(), RenyiELBO(alpha=0, num_particles=1)])
def test_groups_step_in_turn_on_the_same_batch(objective):
    """By hand: a moves by the gradient, then b by the gradient that is left; momentum of each its own."""
    module, values, speeds = Sum(), [0.0, 0.0], [0.0, 0.0]
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    run(module, train=[[module.a], [module.b]], batch_size=32, optimizer=momentum, objective=objective)
    for _ in range(3):
        for index in range(2):
            speeds[index] = 0.5 * speeds[index] + sum(values) - 2.0
            values[index] -= 0.1 * speeds[index]
    assert [module.a.value.item(), module.b.value.item()] == pytest.approx(values, rel=1e-4)
    assert module.a.value.grad is None and module.b.value.grad is None


def test_the_others_stand_still_in_eval_mode():
    module, seen = Sum(), []

    def objective(model, guide, y):
        seen.extend([(module.a.training, module.b.training)] if torch.is_grad_enabled() else [])
        return Trace_ELBO().differentiable_loss(model, guide, y)

    run(module, train=[[module.a], [module.b]], objective=objective, epochs=1)
    assert seen == [(True, False), (False, True)] * 2
    assert not (module.a.training or module.b.training)


def test_an_objective_for_each_group():
    """Each pulls the sum to a place of its own; the loss told, and the one validated with, is the first's."""
    module, calls = Sum(), []

    def pull(name, target):
        def objective(model, guide, y):
            calls.append(name if torch.is_grad_enabled() else f"{name} judged")
            return len(y) * (module.a.value + module.b.value - target) ** 2 / 2

        return objective

    both = [pull("a", 1.0), pull("b", -1.0)]
    result = run(module, train=[[module.a], [module.b]], objective=both, epochs=1)
    assert [call for call in calls if "judged" not in call] == ["a", "b"] * 2
    # The sum goes 0 -> 0.1 -> -0.01 and on.
    assert result.train_loss[0] == pytest.approx((1.0 + 1.01**2) / 4, rel=1e-4)
    calls.clear()
    run(module, train=[[module.a], [module.b]], objective=both, epochs=1, batch_size=32, validation=(Y,))
    assert calls.count("a") == calls.count("b") == 1 and "judged" in calls[-1] and calls[-1][0] == "a"


def test_a_module_may_be_in_two_groups():
    module = Sum()
    run(module, train=[[module.a, module.b], [module.b]], batch_size=32, epochs=1)
    assert module.a.value.item() == pytest.approx(0.2)
    assert module.b.value.item() == pytest.approx(0.2 + 0.1 * (2.0 - 0.4))


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adam])
def test_a_resumed_run_in_turns_is_the_same_run(tmp_path, optimizer):
    torch.manual_seed(1)
    first, x = VAE((4,), 2, hidden=(5,)), torch.rand(48, 4)
    energy = MLPEnergy(2, hidden=(4,))
    found = []
    for epochs in (4, 2, 4):
        vae, e = copy.deepcopy(first), copy.deepcopy(energy)
        files = {"checkpoint": Checkpoint(tmp_path / f"{epochs}.pt")} if epochs == 2 or found else {}
        if len(found) == 2:
            files = {"checkpoint": Checkpoint(tmp_path / "2.pt", resume=True)}
        result = fit(
            tilt(vae.model, {"z": e}), vae.guide, x, train=[[vae], [e]], objective=[Trace_ELBO(), TiltELBO()],
            epochs=epochs, batch_size=16, optimizer=optimizer, seed=0, progress=False, **files,
        )  # fmt: skip
        found.append((result.train_loss, {**weights(vae), **weights(e)}))
    assert found[2][0] == found[0][0]
    assert same(found[2][1], found[0][1])
    with pytest.raises(CheckpointError, match=r"its groups is \[\[0\], \[1\]\], here it is None"):
        fit(tilt(vae.model, {"z": e}), vae.guide, x, train=[vae, e], batch_size=16, optimizer=optimizer, seed=0,
            progress=False, **files)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda m: {"train": [[m.a], m.b]}, TypeError, "or a sequence of such sequences that take turns, got"),
        (lambda m: {"train": [[m.a], []]}, TypeError, "train must be a torch.nn.Module, the name of a pyro.param"),
        (lambda m: {"train": [[m.a], [nn.Dropout()]]}, ValueError, r"train\[1\]\[0\] \(Dropout\) has no parameters"),
        (lambda m: {"train": [[m.a], [nn.Linear(1, 1)]]}, ValueError, r"does not depend on train\[1\]\[0\] \(Linear\)"),
        (
            lambda m: {"train": [[m.a], [m.b, nn.Linear(1, 1)]]},
            ValueError,
            r"does not depend on train\[1\]\[1\] \(Linear\); leave it out",
        ),
        (
            lambda m: {"train": [[m.a], [m.b]], "objective": [Trace_ELBO()]},
            ValueError,
            r"one for each group of train=, got 1 for 2 group\(s\); groups are written train=\[\[vae\], \[energy\]\]",
        ),
        (lambda m: {"train": [m.a, m.b], "objective": [Trace_ELBO()] * 2}, ValueError, "got 2 for 1 group"),
        (
            lambda m: {"train": [[m.a], [m.b]], "objective": [Trace_ELBO(), 3]},
            TypeError,
            r"objective\[1\] must be a Pyro ELBO or a function .*, got int",
        ),
        (
            lambda m: {"train": [[m.a], [m.b]], "objective": [Trace_ELBO(), lambda *args: torch.ones(2)]},
            ValueError,
            r"objective\[1\] must return one number",
        ),
    ],
)
def test_bad_groups_are_named(change, error, match):
    module = Sum()
    with pytest.raises(error, match=match):
        run(module, **change(module))
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


# ----------------------------------------------------------------- measures of fit, and states carried along


class Counting:
    """A loss that is no measure of fit, and depends on how often it was called."""

    def __init__(self):
        self.calls = torch.zeros(())

    def __call__(self, model, guide, y):
        self.calls += 1
        return Trace_ELBO().differentiable_loss(model, guide, y) * (1 + self.calls)

    def validation(self, model, guide, y):
        assert not torch.is_grad_enabled()
        return Trace_ELBO().differentiable_loss(model, guide, y)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_validation_is_by_the_measure_of_fit():
    module, objective = Sum(), Counting()
    result = run(module, objective=objective, validation=(Y,), epochs=6)
    assert objective.calls == 12  # validation leaves it alone
    kept = result.kept_epoch
    assert result.validation_loss[kept - 1] == pytest.approx(Trace_ELBO().loss(module.model, module.guide, Y) / 32)
    assert result.validation_loss[result.best_epoch - 1] == min(result.validation_loss)


def test_without_validation_the_last_weights_are_kept():
    """The train loss rises from epoch to epoch, and says nothing."""
    module, last = Sum(), Sum()
    result = run(module, objective=Counting(), epochs=6)
    assert (result.stopped, result.epochs, result.kept_epoch) == ("epochs", 6, 6)
    assert result.train_loss[-1] > min(result.train_loss)
    counting = Counting()
    run(last, objective=lambda *args: counting(*args) if torch.is_grad_enabled() else 0.0, epochs=6)
    assert same(weights(module), weights(last))  # the same without a measure


def test_the_state_of_an_objective_is_saved_and_restored(tmp_path):
    whole, first, fresh = Sum(), Sum(), Sum()
    expected = run(whole, objective=Counting(), epochs=5)
    run(first, objective=Counting(), epochs=2, checkpoint=tmp_path / "run.pt")
    resumed = Counting()
    result = run(fresh, objective=resumed, epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert result.train_loss == expected.train_loss
    assert same(weights(fresh), weights(whole)) and resumed.calls == 10
    with pytest.raises(CheckpointError, match="its objective, class is 'Counting', here it is 'Trace_ELBO'"):
        run(Sum(), epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))


def test_an_interruption_restores_the_state_of_its_epoch(tmp_path):
    class Interrupted(Counting):
        def __call__(self, *args):
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().__call__(*args)

    Interrupted.__qualname__ = Counting.__qualname__  # it goes on as that
    whole, fresh = Sum(), Sum()
    expected = run(whole, objective=Counting(), epochs=5)
    with pytest.warns(TrainingWarning, match="interrupted in epoch 3"):
        run(Sum(), objective=Interrupted(), epochs=5, checkpoint=tmp_path / "run.pt")
    result = run(fresh, objective=Counting(), epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert result.train_loss == expected.train_loss and same(weights(fresh), weights(whole))


def test_setting_up_leaves_the_state_alone():
    """Lazily made parameters need a call before training; it does not count."""
    guide = pyro.infer.autoguide.AutoNormal(lambda y: None)
    module, objective = Sum(), Counting()
    assert isinstance(guide, nn.Module)
    fit(module.model, lambda y: None, Y, objective=objective, train=module, epochs=1, batch_size=32, validation=None,
        seed=0, progress=False)  # fmt: skip
    assert objective.calls == 1
    empty = nn.Identity()  # a module without parameters may make them when first called
    objective = Counting()
    fit(module.model, empty, Y, objective=objective, train=module, epochs=1, batch_size=32, validation=None, seed=0,
        progress=False)  # fmt: skip
    assert objective.calls == 1


# --------------------------------------------------------------------------------- three ways to train a tilt


@pytest.fixture(scope="module")
def trained_vae():
    """A small VAE of the bundled digits, and those of three classes, whose share the tilt is to raise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, labels = digits().images[:600], digits().labels[:600]
        vae = VAE(x.shape[1:], 2, hidden=(32,))
        adam = functools.partial(torch.optim.Adam, lr=1e-2)
        fit(vae.model, vae.guide, x, optimizer=adam, epochs=8, batch_size=100, seed=0, progress=False)
    return vae, x[labels < 3]


def train_tilt(way, vae, x, seed=0):
    """Train a tilt of a copy of the VAE in one of the three ways."""
    torch.manual_seed(4)
    vae, energy = copy.deepcopy(vae), MLPEnergy(2, hidden=(16, 16))
    tilted = tilt(vae.model, {"z": energy})
    train, objective = {
        "tilt alone": (energy, TiltELBO()),
        "jointly": ([vae, energy], Trace_ELBO()),
        "in turn": ([[vae], [energy]], [Trace_ELBO(), TiltELBO()]),
    }[way]
    adam = functools.partial(torch.optim.Adam, lr=5e-3)
    result = fit(
        tilted, vae.guide, x, train=train, objective=objective, optimizer=adam, epochs=6, batch_size=60, seed=seed,
        progress=False,
    )  # fmt: skip
    return vae, energy, tilted, result


def tilted_elbo(tilted, vae, x):
    torch.manual_seed(9)
    with torch.no_grad():
        return -Trace_ELBO(num_particles=4).loss(tilted, vae.guide, x) / len(x)


@pytest.mark.parametrize("way", ["tilt alone", "jointly", "in turn"])
def test_three_ways_to_train_a_tilt(trained_vae, way):
    base, x = trained_vae
    torch.manual_seed(9)
    before = -Trace_ELBO(num_particles=4).loss(base.model, base.guide, x) / len(x)
    vae, energy, tilted, result = train_tilt(way, base, x)
    assert tilted_elbo(tilted, vae, x) > before + 0.1
    assert same(weights(vae), weights(base)) == (way == "tilt alone")
    vae_again, energy_again, _, again = train_tilt(way, base, x)
    assert again.train_loss == result.train_loss
    assert same(weights(energy), weights(energy_again)) and same(weights(vae), weights(vae_again))
    other = train_tilt(way, base, x, seed=1)[1]
    assert not same(weights(energy), weights(other))
