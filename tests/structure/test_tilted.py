"""The tilt behind a callable, wherever it is wrapped."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import LinearEnergy, importance, log_likelihood, noncentered, predictive, tilt
from pyro_ebm.structure import tilt_of, tilted_call, unnormalized, untilted


def model(y=None, *, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


TILTED = tilt(model, {"z": LinearEnergy(0.5)})
DATA = {"y": torch.tensor(1.0)}
WRAPPED = {
    "itself": TILTED,
    "partial": functools.partial(TILTED, scale=2.0),
    "condition": poutine.condition(TILTED, data=DATA),
    "scale": poutine.scale(TILTED, scale=0.5),
    "both": poutine.condition(functools.partial(TILTED, scale=2.0), data=DATA),
    "trace": poutine.trace(TILTED),
    "method": TILTED.forward,
    "noncentered": noncentered(TILTED),
    "noncentered partial": noncentered(functools.partial(TILTED, scale=2.0)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_tilt_is_found_and_taken_off(name):
    wrapped = WRAPPED[name]
    nodes = poutine.trace(untilted(wrapped)).get_trace().nodes
    assert "z_tilt" not in nodes and any(site.startswith("z") for site in nodes)
    assert tilt_of(wrapped).energies["z"] is TILTED.energies["z"]
    assert tilt_of(unnormalized(wrapped)).normalize is False
    assert tilt_of(untilted(wrapped)) is None


@pytest.mark.parametrize("name", ["condition", "both"])
def test_what_lies_around_the_tilt_stays(name):
    trace = poutine.trace(untilted(WRAPPED[name])).get_trace()
    assert trace.nodes["y"]["is_observed"] and trace.nodes["z"]["fn"].scale == (2.0 if name == "both" else 1.0)


def test_arguments_that_wrappers_add():
    call = tilted_call(WRAPPED["both"], (torch.tensor(3.0),), {"scale": 4.0})
    assert call.tilted is TILTED and call.args == (torch.tensor(3.0),) and call.kwargs == {"scale": 4.0}
    assert tilted_call(WRAPPED["both"]).kwargs == {"scale": 2.0}
    assert tilted_call(functools.partial(TILTED, 1), (2,)).args == (1, 2)


@pytest.mark.parametrize("untouched", [model, functools.partial(model, scale=2.0), poutine.condition(model, data=DATA)])
def test_a_model_without_a_tilt_is_returned_as_it_is(untouched):
    assert untilted(untouched) is untouched and unnormalized(untouched) is untouched and tilt_of(untouched) is None


def test_log_z_of_a_wrapped_tilt():
    """exp(a z) under N(0, s^2): log Z = a^2 s^2 / 2, of the model with the arguments that the wrapper adds."""
    draws = importance(WRAPPED["partial"], num_samples=4000, seed=0)
    assert abs(draws.log_z.value - 0.5) < 4 * draws.log_z.se
    z = predictive(WRAPPED["partial"], num_samples=4000, seed=0)["z"]
    assert abs(float(z.mean()) - 2.0) < 0.25


def test_log_likelihood_of_a_wrapped_tilt():
    def rows(x, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + 0.4, 1.0))

    x = torch.tensor([0.0, 2.0])
    found = log_likelihood(functools.partial(tilt(rows, {"z": LinearEnergy(0.5)}), scale=2.0), guide, x, seed=0)
    exact = dist.Normal(2.0, 5**0.5).log_prob(x)  # the tilted prior is N(a s^2, s^2)
    assert ((found.value - exact).abs() < 4 * found.se).all()


def test_the_tilt_of_a_module_is_found():
    """The base model is then a submodule, which no static look at attributes finds."""

    class Module(torch.nn.Module):
        def forward(self, y=None):
            model(y)

    module = Module()
    tilted = tilt(module, {"z": LinearEnergy(0.5)})
    assert untilted(tilted) is module and tilt_of(functools.partial(tilted)) is tilted
