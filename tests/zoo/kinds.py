"""Kinds of models: regressions, time series, hierarchies, networks."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineTransform
from pyro.nn import PyroModule, PyroSample
from torch import nn

from tests.zoo.case import LOOP, VMAP, gaussian, grid, of_beta, of_gamma, registry

KINDS, case = registry()
X = torch.tensor([-1.0, -0.3, 0.4, 1.2])
Y = torch.tensor([-0.8, 0.1, 0.5, 1.6])
PASSED = torch.tensor([0.0, 1.0, 0.0, 1.0])
COUNTS = torch.tensor([0.0, 1.0, 3.0, 4.0])
DESIGN = torch.stack([torch.ones(4), X], 1)
WIDE = (-8.0, 8.0)


def prior(*values):
    """Log density of independent standard normals."""
    return -sum(value**2 for value in values) / 2


def over_data(function, *values):
    """The sum over the data of a function of (..., n) values."""
    return function(*(value[..., None] for value in values)).sum(-1)


@case(X, Y, answers=dict(zip(("a", "b"), zip(*gaussian(torch.eye(2), DESIGN, 0.5, Y), strict=True), strict=True)))
def linear_regression(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)


RAW = torch.tensor([[1.0, 1e-6, 1e6], [1.0, 2e-6, 3e6], [1.0, 4e-6, 2e6], [1.0, 3e-6, 5e6]])
SCALES = torch.tensor([1.0, 1e6, 1e-6])


@case(RAW, Y, answers={"b": gaussian(torch.diag(SCALES**2), RAW, 0.5, Y)}, ways=VMAP)
def columns_in_raw_units(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), SCALES).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)


CONSTANT = torch.tensor([[1.0, 1.0]] * 4)


@case(CONSTANT, Y, answers={"b": gaussian(torch.eye(2), CONSTANT, 0.5, Y)})
def constant_columns(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), 0.5), obs=y)


@case(X, Y, answers=grid(lambda b: prior(b) - over_data(lambda b: 2 * (1 + (Y - b * X) ** 2 / 3).log(), b), b=WIDE))
def robust_regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(3.0, b * x, 1.0), obs=y)


def _logistic(a, b):
    return prior(a, b) + over_data(lambda a, b: PASSED * (a + b * X) - nn.functional.softplus(a + b * X), a, b)


@case(X, PASSED, answers=grid(_logistic, a=WIDE, b=WIDE))
def logistic_regression(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)


LEVELS = torch.tensor([0, 1, 1, 2])
CUTS = torch.tensor([-0.5, 0.8])


def _ordinal(b):
    below = torch.sigmoid(CUTS - (b[..., None] * X)[..., None])  # (..., n, 2)
    steps = torch.stack([below[..., 0], below[..., 1] - below[..., 0], 1 - below[..., 1]], -1)
    return prior(b) + steps[..., torch.arange(4), LEVELS].log().sum(-1)


@case(X, LEVELS, answers=grid(_ordinal, b=WIDE), ways=("plate", "loop"))
def ordinal_regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(b * x, CUTS), obs=y)


@case(X, COUNTS, answers=grid(lambda b: prior(b) + over_data(lambda b: COUNTS * b * X - (b * X).exp(), b), b=WIDE))
def poisson_regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((b * x).exp()), obs=y)


def _negative_binomial(b):
    return prior(b) + over_data(
        lambda b: -3 * nn.functional.softplus(b * X) + COUNTS * nn.functional.logsigmoid(b * X), b
    )


@case(X, COUNTS, answers=grid(_negative_binomial, b=WIDE))
def negative_binomial_regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.NegativeBinomial(3.0, logits=b * x), obs=y)


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def _schools(mu, tau):
    variance = tau[..., None] ** 2 + ERRORS**2
    likelihood = -(variance.log() + (EFFECTS - mu[..., None]) ** 2 / variance).sum(-1) / 2
    return likelihood - (mu / 5) ** 2 / 2 - (1 + (tau / 5) ** 2).log()


@case(EFFECTS, ERRORS, answers=grid(_schools, mu=(-18.0, 25.0), tau=(1e-6, 120.0)))
def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


@case(torch.tensor([0, 0, 1, 1]), X, Y, ways=VMAP, draws=("loop",))
def varying_slopes(group, x, y):
    scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
    root = scales[:, None] * pyro.sample("L", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", 2):
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), scale_tril=root))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w[group, 0] + w[group, 1] * x, 0.5), obs=y)


ANSWERS = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # persons, items; the second item is easy by 1


def _items(first, second, difficulty):
    total = prior(first, second, difficulty)
    for ability, row in zip((first, second), ANSWERS, strict=True):
        for answer, logit in zip(row, (ability - difficulty, ability + 1), strict=True):
            total = total + answer * logit - nn.functional.softplus(logit)
    return total


_response = grid(_items, first=(-6, 6), second=(-6, 6), difficulty=(-6, 6))
_abilities = tuple(torch.tensor([_response["first"][k], _response["second"][k]])[:, None] for k in (0, 1))


@case(ANSWERS, answers={"ability": _abilities, "difficulty": _response["difficulty"]})
def item_response(y):
    difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("persons", 2, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 2, dim=-1):
            easy = torch.tensor([0.0, 1.0])
            pyro.sample("y", dist.Bernoulli(logits=ability - difficulty * (1 - easy) + easy), obs=y)


@case(torch.tensor([3.0, 5.0, 4.0]), answers={"p": of_beta(13.0, 19.0)}, draws=("plate", "loop"))
def capture_recapture(caught):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("visits", len(caught)):
        pyro.sample("caught", dist.Binomial(10, p), obs=caught)


@case(torch.tensor([0.5, 1.2, 2.0]), torch.tensor([True, True, False]), answers={"rate": of_gamma(4.0, 4.7)}, ways=VMAP)
def censored_survival(time, died):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    life = dist.Exponential(rate)
    pyro.sample("deaths", life.expand([2]).to_event(1), obs=time[died])
    pyro.factor("survivors", (-rate * time[~died]).sum())


SERIES = torch.tensor([0.5, 0.8, 0.1, -0.4])


@case(SERIES, answers={"phi": tuple(x[0] for x in gaussian(torch.eye(1), SERIES[:3, None], 0.5, SERIES[1:]))})
def autoregression(y):
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    for t in range(1, len(y)):
        pyro.sample(f"y_{t}", dist.Normal(phi * y[t - 1], 0.5), obs=y[t])


_walk = torch.ones(3, 3).tril()
_level = gaussian(_walk @ _walk.T, torch.eye(3), 0.5, SERIES[:3])


@case(SERIES[:3], answers={f"level_{t}": (_level[0][t], _level[1][t]) for t in range(3)})
def local_level(y):
    level = torch.tensor(0.0)
    for t in range(len(y)):
        level = pyro.sample(f"level_{t}", dist.Normal(level, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(level, 0.5), obs=y[t])


def _volatility(h0, h1):
    h = torch.stack([h0, h1], -1)
    return -(h0**2 + (h1 - 0.9 * h0) ** 2) / 2 - (h + SERIES[:2] ** 2 / h.exp()).sum(-1) / 2


@case(SERIES[:2], answers=grid(_volatility, h_0=(-7, 7), h_1=(-8, 8)))
def stochastic_volatility(y):
    h = torch.tensor(0.0)
    for t in range(len(y)):
        h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[t])


def _garch(alpha):
    total, variance = torch.zeros_like(alpha), torch.full_like(alpha, 0.5)
    for y in SERIES:
        total = total - (variance.log() + y**2 / variance) / 2
        variance = 0.2 + alpha * y**2 + 0.3 * variance
    return total


@case(SERIES, answers=grid(_garch, alpha=(0.0, 0.7)))
def garch(y):
    alpha = pyro.sample("alpha", dist.Uniform(0.0, 0.7))
    variance = torch.tensor(0.5)
    for t in range(len(y)):
        pyro.sample(f"y_{t}", dist.Normal(0.0, variance.sqrt()), obs=y[t])
        variance = 0.2 + alpha * y[t] ** 2 + 0.3 * variance


def _process(length):
    kernel = (-((X[:, None] - X) ** 2) / (2 * length[..., None, None] ** 2)).exp() + 0.25 * torch.eye(4)
    root = torch.linalg.cholesky(kernel)
    white = torch.linalg.solve_triangular(root, Y.double()[:, None].expand(*root.shape[:-1], 1), upper=False)
    return -(white**2).sum((-2, -1)) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - length


@case(X, Y, answers=grid(_process, length=(1e-3, 18.0)), ways=VMAP)
def gaussian_process(x, y):
    length = pyro.sample("length", dist.Exponential(1.0))
    kernel = (-((x[:, None] - x) ** 2) / (2 * length**2)).exp() + 0.25 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=torch.linalg.cholesky(kernel)), obs=y)


def _decay(rate):
    level, total = torch.ones_like(rate), -(rate.log() ** 2) / 2 - rate.log()
    for observed in (0.7, 0.4, 0.3):
        level = level - 0.5 * rate * level
        total = total - (observed - level) ** 2 / (2 * 0.2**2)
    return total


@case(torch.tensor([0.7, 0.4, 0.3]), answers=grid(_decay, rate=(1e-6, 9.0)))
def ode_by_euler(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    level = torch.tensor(1.0)
    for t in range(len(y)):
        level = level - 0.5 * rate * level
        pyro.sample(f"y_{t}", dist.Normal(level, 0.2), obs=y[t])


def _solved(y):
    """With an array of all states, as users of solvers have it."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    states = torch.zeros(len(y) + 1)
    states[0] = 1.0
    for t in range(len(y)):
        states[t + 1] = states[t] - 0.5 * rate * states[t]
    pyro.sample("y", dist.Normal(states[1:], 0.2).to_event(1), obs=y)


