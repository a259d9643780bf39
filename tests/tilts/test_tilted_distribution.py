"""TiltedDistribution: a normalized density, draws from it, and its place inside Pyro models."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_ebm import (
    InferenceWarning,
    LinearEnergy,
    MLPEnergy,
    Normalizer,
    QuadraticEnergy,
    TiltedDistribution,
)
from pyro_ebm.chain_statistics import mcse_mean
from pyro_ebm.energies import gaussian_log_normalizer
from pyro_ebm.estimates import importance_estimate

A = torch.tensor([0.8, -0.5])


def standard(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def double_well(value):
    """Bimodal and skewed: a wrong sign shows."""
    return (value.square() - 1).square().sum(-1) - 0.5 * value.sum(-1)


class Well(QuadraticEnergy):
    def forward(self, value):
        return double_well(value)


# log_prob


@pytest.mark.parametrize("energy", [Well(0.0), LinearEnergy([0.7]), MLPEnergy(1, hidden=(8,))])
def test_log_prob_integrates_to_one_in_one_dimension(energy):
    tilted = TiltedDistribution(standard(1), energy, normalizer=Normalizer("qmc", 4096))
    grid = torch.linspace(-8, 8, 4001)[:, None]
    log_prob = tilted.log_prob(grid).detach()
    assert log_prob.shape == (4001,)
    mass = torch.trapezoid(log_prob.exp(), grid[:, 0])
    assert abs(mass.log()) < 2e-3


def test_log_prob_integrates_to_one_in_two_dimensions():
    tilted = TiltedDistribution(standard(), double_well, normalizer=Normalizer("qmc", 4096))
    axis = torch.linspace(-6, 6, 401)
    grid = torch.cartesian_prod(axis, axis)
    mass = tilted.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass.log()) < 5e-3


def test_importance_normalizer_is_within_its_standard_error():
    for seed in range(5):
        settings = Normalizer(num_samples=4096, seed=seed)
        tilted = TiltedDistribution(standard(), LinearEnergy(A), normalizer=settings)
        z = torch.randn(7, 2)
        error = tilted.log_prob(z) - dist.Normal(A, 1.0).to_event(1).log_prob(z)
        torch.testing.assert_close(error, error[0].expand(7))
        assert abs(error[0].detach()) < 4 * tilted.log_normalizer(num_samples=4096, seed=0).se


def test_unnormalized_log_prob():
    energy = MLPEnergy(2, hidden=(4,))
    tilted = TiltedDistribution(standard(), energy)
    z = torch.randn(3, 4, 2)
    torch.testing.assert_close(tilted.unnormalized_log_prob(z), standard().log_prob(z) - energy(z))
    difference = tilted.unnormalized_log_prob(z) - tilted.log_prob(z)
    torch.testing.assert_close(difference, difference[0, 0].expand(3, 4))


def test_log_normalizer_is_an_estimate_with_its_error():
    for method in ("importance", "qmc"):
        tilted = TiltedDistribution(standard(), LinearEnergy(A), normalizer=method)
        value, se = tilted.log_normalizer(seed=0)
        assert 0 < se < 0.05 and abs(value - 0.5 * A.square().sum()) <= 4 * se
    with pytest.warns(InferenceWarning, match="Pareto k"):
        TiltedDistribution(standard(), QuadraticEnergy(-1.5)).log_normalizer(seed=0)


def test_zero_energy_is_the_base(rng_untouched):
    z = torch.randn(5, 2)
    for normalizer in ("importance", "qmc", Normalizer(num_samples=1000)):
        tilted = TiltedDistribution(standard(), QuadraticEnergy(0.0), normalizer=normalizer)
        with rng_untouched():
            assert torch.equal(tilted.log_prob(z), standard().log_prob(z))
    skewed = dist.Categorical(torch.tensor([0.13, 0.29, 0.58]))
    k = torch.tensor([0, 1, 2])
    assert torch.equal(TiltedDistribution(skewed, LinearEnergy(0.0)).log_prob(k), skewed.log_prob(k))


def test_per_datum_base():
    loc, scale = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 0.5]]), torch.tensor([0.5, 1.0])
    energy = LinearEnergy(A)
    tilted = TiltedDistribution(
        dist.Normal(loc, scale).to_event(1), energy, normalizer=Normalizer("qmc", 2048)
    )
    assert tilted.batch_shape == (3,) and tilted.event_shape == (2,)
    z = torch.randn(4, 3, 2)
    expected = dist.Normal(loc + A * scale**2, scale).to_event(1).log_prob(z)
    assert (tilted.log_prob(z) - expected).detach().abs().max() < 0.05
    value, se = tilted.log_normalizer(seed=0)
    assert value.shape == (3,)
    assert ((value - gaussian_log_normalizer(energy, loc, scale)).detach().abs() <= 4 * se).all()


def test_scalar_event():
    tilted = TiltedDistribution(dist.Normal(torch.zeros(3), 1.0), LinearEnergy(0.5), normalizer="qmc")
    assert tilted.batch_shape == (3,) and tilted.event_shape == ()
    x = torch.linspace(-1, 1, 3)
    assert (tilted.log_prob(x) - dist.Normal(0.5, 1.0).log_prob(x)).detach().abs().max() < 0.05
    assert tilted.sample((5,)).shape == (5, 3)


def test_discrete_base_is_exact():
    p, b = torch.tensor([0.2, 0.7]), 0.8
    tilted = TiltedDistribution(dist.Bernoulli(p), LinearEnergy(b))
    q = p * math.exp(b) / (1 - p + p * math.exp(b))
    for value in (torch.zeros(2), torch.ones(2)):
        torch.testing.assert_close(tilted.log_prob(value), dist.Bernoulli(q).log_prob(value))
    draws = tilted.sample((4000,))
    # draws share a pool of 16 candidates each, which adds at most a tenth to the standard error here
    assert ((draws.mean(0) - q).abs() <= 4 * 1.1 * (q * (1 - q) / 4000).sqrt()).all()


# log Z is as fresh as the weights


def test_log_z_follows_energy_and_base():
    energy, loc = LinearEnergy([0.3]), nn.Parameter(torch.zeros(1))
    tilted = TiltedDistribution(dist.Normal(loc, 1.0).to_event(1), energy, normalizer="qmc")
    z = torch.zeros(1)
    with torch.no_grad():
        # log N(z; loc + a, 1)
        for a, m in ((0.3, 0.0), (0.6, 0.0), (0.6, 1.0), (-0.6, 1.0)):
            energy.a.fill_(a)
            loc.data.fill_(m)
            for _ in range(2):
                expected = dist.Normal(m + a, 1.0).log_prob(torch.tensor(0.0))
                fresh = TiltedDistribution(tilted.base, energy, normalizer="qmc")
                assert torch.equal(tilted.log_prob(z), fresh.log_prob(z))
                assert abs(tilted.log_prob(z) - expected) < 0.05
    assert tilted.log_prob(z).requires_grad  # what was kept without gradient is not used with it
    hidden = torch.tensor(0.3)
    tilted = TiltedDistribution(standard(1), lambda value: -(hidden * value).sum(-1), normalizer="qmc")
    before = tilted.log_prob(z)
    hidden.fill_(1.0)
    assert abs(before - tilted.log_prob(z) - 0.5 * (1 - 0.09)) < 0.1


def test_log_prob_repeats_exactly_and_can_be_differentiated_twice(rng_untouched):
    tilted = TiltedDistribution(standard(), MLPEnergy(2, hidden=(4,)))
    z = torch.randn(3, 2)
    with rng_untouched():
        first, second = tilted.log_prob(z), tilted.log_prob(z)
        assert torch.equal(first, second)
        first.sum().backward()
        second.sum().backward()


def test_gradients_are_those_of_the_normalized_density():
    a, loc = A.clone(), torch.tensor([0.3, -0.2], requires_grad=True)
    found, z = [], torch.tensor([1.0, 2.0])
    for seed in range(16):
        energy = LinearEnergy(a)
        base = dist.Normal(loc, 1.0).to_event(1)
        log_prob = TiltedDistribution(
            base, energy, normalizer=Normalizer(num_samples=2048, seed=seed)
        ).log_prob(z)
        found.append(torch.cat(torch.autograd.grad(log_prob, [energy.a, loc])))
    mean, se = torch.stack(found).mean(0), torch.stack(found).std(0) / 4
    expected = (z - loc - a).detach()  # of log N(z; loc + a, I), with respect to both
    assert ((mean - torch.cat([expected, expected])).abs() <= 4 * se + 2 / 2048).all()


# sample


def moments_within(draws, mean, variance, ess_fraction):
    n = len(draws)
    slack = math.sqrt(1 + 1 / (16 * ess_fraction))  # the pool of 16 candidates per draw is itself a sample
    se = (variance / n).sqrt() * slack
    assert ((draws.mean(0) - mean).abs() <= 4 * se).all()
    se_variance = variance * math.sqrt(2 / n) * slack
    assert ((draws.var(0) - variance).abs() <= 4 * se_variance).all()
    correlation = torch.corrcoef(draws.T)[0, 1]
    assert abs(correlation) <= 4 / math.sqrt(n) * slack


@pytest.mark.parametrize("seed", [0, 1])
def test_sample_moments(seed):
    torch.manual_seed(seed)
    draws = TiltedDistribution(standard(), LinearEnergy(A)).sample((4000,))
    moments_within(draws, A, torch.ones(2), math.exp(-float(A.square().sum())))
    draws = TiltedDistribution(standard(), QuadraticEnergy(2.0)).sample((4000,))
    moments_within(draws, torch.zeros(2), torch.full((2,), 1 / 3), 0.5)


def test_sample_of_a_bimodal_law_against_a_grid():
    tilted = TiltedDistribution(standard(1), double_well)
    draws = tilted.sample((4000,))[:, 0]
    grid = torch.linspace(-8, 8, 4001)
    weight = (tilted.unnormalized_log_prob(grid[:, None])).softmax(0)
    positive = weight[grid > 0].sum()
    assert abs((draws > 0).float().mean() - positive) <= 4 * 1.1 * (positive * (1 - positive) / 4000).sqrt()
    mean = (weight * grid).sum()
    assert abs(draws.mean() - mean) <= 4 * 1.1 * ((weight * (grid - mean) ** 2).sum() / 4000).sqrt()


def test_sample_shapes_batches_and_chunks(monkeypatch):
    loc = torch.tensor([[0.0, 0.0], [5.0, -5.0], [10.0, 0.0]])
    tilted = TiltedDistribution(dist.Normal(loc, 1.0).to_event(1), LinearEnergy(A))
    assert tilted.sample().shape == (3, 2)
    assert tilted.sample((0,)).shape == (0, 3, 2)
    assert tilted.sample((2, 4)).shape == (2, 4, 3, 2)
    monkeypatch.setattr("pyro_ebm.tilts.distribution._MAX_POOL", 1000)  # several chunks
    draws = tilted.sample((800,))
    assert draws.shape == (800, 3, 2) and not draws.requires_grad
    slack = math.sqrt(1 + math.exp(float(A.square().sum())) / 16)
    assert ((draws.mean(0) - loc - A).abs() <= 4 * slack / math.sqrt(800)).all()
    assert len(draws.flatten(1).unique(dim=0)) > 700


def test_batch_elements_are_drawn_independently():
    draws = TiltedDistribution(standard(1).expand([2]), LinearEnergy([0.5])).sample((4000,))[..., 0]
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 4.5 / math.sqrt(4000)
    assert ((draws.mean(0) - 0.5).abs() < 4.5 / math.sqrt(4000)).all()


def test_a_far_tilt_warns():
    far = TiltedDistribution(standard(), LinearEnergy([8.0, 0.0]))
    with pytest.warns(InferenceWarning, match=r"of 1024 candidates .* effective ones .* mostly copies.*MCMC"):
        far.sample((10,))


# Shapes


def test_expand():
    energy = LinearEnergy(A)
    tilted = TiltedDistribution(standard(), energy, normalizer=Normalizer("qmc", 512))
    expanded = tilted.expand([4, 3])
    assert isinstance(expanded, TiltedDistribution)
    assert expanded.batch_shape == (4, 3) and expanded.event_shape == (2,)
    assert expanded.energy is energy and expanded.normalizer == tilted.normalizer
    z = torch.randn(4, 3, 2)
    torch.testing.assert_close(expanded.log_prob(z), tilted.log_prob(z))
    assert expanded.sample((5,)).shape == (5, 4, 3, 2)
    assert TiltedDistribution(dist.Normal(torch.zeros(3), 1.0), LinearEnergy(0.2)).to_event(
        1
    ).event_shape == (3,)


@pytest.mark.parametrize("validate", [True, False])
def test_validate_args(validate):
    base = dist.Gamma(2.0, 2.0, validate_args=False)
    tilted = TiltedDistribution(base, QuadraticEnergy(0.1, event_dim=0), validate_args=validate)
    for each in (tilted, tilted.expand([3])):
        outside = torch.full(each.batch_shape, -1.0)
        if validate:
            with pytest.raises(ValueError, match="within the support"):
                each.log_prob(outside)
        else:
            each.log_prob(outside)
    if validate:
        with pytest.raises(ValueError, match="Value is not broadcastable"):
            tilted.expand([3]).log_prob(torch.ones(2))
    assert tilted.support is base.support


def test_tilting_a_tilted_distribution():
    once = TiltedDistribution(standard(1), LinearEnergy([0.5]), normalizer="qmc")
    twice = TiltedDistribution(once, LinearEnergy([0.3]), normalizer=Normalizer(num_samples=4096))
    z = torch.linspace(-1, 1, 5)[:, None]
    expected = dist.Normal(0.8, 1.0).log_prob(z[:, 0])
    assert (twice.log_prob(z) - expected).detach().abs().max() < 4 * 0.3 / math.sqrt(4096) + 0.01


def test_deepcopy():
    tilted = TiltedDistribution(standard(), MLPEnergy(2, hidden=(4,)))
    z = torch.randn(3, 2)
    assert torch.equal(copy.deepcopy(tilted).log_prob(z), tilted.log_prob(z))


# Inside models


def test_in_a_plate_the_elbo_of_the_exact_guide_is_log_z_error():
    n, energy = 6, LinearEnergy(A)

    def model():
        with pyro.plate("data", n):
            pyro.sample("z", TiltedDistribution(standard(), energy, normalizer=Normalizer("qmc", 4096)))

    def guide():
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(A, 1.0).to_event(1))

    for vectorize in (False, True):
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        assert abs(elbo.loss(model, guide)) < n * 0.05
    trace = poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (n, 2)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (n,)


@pytest.mark.uses_param_store
def test_stock_svi_learns_energy_and_base():
    target, data = torch.tensor([1.0]), 1.0 + torch.randn(300, 1)

    def model(z):
        pyro.module("energy", energy)
        with pyro.plate("data", len(z)):
            pyro.sample("z", TiltedDistribution(standard(1), energy, normalizer="qmc"), obs=z)

    energy = LinearEnergy([0.0])
    svi = SVI(model, lambda z: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(80)]
    assert losses[-1] < losses[0] - 0.25 * 300 * float(target.square().sum())
    assert abs(energy.a.detach() - data.mean()) < 0.05


def test_local_tilt_renormalizes_for_each_parent():
    """p(y | mu) exp(a y) / Z(mu) leaves mu's distribution alone: y is N(mu + a, 1), mu stays N(0, 1)."""

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        base = dist.Normal(mu, 1.0).to_event(1)
        return pyro.sample(
            "y", TiltedDistribution(base, LinearEnergy([0.5]), normalizer=Normalizer("qmc", 256))
        )

    draws = Predictive(model, num_samples=400)()
    mu, y = draws["mu"][:, 0], draws["y"][:, 0]
    assert abs(mu.mean()) < 4 / 20 and abs((y - mu).mean() - 0.5) < 4 / 20
    values = {"mu": torch.tensor([0.7]), "y": torch.tensor([-0.2])}
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace()
    expected = dist.Normal(0.0, 1.0).log_prob(values["mu"]) + dist.Normal(1.2, 1.0).log_prob(values["y"])
    assert abs(trace.log_prob_sum().detach() - expected) < 0.05


