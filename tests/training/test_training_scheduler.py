"""fit(scheduler=...): the learning rate really moves, and a resumed run goes on where it was."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pyro_ebm import Checkpoint, CheckpointError, TrainingWarning, fit
from pyro_ebm.training.objective import Objective


class Level(nn.Module):
    """y = level + noise of scale one: the gradient per datum is level - mean(y)."""

    def __init__(self, start=0.0):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(start))

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.level, 1.0), obs=y)

    def guide(self, y):
        pass


class Recorded(torch.optim.SGD):
    """Keeps the learning rate of each step in a list."""

    def __init__(self, parameters, rates, **options):
        super().__init__(parameters, **options)
        self.rates = rates

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


Y = torch.linspace(-1, 3, 32)
COSINE = functools.partial(lr_scheduler.CosineAnnealingLR, T_max=5)


def run(module, scheduler, *, rates=None, **options):
    rates = [] if rates is None else rates
    settings = {"epochs": 5, "batch_size": 16, "validation": None, "patience": None, "seed": 0}
    optimizer = functools.partial(Recorded, rates=rates, lr=0.1)
    return fit(
        module.model, module.guide, Y, scheduler=scheduler, optimizer=optimizer, progress=False,
        **{**settings, **options},
    )  # fmt: skip


def test_the_learning_rate_falls_once_an_epoch():
    rates = []
    run(Level(), COSINE, rates=rates)
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5) for _ in range(2)]
    assert rates == pytest.approx(expected)
    assert rates[0] == 0.1 and rates[-1] < 0.01


def test_without_scheduler_it_stays():
    rates = []
    run(Level(), None, rates=rates)
    assert set(rates) == {0.1}


def test_the_weights_are_those_of_steps_taken_by_hand():
    module, level = Level(), 0.0
    run(module, functools.partial(lr_scheduler.ExponentialLR, gamma=0.5), batch_size=32, epochs=4)
    for epoch in range(4):
        level -= 0.1 * 0.5**epoch * (level - Y.mean().item())
    assert module.level.item() == pytest.approx(level, rel=1e-5)


def test_a_plateau_scheduler_sees_the_loss():
    """At the optimum no epoch is better than the first: the rate is cut after `patience` more."""
    rates = []
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1)
    run(Level(start=Y.mean().item()), plateau, rates=rates, batch_size=32, epochs=6)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.025])


@pytest.mark.parametrize(
    "scheduler",
    [
        COSINE,
        functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.3),
        functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
        functools.partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=6),
        functools.partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.9),
    ],
    ids=["cosine", "step", "lambda", "one cycle", "plateau"],
)
@pytest.mark.parametrize("validation", [None, 0.25])
def test_a_resumed_run_is_the_same_run(tmp_path, scheduler, validation):
    rates, parts = [], []
    whole, first, fresh = Level(), Level(), Level()
    options = {"validation": validation}
    expected = run(whole, scheduler, rates=rates, **options)
    run(first, scheduler, rates=parts, epochs=2, checkpoint=tmp_path / "run.pt", **options)
    found = run(fresh, scheduler, rates=parts, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True), **options)
    assert parts == rates and len(set(rates)) > 1
    assert torch.equal(fresh.level, whole.level)
    assert found.train_loss == expected.train_loss and found.validation_loss == expected.validation_loss


def test_an_interruption_resumes_at_the_rate_of_its_epoch(tmp_path, monkeypatch):
    rates, parts, resumed, calls = [], [], [], []
    gradients = Objective.gradients

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second step of the third epoch
            raise KeyboardInterrupt
        return gradients(self, *args, **kwargs)

    whole, fresh = Level(), Level()
    run(whole, COSINE, rates=rates)
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch, pytest.warns(TrainingWarning, match="interrupted in epoch 3"):
        patch.setattr(Objective, "gradients", stop)
        run(Level(), COSINE, rates=parts, checkpoint=path)
    run(fresh, COSINE, rates=resumed, checkpoint=Checkpoint(path, resume=True))
    assert parts[:5] == rates[:5] and resumed == rates[4:]
    assert torch.equal(fresh.level, whole.level)


@pytest.mark.parametrize("other", [None, functools.partial(lr_scheduler.StepLR, step_size=2)])
def test_a_checkpoint_with_another_scheduler_is_refused(tmp_path, other):
    run(Level(), COSINE, epochs=2, checkpoint=tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="its scheduler_class is 'CosineAnnealingLR', here it is"):
        run(Level(), other, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))


def made_elsewhere():
    return lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1), 1)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (made_elsewhere(), "StepLR"),
        (lambda optimizer: made_elsewhere(), "StepLR"),
        (lambda optimizer: optimizer, "Recorded"),
        (lambda optimizer: None, "NoneType"),
        ("cosine", "str"),
    ],
)
def test_what_is_no_scheduler_of_this_optimizer_is_refused(scheduler, name):
    module = Level()
    with pytest.raises(TypeError, match=f"scheduler must be a function of the optimizer .*, got {name}; for"):
        run(module, scheduler)
    assert module.level.item() == 0 and module.level.grad is None
