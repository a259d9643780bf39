"""Data as they come, and models in every form that can be called."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.zoo.case import normal_mean, registry

HABITS, case = registry()
Y = torch.tensor([0.5, 1.5, 0.1])
ANSWER = {"z": normal_mean(Y)}


def _model(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


case(torch.from_numpy(np.array([0.5, 1.5, 0.1])), name="float64_data", answers=ANSWER)(_model)
case(torch.tensor([1, 0, 2]).float(), name="integers_as_floats", answers={"z": normal_mean(torch.tensor([1.0, 0, 2]))})(
    _model
)
case(Y[:1], name="one_datum", answers={"z": normal_mean(Y[:1])})(_model)
case(Y.repeat(2), name="duplicated_rows", answers={"z": normal_mean(Y.repeat(2))})(_model)
_outlier = torch.tensor([0.0, 0.2, 8.0])
case(_outlier, name="an_outlier", answers={"z": normal_mean(_outlier)})(_model)


@case(torch.tensor([1, 0, 1, 1]), answers={"p": (5 / 8, math.sqrt(15 / 64 / 9))}, draws=("plate", "loop"))
def integers(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y.float())


@case(kwargs={"y": Y}, answers=ANSWER)
def keywords(*, y=None):
    _model(y)


@case(kwargs={"seed": 1.0, "num_samples": 3, "x": Y}, answers={"z": normal_mean(Y)})
def keywords_named_like_options(*, seed, num_samples, x):
    z = pyro.sample("z", dist.Normal(0.0, seed))
    with pyro.plate("data", num_samples):
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)


class _Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("y", Y)

    def forward(self):
        _model(self.y)

    def model(self, y):
        _model(y)


class _Callable:
    def __call__(self, y):
        _model(y)


case(Y, name="a_lambda", answers=ANSWER)(lambda y: _model(y))
case(Y, name="a_bound_method", answers=ANSWER)(_Module().model)
case(name="a_module", answers=ANSWER)(_Module())
case(name="a_partial", answers=ANSWER)(functools.partial(_model, Y))
case(Y, name="a_callable_object", answers=ANSWER)(_Callable())
case(name="a_closure", answers=ANSWER)(lambda: _model(Y))


@case(torch.tensor([0.5, 1.5, 0.1], dtype=torch.float64), answers=ANSWER)
def all_in_float64(y):
    zero = torch.zeros((), dtype=torch.float64)
    z = pyro.sample("z", dist.Normal(zero, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