def test_stock_nuts():
    tilted = TiltedDistribution(
        standard(), LinearEnergy(A).requires_grad_(False), normalizer=Normalizer("qmc", 256)
    )
    kernel = NUTS(lambda: pyro.sample("z", tilted), max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples(group_by_chain=True)["z"]
    se = torch.as_tensor(mcse_mean(z))
    assert (se < 0.3).all() and ((z.mean((0, 1)) - A).abs() <= 4 * se).all()


# Errors


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_log_prob_raises_where_log_z_is_not_finite(bad):
    tilted = TiltedDistribution(standard(), lambda value: torch.where(value[..., 0] > 0, bad, 0.0))
    z = -torch.ones(2)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="log Z of this TiltedDistribution is not finite.*unnormalized_log_prob"
        ):
            tilted.log_prob(z)
    assert tilted.unnormalized_log_prob(z).isfinite()


def test_errors():
    with pytest.raises(TypeError, match="energy must be an Energy or callable"):
        TiltedDistribution(standard(), 1.0)
    with pytest.raises(ValueError, match="normalizer must be one of"):
        TiltedDistribution(standard(), LinearEnergy(A), normalizer="mcmc")
    wrong = TiltedDistribution(standard(), lambda value: value)
    for use in (wrong.log_prob, wrong.unnormalized_log_prob, lambda z: wrong.sample((3,))):
        with pytest.raises(ValueError, match="energy of TiltedDistribution must return one number per batch"):
            use(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="inverse cdf"):
        TiltedDistribution(dist.Gamma(2.0, 2.0), LinearEnergy(0.1), normalizer="qmc").log_prob(
            torch.tensor(1.0)
        )


def test_effective_size_used_by_the_warning():
    """The delta-method error of log Z over draws is what the pool's check reads as ESS."""
    log_weights = torch.randn(5000)
    se = importance_estimate(log_weights).se
    ess = 5000 / (1 + (se * math.sqrt(5000)) ** 2)
    kish = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
    torch.testing.assert_close(ess, kish, rtol=1e-2, atol=0)
