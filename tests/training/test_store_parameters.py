"""Parameters that live in Pyro's store: they learn with the rest, and two modules never share them by their names."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_ebm import Checkpoint, LinearEnergy, TrainingWarning, fit, importance, sample, tilt

pytestmark = pytest.mark.uses_param_store
X = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1)) + 2
SCALE, MEAN = X.std(correction=0), X.mean()


def run(model, guide=lambda x: None, data=X, **options):
    settings = {"epochs": 150, "batch_size": 64, "validation": None, "seed": 0, "progress": False, **options}
    settings.setdefault("optimizer", functools.partial(torch.optim.Adam, lr=0.1))
    return fit(model, guide, data, **settings)


class Holder(nn.Module):
    """A module with a parameter of its own, and one by ``pyro.param`` in its model."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, scale), obs=x)

    def guide(self, x):
        pass


def bare(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def test_a_param_inside_a_modules_model_learns():
    holder = Holder()
    run(holder.model, holder.guide)
    torch.testing.assert_close(pyro.param("scale").detach(), SCALE, rtol=0.02, atol=0)
    torch.testing.assert_close(holder.loc.detach(), MEAN, rtol=0.02, atol=0)


def test_a_model_that_has_nothing_but_params_learns():
    run(bare)
    torch.testing.assert_close(pyro.param("scale").detach(), SCALE, rtol=0.02, atol=0)
    torch.testing.assert_close(pyro.param("loc").detach(), MEAN, rtol=0.02, atol=0)


def test_what_a_closure_registers_learns():
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(torch.zeros(len(x), 1)).squeeze(-1), 0.3), obs=x)

    run(model)
    torch.testing.assert_close(net.bias.detach()[0], MEAN, rtol=0.02, atol=0)


def test_stock_svi_goes_on_from_there_and_fit_from_it():
    elbo = pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(bare, lambda x: None, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(20):
        svi.step(X)
    before = pyro.param("scale").item()
    run(bare, epochs=20)
    assert abs(pyro.param("scale").item() - SCALE) < abs(before - SCALE)


def test_a_run_with_params_resumes_exactly(tmp_path):
    whole = run(bare, epochs=6)
    expected = pyro.param("scale").item()
    pyro.clear_param_store()
    run(bare, epochs=3, checkpoint=tmp_path / "run.pt")
    pyro.clear_param_store()
    again = run(bare, epochs=6, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert again.train_loss == whole.train_loss and pyro.param("scale").item() == expected


def test_the_seed_decides_where_what_is_made_late_starts():
    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    starts = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()
        run(model, epochs=1, seed=seed, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
        starts.append(pyro.param("loc").item())
    assert starts[0] == starts[1] != starts[2]


def test_named_params_learn_and_others_stand_still_with_a_word():
    holder = Holder()
    with pytest.warns(TrainingWarning, match=r"stand still: \['scale'\] .*train=\[\.\.\., 'scale'\]"):
        run(holder.model, holder.guide, train=holder, epochs=2)
    assert pyro.param("scale").item() == pytest.approx(3.0)
    run(holder.model, holder.guide, train=[holder, "scale"], epochs=2)
    assert pyro.param("scale").item() < 2.99
    loc = holder.loc.item()
    run(holder.model, holder.guide, train="scale", epochs=2)
    assert holder.loc.item() == loc
    with pytest.raises(ValueError, match=r"train names the pyro.param 'shape', but model and guide have \['scale'\]"):
        run(holder.model, holder.guide, train=[holder, "shape"])


def test_params_of_a_tilted_base_stand_still():
    def base(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    energy = LinearEnergy(torch.tensor(0.0))
    run(tilt(base, {"x": energy}), train=energy, epochs=2)
    assert pyro.param("loc").item() == 0.0 and energy.a.item() != 0.0


# ------------------------------------------------------------------------------------------- two of a name


def latent(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


class Net(PyroModule):
    """A guide as users write it: without a name."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x):
        pyro.sample("w", dist.Normal(self.loc, self.scale))


GUIDES = {
    "AutoNormal": lambda: AutoNormal(latent),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(latent),
    "AutoDelta": lambda: AutoDelta(latent),
    "PyroModule": Net,
}


def values(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", GUIDES)
def test_fitting_one_of_two_guides_leaves_the_other_alone(kind):
    first, second = GUIDES[kind](), GUIDES[kind]()
    run(latent, first, epochs=5)
    stays = values(first)
    run(latent, second, data=-X, epochs=5)
    assert same(values(first), stays) and not same(values(second), stays)
    assert not pyro.get_param_store()


@pytest.mark.parametrize("kind", GUIDES)
def test_a_guide_of_stock_svi_keeps_its_parameters(kind):
    """The store holds those of the first under the names of the second."""
    first, second = GUIDES[kind](), GUIDES[kind]()
    svi = pyro.infer.SVI(latent, first, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    svi.step(X)
    stays, held = values(first), dict(pyro.get_param_store().named_parameters())
    run(latent, second, data=-X, epochs=5)
    assert same(values(first), stays)
    now = dict(pyro.get_param_store().named_parameters())
    assert now.keys() == held.keys() and all(now[name] is held[name] for name in held)


def test_two_of_a_name_in_one_run_are_named():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(w, self.scale), obs=x)

    with pytest.raises(ValueError, match=r"both have a parameter 'scale' in Pyro's store.*super\(\).__init__\(name="):
        run(Model(), Net())


ENTRY_POINTS = {
    "importance": lambda guide: importance(latent, guide, X, num_samples=50, seed=0),
    "sample": lambda guide: sample(latent, X, method="chees", guide=guide, num_samples=20, seed=0, progress=False),
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("kind", ["AutoNormal", "PyroModule"])
@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
def test_a_guide_runs_by_its_own_parameters_elsewhere_too(entry, kind):
    first, second = GUIDES[kind](), GUIDES[kind]()
    run(latent, second, data=-X, epochs=5)
    stays = values(second)
    first(X)  # from now on the store knows its parameters, by the names of the other
    ENTRY_POINTS[entry](second)
    assert same(values(second), stays)
    assert not any(a is b for a in first.parameters() for b in second.parameters())
