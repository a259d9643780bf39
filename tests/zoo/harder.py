"""Models on which samplers fail: vague priors in raw units, far modes, matrices that are nearly singular."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.zoo.case import VMAP, Answers, gaussian, grid, registry

HARDER, case = registry()


def regression(y: Tensor, x: Tensor, prior_sd: Tensor, log_prior: Tensor, sigma: Tensor) -> Answers:
    """Of ``y ~ N(a + b x, sigma^2)``: a mixture, over a grid of log sigma, of what is known where sigma is."""
    design = torch.stack([torch.ones_like(x), x], 1).double()
    root = design * prior_sd.double()
    zero = torch.zeros(len(y)).double()
    weights, means, sds = [], [], []
    for s in sigma.tolist():
        weights.append(dist.LowRankMultivariateNormal(zero, root, zero + s * s).log_prob(y.double()))
        mean, sd = gaussian(torch.diag(prior_sd.double() ** 2), design, s, y)
        means.append(mean)
        sds.append(sd)
    weight = (torch.stack(weights) + log_prior + sigma.log()).softmax(0)  # equal steps of log sigma
    found = {}
    for index, name in enumerate(("a", "b")):
        mean = torch.stack(means)[:, index]
        total = float(weight @ mean)
        variance = float(weight @ (torch.stack(sds)[:, index] ** 2 + (mean - total) ** 2))
        found[name] = (total, math.sqrt(variance))
    center = float(weight @ sigma)
    return found | {"sigma": (center, math.sqrt(float(weight @ (sigma - center) ** 2)))}


_noise = torch.linspace(-2.2, 2.2, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
HEIGHT = torch.linspace(58.0, 77.0, 60).round()
EARNINGS = -60_000 + 1_300.0 * HEIGHT + 15_000.0 * _noise
_sigma = torch.logspace(3.5, 5.0, 400, dtype=torch.float64)
_vague = torch.tensor([1e5, 1e4])
_of_earnings = regression(EARNINGS, HEIGHT, _vague, -(1 + (_sigma / 1e4) ** 2).log(), _sigma)


@case(HEIGHT, EARNINGS, answers=_of_earnings, prior_reaches=False)
def earnings_on_height(height, earnings):
    a, b = pyro.sample("a", dist.Normal(0.0, 1e5)), pyro.sample("b", dist.Normal(0.0, 1e4))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1e4))
    with pyro.plate("people", len(height)):
        pyro.sample("y", dist.Normal(a + b * height, sigma), obs=earnings)


MOTHER = torch.linspace(71.0, 138.0, 60).round()
SCORE = 26.0 + 0.6 * MOTHER + 9.0 * _noise
_sd = torch.logspace(0.5, 1.8, 400, dtype=torch.float64)


@case(MOTHER, SCORE, answers=regression(SCORE, MOTHER, torch.tensor([1e3, 1e3]), -_sd / 20, _sd), prior_reaches=False)
def child_scores(mother, score):
    a, b = pyro.sample("a", dist.Normal(0.0, 1e3)), pyro.sample("b", dist.Normal(0.0, 1e3))
    sigma = pyro.sample("sigma", dist.Exponential(0.05))
    with pyro.plate("children", len(mother)):
        pyro.sample("y", dist.Normal(a + b * mother, sigma), obs=score)


HITS, TRIALS = torch.tensor([3.0, 9.0, 5.0, 14.0, 7.0]), 20.0


def _beta_binomial(a, b):
    a, b = a[..., None], b[..., None]
    data = torch.lgamma(HITS + a) + torch.lgamma(TRIALS - HITS + b) - torch.lgamma(TRIALS + a + b)
    data = (data - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)).sum(-1)
    return data + (a.log() + b.log() - (a + b) / 2)[..., 0]


@case(HITS, answers=grid(_beta_binomial, a=(1e-4, 30.0), b=(1e-4, 40.0)))
def beta_binomial(hits):
    a, b = pyro.sample("a", dist.Gamma(2.0, 0.5)), pyro.sample("b", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(hits)):
        pyro.sample("y", dist.BetaBinomial(a, b, TRIALS), obs=hits)


POINTS = torch.tensor([-2.4, -1.1, -1.9, 0.2, 1.4, 2.6])


def _two_clusters(a, b):
    parts = torch.stack([-((POINTS - loc[..., None]) ** 2) / 2 for loc in (a, b)])
    return parts.logsumexp(0).sum(-1) - (a + 2) ** 2 / 2 - (b - 2) ** 2 / 2


@case(POINTS, answers=grid(_two_clusters, a=(-6.5, 2.5), b=(-2.5, 6.5)))
def clusters_with_unknown_means(y):
    a, b = pyro.sample("a", dist.Normal(-2.0, 1.0)), pyro.sample("b", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.where(k == 1, b, a), 1.0), obs=y)


_shrunk = 5 * 100 / 101  # two Gaussians at +-5 times a prior of variance 100


@case(answers={"z": (torch.zeros(5), math.sqrt(_shrunk**2 + 100 / 101))}, prior_reaches=False)
def two_far_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    modes = torch.stack([-((z - 5) ** 2).sum(-1) / 2, -((z + 5) ** 2).sum(-1) / 2])
    pyro.factor("modes", modes.logsumexp(0))


WHERE = torch.linspace(0.0, 3.0, 14)
ROUGH = torch.sin(3 * WHERE)


def _kernel(length):
    scaled = (WHERE[:, None] - WHERE) / length
    return (-(scaled**2) / 2).exp() + 1e-5 * torch.eye(len(WHERE)).to(scaled)


def _log_gp(length):
    zero = torch.zeros(len(WHERE)).double()
    tril = [torch.linalg.cholesky(_kernel(one) + 1e-4 * torch.eye(14).double()) for one in length]
    fit = dist.MultivariateNormal(zero, scale_tril=torch.stack(tril)).log_prob(ROUGH.double())
    return fit - length.log() - length.log() ** 2 / 2


def _on_a_line(log_density, low, high):
    line = torch.linspace(low, high, 3_000, dtype=torch.float64)
    weight = log_density(line).softmax(0)
    mean = float(weight @ line)
    return mean, math.sqrt(float(weight @ (line - mean) ** 2))


@case(WHERE, ROUGH, answers={"length": _on_a_line(_log_gp, 0.05, 2.0)}, ways=VMAP)
def nearly_singular_gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    tril = torch.linalg.cholesky(_kernel(length) + 1e-4 * torch.eye(len(x)))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=tril), obs=y)


@case(
    torch.tensor([0.4, math.nan, 1.6]),
    answers={"z": (2.0 / 3, math.sqrt(1 / 3))},
    has_density=False,  # its gradient is NaN
)
def holes_masked_on_the_distribution(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0).mask(~y.isnan()), obs=y)


@case(torch.tensor([1.0, 1.5, 2.0, 1.5]), answers={"mu": (1.5, 0.5)}, prior_reaches=False)
def flat_by_a_mask_on_the_distribution(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
