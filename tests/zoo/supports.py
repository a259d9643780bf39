"""Sites of every support."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, ExpTransform, OrderedTransform

from tests.zoo.case import LOOP, PLATE, VMAP, gaussian, grid, of_beta, of_gamma, registry

SUPPORTS, case = registry()
Y = torch.tensor([0.4, -1.1, 0.8, 1.5])
SQUARES = float((Y.double() ** 2).sum())
DRAWN_ALONE = {"ways": PLATE, "draws": ("plate", "loop")}  # no rule of torch's draws them under vmap


def normal_scale(log_prior):
    return grid(lambda s: log_prior(s) - 4 * s.log() - SQUARES / (2 * s**2), s=(1e-3, 60.0))


@case(Y, answers=normal_scale(lambda s: -(1 + s**2).log()))
def half_cauchy(y):
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, s), obs=y)


@case(Y, answers=normal_scale(lambda s: -(s**2) / 2))
def half_normal(y):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, s), obs=y)


@case(Y, answers={"precision": of_gamma(2.001, 0.001 + SQUARES / 2)}, prior_reaches=False)
def vague_gamma(y):
    precision = pyro.sample("precision", dist.Gamma(0.001, 0.001))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, precision.rsqrt()), obs=y)


_b = 3 + SQUARES / 2


@case(Y, answers={"variance": (_b / 4, _b / 4 / math.sqrt(3))})
def inverse_gamma(y):
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, variance.sqrt()), obs=y)


@case(torch.tensor([1.0, 0.0, 1.0, 1.0]), answers={"p": of_beta(5.0, 3.0)}, **DRAWN_ALONE)
def beta(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


_counts = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)  # one pseudo-count each


@case(
    torch.tensor([0, 0, 0, 1, 1, 2]),
    answers={"p": (_counts / 9, (_counts * (9 - _counts) / 81 / 10).sqrt())},
    **DRAWN_ALONE,
)
def dirichlet(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


@case(
    torch.tensor([0, 0, 1]),
    answers=grid(lambda a, b: -(a**2 + b**2) / 2 + 2 * a + b - 3 * (1 + a.exp() + b.exp()).log(), a=(-7, 7), b=(-7, 7)),
)
def simplex_logits(y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    logits = torch.stack([a, b, torch.zeros_like(a)], -1)
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def _root(power):
    """E[(1 - r^2)^(power / 2)] for r = 2 B - 1 with B ~ Beta(2, 2)."""
    log_beta = 2 * math.lgamma(2 + power / 2) - math.lgamma(4 + power)
    return 2**power * math.exp(log_beta - 2 * math.lgamma(2) + math.lgamma(4))


_off, _diagonal = math.sqrt(0.2), math.sqrt(_root(2) - _root(1) ** 2)


@case(answers={"L": (torch.tensor([[1, 0], [0, _root(1)]]), torch.tensor([[0, 0], [_off, _diagonal]]))}, **DRAWN_ALONE)
def lkj_cholesky():
    pyro.sample("L", dist.LKJCholesky(2, 2.0))


@case(answers={"C": (torch.eye(2), torch.tensor([[0, _off], [_off, 0]]))}, ways=VMAP, draws=LOOP)
def lkj():
    pyro.sample("C", dist.LKJ(2, torch.tensor(2.0)))


_five = torch.tensor(5.0)


@case(
    answers={"W": (5 * torch.eye(2), torch.tensor([[10.0, 5.0], [5.0, 10.0]]).sqrt())},
    draws=("plate", "loop"),
    has_density=False,  # torch has no transform to it
)
def wishart():
    pyro.sample("W", dist.Wishart(_five, torch.eye(2)))


@case(answers={"c": ([0.0, math.exp(0.5)], [1.0, math.sqrt(1 + math.e**2 - math.e)])})
def ordered_cut_points():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    pyro.sample("c", dist.TransformedDistribution(base, OrderedTransform()))


_z2 = math.exp(0.5) / 3 - math.exp(0.25) / 4


@case(answers={"z": (math.exp(0.125) / 2, math.sqrt(_z2))}, has_density=False)
def uniform_up_to_a_latent():
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    pyro.sample("z", dist.Uniform(0.0, b))


@case(torch.tensor(1.5), answers=grid(lambda z: -((1.5 - z) ** 2) / 2, z=(-1.0, 2.0)))
def truncated_by_uniform(y):
    z = pyro.sample("z", dist.Uniform(-1.0, 2.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(
    torch.tensor(0.7),
    answers=grid(lambda z: 2 * z.cos() - (0.7 - z) ** 2 / 2, z=(-math.pi, math.pi)),
    draws=("plate", "loop"),
)
def von_mises(y):
    z = pyro.sample("z", dist.VonMises(0.0, 2.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": (float(Y.mean()), 0.5)}, draws=(), prior_reaches=False)
def improper_uniform(y):
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(answers={"z": (math.exp(1.125), math.exp(1.125) * math.sqrt(math.exp(0.25) - 1))})
def transformed_distribution():
    pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AffineTransform(1.0, 0.5), ExpTransform()]))


@case(
    torch.tensor(2.0),
    answers=grid(lambda z: -z.log() - z.log() ** 2 / 2 - (2 - z) ** 2 / 2, z=(1e-6, 9.0)),
)
def log_normal(y):
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 1.0]])


def _multivariate(**parameter):
    def model(y):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), **parameter))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    return model


for _name, _parameter in (
    ("covariance_matrix", COVARIANCE),
    ("precision_matrix", torch.linalg.inv(COVARIANCE)),
    ("scale_tril", torch.linalg.cholesky(COVARIANCE)),
):
    case(Y[:2], name=f"multivariate_by_{_name}", answers={"z": gaussian(COVARIANCE, torch.eye(2), 1.0, Y[:2])})(
        _multivariate(**{_name: _parameter})
    )


@case(
    torch.tensor([[0.5, -0.2], [1.0, 0.9]]),
    answers=grid(
        lambda r: (
            -(1 - r**2).log()  # of two data
            - sum((x * x - 2 * r * x * y + y * y) / (2 * (1 - r**2)) for x, y in ((0.5, -0.2), (1.0, 0.9)))
        ),
        r=(-0.9999, 0.9999),
    ),
    ways=VMAP,
)
def correlation_in_a_matrix(y):
    r = pyro.sample("r", dist.Uniform(-1.0, 1.0))
    covariance = torch.stack([torch.stack([torch.ones(()), r]), torch.stack([r, torch.ones(())])])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)
