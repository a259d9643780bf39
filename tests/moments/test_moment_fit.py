"""fit_moments against closed forms, exact sums and grids; targets that nothing reaches."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import one_hot

from pyro_ebm import (
    VAE,
    InfeasibleError,
    InferenceError,
    InferenceWarning,
    LabelClassifier,
    LinearEnergy,
    MomentEnergy,
    QuadraticEnergy,
    TiltedDistribution,
    class_balance,
    digits,
    fit,
    fit_moments,
    quadrature,
)
from pyro_ebm.moments.feasibility import separation


def normal(dim):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def identity():
    return MomentEnergy(lambda z: z)


def powers():
    return MomentEnergy(lambda z: torch.stack([z, z**2], -1), names=["mean", "square"])


def within(value, truth, se, scores=4.5):
    # Errors with 15 or 31 degrees of freedom: 4.5 of them are as improbable as 4 of a normal distribution
    off = (torch.as_tensor(value) - torch.as_tensor(truth)).abs()
    assert (off <= scores * torch.as_tensor(se) + 1e-5).all(), (value, truth, se)


def assert_reached(found):
    """Means on fresh draws: their own error, and that of lambda, which is as large."""
    within(found.moments, found.target, math.sqrt(2) * found.moments_se)


# Exact answers


@pytest.mark.parametrize("method, dim", [("qmc", 2), ("importance", 4)])
def test_linear_features_shift_a_gaussian(method, dim):
    target = torch.tensor([0.8, -0.5, 0.2, 0.0])[:dim]
    energy = identity()
    found = fit_moments(normal(dim), energy, target, method=method, seed=0)
    within(found.multipliers, target, found.multipliers_se)
    within(found.kl.value, 0.5 * target.square().sum(), found.kl.se)
    assert_reached(found)
    assert torch.equal(energy.multipliers.detach(), found.multipliers) and found.method == method
    assert (found.multipliers_se < 0.05).all() and 0.2 < found.ess < 0.6 and found.pareto_k < 0.7


def test_mean_and_variance_make_another_gaussian():
    mean, variance = 0.5, 0.25
    found = fit_moments(dist.Normal(0.0, 1.0), powers(), [mean, variance + mean**2], seed=0)
    truth = torch.tensor([mean / variance, 0.5 - 0.5 / variance])
    within(found.multipliers, truth, found.multipliers_se)
    kl = 0.5 * (variance + mean**2 - 1 - math.log(variance))
    within(found.kl.value, kl, found.kl.se)
    assert (found.multipliers_se < 0.01).all() and found.kl.se < 0.01


def test_a_discrete_base_is_summed_exactly(rng_untouched):
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    values = torch.tensor([0.0, 1.0, 4.0, 9.0]).double()
    energy = MomentEnergy(lambda v: values[v][..., None])
    with rng_untouched():
        found = fit_moments(dist.Categorical(p), energy, 2.0, seed=0)
    tilted = (p.log() + found.multipliers * values).softmax(0)
    assert float(tilted @ values) == pytest.approx(2.0, abs=1e-6)
    assert found.kl.value.item() == pytest.approx(float((tilted * (tilted / p).log()).sum()), abs=1e-6)
    assert found.method == "exact" and found.kl.se == 0 and (found.moments_se == 0).all()


def test_shares_of_intervals_are_reweighted():
    """Indicators of a partition: mass q_c / p_c times the base in each cell, KL between the shares."""
    cuts = torch.tensor([-0.5, 0.7])
    energy = MomentEnergy(lambda z: one_hot(torch.bucketize(z, cuts), 3))
    q = torch.tensor([0.5, 0.3, 0.2])
    found = fit_moments(dist.Normal(0.0, 1.0), energy, q, seed=0)
    edges = dist.Normal(0.0, 1.0).cdf(torch.cat([cuts.new_tensor([-math.inf]), cuts, cuts.new_tensor([math.inf])]))
    p = edges.diff()
    truth = (q / p).log()
    within(found.multipliers, truth - truth.mean(), found.multipliers_se)  # the shortest of all equivalent ones
    within(found.kl.value, (q * (q / p).log()).sum(), found.kl.se)
    assert found.multipliers.sum().abs() < 1e-5 and (found.multipliers_se < 0.01).all()


def test_nothing_to_do_is_done_with_zero():
    energy = MomentEnergy(lambda z: z, [5.0, 5.0])
    found = fit_moments(normal(2), energy, [0.0, 0.0], seed=0)
    within(found.multipliers, torch.zeros(2), found.multipliers_se)
    assert found.kl.value.abs() < 1e-3 and energy.multipliers.abs().max() < 0.05


def test_moments_on_the_grid_are_those_asked_for():
    energy = MomentEnergy(lambda z: torch.stack([torch.tanh(3 * z[..., 0]), z.prod(-1)], -1))
    target = torch.tensor([0.4, 0.5])
    found = fit_moments(normal(2), energy, target, seed=0)
    exact = quadrature(TiltedDistribution(normal(2), energy))
    with torch.no_grad():
        features = energy.features(exact.flat("z"))
    moments = exact.weights @ features
    within(moments, target, found.moments_se)
    kl = found.multipliers @ target - exact.log_z.value
    within(found.kl.value, kl, found.kl.se)


def test_a_target_that_draws_of_the_base_never_see():
    target = torch.zeros(16)
    target[0] = 4.5
    found = fit_moments(normal(16), identity(), target, num_samples=4096, seed=0)
    assert found.method == "smc" and found.num_rounds >= 2 and found.ess > 0.3
    within(found.multipliers, target, found.multipliers_se, scores=5.5)
    within(found.kl.value, 4.5**2 / 2, found.kl.se, scores=5.5)
    within(found.moments, target, math.sqrt(2) * found.moments_se, scores=5.5)
    assert found.multipliers_se[0] < 0.2 and found.kl.se < 0.3


@pytest.mark.slow
def test_a_shift_by_five_in_32_dimensions():
    target = torch.zeros(32)
    target[0] = 5.0
    found = fit_moments(normal(32), identity(), target, seed=0)
    assert found.method == "smc"
    within(found.multipliers, target, found.multipliers_se, scores=5.5)
    within(found.kl.value, 12.5, found.kl.se, scores=5.5)


# Combined with a tilt learned elsewhere


def test_moments_hold_under_the_sum_of_both_energies():
    learned, energy = QuadraticEnergy(1.0) + LinearEnergy([0.5, 0.0]), identity()
    base = TiltedDistribution(normal(2), learned)  # N((1/4, 0), I / 2)
    target = torch.tensor([0.6, -0.3])
    found = fit_moments(base, energy, target, seed=0)
    shift = target - torch.tensor([0.25, 0.0])
    within(found.multipliers, 2 * shift, found.multipliers_se)
    within(found.kl.value, shift.square().sum(), found.kl.se)
    assert_reached(found)
    exact = quadrature(TiltedDistribution(normal(2), learned + energy))
    within(exact.mean("z"), target, found.moments_se)


def test_a_tilt_of_a_tilt_far_from_the_base():
    far = TiltedDistribution(TiltedDistribution(normal(8), LinearEnergy([2.0] + [0.0] * 7)), QuadraticEnergy(0.5))
    target = torch.tensor([3.5] + [0.0] * 7)  # from N((4/3, 0, ...), 2/3 I)
    found = fit_moments(far, identity(), target, num_samples=4096, seed=0)
    truth = 1.5 * (target - torch.tensor([4 / 3] + [0.0] * 7))
    assert found.method == "smc"
    within(found.multipliers, truth, found.multipliers_se, scores=5.5)
    within(found.kl.value, 0.75 * (3.5 - 4 / 3) ** 2, found.kl.se, scores=5.5)


# Targets that cannot be


def test_targets_no_law_can_have():
    die = dist.Categorical(torch.ones(6))
    faces = MomentEnergy(lambda v: (v + 1.0)[..., None], names=["face"])
    with pytest.raises(InfeasibleError, match=r"outside what any tilt .* 'face' is to be 7, its range is \[1, 6\]"):
        fit_moments(die, faces, 7.0)
    with pytest.raises(InfeasibleError, match=r"at the boundary of what .* 'face' is to be 6, its range is \[1, 6\]"):
        fit_moments(die, faces, 6.0)
    assert faces.multipliers is None  # a failed fit leaves it as it was
    pair = MomentEnergy(lambda v: torch.stack([v + 1.0, (v + 1.0) ** 2], -1))
    together = "feature 0 - 0.172 . feature 1 is to be 1.538 and is at most 1.452"
    with pytest.raises(InfeasibleError, match=f"outside what any tilt .* {together}"):
        fit_moments(die, pair, [3.0, 8.5])  # each alone is possible, a variance of -1/2 is not


def test_a_variance_below_zero_is_found_out_by_going_there():
    with pytest.raises(InfeasibleError, match=r"outside what any tilt .* 'square' is to be -1, its range is \["):
        fit_moments(dist.Normal(0.0, 1.0), powers(), [0.5, -1.0], num_samples=2048, seed=0)
    with pytest.raises(InfeasibleError, match="outside what any tilt .* 'square' is to be -1"):
        fit_moments(dist.Normal(0.0, 1.0), powers(), [0.5, -1.0], method="importance", seed=0)


def test_an_event_of_probability_one_lies_at_the_boundary():
    energy = MomentEnergy(lambda z: (z[..., :1] > 0.5).float(), names=["right"])
    with pytest.raises(InfeasibleError, match="at the boundary of what any tilt .* 'right' is to be 1"):
        fit_moments(normal(2), energy, [1.0], method="importance", seed=0)


def test_probabilities_must_sum_to_one():
    def soft(z):
        return (3 * z).softmax(-1)

    with pytest.raises(InfeasibleError, match=r"feature 0 \+ feature 1 \+ feature 2 is 1 at all .* makes it 1.1"):
        fit_moments(normal(3), MomentEnergy(soft), [0.2, 0.3, 0.6], seed=0)
    found = fit_moments(normal(3), MomentEnergy(soft), [0.2, 0.3, 0.5], seed=0)
    assert_reached(found)
    assert found.multipliers.sum().abs() < 1e-4
    with pytest.raises(InfeasibleError, match=r"outside what any tilt .* feature 0 is to be -0.1, its range"):
        fit_moments(normal(3), MomentEnergy(soft), [-0.1, 0.3, 0.8], method="importance", seed=0)


def test_constant_features():
    energy = MomentEnergy(lambda z: torch.stack([z, torch.full_like(z, 2.0)], -1))
    found = fit_moments(dist.Normal(0.0, 1.0), energy, [0.3, 2.0], seed=0)
    within(found.multipliers[0], 0.3, found.multipliers_se[0])
    assert found.multipliers[1] == 0
    with pytest.raises(InfeasibleError, match="feature 1 is 2 at all draws of the base, but the target makes it 3"):
        fit_moments(dist.Normal(0.0, 1.0), energy, [0.3, 3.0], seed=0)
    with pytest.raises(InfeasibleError, match="features do not vary under the base"):
        fit_moments(dist.Normal(0.0, 1.0), MomentEnergy(lambda z: torch.ones_like(z)[..., None]), 1.0, seed=0)


def test_separation():
    square = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]).double()
    direction, margin = separation(square)
    assert margin == pytest.approx(math.sqrt(2)) and (direction < 0).all()
    assert separation(square - 1.5)[1] == 0
    cloud = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).double()
    assert separation(cloud)[1] == 0
    away = cloud + torch.tensor([9.0, 0.0, 0.0, 0.0])
    direction, margin = separation(away)
    assert margin > 4 and margin == pytest.approx(-float((away @ direction).max())) and direction[0] < -0.9


# What is wrong with draws and arguments


def test_weights_that_cannot_be_trusted():
    options = {"method": "importance", "num_samples": 4096, "seed": 0}
    with pytest.warns(InferenceWarning, match="fit_moments: the weights are not reliable .* method='auto'"):
        fit_moments(normal(8), identity(), [2.5] + [0.0] * 7, **options)
    with pytest.raises(InferenceError, match="the weights are not reliable"):
        fit_moments(normal(8), identity(), [2.5] + [0.0] * 7, strict=True, **options)
    with pytest.raises(InfeasibleError, match="feature 0 is to be 9, its range"):
        fit_moments(normal(8), identity(), [9.0] + [0.0] * 7, **options)


def test_seeds(rng_untouched):
    with rng_untouched():
        one, two, other = (fit_moments(normal(2), identity(), [0.5, 0.0], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.multipliers, two.multipliers) and torch.equal(one.moments, two.moments)
    assert not torch.equal(one.multipliers, other.multipliers)


def test_double_precision():
    found = fit_moments(dist.Normal(torch.zeros(1).double(), 1.0).to_event(1), identity(), [0.3], seed=0)
    assert found.multipliers.dtype == found.kl.value.dtype == found.moments.dtype == torch.float64


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"energy": LinearEnergy(1.0)}, TypeError, r"energy must be a MomentEnergy, got LinearEnergy"),
        ({"target": [0.1, 0.2]}, ValueError, r"one value for each of the 1 features, shape \(1,\), got \(2,\)"),
        ({"target": math.nan}, ValueError, r"target must be a number, got nan"),
        ({"method": "newton"}, ValueError, r"method must be one of \('auto', .*\), got 'newton'"),
        ({"num_samples": 10}, ValueError, "num_samples must be a whole number of at least 640, got 10"),
        ({"base": dist.Normal(torch.arange(3.0), 1.0)}, ValueError, r"must be one distribution, got .*\(3,\)"),
        ({"base": dist.Poisson(3.0), "method": "smc"}, ValueError, "needs a continuous base, got Poisson"),
        ({"energy": MomentEnergy(lambda z: z.log()[..., None])}, ValueError, "features must be finite, got NaN"),
        ({"energy": MomentEnergy(lambda z: z)}, ValueError, "one number per batch element"),
    ],
)
def test_errors(change, error, message):
    arguments = {"base": dist.Normal(0.0, 1.0), "energy": MomentEnergy(lambda z: z[..., None]), "target": 0.3}
    with pytest.raises(error, match=message):
        fit_moments(**(arguments | change), seed=0)


# Features of the decoded value, from a classifier that knows no gradient


@pytest.fixture(scope="module")
def decoded_digits():
    data = digits(range(3))
    images, labels = data.images, data.labels
    biased = torch.cat([images[labels == c][:n] for c, n in ((0, 170), (1, 60), (2, 30))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAE((1, 8, 8), 2, hidden=(64,))
    fit(vae.model, vae.guide, biased, epochs=40, batch_size=64, validation=None, seed=0, progress=False)
    classifier = LabelClassifier.fit(images, labels)

    def probabilities(z):
        with torch.no_grad():
            decoded = vae.decode(z.reshape(-1, 2).to(torch.float32)).mean
        return classifier.predict_proba(decoded.reshape(-1, 1, 8, 8)).reshape(*z.shape[:-1], 3)

    return vae, probabilities


@pytest.mark.slow
def test_classifier_probabilities_of_decoded_digits(decoded_digits):
    vae, probabilities = decoded_digits
    energy = MomentEnergy(probabilities, names=["0", "1", "2"])
    before = probabilities(vae.prior.sample((2000,))).mean(0)
    found = fit_moments(vae.prior, energy, torch.full((3,), 1 / 3), num_samples=4096, seed=0)
    assert_reached(found)
    tilted = TiltedDistribution(vae.prior, energy)
    shares = class_balance(probabilities(tilted.sample((4000,))).argmax(-1), (0, 1, 2))
    assert 0.5 * (before - 1 / 3).abs().sum() > 0.15
    # Probabilities are held, labels counted: they differ where the classifier is unsure
    assert shares.tv() < 0.05 and 0 < found.kl.value < 1.5
