"""Data of another precision than the model's parameters, or with NaN, are named by whoever is called."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS
from torch import nn

from pyro_ebm import (
    MCMC,
    SMC,
    ChEES,
    InputError,
    LinearEnergy,
    fit,
    fit_tilt,
    importance,
    log_likelihood,
    posterior_draws,
    predictive,
    pyro_nuts,
    sample,
    tilt,
)

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
FEW = {"seed": 0, "progress": False}


class Doubles(nn.Module):
    """Reads its data by a layer in double precision."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3, 1, dtype=torch.float64)

    def model(self, x):
        loc = self.read(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.read(x), 1.0).to_event(1))


def tilted(own):
    return tilt(own.model, {"z": LinearEnergy([0.5])})


CALLS = {
    "fit": lambda own, x: fit(own.model, own.guide, x, epochs=1, **FEW),
    "fit_tilt": lambda own, x: fit_tilt(tilted(own), own.guide, x, max_steps=1, **FEW),
    "log_likelihood": lambda own, x: log_likelihood(own.model, own.guide, x, num_samples=4),
    "posterior_draws": lambda own, x: posterior_draws(own.model, own.guide, x, num_samples=4, seed=0),
    "predictive": lambda own, x: predictive(own.model, x, num_samples=4, seed=0),
    "importance": lambda own, x: importance(own.model, own.guide, x, num_samples=4, seed=0),
    "log_normalizer": lambda own, x: tilted(own).log_normalizer(x),
    "sample": lambda own, x: sample(own.model, x, **FEW),
    "pyro_nuts": lambda own, x: pyro_nuts(own.model, x, num_samples=2, warmup_steps=2, **FEW),
    "MCMC.run": lambda own, x: MCMC(ChEES(own.model), 2, 2, progress=False).run(x),
    "MCMC.run of Pyro's": lambda own, x: MCMC(NUTS(own.model), 2, 2, progress=False).run(x),
    "SMC.run": lambda own, x: SMC(own.model, progress=False).run(x),
}


@pytest.mark.parametrize("x", [X, X.double().numpy()], ids=["tensor", "array"])
@pytest.mark.parametrize("name", CALLS)
def test_data_of_another_precision_are_named(name, x):
    told = rf"^[\w.]*{name.split()[0]}: the parameters of Doubles are float64, and .* some are float32 .*x.to\("
    with pytest.raises(InputError, match=told):
        CALLS[name](Doubles(), x)


def test_missing_data_are_named():
    own, x = Doubles().float(), X.clone()
    x[2, 1] = torch.nan
    options = {"num_samples": 4, "seed": 0}
    for call in (
        lambda: fit_tilt(tilted(own), own.guide, x, max_steps=1, **FEW),
        lambda: log_likelihood(own.model, own.guide, x, **options),
        lambda: posterior_draws(own.model, own.guide, pd.DataFrame(x.numpy()), **options),
    ):
        with pytest.raises(InputError, match=r"NaN in argument 0 \(1 of 18 numbers\)"):
            call()


def test_whole_numbers_are_named():
    with pytest.raises(InputError, match="some are int64"):
        CALLS["fit"](Doubles(), np.ones((6, 3), dtype=int))


def test_other_errors_of_a_model_are_left_as_they_are():
    def model(x):
        raise RuntimeError("dtype of the user's own")

    with pytest.raises(RuntimeError, match="dtype of the user's own") as told:
        predictive(model, X, num_samples=4)
    assert not isinstance(told.value, InputError)
