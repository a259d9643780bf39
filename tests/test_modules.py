"""Modules behind callables, random streams, modes."""

from __future__ import annotations

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ebm import InferenceWarning, LinearEnergy, fit, sample, tilt
from pyro_ebm.modules import evaluation_mode, frozen, modules_of, own_parameters, register_for_svi
from pyro_ebm.randomness import forked_rng, random_stream


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def model(self, x=None):
        return self.inner(x)


def plain(x=None):
    return x


def test_modules_of_sees_through_wrappers():
    owner = Owner()
    partial = functools.partial(functools.partial(owner.model, 1), x=2)
    assert modules_of(owner) == [owner]
    assert modules_of(owner.model) == [owner]
    assert modules_of(partial) == [owner]
    assert modules_of(functools.partial(owner)) == [owner]
    assert modules_of(poutine.scale(owner.model, scale=2.0)) == [owner]
    assert modules_of(poutine.trace(poutine.condition(owner, data={}))) == [owner]
    assert (
        modules_of(functools.partial(plain, owner))
        == modules_of(functools.partial(plain, x=owner))
        == [owner]
    )
    assert modules_of(functools.wraps(owner.model)(lambda: None)) == [owner]
    tilted = tilt(owner.model, {"z": LinearEnergy([1.0])})
    assert modules_of(tilted) == [tilted]


def test_modules_of_lists_each_module_once_and_nothing_for_functions():
    first, second = Owner(), Owner()
    assert modules_of(plain, lambda: 0) == []
    assert modules_of(first.model, second, first, plain) == [first, second]


@pytest.mark.uses_param_store
def test_register_for_svi_needs_a_listener_and_gives_each_instance_its_own_name():
    first, second = LinearEnergy([1.0]), LinearEnergy([1.0])
    register_for_svi(first, "tilt")
    with poutine.trace():
        register_for_svi(first, "tilt")
    assert not pyro.get_param_store().keys()
    with poutine.trace(param_only=True) as capture:
        register_for_svi(first, "tilt")
        register_for_svi(second, "tilt")
    names = list(capture.trace.nodes)
    assert len(set(names)) == 2 and all(name.startswith("tilt_") and name.endswith("$$$a") for name in names)
    assert pyro.param(names[0]) is first.a and pyro.param(names[1]) is second.a
    with poutine.trace(param_only=True) as again:
        register_for_svi(first, "tilt")
    assert list(again.trace.nodes) == names[:1]


@pytest.mark.uses_param_store
def test_register_for_svi_leaves_frozen_parameters_out_without_a_warning():
    energy = LinearEnergy([1.0]) + LinearEnergy([2.0])
    energy.terms[0].requires_grad_(False)
    with poutine.trace(param_only=True) as capture:
        register_for_svi(energy, "tilt")
        register_for_svi(LinearEnergy([1.0]).requires_grad_(False), "tilt")
    assert len(capture.trace.nodes) == 1


def test_forked_rng_restores_and_repeats(rng_untouched):
    with rng_untouched():
        with forked_rng(3):
            first = torch.rand(2)
        with forked_rng(3):
            second = torch.rand(2)
        with forked_rng(None):
            third = torch.rand(2)
        with pytest.raises(RuntimeError, match="inside"), forked_rng(1):
            torch.rand(1)
            raise RuntimeError("inside")
    assert torch.equal(first, second)
    assert torch.equal(third, torch.rand(2))  # None continues from the global state


def test_random_stream_is_global_only_without_a_seed(rng_untouched):
    with rng_untouched(), random_stream(0):
        torch.rand(1)
    state = torch.get_rng_state()
    with random_stream(None):
        torch.rand(1)
    assert not torch.equal(state, torch.get_rng_state())


def test_evaluation_mode_restores_each_module():
    owner = Owner()
    owner.inner[0].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(owner.model):
        assert not any(module.training for module in owner.modules())
        raise RuntimeError("inside")
    assert [module.training for module in owner.modules()] == [True, True, False, True]


def test_frozen_restores_each_parameter():
    owner = Owner()
    owner.inner[0].bias.requires_grad_(False)
    with frozen(owner):
        assert not any(p.requires_grad for p in owner.parameters()) and not owner.training
    assert owner.inner[0].weight.requires_grad and not owner.inner[0].bias.requires_grad and owner.training


class Weights(PyroModule):
    """Random weights, and a bias and a layer that learn, one of them frozen."""

    def __init__(self):
        super().__init__()
        self.random = PyroModule[nn.Linear](2, 1)
        self.random.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.plain = nn.Linear(1, 1)
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x):
        loc = self.plain(self.random(x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.scale.abs() + 0.1), obs=x[:, 0])


def test_parameters_of_pyro_modules_are_met_under_vmap_and_stay_frozen():
    model, x = Weights(), torch.linspace(-1, 1, 8).reshape(4, 2)
    before = dict(pyro.get_param_store().named_parameters())
    options = {"num_samples": 2, "warmup_steps": 2, "num_chains": 2, "seed": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        draws = sample(model, x, method="chees", vectorize="vmap", **options)
    assert draws.values["random.weight"].shape == (2, 2, 1, 2)
    assert not model.scale.requires_grad and model.plain.weight.requires_grad
    assert dict(pyro.get_param_store().named_parameters()) == before


@pytest.mark.parametrize("kind", [AutoIAFNormal, AutoNormal])
def test_a_flow_of_pyros_learns_and_leaves_nothing_in_the_store(kind):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    guide = kind(model)
    with own_parameters(guide):
        guide(torch.zeros(4, 2))
    start = [p.detach().clone() for p in guide.parameters()]
    result = fit(model, guide, torch.ones(4, 2), epochs=2, validation=None, seed=0, progress=False)
    assert result.stopped == "epochs" and not list(pyro.get_param_store().keys())
    assert any(not torch.equal(p, old) for p, old in zip(guide.parameters(), start, strict=True))
