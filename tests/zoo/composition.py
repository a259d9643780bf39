"""Models put together: hierarchies, handlers, factors, data that are not all there."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.reparam.strategies import AutoReparam

from tests.zoo.case import gaussian, normal_mean, registry

COMPOSITION, case = registry()
Y = torch.tensor([1.0, 0.2, -0.6])
HOLES = torch.tensor([1.0, math.nan, -0.6])
SEEN = torch.tensor([1.0, -0.6])
# mu and three groups, one datum each: a_i = mu + 0.5 e_i, y_i = a_i + noise
_prior = torch.full((4, 4), 1.0) + torch.diag(torch.tensor([0.0, 0.25, 0.25, 0.25]))
_mean, _sd = gaussian(_prior, torch.eye(4)[1:], 1.0, Y)
_noise = gaussian(torch.eye(4), torch.cat([torch.ones(3, 1), 0.5 * torch.eye(3)], 1), 1.0, Y)


@case(Y, answers={"mu": (_mean[0], _sd[0]), "a": (_mean[1:], _sd[1:])})
def centered(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        a = pyro.sample("a", dist.Normal(mu, 0.5))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


@case(Y, answers={"mu": (_noise[0][0], _noise[1][0]), "e": (_noise[0][1:], _noise[1][1:])})
def noncentered_by_hand(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        a = pyro.deterministic("a", mu + 0.5 * e)
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


_REPARAMETERIZED = {"mu": (_noise[0][0], _noise[1][0]), "a_decentered": (_noise[0][1:], _noise[1][1:])}
case(Y, name="loc_scale_reparam", answers=_REPARAMETERIZED)(
    poutine.reparam(centered, config={"a": LocScaleReparam(0.0)})
)
case(Y, name="auto_reparam", fills_param_store=True)(poutine.reparam(centered, config=AutoReparam()))


def _joint(n=3):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("y", dist.Normal(z, 1.0))


case(name="condition", answers={"z": normal_mean(Y)})(poutine.condition(_joint, data={"y": Y}))
case(name="do", answers={"y": (torch.full((3,), 2.0), 1.0)})(poutine.do(_joint, data={"z": torch.tensor(2.0)}))
case(name="block", answers={"z": (0.0, 1.0)})(poutine.block(poutine.condition(_joint, data={"y": Y}), hide=["y"]))


@case(Y, answers={"z": normal_mean(Y, noise=math.sqrt(2))})
def scale(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5), pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": normal_mean(Y[:2])})
def mask(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=torch.tensor([True, True, False])):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def _with_parameter(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


case(Y[0], name="lift", answers={"loc": normal_mean(Y[:1])})(
    poutine.lift(_with_parameter, prior={"loc": dist.Normal(0.0, 1.0)})
)


@case(Y, answers={"z": (float(Y.mean()), 1 / math.sqrt(3))})
def flat_by_mask(y):
    z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": (float(Y.mean()), 1 / math.sqrt(3))})
def flat_by_handler(y):
    with poutine.mask(mask=False):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": normal_mean(Y, prior_sd=2.0)})
def scaled_prior(y):
    with poutine.scale(scale=0.25):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(answers={"z": (0.25, math.sqrt(0.5))})
def factor_by_hand():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("pull", -((z - 0.5) ** 2) / 2)


@case(Y[0], answers={"z": normal_mean(Y[:1]), "twice": tuple(2 * x for x in normal_mean(Y[:1]))})
def deterministic(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * z)
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y[0], answers={"z": normal_mean(Y[:1], noise=math.exp(0.1))}, fills_param_store=True)
def parameter(y):
    scale = pyro.param("zoo_log_scale", torch.tensor(0.1)).exp()
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, scale), obs=y)


@case(HOLES, answers={"z": normal_mean(SEEN)})
def holes_masked(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    seen = ~y.isnan()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0).mask(seen), obs=y.nan_to_num(0.0))


@case(HOLES, answers={"z": normal_mean(SEEN)})
def obs_mask(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.nan_to_num(0.0), obs_mask=~y.isnan())


@case(answers={"z": (0.0, 1.0), "y": (torch.zeros(3), math.sqrt(2))})
def called_without_data(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, has_density=False)
def subsampled_plate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@case(torch.zeros(0), answers={"z": (0.0, 1.0)})
def empty_data(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z[..., None], 1.0).expand([*z.shape, 0]).to_event(1), obs=y)
