"""Whole models: the batched kernels and stock NUTS agree within the Monte Carlo error of both."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform

from pyro_ebm import compare, pyro_nuts
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import HMC, ChEES

pytestmark = pytest.mark.slow

# Treatment effects and their standard errors (Rubin 1981)
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(100, 4, generator=GENERATOR) * torch.tensor([1.0, 0.3, 3.0, 1.0])
LABELS = (torch.rand(100, generator=GENERATOR) < (X @ torch.tensor([1.0, -1.0, 0.3, 0.0]) + 0.5).sigmoid()).float()
POINTS = torch.randn(40, 3, generator=GENERATOR) @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def eight_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", 8, dim=-1):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=EFFECTS)


def logistic():
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 100, dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=(w * X).sum(-1) + b), obs=LABELS)


def votes():
    """Concentrations under a heavy-tailed scale, shares, counts."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 1.0, 2.0])))
    pyro.sample("counts", dist.Multinomial(20, shares), obs=torch.tensor([3.0, 10.0, 7.0]))
    pyro.sample("size", dist.Normal(0.0, scale), obs=torch.tensor(0.7))
    pyro.sample("other", dist.Normal(0.0, scale), obs=torch.tensor(-0.4))


def correlated():
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", 40, dim=-1):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scales[..., None] * factor), obs=POINTS)


def cutpoints():
    """Ordered logistic: grades by cut points on a line."""
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, OrderedTransform()))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    x = torch.linspace(-2, 2, 12)
    grades = torch.tensor([0, 0, 1, 0, 1, 2, 1, 2, 3, 2, 3, 3])
    with pyro.plate("data", 12, dim=-1):
        above = (slope[..., None] * x[:, None] - cuts).sigmoid()
        ones, zeros = torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])
        probabilities = (torch.cat([ones, above], -1) - torch.cat([above, zeros], -1)).clamp(min=1e-9)
        pyro.sample("grade", dist.Categorical(probabilities), obs=grades)


MODELS = {each.__name__: each for each in (eight_schools, logistic, votes, correlated, cutpoints)}


def light_tails(draws):
    """A heavy-tailed site has no moments: compare its logarithm."""
    values = {site: value.log() if site == "scale" else value for site, value in draws.values.items()}
    return dataclasses.replace(draws, values=values)


@pytest.mark.filterwarnings("ignore:nuts:pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_nuts(name):
    model = MODELS[name]
    options = {"num_samples": 200, "num_chains": 128, "seed": 0, "progress": False}
    draws = {
        "nuts": pyro_nuts(model, num_samples=300, warmup_steps=100, num_chains=1, seed=0, progress=False),
        "chees": MCMC(ChEES(model, target_accept_prob=0.8), warmup_steps=300, **options).run(),
        "hmc": MCMC(HMC(model, target_accept_prob=0.9), warmup_steps=300, **options).run(),
    }
    table = compare({key: light_tails(value) for key, value in draws.items()}, reference="nuts")
    assert (table.loc[["chees", "hmc"], "worst_error_in_se"] < 4).all(), table.T
    assert (table.loc[["chees", "hmc"], "ess_bulk"] > 1000).all(), table.T
    assert table.loc["nuts", "ess_bulk"] > 50, table.T
    table = compare({"chees": draws["chees"]}, reference=draws["hmc"])
    assert table.loc["chees", "worst_error_in_se"] < 4, table.T
