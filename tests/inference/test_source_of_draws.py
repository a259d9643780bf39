"""Draws know the model and the arguments they come from, whichever method made them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    ChEES,
    LinearEnergy,
    LogDensity,
    centered,
    importance,
    noncentered,
    quadrature,
    sample,
    tilt,
)

pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # draws are few

Y = torch.tensor([0.5, 1.5, -0.5])


def model(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


FEW = {"num_samples": 12, "seed": 0}
CHAINS = {**FEW, "num_chains": 2, "warmup_steps": 5, "progress": False}
CALLS = {
    "importance": lambda given: importance(given, None, Y, scale=2.0, **FEW),
    "snis": lambda given: sample(given, Y, method="snis", model_kwargs={"scale": 2.0}, **FEW),
    "smc": lambda given: sample(given, Y, method="smc", model_kwargs={"scale": 2.0}, progress=False, **FEW),
    "auto": lambda given: sample(given, Y, ess=50, model_kwargs={"scale": 2.0}, progress=False, seed=0),
    "quadrature": lambda given: quadrature(given, Y, scale=2.0),
    "MCMC": lambda given: MCMC(ChEES(given), init="prior", **CHAINS).run(Y, scale=2.0),
    **{
        method: lambda given, method=method: sample(given, Y, method=method, model_kwargs={"scale": 2.0}, **CHAINS)
        for method in ("nuts", "hmc", "chees", "mala", "ula")
    },
}


@pytest.mark.parametrize(("name", "tilted"), [*((name, False) for name in CALLS), ("snis", True), ("chees", True)])
def test_source(name, tilted):
    given = tilt(model, {"mu": LinearEnergy(0.1)}) if tilted else model
    draws = CALLS[name](given)
    assert draws.source.args == (Y,) and draws.source.args[0] is Y and draws.source.kwargs == {"scale": 2.0}
    found = draws.source.model
    assert found is given or (tilted and found.base_model is model and list(found.energies) == ["mu"])
    assert torch.equal(draws.observed["y"], Y)


def test_centered_draws_come_from_the_model_itself():
    draws = importance(noncentered(model), None, Y, **FEW)
    assert draws.source.model is not model
    found = centered(noncentered(model), draws, Y)
    assert list(found.values) == ["mu"] and found.source.model is model
    tilted = noncentered(tilt(model, {"mu": LinearEnergy(0.1)}))
    found = centered(tilted, importance(tilted, None, Y, **FEW), Y)
    assert found.source.model.base_model is model and found.source.args == (Y,)


def test_a_density_without_a_model_has_none():
    density = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 1)
    draws = sample(density, method="chees", init="uniform", **CHAINS)
    assert draws.source is None
