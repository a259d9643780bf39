"""The toy mixture: exact tilt, exact weights, and what learned tilts make of it."""

from __future__ import annotations

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_ebm import (
    GaussianMixture2D,
    InferenceError,
    LinearEnergy,
    MLPEnergy,
    MomentEnergy,
    Normalizer,
    QuadraticEnergy,
    TiltedDistribution,
    fit,
    fit_moments,
    log_normalizer,
    sample,
    tilt,
)

TOY = GaussianMixture2D()


def test_both_laws_are_mixtures_of_normals():
    x = torch.randn(50, 2) * 2
    for law, weights in ((TOY.balanced, [0.3, 0.4, 0.3]), (TOY.biased, [0.7, 0.2, 0.1])):
        parts = dist.Normal(TOY.locs, TOY.scale).to_event(1)
        truth = dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts)
        torch.testing.assert_close(law.log_prob(x), truth.log_prob(x))
        draws, num = law.sample((4000,)), 4000
        assert (((draws - truth.mean) / truth.stddev).mean(0).abs() < 4 / math.sqrt(num)).all()
        assert law.sample((3, 4)).shape == (3, 4, 2) and law.expand([5]).sample((2,)).shape == (2, 5, 2)


def test_samples_with_their_components(rng_untouched):
    with rng_untouched():
        x, labels = TOY.sample(4000, biased=True, seed=0)
        again, _ = TOY.sample(4000, biased=True, seed=0)
        balanced = TOY.sample(4000, biased=False, seed=1)[1]
    assert torch.equal(x, again)
    for found, share in ((labels, TOY.biased_weights), (balanced, TOY.weights)):
        counts = torch.bincount(found, minlength=3) / 4000
        assert ((counts - share).abs() < 4 * (share * (1 - share) / 4000).sqrt()).all()
    assert (TOY.responsibilities(x, biased=True).argmax(-1) == labels).float().mean() > 0.97


