"""sample(): each method is the function of its name, and misspelt things are refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LinearEnergy, hmc, importance, nuts, sample, tilt

pytestmark = pytest.mark.filterwarnings("ignore:.*chains disagree:pyro_ebm.InferenceWarning")
FAST = {"num_samples": 6, "num_chains": 2, "seed": 0}


def model(loc=0.0, *, scale=1.0):
    pyro.sample("z", dist.Normal(torch.full((2,), loc), scale).to_event(1))


def guide(loc=0.0, *, scale=1.0):
    pyro.sample("z", dist.Normal(torch.ones(2), 2.0).to_event(1))


TILTED = tilt(model, {"z": LinearEnergy([1.0, 0.0])})


@pytest.mark.parametrize("method, function", [("nuts", nuts), ("hmc", hmc)])
def test_chains(method, function):
    options = {"warmup_steps": 5, "progress": False, "init": "uniform", "model_kwargs": {"scale": 2.0}, **FAST}
    found, expected = sample(TILTED, 0.5, method=method, **options), function(TILTED, 0.5, **options)
    assert found.method == method and found.num_chains == 2 and found.num_draws == 6
    assert torch.equal(found.values["z"], expected.values["z"])


@pytest.mark.parametrize("proposal", [None, guide], ids=["prior", "guide"])
def test_importance(proposal):
    options = {"guide": proposal, "strict": False, "model_kwargs": {"scale": 2.0}}
    found = sample(TILTED, 0.5, method="snis", num_samples=50, num_chains=3, seed=0, **options)
    expected = importance(TILTED, proposal, 0.5, num_samples=150, seed=0, scale=2.0)
    assert found.method == "snis" and found.num_chains == 1 and found.num_draws == 150
    assert torch.equal(found.values["z"], expected.values["z"])
    assert torch.equal(found.log_weights, expected.log_weights)


def test_the_guide_reaches_the_chains():
    def far():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide does not propose"):
        sample(model, method="nuts", guide=far, progress=False, **FAST)


@pytest.mark.parametrize("method", ["NUTS", "mcmc", ""])
def test_unknown_method(method):
    with pytest.raises(ValueError, match=r"method must be one of \('snis', 'nuts', 'hmc'\), got " + repr(method)):
        sample(model, method=method, warmup=3, **FAST)


@pytest.mark.parametrize("method", ["snis", "nuts", "hmc"])
def test_unknown_option(method):
    with pytest.raises(TypeError, match="warmup_step"):
        sample(model, method=method, warmup_step=3, **FAST)


def test_options_of_chains_are_none_of_importance_sampling():
    with pytest.raises(TypeError, match=r"takes the options strict and model_kwargs, got \['init', 'progress'\]"):
        sample(model, method="snis", progress=False, init="uniform", **FAST)


def test_the_method_has_to_be_named():
    with pytest.raises(TypeError, match="method"):
        sample(model, **FAST)
