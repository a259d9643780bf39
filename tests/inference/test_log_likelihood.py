"""log_likelihood against the exact log p(x) of linear Gaussian models, tilted or not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    VAE,
    Estimate,
    InferenceWarning,
    LinearEnergy,
    QuadraticEnergy,
    log_likelihood,
    log_normalizer,
    tilt,
)
from pyro_ebm.inference.importance import posterior_draws

W = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.6]])
NOISE = 0.5


def linear(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)


def posterior(x, mean=None, covariance=None):
    """Mean and covariance of z given x, for z ~ N(mean, covariance)."""
    mean = torch.zeros(2) if mean is None else mean
    covariance = torch.eye(2) if covariance is None else covariance
    precision = torch.linalg.inv(covariance) + W @ W.T / NOISE**2
    spread = torch.linalg.inv(precision)
    return (x @ W.T / NOISE**2 + torch.linalg.solve(covariance, mean)) @ spread, spread


def wide_guide(x):
    loc, spread = posterior(x)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(loc, 1.5 * spread.diagonal().sqrt()).to_event(1))


def exact(x, mean=None, covariance=None):
    mean = torch.zeros(2) if mean is None else mean
    covariance = torch.eye(2) if covariance is None else covariance
    marginal = W.T @ covariance @ W + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(mean @ W, marginal).log_prob(x)


NOTHING = Estimate(torch.tensor(0.0), torch.tensor(0.0))  # for log Z: a density up to a constant


def data(n=20):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=generator)
    return z @ W + NOISE * torch.randn(n, 3, generator=generator)


def covered(found, truth):
    scores = (found.value - truth) / found.se
    assert (scores.abs() < 4).all(), scores.tolist()
    assert (found.se < 0.2).all()
    return scores


def test_untilted_linear_gaussian():
    x = data()
    found = log_likelihood(linear, wide_guide, x, num_samples=2000, seed=0)
    assert all(field.shape == (20,) for field in found)
    scores = covered(found, exact(x))
    assert 0.4 < float((scores**2).mean()) < 2.5  # the error is neither too large nor too small (19 dof)
    assert (found.pareto_k < 0.7).all()
    assert (found.ess > 500).all() and (found.ess < 2000).all()


def test_exact_posterior_as_guide_is_exact():
    def guide(x):
        loc, spread = posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, spread))

    x = data(5)
    found = log_likelihood(linear, guide, x, num_samples=50, seed=0)
    torch.testing.assert_close(found.value, exact(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.ess, torch.full((5,), 50.0), rtol=1e-2, atol=0.0)


def test_tilted_linear_gaussian():
    a = torch.tensor([1.0, -0.5])
    x = data()
    found = log_likelihood(tilt(linear, {"z": LinearEnergy(a)}), wide_guide, x, num_samples=2000, seed=0)
    covered(found, exact(x, mean=a))


def test_quadratic_tilt():
    x = data()
    found = log_likelihood(tilt(linear, {"z": QuadraticEnergy(1.5)}), wide_guide, x, num_samples=2000, seed=0)
    covered(found, exact(x, covariance=torch.eye(2) / 2.5))


def test_error_of_log_z_is_included():
    a = torch.tensor([1.0, -0.5])

    def guide(x):
        loc, spread = posterior(x, mean=a)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, spread))

    x = data(3)
    found = log_likelihood(tilt(linear, {"z": LinearEnergy(a)}), guide, x, num_samples=50, seed=0)
    expected = math.sqrt(math.exp(1.25) - 1) / math.sqrt(100_000)  # that of 100,000 draws of the prior
    torch.testing.assert_close(found.se, torch.full((3,), expected), rtol=0.2, atol=0.0)
    covered(found, exact(x, mean=a))


def test_the_mean_counts_the_error_of_log_z_once():
    a, x = torch.tensor([1.0, -0.5]), data(8)
    found = log_likelihood(tilt(linear, {"z": LinearEnergy(a)}), wide_guide, x, num_samples=400, seed=0)
    alone = log_likelihood(linear, wide_guide, x, num_samples=400, seed=0)
    assert (alone.log_z_se == 0).all() and (found.log_z_se > 0).all()
    value, se = alone.mean()
    assert value == alone.value.mean()
    torch.testing.assert_close(se, alone.se.square().sum().sqrt() / 8)
    value, se = found.mean()
    own = (found.se**2 - found.log_z_se**2).sum() / 64
    torch.testing.assert_close(se, (own + found.log_z_se[0] ** 2).sqrt())
    assert abs(value - exact(x, mean=a).mean()) < 4 * se


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")  # few draws
def test_errors_of_the_mean_are_neither_too_small_nor_too_large():
    a, x = torch.tensor([0.8, -0.5]), data(5)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    scores = []
    for seed in range(40):  # a log Z whose error dominates: without it scores would be many times larger
        log_z = log_normalizer(base, LinearEnergy(a), num_samples=400, seed=seed)
        model = tilt(linear, {"z": LinearEnergy(a)}, normalize=False)
        value, se = log_likelihood(model, wide_guide, x, num_samples=400, log_z=log_z, seed=seed).mean()
        scores.append((value - exact(x, mean=a).mean()) / se)
    # Chi squared with 40 degrees of freedom, over 40: standard deviation 0.22
    assert 0.35 < float(torch.stack(scores).square().mean()) < 2.0


def test_log_z_from_elsewhere():
    """A tilt so far that draws of the base miss it: they warn, and annealing knows better."""
    a, x = torch.tensor([3.5, -3.5]), data(3) + 3
    model = tilt(linear, {"z": LinearEnergy(a)})
    with pytest.warns(InferenceWarning, match="the estimate of log Z is not reliable"):
        log_likelihood(model, wide_guide, x, num_samples=50, seed=0)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    log_z = log_normalizer(base, LinearEnergy(a), method="ais", num_samples=256, seed=0)
    unnormalized = log_likelihood(model, wide_guide, x, num_samples=500, log_z=NOTHING, seed=0)
    found = log_likelihood(model, wide_guide, x, num_samples=500, log_z=log_z, seed=0)
    torch.testing.assert_close(found.value, unnormalized.value - log_z.value)
    torch.testing.assert_close(found.se, (unnormalized.se**2 + log_z.se**2).sqrt())
    assert (found.log_z_se == log_z.se).all()


def test_log_z_that_does_not_belong():
    x, log_z = data(2), Estimate(torch.tensor(0.6), torch.tensor(0.1))
    energy = {"z": LinearEnergy([1.0, -0.5])}
    with pytest.raises(ValueError, match="log_z is given, but the model is not tilted"):
        log_likelihood(linear, wide_guide, x, log_z=log_z)
    with pytest.raises(ValueError, match="log_z is given twice"):
        log_likelihood(tilt(linear, energy, normalize=0.6), wide_guide, x, log_z=log_z)
    with pytest.raises(ValueError, match=r"log_z must be finite .* got \(nan, "):
        bad = Estimate(torch.tensor(math.nan), torch.tensor(0.1))
        log_likelihood(tilt(linear, energy), wide_guide, x, log_z=bad)


@pytest.mark.parametrize("normalize", [True, False, "qmc"])
def test_a_likelihood_is_normalized_whatever_the_tilt_leaves_out(normalize):
    """Log Z of these tilts is one number, and each of the data's own."""
    a, x = torch.tensor([1.0, -0.5]), data(6)

    def by_inputs(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x[..., :1].expand(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)

    for model in (linear, by_inputs):
        tilted = tilt(model, {"z": LinearEnergy(a)}, normalize=normalize)
        same = tilt(model, {"z": LinearEnergy(a)})
        found, expected = (log_likelihood(each, wide_guide, x, num_samples=50, seed=0) for each in (tilted, same))
        assert torch.equal(found.value, expected.value) and (found.log_z_se > 0).all()


def test_a_log_z_given_by_the_user_is_used():
    a = torch.tensor([1.0, -0.5])
    x = data(4)
    options = {"num_samples": 200, "seed": 0}
    free = log_likelihood(tilt(linear, {"z": LinearEnergy(a)}), wide_guide, x, log_z=NOTHING, **options)
    given = log_likelihood(tilt(linear, {"z": LinearEnergy(a)}, normalize=0.625), wide_guide, x, **options)
    torch.testing.assert_close(given.value, free.value - 0.625)
    assert torch.equal(given.se, free.se)


def test_log_z_for_each_datum_where_the_prior_depends_on_inputs():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x[..., :1].expand(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)

    a = torch.tensor([1.0, -0.5])
    x = data(6)
    found = log_likelihood(tilt(model, {"z": LinearEnergy(a)}), wide_guide, x, num_samples=2000, seed=0, batch_size=4)
    loc = x[:, :1].expand(6, 2) + a
    covered(found, torch.stack([exact(row, mean=mean) for row, mean in zip(x, loc, strict=True)]))


def test_posterior_draws_of_each_datum():
    a = torch.tensor([1.0, -0.5])
    x = data(6)
    model = tilt(linear, {"z": LinearEnergy(a)})
    values, log_weights = posterior_draws(model, wide_guide, x, num_samples=3000, seed=0, batch_size=4)
    assert values.keys() == {"z"} and values["z"].shape == (6, 3000, 2) and log_weights.shape == (6, 3000)
    w = log_weights.exp()[..., None]
    torch.testing.assert_close(w.sum(1), torch.ones(6, 1), atol=1e-4, rtol=0.0)
    loc, spread = posterior(x, mean=a)
    mean = (w * values["z"]).sum(1)
    se = ((w * (values["z"] - mean[:, None])) ** 2).sum(1).sqrt()
    assert ((mean - loc).abs() < 4 * se).all() and (se < 0.1).all()
    variance = (w * (values["z"] - mean[:, None]) ** 2).sum(1)
    torch.testing.assert_close(variance, spread.diagonal().expand(6, 2), rtol=0.25, atol=0.0)


def test_posterior_draws_in_chunks_and_by_seed(rng_untouched):
    x = data(5)
    num = 16384 // 5 + 1  # the last chunk is one draw
    with rng_untouched():
        first, again, other = (
            posterior_draws(linear, wide_guide, x, num_samples=num, seed=seed)[0]["z"] for seed in (1, 1, 2)
        )
    assert first.shape == (5, num, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batches_and_chunks_change_nothing_but_memory():
    x = data(7)
    whole = log_likelihood(linear, wide_guide, x, num_samples=3000, seed=0)
    parts = log_likelihood(linear, wide_guide, x, num_samples=3000, seed=0, batch_size=2)
    assert ((whole.value - parts.value).abs() < 4 * (whole.se**2 + parts.se**2).sqrt()).all()
    odd = log_likelihood(linear, wide_guide, x, num_samples=16384 // 7 + 1, seed=0)  # the last chunk is one draw
    covered(odd, exact(x))


def test_seed(rng_untouched):
    x = data(3)
    with rng_untouched():
        first = log_likelihood(linear, wide_guide, x, num_samples=20, seed=1)
        second = log_likelihood(linear, wide_guide, x, num_samples=20, seed=1)
        other = log_likelihood(linear, wide_guide, x, num_samples=20, seed=2)
    assert torch.equal(first.value, second.value) and not torch.equal(first.value, other.value)


def test_a_vae_is_evaluated_and_left_as_it_was():
    torch.manual_seed(0)
    drop = nn.Dropout(0.5)
    vae = VAE((6,), 2, hidden=(8,), decoder=nn.Sequential(drop, nn.Linear(2, 6)))
    x = torch.rand(3, 6)
    found = log_likelihood(vae.model, vae.guide, x, num_samples=500, seed=0)
    assert vae.training and drop.training
    z = vae.prior.sample((200_000,))
    drop.eval()
    with torch.no_grad():
        logs = vae.decode(z[:, None]).log_prob(x)
    truth = logs.logsumexp(0) - math.log(len(z))
    se = ((logs - truth).exp().var(0) / len(z)).sqrt()
    assert ((found.value - truth).abs() < 4 * (found.se**2 + se**2).sqrt()).all()


def test_bad_weights_are_visible():
    def narrow(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(posterior(x)[0], 0.02).to_event(1))

    with pytest.warns(InferenceWarning, match=r"draws of \d+ of 20 data .*effective sample size 1.7 of 1000"):
        assert log_likelihood(linear, narrow, data(20), num_samples=1000, seed=0).pareto_k.median() > 0.7


def test_models_it_is_not_for():
    def no_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    def shared(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w[..., None], 1.0).expand([*w.shape[:-1], len(x), 3]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide_of_shared(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one plate at dim -1, one row of x each, but the model has 0"):
        log_likelihood(no_plate, guide, data(3))
    with pytest.raises(ValueError, match=r"latent site\(s\) \['w'\] lie outside the plate of the data"):
        log_likelihood(shared, guide_of_shared, data(3))
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 2"):
        log_likelihood(linear, wide_guide, data(3), num_samples=1)


@pytest.mark.parametrize("given", [(None, torch.zeros(3, 2)), (torch.zeros(3, 2),)])
def test_without_a_guide_the_error_says_what_to_call(given):
    kind = type(given[0]).__name__
    with pytest.raises(TypeError, match=rf"got {kind} for guide\. Without one: to_arviz\(sample.*az\.loo"):
        log_likelihood(linear, *given)
