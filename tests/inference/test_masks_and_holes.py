"""Masks that fit no site, arguments with NaN, supports that move: refused by name wherever they are met."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS

from pyro_ebm import MCMC, InputError, QuadraticEnergy, importance, predictive, sample, tilt

Y = torch.linspace(-1, 1, 6)
SHORT = {"num_samples": 20, "num_chains": 2, "seed": 0}
METHODS = ("auto", "snis", "nuts", "chees", "smc")
ENTRY_POINTS = {
    **{f"sample {way}": functools.partial(sample, method=way, **SHORT) for way in METHODS},
    "importance": lambda model, *args: importance(model, None, *args, num_samples=20),
    "predictive": functools.partial(predictive, num_samples=20),
    "tilt": lambda model, *args: tilt(model, {"mu": QuadraticEnergy(1.0)})(*args),
}
every = pytest.mark.parametrize("entry_point", ENTRY_POINTS)


def masked(y, mask):
    with poutine.mask(mask=mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    with poutine.mask(mask=mask), pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def data_masked(y, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=mask), pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def slope(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)


@every
@pytest.mark.parametrize(
    "model, shape, site",
    [(data_masked, (4,), "y"), (data_masked, (6, 6), "y"), (data_masked, (6, 1), "y"), (masked, (6,), "mu")],
)
def test_a_mask_that_fits_no_site(entry_point, model, shape, site):
    """The larger ones count a site many times without a word: mu +- .08 of (6, 6) for +- .38."""
    with pytest.raises(InputError, match=rf"a mask of shape .* over site '{site}', whose batch shape is"):
        ENTRY_POINTS[entry_point](model, Y, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.tensor(True), torch.ones(1).bool(), torch.ones(1, 6).bool(), Y > 0, True])
def test_masks_that_fit(mask):
    draws = importance(data_masked, None, Y, mask, num_samples=4000, seed=0)
    count = int(torch.as_tensor(mask).expand(1, 6).sum())
    assert abs(float(draws.weights @ draws.flat("mu").square()) - float(draws.mean("mu")) ** 2 - 1 / (1 + count)) < 0.05


@pytest.mark.parametrize("entry_point", [name for name in ENTRY_POINTS if name != "tilt"])  # runs the model alone
def test_nan_among_the_arguments(entry_point):
    x = torch.where(Y.abs() < 0.3, math.nan, Y)
    with pytest.raises(InputError, match=r"NaN in argument 0 \(2 of 6 numbers\)"):
        ENTRY_POINTS[entry_point](slope, x, Y)


def under_a_latent(y):
    top = pyro.sample("top", dist.Uniform(0.0, 10.0))
    below = pyro.sample("below", dist.Uniform(0.0, top))
    pyro.sample("y", dist.Normal(below, 1.0), obs=y)


@pytest.mark.parametrize("method", ["nuts", "hmc", "stock", "chees", "smc"])
def test_a_support_that_moves(method):
    """Pyro's kernels stay where it was in their first run: a mean of 1.7 for 6.6."""
    y, short = torch.tensor(7.0), {"num_samples": 20, "seed": 0, "progress": False}
    with pytest.raises(ValueError, match="the support of site 'below' .* depends on other latent sites"):
        if method == "stock":
            MCMC(NUTS(under_a_latent), warmup_steps=20, **short).run(y)
        else:
            sample(under_a_latent, y, method=method, **short)
