"""Modules behind callables, random streams, modes."""

from __future__ import annotations

import functools

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_ebm import LinearEnergy, tilt
from pyro_ebm.modules import evaluation_mode, frozen, modules_of, register_for_svi
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
