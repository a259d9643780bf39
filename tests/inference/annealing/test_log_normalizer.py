"""log Z of a tilted distribution by sequential Monte Carlo and by annealing in both directions."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Estimate, InferenceError, InferenceWarning, LinearEnergy, QuadraticEnergy
from pyro_ebm.energies import gaussian_log_normalizer
from pyro_ebm.estimates import BoundedEstimate
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer

METHODS = ["smc", "bridge", "ais"]
SIZE = {"smc": 2048, "bridge": 2048, "ais": 512}
# In standard errors. What 16 islands or groups tell is beyond 4 once in 900, what SMC's 8 tell beyond 5.4 as rarely.
SCORES = {"importance": 4.0, "qmc": 4.0, "smc": 5.4, "bridge": 4.0, "ais": 4.0}


def estimate(base, energy, method, **options):
    options = {"seed": 0, "num_samples": SIZE[method]} | options
    return log_normalizer(base, energy, method=method, **options)


def assert_right(method, found, truth, *, max_se=0.2):
    truth = torch.as_tensor(truth)
    assert found.value.shape == found.se.shape == truth.shape
    assert (found.se > 0).all() and (found.se < max_se).all()
    assert ((found.value - truth).abs() < SCORES[method] * found.se).all(), (found, truth)
    if isinstance(found, BoundedEstimate):
        assert (found.lower < truth).all() and (truth < found.upper).all(), (found, truth)
        assert (found.upper - found.lower < 1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [LinearEnergy([2.0, -2.0, 1.0]), QuadraticEnergy(3.0)], ids=["linear", "quadratic"])
def test_gaussian_base(method, energy):
    loc, scale = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([0.5, 1.0, 1.5])
    found = estimate(dist.Normal(loc, scale).to_event(1), energy, method)
    assert_right(method, found, gaussian_log_normalizer(energy, loc, scale).detach())
    value, se = found
    assert isinstance(found, Estimate) and value == found.value and se == found.se


@pytest.mark.parametrize("method", ["smc", "ais"])
def test_a_tilt_too_far_for_importance_sampling(method):
    a = torch.full((8,), 5.0 / math.sqrt(8))
    base = dist.Normal(torch.zeros(8), 1.0).to_event(1)
    with pytest.raises(InferenceError, match="Pareto k"):
        log_normalizer(base, LinearEnergy(a), seed=0, strict=True)
    assert_right(method, estimate(base, LinearEnergy(a), method), 12.5)


@pytest.mark.parametrize("method", METHODS)
def test_scalar_and_constrained_bases(method):
    assert_right(method, estimate(dist.Gamma(torch.tensor(2.0), 2.0), LinearEnergy(1.0), method), math.log(4.0))
    # Of a plate: one number for all its elements, the distribution of one
    assert_right(method, estimate(dist.Gamma(2.0, 2.0).expand([3, 2]), LinearEnergy(1.0), method), math.log(4.0))


@pytest.mark.parametrize("method", METHODS)
def test_one_number_for_all_elements_or_one_for_each(method):
    energy = LinearEnergy([1.5, -1.0])
    same = dist.Normal(torch.zeros(4, 2), torch.ones(4, 2)).to_event(1)
    assert_right(method, estimate(same, energy, method), 0.5 * (1.5**2 + 1))
    loc = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]])
    truth = gaussian_log_normalizer(energy, loc, torch.tensor(0.5)).detach()
    assert_right(method, estimate(dist.Normal(loc, 0.5).to_event(1), energy, method), truth)
    with pytest.raises(ValueError, match=r"one batch dimension where .* differ, got batch_shape \(1, 3\)"):
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
    known = r"\('importance', 'qmc', 'smc', 'bridge', 'ais'\)"
    with pytest.raises(ValueError, match=f"method must be one of {known}, got 'mcmc'"):
        log_normalizer(dist.Normal(0.0, 1.0), LinearEnergy(1.0), method="mcmc")
    uniform = dist.Uniform(torch.zeros(3), torch.ones(3))
    for method in METHODS:
        with pytest.raises(ValueError, match=f'{method}.* needs a continuous base .*, got Poisson; use method="impo'):
            estimate(dist.Poisson(3.0), LinearEnergy(0.1), method)
        with pytest.raises(ValueError, match=r"base has a support for each element of its batch_shape \(3,\)"):
            estimate(uniform, LinearEnergy(0.1), method)
        with pytest.raises(TypeError, match="energy must be an Energy or callable"):
            estimate(dist.Normal(0.0, 1.0), 3.0, method)
        with pytest.raises(ValueError, match="one number per batch element"):
            estimate(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda v: v, method)


# Every estimator on the oracles, up to 64 dimensions, at the strength each is meant for

DIMS = (2, 8, 32, 64)
SHIFT = {"importance": 1.0, "qmc": 1.0, "smc": 3.0, "bridge": 2.5, "ais": 3.0}


def oracle(method, shape, dim):
    """A shift by ``SHIFT`` standard deviations, or a curvature that is as hard."""
    shift = SHIFT[method]
    energy = {"linear": LinearEnergy(torch.full((dim,), shift / math.sqrt(dim))),
              "quadratic": QuadraticEnergy(shift / math.sqrt(dim))}[shape]  # fmt: skip
    return energy, float(gaussian_log_normalizer(energy, torch.zeros(dim), torch.ones(dim)).detach())


def agrees(method, shape, dim, seed):
    """Within 4 of its own standard errors; SMC, whose islands are few, within as many as are as improbable."""
    energy, truth = oracle(method, shape, dim)
    num = {"importance": 8192, "qmc": 8192, "smc": 2048, "bridge": 2048, "ais": 256}[method]
    found = log_normalizer(
        dist.Normal(torch.zeros(dim), 1.0).to_event(1), energy, method=method, num_samples=num, seed=seed, strict=True
    )
    assert 0 < found.se < 0.2 and abs(found.value - truth) < SCORES[method] * found.se, (found, truth)
    if method == "ais":
        assert found.lower < truth < found.upper


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", ["linear", "quadratic"])
@pytest.mark.parametrize("method", ["importance", "qmc"])
def test_draws_of_the_base_agree_with_the_oracle(method, shape, dim):
    agrees(method, shape, dim, seed=0)


@pytest.mark.parametrize("method, shape, dim", [("smc", "linear", 8), ("bridge", "quadratic", 8), ("ais", "linear", 2)])
def test_annealed_estimates_agree_with_the_oracle(method, shape, dim):
    agrees(method, shape, dim, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", ["linear", "quadratic"])
@pytest.mark.parametrize("method", METHODS)
def test_annealed_estimates_agree_with_the_oracle_up_to_64_dimensions(method, shape, dim):
    agrees(method, shape, dim, seed=0)


@pytest.mark.parametrize("dim", DIMS)
def test_importance_says_where_it_is_lost(dim):
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    energy = LinearEnergy(torch.full((dim,), 6.0 / math.sqrt(dim)))
    with pytest.warns(InferenceWarning, match="Pareto k = .* > 0.7"):
        log_normalizer(base, energy, seed=0)


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")  # what is shown is why it warns
def test_the_bridge_is_sharper_than_importance():
    energy = LinearEnergy([2.0, 2.0])
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    bridged = estimate(base, energy, "bridge")
    assert_right("bridge", bridged, 4.0)
    plain = torch.stack([log_normalizer(base, energy, num_samples=2048, seed=seed).value for seed in range(50)])
    assert bridged.se < 0.7 * (plain - 4.0).square().mean().sqrt()


def test_a_bridge_without_ends_that_meet():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.warns(InferenceWarning, match="bridge: the base and the tilt hardly overlap .* method=.ais."):
        estimate(base, LinearEnergy([8.0, 0.0]), "bridge")
    with pytest.raises(InferenceError, match="hardly overlap"):
        estimate(base, LinearEnergy([8.0, 0.0]), "bridge", strict=True)
