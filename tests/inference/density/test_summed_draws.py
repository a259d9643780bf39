"""Discrete sites that a sampler has summed out are drawn from their posterior, not from the prior."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Draws, LinearEnergy, importance, predictive, sample, tilt, to_arviz
from tests.zoo.cases import CASES

Y = torch.tensor([-1.2, 0.1, 1.4, 2.5])
NUM = 4000


def global_switch(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z + 2 * k, 1.0), obs=y)


def mixture(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)


def one_hot(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal((k * loc).sum(-1), 1.0), obs=y)


def given(**values):
    """Draws of the continuous sites, all alike: what is left to draw has one known distribution."""
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    return Draws({name: value.expand(1, NUM, *value.shape) for name, value in tensors.items()}, "chees")


def of_mixture(loc):
    logs = dist.Normal(torch.tensor(loc), 1.0).log_prob(Y[:, None]) + torch.tensor([0.3, 0.7]).log()
    return logs.softmax(-1)[:, 1]


def close(found, expected):
    error = (expected * (1 - expected) / NUM).sqrt()
    assert ((found - expected).abs() < 4 * error + 1e-6).all()


def test_outside_and_inside_plates():
    odds = math.log(0.3 / 0.7) + float((dist.Normal(2.5, 1.0).log_prob(Y) - dist.Normal(0.5, 1.0).log_prob(Y)).sum())
    found = predictive(global_switch, Y, draws=given(z=0.5), seed=0)
    close(found["k"].mean(0), torch.tensor(odds).sigmoid())
    assert abs(float(found["y"].mean()) - 0.5 - 2 * float(torch.tensor(odds).sigmoid())) < 0.1
    for model, k in ((mixture, lambda draw: draw.float()), (one_hot, lambda draw: draw[..., 1])):
        found = predictive(model, Y, draws=given(loc=[-1.0, 1.5]), seed=0)
        close(k(found["k"]).mean(0), of_mixture([-1.0, 1.5]))
        assert found["y"].shape == (NUM, 4)


def test_a_chain_of_states_follows_its_joint_distribution():
    case = {case.name: case for case in CASES}["hidden_markov"]

    def model(y):
        pyro.sample("nothing", dist.Normal(0.0, 1.0))
        case.model(y)

    found = predictive(model, *case.args, draws=given(nothing=0.0), seed=1)
    states = torch.stack([found[f"x_{t}"] for t in range(3)], 1)
    for t in range(3):
        close(states[:, t].float().mean(), case.answers[f"x_{t}"][0])
    exact = importance(case.model, *[None, *case.args], num_samples=20_000, seed=0)  # which draws the states
    together = exact.weights @ (exact.flat("x_0") * exact.flat("x_1")).to(exact.weights)
    assert abs(float((states[:, 0] * states[:, 1]).float().mean()) - float(together)) < 0.03


def test_a_tilt_leaves_them_to_the_data():
    tilted = tilt(mixture, {"loc": LinearEnergy([1.0, -1.0])})
    close(predictive(tilted, Y, draws=given(loc=[-1.0, 1.5]), seed=0)["k"].float().mean(0), of_mixture([-1.0, 1.5]))


def test_after_a_sampler_and_in_arviz():
    draws = sample(global_switch, Y, method="chees", num_samples=400, num_chains=8, seed=0, progress=False)
    exact = importance(global_switch, None, Y, num_samples=20_000, seed=0)
    found = predictive(global_switch, Y, draws=draws, seed=0)
    assert abs(float(found["k"].mean()) - float(exact.mean("k"))) < 0.06
    shown = to_arviz(draws, posterior_predictive=found)
    assert abs(float(shown.posterior_predictive["k"].mean()) - float(exact.mean("k"))) < 0.06


def test_new_data_have_new_assignments_and_keep_common_sites():
    own = Draws(given(loc=[-1.0, 1.5]).values, "chees", observed={"y": Y})
    close(predictive(mixture, torch.zeros(6), draws=own, seed=0)["k"].float().mean(0), torch.full((6,), 0.7))
    own = Draws(given(z=0.5).values, "chees", observed={"y": Y})
    with pytest.raises(ValueError, match=r"discrete site\(s\) \['k'\] were summed out .* from other data"):
        predictive(global_switch, torch.zeros(6), draws=own, seed=0)


def test_what_cannot_be_drawn_is_named():
    def branches(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        loc = z if float(z) > 0 else -z
        pyro.sample("y", dist.Normal(loc + k, 1.0), obs=y[0])

    def two(y):
        pyro.sample("other", dist.Normal(0.0, 1.0))
        global_switch(y)

    with pytest.raises(ValueError, match=r"discrete site\(s\) \['k'\] .* cannot be drawn given these"):
        predictive(branches, Y, draws=given(z=0.5), seed=0)
    with pytest.raises(ValueError, match=r"site\(s\) \['k'\] are not among the draws and depend on \['other'\]"):
        predictive(two, Y, draws=given(z=0.5), seed=0)
