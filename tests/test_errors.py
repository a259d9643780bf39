"""Warnings point at the user's line, whichever way led to them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    SMC,
    ULA,
    VAE,
    Annealing,
    ChEES,
    Draws,
    InferenceWarning,
    LinearEnergy,
    TiltedDistribution,
    TrainingWarning,
    errors,
    fit,
    importance,
    predictive,
    pyro_nuts,
    sample,
    tilt,
    to_arviz,
)
from pyro_ebm.errors import warn_user


def model():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


FAR = tilt(model, {"z": LinearEnergy([9.0, 0.0])})
FAR_DISTRIBUTION = TiltedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([9.0, 0.0]))
VAE_OF_ONE = VAE((2,), latent_dim=1, hidden=(2,))
TRAINING = {"epochs": 2, "validation": None, "seed": 0, "progress": False}


def model_with_data():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))


def lost(vae_model, guide, x):
    return math.nan * sum(parameter.sum() for parameter in VAE_OF_ONE.parameters())


SHORT = {"num_samples": 12, "warmup_steps": 0, "num_chains": 2, "seed": 0, "init": "uniform"}
CALLS = {
    "importance": lambda: importance(FAR, num_samples=100, seed=0),
    "snis": lambda: sample(FAR, method="snis", num_samples=100, seed=0),
    "snis ess": lambda: sample(FAR, method="snis", ess=100, seed=0),
    "nuts": lambda: pyro_nuts(FAR, progress=False, **SHORT),
    "sample nuts": lambda: sample(FAR, method="nuts", progress=False, **SHORT),
    "MCMC": lambda: MCMC(ChEES(FAR), progress=False, **SHORT).run(),
    "chees": lambda: sample(FAR, method="chees", progress=False, **SHORT),
    "chees ess": lambda: sample(FAR, method="chees", progress=False, ess=1e6, **SHORT),
    "auto": lambda: sample(FAR, progress=False, ess=1e6, seed=0, num_samples=12, num_chains=8),
    "smc": lambda: SMC(FAR, annealing=Annealing(ULA), particles_per_island=16, num_islands=2, progress=False).run(),
    "log_normalizer": lambda: FAR.log_normalizer(num_samples=100, seed=0),
    "method": lambda: FAR_DISTRIBUTION.log_normalizer(num_samples=100, seed=0),
    "predictive": lambda: predictive(FAR, num_samples=10, seed=0),
    "fit": lambda: fit(VAE_OF_ONE.model, VAE_OF_ONE.guide, torch.ones(4, 2), objective=lost, **TRAINING),
    "to_arviz": lambda: to_arviz(Draws({"chain": torch.zeros(2, 9)}, "nuts")),
    "to_arviz, other model": lambda: to_arviz(Draws({"z": torch.zeros(2, 9, 3)}, "nuts").with_model(model_with_data)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_line_of_the_caller(name):
    with pytest.warns(UserWarning) as record:
        CALLS[name]()
    line = inspect.getsourcelines(CALLS[name])[1]
    assert {(each.filename, each.lineno) for each in record} == {(__file__, line)}


CELL = "from pyro_ebm import importance\n\nimportance(far, num_samples=100, seed=0)\n"


def as_notebook_cell(call):
    """A cell is compiled under a name of its own and runs in ``__main__``."""
    exec(compile(CELL, "<cell 3>", "exec"), {"__name__": "__main__", "far": FAR})


def in_a_context(call):
    @contextlib.contextmanager
    def context():
        yield

    with context():
        call()  # here


def in_a_thread(call):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: call()).result()  # here


@torch.no_grad()
def under_a_decorator(call):
    call()  # here


def through_a_decorator(call):
    torch.no_grad()(call)()  # here


def as_a_part(call):
    functools.partial(call)()  # here


@pytest.mark.parametrize(
    "way", [as_notebook_cell, in_a_context, in_a_thread, under_a_decorator, through_a_decorator, as_a_part]
)
def test_the_line_of_the_caller_however_it_is_called(way):
    with pytest.warns(InferenceWarning) as record:
        way(functools.partial(importance, FAR, num_samples=100, seed=0))
    if way is as_notebook_cell:
        expected = ("<cell 3>", 3)
    else:
        lines, first = inspect.getsourcelines(way)
        expected = (__file__, first + next(i for i, line in enumerate(lines) if "# here" in line))
    assert {(each.filename, each.lineno) for each in record} == {expected}


def as_module(name):
    """A function that warns, as if it were written in that module."""
    scope = {"__name__": name, "warn_user": warn_user, "torch": torch, "contextlib": contextlib}
    source = """
def plain(message, *category):
    warn_user(message, *category)

@torch.no_grad()
def decorated(message):
    plain(message)

@contextlib.contextmanager
def context(message):
    plain(message)
    yield

def outer(function):
    function()
"""
    exec(compile(source, "package.py", "exec"), scope)
    return scope


def where(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught[0].filename


@pytest.mark.parametrize("name", ["pyro_ebm", "pyro_ebm.inference.made_up"])
def test_layers_of_the_package_and_what_lies_between(name):
    inside = as_module(name)
    assert where(lambda: inside["plain"]("x")) == __file__
    assert where(lambda: inside["decorated"]("x")) == __file__  # through torch's decorator
    assert where(lambda: inside["context"]("x").__enter__()) == __file__
    assert where(lambda: inside["outer"](lambda: inside["plain"]("x"))) == __file__


@pytest.mark.parametrize("name", ["pyro_ebm_extension", "__main__", "mine"])
def test_other_packages_are_users(name):
    assert where(lambda: as_module(name)["plain"]("x")) == "package.py"


def test_category_and_text():
    with pytest.warns(InferenceWarning, match="^as it is$"):
        warn_user("as it is")
    with pytest.warns(TrainingWarning, match="^stopped$"):
        warn_user("stopped", TrainingWarning)


def test_filters_by_category():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        warn_user("not seen")
    assert issubclass(errors.InferenceWarning, UserWarning) and issubclass(errors.InferenceError, RuntimeError)
