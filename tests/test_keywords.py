"""Which keywords of a call are the model's: in all the ways a model is written, and at every function that runs one."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_ebm
from pyro_ebm import HMC, MCMC, SMC, LinearEnergy, LogDensity, noncentered, tilt
from pyro_ebm.keywords import model_arguments

Y = torch.tensor([0.3, -0.2, 1.1])


def model(x, y=None, *, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z * x, scale), obs=y)


def with_seed(x, y=None, seed=0):
    model(x, y, scale=1.0 + seed)


def anything(*args, **kwargs):
    model(*args, **kwargs)


class Module(nn.Module):
    def forward(self, x, y=None, *, scale=1.0):
        model(x, y, scale=scale)

    def other(self, x, y=None, *, scale=1.0):
        model(x, y, scale=scale)


class Callable:
    def __call__(self, x, y=None, *, scale=1.0):
        model(x, y, scale=scale)


@functools.wraps(model)
def decorated(*args, **kwargs):
    model(*args, **kwargs)


ALIKE = {
    "function": model,
    "lambda": lambda x, y=None, scale=1.0: model(x, y, scale=scale),
    "module": Module(),
    "method": Module().other,
    "callable": Callable(),
    "decorated": decorated,
    "tilted": tilt(model, {"z": LinearEnergy(1.0)}),
    "tilted module": tilt(Module(), {"z": LinearEnergy(1.0)}).unnormalized(),
    "handler": poutine.scale(model, 2.0),
    "handlers": poutine.mask(poutine.scale(Module(), 2.0), mask=True),
    "traced": poutine.trace(model),
    "noncentered": noncentered(model),
    "conditioned tilt": poutine.condition(tilt(model, {"z": LinearEnergy(1.0)}), data={}),
    "partial of a module": functools.partial(Module(), torch.ones(3)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_arguments_are_found_through_what_is_around_a_model(kind):
    taken = 0 if kind.startswith("partial") else 1
    found = model_arguments(ALIKE[kind], taken)
    assert found.names == {"y", "scale"} == found.unset and not found.takes_any


def test_arguments_set_by_partial_can_be_given_but_are_not_missing():
    found = model_arguments(functools.partial(poutine.scale(functools.partial(Module(), y=Y), 1.0), scale=2.0), 1)
    assert found.names == {"y", "scale"} and not found.unset


@pytest.mark.parametrize("given", [anything, Module().__call__, functools.partial(anything, 1), max])
def test_a_model_that_takes_everything_or_shows_nothing(given):
    assert model_arguments(given).takes_any


def test_a_distribution_has_no_arguments():
    found = model_arguments(dist.Normal(0.0, 1.0))
    assert not found.names and not found.takes_any


# Every function that runs a model, as (model, *args, **keywords) to something to compare


def _ranks(model, *args, **kwargs):
    result = pyro_ebm.calibrate(model, *args, sampler=_quick, num_simulations=2, seed=0, progress=False, **kwargs)
    return torch.cat(list(result.ranks.values()))


def _quick(model, *args, seed, **kwargs):
    return pyro_ebm.importance(model, None, *args, num_samples=400, seed=seed, **kwargs)


def _values(draws):
    return torch.cat([draws.values["z"].flatten(), draws.stats["lp"].flatten()])


WARM = {"warmup_steps": 2}
SHORT = {"num_samples": 5, "num_chains": 2, "progress": False}
CALLS = {
    **{
        f"sample {method}": lambda *args, method=method, **k: _values(
            pyro_ebm.sample(*args, method=method, seed=0, **(WARM if method in ("nuts", "chees") else {}), **SHORT, **k)
        )
        for method in ("snis", "nuts", "chees", "smc")
    },
    "sample auto": lambda *a, **k: _values(pyro_ebm.sample(*a, ess=50, seed=0, progress=False, **k)),
    "importance": lambda m, *a, **k: _values(pyro_ebm.importance(m, None, *a, num_samples=100, seed=0, **k)),
    "pyro_nuts": lambda *a, **k: _values(pyro_ebm.pyro_nuts(*a, warmup_steps=2, seed=0, **SHORT, **k)),
    "pyro_hmc": lambda *a, **k: _values(pyro_ebm.pyro_hmc(*a, warmup_steps=2, seed=0, **SHORT, **k)),
    "quadrature": lambda *a, **k: _values(pyro_ebm.quadrature(*a, num_points=51, **k)),
    "annealed_importance": lambda *a, **k: pyro_ebm.annealed_importance(
        *a, chains_per_group=4, num_groups=2, num_temperatures=2, seed=0, progress=False, **k
    ).value[None],
    "calibrate": _ranks,
    "predictive": lambda *a, **k: pyro_ebm.predictive(*a, num_samples=5, seed=0, **k)["y"].flatten(),
    "LogDensity": lambda *a, **k: LogDensity.from_model(*a, **k)(torch.ones(1, 1)),
    "log_normalizer": lambda m, *a, **k: tilt(m, {"y": _Tenth()})
    .log_normalizer(*a, num_samples=64, seed=0, **k).value[None],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore::pyro_ebm.InferenceWarning",  # runs of a few draws
)


class _Tenth(pyro_ebm.Energy):
    def forward(self, value):
        return 0.1 * value


# Seconds each, and by the same path as others
SLOW = {"sample smc", "sample nuts", "annealed_importance"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CALLS]


@pytest.fixture(params=NAMES)
def call(request):
    return CALLS[request.param]


def test_keywords_reach_the_model(call):
    """As positional arguments, as keywords and in model_kwargs the same; another value, another answer."""
    x = torch.ones(3)
    expected = call(model, x, Y, model_kwargs={"scale": 0.5})
    assert torch.equal(call(model, x, y=Y, scale=0.5), expected)
    assert torch.equal(call(model, x, scale=0.5, model_kwargs={"y": Y}), expected)
    assert not torch.equal(call(model, x, y=Y, scale=2.0), expected) or call is CALLS["calibrate"]


def test_arrays_and_tables_do_as_tensors(call):
    table = pd.DataFrame({"x": np.ones(3), "y": Y.double().numpy()})
    expected = call(model, torch.ones(3), y=Y)
    assert torch.equal(call(model, np.ones(3), y=Y.double().numpy()), expected)
    assert torch.equal(call(model, table["x"], y=table["y"]), expected)


def reads_tables(table, scale=1.0):
    """A model that makes its tensors itself, as many do."""
    x, y = (torch.from_numpy(table[name].to_numpy(copy=True)).float() for name in ("x", "y"))
    model(x, y, scale=scale)


def test_a_model_that_takes_tables_gets_tables(call):
    table = pd.DataFrame({"x": np.ones(3), "y": Y.double().numpy(), "word": ["a", "b", "c"]})
    expected = call(model, torch.ones(3), Y)
    for given in (table, table[["x", "y"]]):
        assert torch.equal(call(reads_tables, given), expected)


def reads_arrays(x, y, scale=1.0):
    """Numpy's standard deviation divides by n, and time stamps need double precision."""
    moved = torch.as_tensor(x - x[0] + 1.0).float()
    model(moved, torch.as_tensor(y / y.std()).float(), scale=scale)