_rate = grid(_decay, rate=(1e-6, 9.0))
case(torch.tensor([0.7, 0.4, 0.3]), name="ode_into_an_array", answers=_rate, ways=LOOP)(_solved)


def _horseshoe(log_scale, b):
    scale = log_scale.exp()
    return -(1 + scale**2).log() - (b / scale) ** 2 / 2 - (1.5 - b) ** 2 / 2  # b's normalizer and the Jacobian cancel


@case(torch.tensor(1.5), answers={"b": grid(_horseshoe, log_scale=(-9.0, 9.0), b=(-5.0, 7.0))["b"]})
def horseshoe(y):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    b = pyro.sample("b", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)


@case(torch.tensor(1.0), answers=grid(lambda w, f: prior(w, f) - (1 - w * f) ** 2 / 0.5, w=(-6, 6), f=(-6, 6)))
def factor_with_sign_switching(y):
    w, f = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("f", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w * f, 0.5), obs=y)


def _switching(a, b):
    return prior(a, b) + over_data(lambda a, b: torch.logaddexp(-((Y - a) ** 2), -((Y - b) ** 2)), a, b)


@case(Y, answers=grid(_switching, a=(-6, 6), b=(-6, 6)))
def mixture_with_label_switching(y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    parts = torch.logaddexp(-((y - a[..., None]) ** 2), -((y - b[..., None]) ** 2))
    pyro.factor("likelihood", parts.sum(-1))


class BayesianNetwork(PyroModule):
    """One layer, whose weights and bias are sites."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 1)
        self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 1), 1.0).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def forward(self, x, y=None):
        loc = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


_layer = gaussian(torch.eye(2), DESIGN, 0.5, Y)
case(
    X[:, None], Y, name="bayesian_network",
    answers={"layer.bias": (_layer[0][:1], _layer[1][:1]), "layer.weight": (_layer[0][1:, None], _layer[1][1:, None])},
    ways=VMAP,
)(BayesianNetwork())  # fmt: skip


class Decoder(nn.Module):
    """A linear decoder, known: probabilistic principal components."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(DESIGN)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.linear(z), 0.5).to_event(1), obs=y)


_decoded = gaussian(torch.eye(2), DESIGN, 0.5, Y)
case(Y[None], name="decoder", answers={"z": (_decoded[0][None], _decoded[1][None])})(Decoder().model)


@case(torch.tensor(2.0), answers={"z": (1 + 4 / 5, math.sqrt(0.8))})
def flow_prior(y):
    flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AffineTransform(1.0, 2.0)])
    z = pyro.sample("z", flow)
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(answers={"u": (torch.full((2,), 0.5), math.sqrt(1 / 12))})
def copula():
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    g = pyro.sample("g", dist.MultivariateNormal(torch.zeros(2), scale_tril=root))
    pyro.deterministic("u", torch.special.ndtr(g), event_dim=1)
