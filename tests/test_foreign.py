"""Whoever comes from another library, or forgets what a call needs, is told what to write here."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer

import pyro_ebm
from pyro_ebm import HMC, MALA, MCMC, SMC, ULA, ChEES, importance, predictive, pyro_nuts, quadrature, sample
from pyro_ebm.randomness import forked_rng, random_seed

Y = torch.tensor([1.0, 2.0, 0.5])


def model(y=Y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: HMC(model, target_accept=0.9), "PyMC's target_accept is target_accept_prob= here"),
        (lambda: ChEES(model, dense_mass=True), "NumPyro's dense_mass is full_mass= here"),
        (lambda: MALA(model, num_warmup=5), r"NumPyro's num_warmup is warmup_steps= of MCMC\(kernel"),
        (lambda: ULA(model, nonsense=5), "unexpected keyword argument 'nonsense'$"),
        (lambda: MCMC(HMC(model), 5, tune=5), "PyMC's tune is warmup_steps= here"),
        (lambda: MCMC(HMC(model), 5, target_accept=0.9), "PyMC's target_accept is target_accept_prob= of the kernel"),
        (lambda: MCMC(HMC(model), 5, chain_method="x"), "leave NumPyro's chain_method out: chains always move as one"),
        (lambda: sample(model, method="chees", warmup=3), "; warmup is warmup_steps= here$"),
        (lambda: sample(model, method="snis", tune=3), "PyMC's tune is warmup_steps= in other methods"),
        (
            lambda: sample(model, draws=5, tune=3, chains=2, random_seed=0, method="nuts"),
            "chains is num_chains= here; PyMC's draws is num_samples= here; PyMC's random_seed is seed= here",
        ),
        (lambda: pyro_nuts(model, target_accept=0.9), "PyMC's target_accept is target_accept_prob= here"),
    ],
)
def test_options_of_other_libraries_are_named(call, said):
    with pytest.raises(TypeError, match=said):
        call()


def test_kernels_keep_their_signature_and_can_be_copied():
    assert list(inspect.signature(HMC).parameters)[:3] == ["model", "potential_fn", "step_size"]
    kernel = dataclasses.replace(copy.copy(ChEES(model, step_size=0.3)), target_accept_prob=0.7)
    assert (kernel.step_size, kernel.target_accept_prob, kernel.model) == (0.3, 0.7, model)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NUTS", "MCMC runs pyro.infer.NUTS.model. as it is; ChEES"),
        *[(old, f"called {new}") for old, new in (("nuts", "pyro_nuts"), ("hmc", "pyro_hmc"))],
        *[(old, f"called {new}$") for old, new in (("centred", "centered"), ("noncentred", "noncentered"))],
    ],
)
def test_names_that_people_look_for(name, said):
    with pytest.raises(ImportError, match=said):
        exec(f"from pyro_ebm import {name}")
    assert not hasattr(pyro_ebm, "no_such_name")


@pytest.mark.parametrize("call", [sample, importance, predictive, pyro_nuts, quadrature])
def test_a_forgotten_model(call):
    with pytest.raises(TypeError, match=rf"must be callable \(a Pyro model\), got Tensor; call {call.__name__}\(model"):
        call(Y)


@pytest.mark.parametrize(
    "call",
    [
        lambda data: sample(model, data),
        lambda data: MCMC(HMC(model), 5, progress=False).run(data),
        lambda data: MCMC(infer.NUTS(model), 5, progress=False).run(data),
        lambda data: pyro_nuts(model, data, progress=False),
        lambda data: importance(model, None, data),
    ],
)
def test_data_in_a_list(call):
    with pytest.raises(TypeError, match="the value of site 'y' is a list: give data as tensors") as told:
        call([1.0, 2.0, 0.5])
    assert "while running the model once with arguments (list)" in told.value.__notes__


def test_a_model_that_fails_names_its_arguments_and_keeps_its_error():
    with pytest.raises(TypeError, match="has no len") as told:
        sample(lambda x, y: model(y), Y, y=3.0)
    assert "while running the model once with arguments (Tensor of shape (3,), y=float)" in told.value.__notes__


@pytest.mark.parametrize(
    "call",
    [
        lambda seed: MCMC(HMC(model), 5, seed=seed),
        lambda seed: SMC(model, seed=seed),
        lambda seed: sample(model, method="snis", seed=seed),
        lambda seed: pyro_nuts(model, seed=seed, progress=False),
        lambda seed: predictive(model, seed=seed),
        lambda seed: random_seed(seed, None),
        lambda seed: forked_rng(seed).__enter__(),
    ],
)
@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_seeds_are_whole_numbers(call, seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number or None, got {seed!r}"):
        call(seed)