def test_the_exact_tilt_is_exact():
    x = 3 * torch.randn(200, 2)
    torch.testing.assert_close(TOY.biased.log_prob(x) - TOY.energy(x), TOY.balanced.log_prob(x))
    assert abs(float(TOY.log_z(TOY.energy))) < 1e-6
    torch.testing.assert_close(TOY.log_prob(x, TOY.energy), TOY.balanced.log_prob(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TOY.class_weights(TOY.energy), TOY.weights.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(TOY.class_weights(), TOY.biased_weights.double(), atol=1e-6, rtol=0)
    assert TOY.density_error(TOY.energy) == 0 and TOY.kl_from_balanced(TOY.energy) == 0


def test_the_grid_gives_log_z_and_divergences():
    a = torch.tensor([0.4, -0.3])
    logs = torch.tensor([0.7, 0.2, 0.1]).double().log() + (TOY.locs.double() @ a.double())
    truth = logs.logsumexp(0) + 0.5 * TOY.scale**2 * a.double().square().sum()
    assert float(TOY.log_z(LinearEnergy(a))) == pytest.approx(float(truth), abs=1e-6)
    # By Monte Carlo: both divergences between the distributions, and the distance
    x, y = TOY.biased.sample((20000,)), TOY.balanced.sample((20000,))
    ratio = TOY.energy(y)  # log biased - log balanced
    assert abs(TOY.kl(TOY.energy) + ratio.mean()) < 4 * ratio.std() / math.sqrt(20000)
    assert TOY.kl(TOY.energy) == pytest.approx(float(TOY.kl_from_balanced()), abs=1e-6)
    gap = 0.5 * (1 - (-TOY.energy(x)).exp()).abs()
    assert abs(TOY.density_error() - gap.mean()) < 4 * gap.std() / math.sqrt(20000)
    assert TOY.kl(QuadraticEnergy(0.0)) == pytest.approx(0.0, abs=1e-9)


def test_log_z_of_a_tilt_agrees_with_importance():
    energy = MLPEnergy(2, hidden=(16,))
    found = log_normalizer(TOY.biased, energy, seed=0)
    assert abs(found.value - TOY.log_z(energy)) < 4 * found.se + 1e-6


def test_the_model_can_be_tilted_and_sampled():
    draws = sample(tilt(TOY.model, {"x": TOY.energy}, normalize=0.0), method="snis", num_samples=4000, seed=0)
    shares = draws.weights @ TOY.responsibilities(draws.flat("x"))
    se = math.sqrt(0.25 / (0.4 * 4000))
    assert ((shares - TOY.weights).abs() < 4 * se).all()
    trace = poutine.trace(tilt(TOY.model, {"x": TOY.energy}, normalize=0.0)).get_trace(torch.zeros(7, 2))
    torch.testing.assert_close(trace.log_prob_sum(), 7 * TOY.balanced.log_prob(torch.zeros(2)))
    # A gradient sampler asks where the distribution lives
    found = log_normalizer(TOY.biased, QuadraticEnergy(0.5), method="smc", num_samples=1024, seed=0)
    assert abs(found.value - TOY.log_z(QuadraticEnergy(0.5))) < 5.5 * found.se


def test_the_log_ratio_as_a_feature_recovers_the_exact_tilt():
    energy = MomentEnergy(lambda x: -TOY.energy(x)[..., None])
    target = TOY.expectation(energy.features, TOY.energy)
    found = fit_moments(TOY.biased, energy, target, seed=0)
    assert abs(found.multipliers[0] - 1) < 4.5 * found.multipliers_se[0] and found.multipliers_se[0] < 0.1
    assert abs(found.kl.value - TOY.kl(TOY.energy)) < 4.5 * found.kl.se


def test_responsibilities_as_features_balance_the_classes():
    """The projection of least KL: its price is at most that of the exact tilt, by exactly what it misses."""
    energy = MomentEnergy(TOY.responsibilities)
    found = fit_moments(TOY.biased, energy, TOY.expectation(TOY.responsibilities, TOY.energy), seed=0)
    shares = TOY.class_weights(energy)
    assert ((shares - TOY.weights).abs() < 4.5 * found.moments_se + 1e-5).all()
    assert TOY.density_error(energy) < 0.1 * TOY.density_error()
    price, missed = TOY.kl(energy), TOY.kl_from_balanced(energy)
    slack = 4.5 * float((found.multipliers.abs() * found.moments_se).sum())
    assert abs(price + missed - TOY.kl(TOY.energy)) < slack < 0.1
    assert abs(found.kl.value - price) < 4.5 * found.kl.se


def learned(num, seed):
    x, _ = TOY.sample(num, biased=False, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        energy = MLPEnergy(2, hidden=(16, 16))
    model = tilt(TOY.model, {"x": energy}, normalize=Normalizer(num_samples=4096))
    fit(
        model, TOY.guide, x, objective=Trace_ELBO(), train=energy, epochs=150, batch_size=num, validation=None,
        optimizer=functools.partial(torch.optim.Adam, lr=0.02), seed=seed, progress=False,
    )  # fmt: skip
    return energy


@pytest.mark.slow
def test_maximum_likelihood_approaches_the_balanced_law_as_data_grow():
    few, many = learned(40, seed=0), learned(4000, seed=0)
    assert TOY.density_error(many) < 0.65 * TOY.density_error(few)
    assert TOY.kl_from_balanced(many) < 0.45 * TOY.kl_from_balanced(few)
    assert TOY.density_error(many) < 0.35 * TOY.density_error()
    assert (TOY.class_weights(many) - TOY.weights).abs().max() < 0.08


def test_a_tilt_that_cannot_be_normalized_is_found():
    with pytest.raises(InferenceError, match="not finite"):
        log_normalizer(TOY.biased, lambda x: -(x**2).sum(-1).exp().exp(), seed=0, strict=True)
    assert TiltedDistribution(TOY.biased, TOY.energy).sample((5,)).shape == (5, 2)


def test_errors():
    with pytest.raises(ValueError, match="weights must be 3 positive numbers that sum to one, got"):
        GaussianMixture2D(weights=(0.3, 0.3, 0.3))
    with pytest.raises(ValueError, match="biased_weights must be 3 positive numbers"):
        GaussianMixture2D(biased_weights=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"locs must have shape \(components, 2\), got \(3,\)"):
        GaussianMixture2D(locs=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="scale must be positive and finite, got 0"):
        GaussianMixture2D(scale=0)
