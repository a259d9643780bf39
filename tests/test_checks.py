"""Whole numbers: what counts as one, what the error says, and that the doors of the library ask for them alike."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    HMC,
    MCMC,
    SMC,
    ChEES,
    ContrastiveDivergence,
    FirstOrder,
    LogDensity,
    MLPEncoder,
    MomentEnergy,
    Normalizer,
    ReplayBuffer,
    ShortRun,
    annealed_importance,
    calibrate,
    class_balance,
    fit,
    fit_moments,
    importance,
    log_likelihood,
    marginal_density,
    predictive,
    pyro_nuts,
    quadrature,
    sample,
)
from pyro_ebm.checks import is_whole_number, whole_number

BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)
DENSITY = LogDensity(lambda u: -u.square().sum(-1), 2)


def model(x=None):
    pyro.sample("z", BASE)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)])
def test_whole_numbers_of_every_library_become_pythons(value):
    found = whole_number("n", value)
    assert found == 3 and type(found) is int and is_whole_number(value, at_least=3)


@pytest.mark.parametrize(
    "value, meant",
    [
        (3.0, 3),
        (1e4, 10000),
        (2.6, 3),
        (np.float64(3.0), 3),
        (torch.tensor(3.0), 3),
        (True, 1),
        (np.bool_(True), 1),
        (torch.tensor(True), 1),
        ("3", 3),
        ("many", 1),
        (None, 1),
        ([3], 1),
        (float("nan"), 1),
        (float("inf"), 1),
        (-2.0, 1),
    ],
)
def test_what_is_none_is_refused_with_what_to_give(value, meant):
    with pytest.raises(ValueError) as caught:
        whole_number("n", value)
    assert str(caught.value) == f"n must be a whole number of at least 1, got {value!r}; give n={meant}"
    assert not is_whole_number(value)


def test_the_limit_is_the_callers():
    assert whole_number("n", 0, at_least=0) == 0
    with pytest.raises(ValueError, match="n must be a whole number of at least 2, got 1$"):
        whole_number("n", 1, at_least=2)


DOORS = {
    "sample num_chains": ("num_chains", lambda n: sample(model, method="chees", num_chains=n)),
    "sample ess": ("num_samples", lambda n: sample(model, method="chees", ess=10, num_samples=n)),
    "MCMC": ("num_samples", lambda n: MCMC(ChEES(DENSITY), num_samples=n)),
    "pyro_nuts": ("num_samples", lambda n: pyro_nuts(model, num_samples=n)),
    "HMC": ("num_steps", lambda n: HMC(DENSITY, num_steps=n)),
    "SMC": ("particles_per_island", lambda n: SMC(DENSITY, particles_per_island=n)),
    "annealed_importance": ("num_temperatures", lambda n: annealed_importance(DENSITY, num_temperatures=n)),
    "importance": ("num_samples", lambda n: importance(model, num_samples=n)),
    "log_likelihood": ("num_samples", lambda n: log_likelihood(model, model, torch.zeros(3, 2), num_samples=n)),
    "predictive": ("num_samples", lambda n: predictive(model, num_samples=n)),
    "quadrature": ("num_points", lambda n: quadrature(DENSITY, num_points=n)),
    "LogDensity": ("dim", lambda n: LogDensity(lambda u: u.sum(-1), n)),
    "marginal_density": ("num_particles", lambda n: marginal_density(None, num_particles=n)),
    "Normalizer": ("num_samples", lambda n: Normalizer(num_samples=n)),
    "fit": ("epochs", lambda n: fit(model, model, torch.zeros(3), epochs=n)),
    "fit_moments": ("num_samples", lambda n: fit_moments(BASE, MomentEnergy(lambda v: v), [0.0, 0.0], num_samples=n)),
    "calibrate": ("num_draws", lambda n: calibrate(model, sampler=sample, num_draws=n)),
    "class_balance": ("num_bootstrap", lambda n: class_balance(torch.tensor([0, 1]), (0, 1), num_bootstrap=n)),
    "MLPEncoder": ("latent_dim", lambda n: MLPEncoder((4,), n)),
    "ReplayBuffer": ("capacity", lambda n: ReplayBuffer(capacity=n)),
    "ContrastiveDivergence": ("num_steps", lambda n: ContrastiveDivergence(num_steps=n)),
    "ShortRun": ("prior_steps", lambda n: ShortRun(prior_steps=n)),
    "FirstOrder": ("num_samples", lambda n: FirstOrder(num_samples=n)),
}


@pytest.mark.parametrize("value", [0, 1000.0, True, "7"], ids=repr)
@pytest.mark.parametrize("name, call", DOORS.values(), ids=DOORS)
def test_every_door_asks_for_whole_numbers_alike(name, call, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number of at least \d+, got {value!r}"):
        call(value)
