"""A run goes on only as the run that it was: whatever changes it is named."""

from __future__ import annotations

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn
from torch.optim import lr_scheduler

from pyro_ebm import (
    VAE,
    Checkpoint,
    CheckpointError,
    LinearEnergy,
    Normalizer,
    RunningControl,
    TiltELBO,
    fit,
    fit_tilt,
    tilt,
)
from pyro_ebm.training.identity import description, differences

X = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def vae(beta=2.0, likelihood="bernoulli"):
    torch.manual_seed(1)
    return VAE((4,), 2, likelihood, beta, hidden=(5,))


def weighted(weight):
    def objective(model, guide, x):
        return weight * Trace_ELBO().differentiable_loss(model, guide, x)

    return objective


class Pull:
    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, model, guide, x):
        return self.strength * Trace_ELBO().differentiable_loss(model, guide, x)


def by_fit(path, *, resume=False, module=None, **options):
    module = vae() if module is None else module
    settings = {"epochs": 4 if resume else 2, "batch_size": 16, "seed": 0, "progress": False, **options}
    settings.setdefault("optimizer", functools.partial(torch.optim.Adam, lr=1e-2))
    settings.setdefault("scheduler", functools.partial(lr_scheduler.StepLR, step_size=2))
    settings.setdefault("objective", Pull())
    return fit(module.model, module.guide, X, checkpoint=Checkpoint(path, resume=resume), **settings)


def by_fit_tilt(path, *, resume=False, base=None, normalize=True, **options):
    base = vae() if base is None else base
    settings = {"max_steps": 12, "batch_size": 16, "num_particles": 4, "folds": 0, "seed": 0, "progress": False}
    settings |= {"tolerance": None, **options}
    tilted = tilt(base.model, {"z": LinearEnergy(torch.zeros(2))}, normalize=normalize)
    return fit_tilt(tilted, base.guide, X, checkpoint=Checkpoint(path, resume=resume), **settings)


def other_weights():
    base = vae()
    with torch.no_grad():
        base.decoder.layers[0].weight.add_(1.0)
    return base


Adam, SGD, StepLR = torch.optim.Adam, torch.optim.SGD, lr_scheduler.StepLR
CHANGES = [
    (by_fit, {"optimizer": functools.partial(Adam, lr=1e-3)}, "its optimizer settings, lr is 0.01, here it is 0.001"),
    (by_fit, {"optimizer": functools.partial(Adam, lr=1e-2, betas=(0.8, 0.9))}, "betas is 0.9, here it is 0.8"),
    (by_fit, {"optimizer": functools.partial(SGD, lr=1e-2)}, "its optimizer_class is 'Adam', here it is 'SGD'"),
    (by_fit, {"scheduler": functools.partial(StepLR, step_size=3)}, "scheduler settings, step_size is 2, here it is 3"),
    (by_fit, {"scheduler": functools.partial(StepLR, step_size=2, gamma=0.5)}, "settings, gamma is 0.1, here"),
    (by_fit, {"objective": Pull(2.0)}, "its objective, strength is 1.0, here it is 2.0"),
    (by_fit, {"objective": None}, "its objective, class is 'Pull', here it is 'Trace_ELBO'"),
    (by_fit, {"objective": weighted(2.0)}, "its objective, class is 'Pull', here it is None"),
    (by_fit, {"module": vae(beta=4.0)}, r"its model, VAE.beta \(0\) is 2.0, here it is 4.0"),
    (by_fit, {"module": vae(likelihood="continuous_bernoulli")}, r"its model, VAE.likelihood \(0\) is 'bernoulli'"),
    (by_fit, {"clip_grad_norm": 1.0}, "its clip_grad_norm is None, here it is 1.0"),
    (by_fit, {"batch_size": 8}, "its batch_size is 16, here it is 8"),
    (by_fit, {"seed": 1}, "its seed is 0, here it is 1"),
    (by_fit, {"keep": "last"}, "its keep is \"'best'\", here it is \"'last'\""),
    (by_fit, {"validation": None}, "its data is"),
    (by_fit_tilt, {"learning_rate": 1e-2}, "its optimizer settings, lr is 0.005, here it is 0.01"),
    (by_fit_tilt, {"max_steps": 18}, "its scheduler settings, T_max is 4, here it is 6"),
    (by_fit_tilt, {"tolerance": 0.1}, "its scheduler_class is 'CosineAnnealingLR', here it is 'UntilFlat'"),
    (by_fit_tilt, {"bound": "elbo"}, "its data is|its objective, class is"),
    (by_fit_tilt, {"control": 0.9}, "its objective, class is 'TiltLikelihood', here it is 'RunningControl'"),
    (by_fit_tilt, {"num_particles": 8}, "its data is"),
    (by_fit_tilt, {"normalize": Normalizer(num_samples=64)}, r"TiltedModel.normalize .*, num_samples is 1024"),
    (by_fit_tilt, {"base": other_weights()}, "its data is|its frozen weights is"),
]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Runs of both kinds, two epochs long."""
    folder = tmp_path_factory.mktemp("runs")
    by_fit(folder / "by_fit.pt")
    by_fit_tilt(folder / "by_fit_tilt.pt", bound="exact")
    return folder


@pytest.mark.parametrize(("entry", "change", "match"), CHANGES)
def test_another_run_is_named(begun, entry, change, match):
    options = {"bound": "exact"} if entry is by_fit_tilt else {}
    with pytest.raises(CheckpointError, match=match):
        entry(begun / f"{entry.__name__}.pt", resume=True, **options | change)


def test_the_same_run_goes_on(begun, tmp_path):
    for entry, options in ((by_fit, {}), (by_fit_tilt, {"bound": "exact"})):
        path = tmp_path / "run.pt"
        path.write_bytes((begun / f"{entry.__name__}.pt").read_bytes())
        assert entry(path, resume=True, **options).epochs == 4


MAKERS = [
    lambda: weighted(2.0),
    lambda: Trace_ELBO(num_particles=3),
    Pull,
    lambda: RunningControl(TiltELBO(), decay=0.5),
    lambda: RenyiELBO(num_particles=2),
]


@pytest.mark.parametrize("make", MAKERS)
def test_descriptions_are_the_same_for_the_same(make):
    assert description(make()) == description(make()) == description(copy.deepcopy(make()))


def test_an_elbo_that_has_been_used_is_described_as_before():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    before = description(elbo)
    elbo.loss(model, model, X)
    assert description(elbo) == before


def test_functions_differ_by_code_constants_and_what_they_close_over():
    functions = [lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, weighted(1.0), weighted(2.0)]
    functions += [functools.partial(weighted, 1.0), functools.partial(weighted, 2.0)]
    described = [description(function) for function in functions]
    for index, first in enumerate(described):
        assert all(list(differences(first, second, "it")) for second in described[:index])


def test_settings_of_modules_leave_counters_out():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.rate, self.weight = 0, 0.5, nn.Parameter(torch.zeros(()))

        def model(self, x):
            self.calls += 1
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.weight, 1.0).expand([4]).to_event(1), obs=x)

        def guide(self, x):
            pass

    module = Counting()
    from pyro_ebm.training.identity import settings_of_modules

    assert settings_of_modules([module]) == {"Counting.rate (0)": 0.5}
