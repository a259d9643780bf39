"""log Z of a tilted distribution by sequential Monte Carlo and by annealing in both directions."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Estimate, InferenceError, LinearEnergy, QuadraticEnergy
from pyro_ebm.energies import gaussian_log_normalizer
from pyro_ebm.inference.ais import BoundedEstimate
from pyro_ebm.inference.log_normalizer import log_normalizer

METHODS = ["smc", "ais"]
SIZE = {"smc": 2048, "ais": 512}


def estimate(base, energy, method, **options):
    options = {"seed": 0, "num_samples": SIZE[method]} | options
    return log_normalizer(base, energy, method=method, **options)


def assert_right(found, truth, *, max_se=0.2):
    truth = torch.as_tensor(truth)
    assert found.value.shape == found.se.shape == truth.shape
    assert (found.se > 0).all() and (found.se < max_se).all()
    # Eight islands or more: 5.4 standard errors are as improbable as 4 of a normal law
    assert ((found.value - truth).abs() < 5.4 * found.se).all(), (found, truth)
    if isinstance(found, BoundedEstimate):
        assert (found.lower < truth).all() and (truth < found.upper).all(), (found, truth)
        assert (found.upper - found.lower < 1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [LinearEnergy([2.0, -2.0, 1.0]), QuadraticEnergy(3.0)], ids=["linear", "quadratic"])
def test_gaussian_base(method, energy):
    loc, scale = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([0.5, 1.0, 1.5])
    found = estimate(dist.Normal(loc, scale).to_event(1), energy, method)
    assert_right(found, gaussian_log_normalizer(energy, loc, scale).detach())
    value, se = found
    assert isinstance(found, Estimate) and value == found.value and se == found.se


@pytest.mark.parametrize("method", METHODS)
def test_a_tilt_too_far_for_importance_sampling(method):
    a = torch.full((8,), 5.0 / math.sqrt(8))
    base = dist.Normal(torch.zeros(8), 1.0).to_event(1)
    with pytest.raises(InferenceError, match="Pareto k"):
        log_normalizer(base, LinearEnergy(a), seed=0, strict=True)
    assert_right(estimate(base, LinearEnergy(a), method), 12.5)


@pytest.mark.parametrize("method", METHODS)
def test_scalar_and_constrained_bases(method):
    assert_right(estimate(dist.Gamma(torch.tensor(2.0), 2.0), LinearEnergy(1.0), method), math.log(4.0))
    # Of a plate: one number for all its elements, the law of one
    assert_right(estimate(dist.Gamma(2.0, 2.0).expand([3, 2]), LinearEnergy(1.0), method), math.log(4.0))


@pytest.mark.parametrize("method", METHODS)
def test_one_number_for_all_elements_or_one_for_each(method):
    energy = LinearEnergy([1.5, -1.0])
    same = dist.Normal(torch.zeros(4, 2), torch.ones(4, 2)).to_event(1)
    assert_right(estimate(same, energy, method), 0.5 * (1.5**2 + 1))
    loc = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]])
    truth = gaussian_log_normalizer(energy, loc, torch.tensor(0.5)).detach()
    assert_right(estimate(dist.Normal(loc, 0.5).to_event(1), energy, method), truth)
    with pytest.raises(ValueError, match=r"one batch dimension where .* differ in law, got batch_shape \(1, 3\)"):
        estimate(dist.Normal(loc[None], 0.5).to_event(1), energy, method)


@pytest.mark.parametrize("method", METHODS)
def test_finite_bases_are_summed_exactly(method):
    p = torch.tensor([0.1, 0.6])
    found = estimate(dist.Bernoulli(p).mask(False), LinearEnergy(1.3), method)
    torch.testing.assert_close(found.value, (1 - p + p * math.exp(1.3)).log())
    assert (found.se == 0).all()
    if method == "ais":
        assert torch.equal(found.lower, found.value) and torch.equal(found.upper, found.value)


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")  # few particles and chains
@pytest.mark.parametrize("method", METHODS)
def test_seeds_and_dtypes(method, rng_untouched):
    base, energy = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), QuadraticEnergy(1.0)
    with rng_untouched():
        first, second = (estimate(base, energy, method, num_samples=64, seed=3) for _ in range(2))
    assert first == second and first.value.dtype == first.se.dtype == torch.float64
    assert estimate(base, energy, method, num_samples=64, seed=None).value != first.value


def test_errors():
    with pytest.raises(ValueError, match=r"method must be one of \('importance', 'qmc', 'smc', 'ais'\), got 'mcmc'"):
        log_normalizer(dist.Normal(0.0, 1.0), LinearEnergy(1.0), method="mcmc")
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))
    uniform = dist.Uniform(torch.zeros(3), torch.ones(3))
    for method in METHODS:
        with pytest.raises(ValueError, match=f'{method}.* needs a continuous base .*, got Poisson; use method="impo'):
            estimate(dist.Poisson(3.0), LinearEnergy(0.1), method)
        with pytest.raises(ValueError, match="got MixtureSameFamily"):
            estimate(mixture, LinearEnergy(0.1), method)
        with pytest.raises(ValueError, match=r"base has a support for each element of its batch_shape \(3,\)"):
            estimate(uniform, LinearEnergy(0.1), method)
        with pytest.raises(TypeError, match="energy must be an Energy or a callable"):
            estimate(dist.Normal(0.0, 1.0), 3.0, method)
        with pytest.raises(ValueError, match="one number per batch element"):
            estimate(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda v: v, method)
