"""Everything that holds draws becomes Draws, with chains, statistics and the model where they are known."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.streaming import CountMeanStats, StackStats, StatsOfDict

import pyro_ebm
from pyro_ebm import Draws
from pyro_ebm.inference.as_draws import as_draws

Y = torch.tensor([0.5, 1.5, -0.5])


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


def streaming(statistics):
    run = StreamingMCMC(NUTS(model), num_samples=12, warmup_steps=8, disable_progbar=True, statistics=statistics)
    run.run(Y)
    return run


@pytest.fixture(scope="module")
def mcmc():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run = MCMC(NUTS(model), num_samples=12, warmup_steps=8, disable_progbar=True)
        run.run(Y)
    return run


def test_draws_are_themselves():
    draws = Draws({"z": torch.zeros(2, 3)}, "nuts")
    assert as_draws(draws) is draws


def test_stock_mcmc(mcmc):
    draws = as_draws(mcmc)
    assert torch.equal(draws.values["mu"], mcmc.get_samples(group_by_chain=True)["mu"])
    assert draws.source.model is model and draws.source.args[0] is Y
    assert torch.equal(draws.observed["y"], Y) and draws.method == "nuts"


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
def test_an_mcmc_of_this_library():
    mcmc = pyro_ebm.MCMC(pyro_ebm.ChEES(model), 4, 4, num_chains=8, init="prior", seed=0, progress=False)
    mcmc.run(Y)
    assert as_draws(mcmc) is mcmc.draws


def test_samples_by_site_are_one_chain(mcmc):
    samples = mcmc.get_samples()
    draws = as_draws({**samples, "numbers": np.arange(12), "tilt": torch.empty(12, 0)})
    assert torch.equal(draws.values["mu"], samples["mu"][None]) and draws.source is None
    assert draws.values["numbers"].tolist() == [list(range(12))] and "tilt" not in draws.values


def test_streaming_that_keeps_samples():
    draws = as_draws(streaming(StatsOfDict(default=StackStats)))
    assert draws.values["mu"].shape == (1, 12, 2) and draws.source.model is model
    assert draws.stats["diverging"].shape == (1, 12)


@pytest.mark.parametrize(
    ("draws", "error", "text"),
    [
        (3, TypeError, r"draws must be a Draws, an MCMC \(Pyro's or ours\) or samples by site, got int"),
        ({}, ValueError, "the samples are empty"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, ValueError, r"same number of samples.*\{'a': 3, 'b': 4\}"),
        ({"a": torch.tensor(1.0)}, ValueError, "same number of samples"),
        ({"a": torch.zeros(4, 100), "b": torch.zeros(4, 100, 2)}, ValueError, r"grouped by chain.*Draws\(samples"),
        (MCMC(NUTS(model), num_samples=1), ValueError, r"no samples; call its run"),
        (StreamingMCMC(NUTS(model), num_samples=1), ValueError, r"no samples; call its run"),
    ],
)
def test_what_holds_no_draws(draws, error, text):
    with pytest.raises(error, match=text):
        as_draws(draws)


def test_streaming_that_keeps_none():
    run = streaming(StatsOfDict(default=CountMeanStats))
    with pytest.raises(ValueError, match=r"keeps statistics \(\['count', 'mean'\]\) and no samples; .*StackStats"):
        as_draws(run)


def test_draws_of_some_chains():
    values = torch.arange(12.0).reshape(4, 3)
    logs = torch.randn(4, 3)
    warmup = Draws({"z": torch.arange(4.0)[:, None]}, "smc")
    draws = Draws({"z": values}, "smc", stats={"lp": -values}, log_weights=logs, warmup=warmup)
    found = draws.of_chains([1, 3])
    assert torch.equal(found.values["z"], values[[1, 3]]) and torch.equal(found.stats["lp"], -values[[1, 3]])
    assert found.warmup.values["z"].flatten().tolist() == [1.0, 3.0]
    torch.testing.assert_close(found.log_weights.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(found.log_weights.diff(), logs[[1, 3]].diff())
    assert draws.of_chains([0, 1, 2, 3]) is draws