def test_a_model_that_computes_with_arrays_gets_arrays(call):
    x, y = 1.7e9 + np.arange(3.0), Y.double().numpy()
    expected = call(model, torch.arange(1.0, 4.0), torch.as_tensor(y / y.std()).float())
    assert torch.equal(call(reads_arrays, x, y), expected)


def test_an_error_on_tensors_is_told_where_arrays_do_not_serve_either(call):
    with pytest.raises(Exception, match="(?i)size|shape|broadcast"):
        call(model, np.ones((3, 2)), y=Y)


def test_a_misspelt_keyword_names_what_there_is(call):
    expected = r"has no option \['scael'\]; it takes \[.*\], and the model has .*'scale'.*; is 'scale' meant\?"
    with pytest.raises(TypeError, match=expected):
        call(model, torch.ones(3), y=Y, scael=2.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] not in ("quadrature", "LogDensity")])
def test_a_name_that_both_have_is_settled_by_model_kwargs(name):
    call, x = CALLS[name], torch.ones(3)
    if name != "calibrate":  # its sampler gives the seed
        with pytest.raises(TypeError, match=r"has an option 'seed' and the model an argument .*model_kwargs=\{'seed'"):
            call(with_seed, x, Y)
    by_default = call(with_seed, x, Y, model_kwargs={})
    assert torch.equal(by_default, call(model, x, Y))
    assert torch.equal(call(with_seed, x, Y, model_kwargs={"seed": 1}), call(model, x, Y, scale=2.0))
    assert torch.equal(call(functools.partial(with_seed, seed=1), x, Y), call(model, x, Y, scale=2.0))


def test_a_keyword_given_twice(call):
    with pytest.raises(TypeError, match=r"\['scale'\] given twice: by keyword and in model_kwargs"):
        call(model, torch.ones(3), Y, scale=1.0, model_kwargs={"scale": 1.0})


def test_a_misspelt_option_does_not_vanish_in_a_model_that_takes_everything():
    for function, misspelt in ((pyro_ebm.sample, "num_sample"), (pyro_ebm.predictive, "num_sampels")):
        with pytest.raises(TypeError, match=rf"has no option \['{misspelt}'\].* is 'num_samples' meant"):
            function(anything, torch.ones(3), y=Y, **{misspelt: 10})


@pytest.mark.parametrize("run", [lambda m: MCMC(HMC(m), 4, 2, num_chains=2, seed=0, progress=False),
                                 lambda m: SMC(m, particles_per_island=8, num_islands=2, seed=0,
                                               progress=False)])  # fmt: skip
def test_runners_take_arrays_and_keep_every_keyword_for_the_model(run):
    expected = run(with_seed).run(torch.ones(3), y=Y, seed=1)
    found = run(with_seed).run(np.ones(3), y=Y.double().numpy(), seed=1)
    assert torch.equal(found.values["z"], expected.values["z"])


def test_the_model_by_keyword():
    expected = pyro_ebm.importance(model, None, torch.ones(3), num_samples=50, seed=0, y=Y)
    found = pyro_ebm.importance(model=model, num_samples=50, seed=0, x=torch.ones(3), y=Y)
    assert torch.equal(found.values["z"], expected.values["z"])
    with pytest.raises(TypeError, match="model"):
        pyro_ebm.importance(num_samples=50)
