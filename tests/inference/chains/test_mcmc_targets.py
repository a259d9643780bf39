"""Every adjusted batched kernel against exact answers: scales, skew, a funnel, constrained supports, tilts."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import tensor

from pyro_ebm import VAE, Draws, LinearEnergy, compare, quadrature, tilt
from pyro_ebm.diagnostics.moments import bulk_ess, components, moments
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import HMC, ChEES
from pyro_ebm.inference.kernels.langevin import MALA

# kernel, draws per chain, warm-up: at least 1,000 effective draws of every target below
KERNELS = {"chees": (ChEES, 100, 200), "hmc": (HMC, 100, 200), "mala": (MALA, 700, 200)}
FEW = {"num_chains": 128, "seed": 0, "progress": False}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def run(kernel, model, *args, options=None, **runner):
    kind, num_samples, warmup_steps = KERNELS[kernel]
    return MCMC(kind(model, **(options or {})), num_samples, warmup_steps, **FEW, **runner).run(*args)


def agree(draws, exact):
    """``exact``: site -> (means, mean squares)."""
    sites = list(exact)
    found, x = moments(draws, sites), components(draws, sites)
    truth = torch.cat([torch.as_tensor(pair[i]).double().flatten() for i in (0, 1) for pair in exact.values()])
    ess = bulk_ess(draws, x)
    assert (ess >= 1000).all(), ess
    scores = (found.mean - truth) / found.se
    assert (scores.abs() < 4).all(), scores


def site(law):
    return lambda: pyro.sample("z", law)


SCALES = tensor([0.01, 1.0, 10.0, 100.0])
MEANS = tensor([0.02, -1.0, 5.0, 100.0])
COVARIANCE = (0.7 * torch.ones(4, 4) + 0.3 * torch.eye(4)) * SCALES * SCALES[:, None]


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def moments_of_dirichlet(a):
    total = a.sum()
    return a / total, a * (a + 1) / (total * (total + 1))


A = tensor([1.0, 2.0, 3.0, 0.5])
TARGETS = {
    "correlated": (
        site(dist.MultivariateNormal(MEANS, COVARIANCE)),
        {"z": (MEANS, MEANS**2 + SCALES**2)},
    ),
    "tilted": (
        tilt(site(dist.Normal(torch.zeros(3), 1.0).to_event(1)), {"z": LinearEnergy([1.0, -2.0, 0.5])}),
        {"z": (tensor([1.0, -2.0, 0.5]), tensor([2.0, 5.0, 1.25]))},
    ),
    "log-gamma": (site(dist.Gamma(2.0, 3.0)), {"z": (2 / 3, 6 / 9)}),
    "funnel": (funnel, {"v": (0.0, 1.0), "x": (0.0, math.exp(0.5))}),
    "lognormal": (site(dist.LogNormal(0.3, 0.5)), {"z": (math.exp(0.425), math.exp(1.1))}),
    "beta": (site(dist.Beta(2.0, 3.0)), {"z": (0.4, 0.2)}),
    "uniform": (site(dist.Uniform(-1.0, 3.0)), {"z": (1.0, 1 + 16 / 12)}),
    "dirichlet": (site(dist.Dirichlet(A)), {"z": moments_of_dirichlet(A)}),
    "ordered": (
        site(dist.TransformedDistribution(dist.Normal(torch.zeros(3), 0.5).to_event(1), OrderedTransform())),
        {
            "z": (
                tensor([0.0, 1.0, 2.0]) * math.exp(0.125),
                tensor([0.25, 0.25 + math.exp(0.5), 0.25 + 2 * math.exp(0.5) + 2 * math.exp(0.25)]),
            )
        },
    ),
}


@pytest.mark.parametrize("target", TARGETS)
def test_moments(kernel, target):
    model, exact = TARGETS[target]
    # steep walls and narrow necks need small steps
    agree(run(kernel, model, options={"target_accept_prob": 0.9} if target in ("funnel", "log-gamma") else {}), exact)


def test_starts_far_too_wide(kernel):
    model, exact = TARGETS["correlated"]
    starts = MEANS + 4 * SCALES * torch.randn(128, 4)
    agree(run(kernel, model, init={"z": starts}), exact)


def test_heavy_tails(kernel):
    z = run(kernel, site(dist.HalfCauchy(2.0))).values["z"]
    probabilities = tensor([0.1, 0.5, 0.9])
    below = (z[..., None] < dist.HalfCauchy(2.0).icdf(probabilities)).float()
    agree(Draws({"below": below}, kernel), {"below": (probabilities, probabilities)})


def test_correlation_matrices(kernel):
    factor = run(kernel, site(dist.LKJCholesky(3, 1.7))).values["z"]
    matrix = factor @ factor.mT
    r = torch.stack([matrix[..., 1, 0], matrix[..., 2, 0], matrix[..., 2, 1]], -1)
    # (r + 1) / 2 is beta(a, a) with a = eta - 1 + d / 2
    agree(Draws({"r": r}, kernel), {"r": (torch.zeros(3), torch.full((3,), 1 / (2 * 2.2 + 1)))})


def in_double():
    pyro.sample("z", dist.Gamma(tensor(2.0, dtype=torch.float64), 3.0))
    pyro.sample("p", dist.Dirichlet(A.double()))


def test_double_precision(kernel):
    draws = run(kernel, in_double)
    assert all(value.dtype == torch.float64 for value in [*draws.values.values(), draws.stats["lp"]])
    agree(draws, {"z": (2 / 3, 6 / 9), "p": moments_of_dirichlet(A.double())})


# Tilts, against the grid


def bent(z):
    """Skewed, with two bumps, as a small network would tilt."""
    return 2 * torch.tanh(2 * z[..., 0] + z[..., 1]) - 1.5 * torch.tanh(z[..., 1] - z[..., 0] - 1)


def prior():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@functools.cache
def small_vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = VAE((6,), 2, hidden=(8,))
        for parameter in vae.decoder.parameters():
            parameter.data *= 3
        return vae, torch.rand(5, 6)


def trusted(table):
    row = table.loc["run"]
    assert row["worst_error_in_se"] < 4 and row["ess_bulk"] >= 1000 and row["r_hat"] < 1.05, row


def test_tilted_prior(kernel):
    model = tilt(prior, {"z": bent})
    trusted(compare({"run": run(kernel, model, init="uniform")}, reference=quadrature(model)))


def test_tilted_posterior_of_an_image(kernel):
    vae, images = small_vae()
    model = tilt(vae.model, {"z": bent})
    trusted(compare({"run": run(kernel, model, images[:1], init="uniform")}, reference=quadrature(model, images[:1])))


def test_tilted_posteriors_of_images_each_on_its_own(kernel):
    vae, images = small_vae()
    model = tilt(vae.model, {"z": bent})
    kind, num_samples, warmup_steps = KERNELS[kernel]
    draws = MCMC(kind(model, independent="data"), num_samples, warmup_steps, **FEW).run(images)
    assert draws.stats["acceptance_rate"].shape == (128, num_samples, 5)
    for i in range(5):
        exact = quadrature(model, images[i : i + 1])
        trusted(compare({"run": Draws({"z": draws.values["z"][:, :, i : i + 1]}, kernel)}, reference=exact))
