"""Warnings point at the user's line, whichever way led to them."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    ChEES,
    InferenceWarning,
    LinearEnergy,
    TrainingWarning,
    errors,
    importance,
    pyro_nuts,
    sample,
    tilt,
)
from pyro_ebm.errors import warn_user


def model():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


FAR = tilt(model, {"z": LinearEnergy([9.0, 0.0])})
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
}


@pytest.mark.parametrize("name", CALLS)
def test_the_line_of_the_caller(name):
    with pytest.warns(InferenceWarning) as record:
        CALLS[name]()
    line = inspect.getsourcelines(CALLS[name])[1]
    assert {(each.filename, each.lineno) for each in record} == {(__file__, line)}


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
