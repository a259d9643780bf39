"""Discrete sites: enumerated, summed by hand, or drawn."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch

from tests.zoo.case import VMAP, grid, of_enumeration, registry

DISCRETE, case = registry()
Y = torch.tensor([-1.2, 0.1, 1.4])
LOCS = torch.tensor([-1.0, 1.0])


def _log_normal(y, loc):
    return -((y - loc) ** 2) / 2


_component = torch.softmax(torch.stack([_log_normal(Y, loc) for loc in LOCS.double()]), 0)[1]


@case(Y, answers={"k": (_component, (_component * (1 - _component)).sqrt())})
def enumerated_mixture(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(LOCS[k], 1.0), obs=y)


@case(
    torch.tensor(0.7),
    answers={
        "b": of_enumeration(
            torch.tensor([0.0, 1.0]),
            -(torch.tensor([0.7, -1.3]) ** 2) / 4,
        )
    },
)
def discrete_and_continuous(y):
    b = pyro.sample("b", dist.Bernoulli(0.5))
    z = pyro.sample("z", dist.Normal(2 * b, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


STAY = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
_paths = torch.tensor(list(itertools.product([0, 1], repeat=3)))
_log_path = math.log(0.5) + STAY[_paths[:, :2], _paths[:, 1:]].log().sum(1)
_log_path = _log_path + _log_normal(Y, LOCS[_paths]).sum(1)
_state = of_enumeration(_paths.double(), _log_path)


@case(Y, answers={f"x_{t}": (_state[0][t], _state[1][t]) for t in range(3)})
def hidden_markov(y):
    x = None
    for t in pyro.markov(range(len(y))):
        probs = torch.tensor([0.5, 0.5]) if x is None else STAY[x]
        x = pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(LOCS[x], 1.0), obs=y[t])


COUNTS = torch.tensor([0.0, 0.0, 3.0, 2.0, 0.0])


def _zero_inflated(gate, rate):
    zero = (gate + (1 - gate) * (-rate).exp()).log()
    return 3 * zero + 2 * (1 - gate).log() - 2 * rate + 5 * rate.log() + rate.log() - rate


@case(COUNTS, answers=grid(_zero_inflated, gate=(1e-6, 1 - 1e-6), rate=(1e-6, 14.0)))
def zero_inflated(y):
    gate = pyro.sample("gate", dist.Uniform(0.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


STEP = torch.tensor([0.1, -0.2, 0.9, 1.2, 0.8])
_when = torch.arange(5)
_log_when = torch.stack([_log_normal(STEP, (torch.arange(5) >= t).double()).sum() for t in range(5)])


@case(STEP, answers={"when": of_enumeration(_when.double(), _log_when)})
def change_point(y):
    when = pyro.sample("when", dist.Categorical(torch.ones(5)))
    loc = torch.where(torch.arange(5) < when, 0.0, 1.0)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def _mixed(w):
    density = w[..., None] * _log_normal(Y, 1.0).exp() + (1 - w[..., None]) * _log_normal(Y, -1.0).exp()
    return density.log().sum(-1)


@case(Y, answers=grid(_mixed, w=(0.0, 1.0)))
def summed_by_hand(y):
    w = pyro.sample("w", dist.Uniform(0.0, 1.0))
    parts = torch.stack([(1 - w).log()[..., None] + _log_normal(y, -1.0), w.log()[..., None] + _log_normal(y, 1.0)])
    pyro.factor("likelihood", parts.logsumexp(0).sum(-1))


@case(Y, answers=grid(_mixed, w=(0.0, 1.0)), ways=VMAP)
def mixture_same_family(y):
    w = pyro.sample("w", dist.Uniform(0.0, 1.0))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.stack([1 - w, w])), dist.Normal(LOCS, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", mixture, obs=y)
