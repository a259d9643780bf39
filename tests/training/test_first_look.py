"""Rows that are no data of their own, and what has the size of all data, are seen before training."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm import Batches, TrainingWarning, fit

N = 40
Y = torch.randn(N, generator=torch.Generator().manual_seed(0))
ALL_AT_ONCE = {"batch_size": N, "validation": None}
IN_PARTS = [{"batch_size": 16, "validation": None}, {"batch_size": N}, {"batch_size": N, "validation": Y[:7]}]


class Learner(nn.Module):
    """A slope that guide and model share."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))
        self.locs = nn.Parameter(torch.zeros(N))

    def guide(self, y):
        pass


class Vector(Learner):
    """A latent number for each datum, in no plate."""

    def model(self, y):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(self.slope + z, 0.5).to_event(1), obs=y)

    def guide(self, y):
        pyro.sample("z", dist.Normal(self.slope * y, 1.0).to_event(1))


class OwnNumbers(Vector):
    def guide(self, y):
        pyro.sample("z", dist.Normal(self.locs, 1.0).to_event(1))


class OwnNumbersInAPlate(Vector):
    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(self.slope + z, 0.5), obs=y)

    def guide(self, y):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(self.locs, 1.0))


class OwnSize(Learner):
    def model(self, y):
        pyro.sample("y", dist.Normal(self.locs, 1.0).to_event(1), obs=y)


class Walk(Learner):
    def model(self, y):
        z = 0.0
        for i in range(len(y)):
            z = pyro.sample(f"z_{i}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, self.slope), obs=y[i])

    def guide(self, y):
        for i in range(len(y)):
            pyro.sample(f"z_{i}", dist.Normal(self.slope * y[i], 1.0))


class Sums(Vector):
    """A random walk by its steps."""

    def model(self, y):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.cumsum(0), 0.5).to_event(1), obs=y)


class RandomWalk(Vector):
    def model(self, y):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=torch.ones(len(y), len(y)).tril()))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


class Autoregression(Learner):
    def model(self, y):
        pyro.sample("y", dist.Normal(self.slope * y[:-1], 1.0).to_event(1), obs=y[1:])


class AutoregressionInALoop(Learner):
    def model(self, y):
        for i in range(1, len(y)):
            pyro.sample(f"y_{i}", dist.Normal(self.slope * y[i - 1], 1.0), obs=y[i])


class Process(Learner):
    def model(self, y):
        apart = torch.linspace(0, 1, len(y))
        covariance = torch.exp(-((apart[:, None] - apart) ** 2)) + self.slope * torch.eye(len(y))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


class InTurn(Walk):
    """Data one after another, each of its own."""

    def model(self, y):
        for i in pyro.plate("data", len(y)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, self.slope), obs=y[i])


class OneByOne(Walk):
    def model(self, y):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        for i in range(len(y)):
            first = pyro.sample(f"z_{i}", dist.Normal(top, 1.0))
            second = pyro.sample(f"z_{i}_1", dist.Normal(first, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(second, self.slope), obs=y[i])

    def guide(self, y):
        pyro.sample("top", dist.Normal(self.slope, 1.0))
        for i in range(len(y)):
            pyro.sample(f"z_{i}", dist.Normal(self.slope * y[i], 1.0))
            pyro.sample(f"z_{i}_1", dist.Normal(self.slope * y[i], 1.0))


class Noisy(Learner):
    """Noise that is no site differs from row to row, and means nothing."""

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.slope + torch.randn_like(y), 1.0), obs=y)


def trained(learner, guide=None, **options):
    return fit(learner.model, guide or learner.guide, Y, epochs=1, seed=0, progress=False, **options)


@pytest.mark.parametrize("options", IN_PARTS)
@pytest.mark.parametrize("kind", [OwnNumbers, OwnNumbersInAPlate, OwnSize])
def test_what_has_the_size_of_all_data_is_named(kind, options):
    site = "y" if kind is OwnSize else "z"
    with pytest.raises(ValueError, match=rf"run with 40 data but not with .*'{site}'.*validation=None"):
        trained(kind(), **options)
    assert trained(kind(), **ALL_AT_ONCE).stopped == "epochs"


@pytest.mark.uses_param_store
def test_an_autoguide_that_has_seen_all_data_is_named():
    learner = Vector()
    guide = AutoNormal(learner.model)
    guide(Y)
    with pytest.raises(ValueError, match=r"run with 40 data but not with 16.*'z'"):
        trained(learner, guide, batch_size=16)
    assert trained(learner, guide, **ALL_AT_ONCE).stopped == "epochs"


@pytest.mark.parametrize("options", IN_PARTS[:2])
@pytest.mark.parametrize("kind", [Walk, Sums, RandomWalk, Autoregression, AutoregressionInALoop, Process])
def test_rows_that_hang_together_are_told(kind, options):
    with pytest.warns(TrainingWarning, match=r"the density of the site\(s\) \[.*\].* depends on other rows"):
        trained(kind(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        trained(kind(), **ALL_AT_ONCE)


@pytest.mark.parametrize("kind", [Vector, InTurn, OneByOne, Noisy])
def test_rows_of_their_own_are_trained_in_any_order(kind):
    assert trained(kind(), batch_size=16).stopped == "epochs"


class Normalized(Learner):
    """Batch normalization learns nothing from one datum."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.net(y[:, None]).squeeze(-1), 1.0), obs=y)


@pytest.mark.parametrize("size", [13, Batches(13, accumulate=2)])
def test_a_last_minibatch_of_one_is_named_where_it_cannot_be_learned_from(size):
    with pytest.raises(ValueError, match="batch_size: a minibatch has one datum alone"):
        trained(Normalized(), batch_size=size, validation=None)
    assert trained(Normalized(), batch_size=14, validation=None).stopped == "epochs"
    assert trained(Noisy(), batch_size=13, validation=None).stopped == "epochs"
