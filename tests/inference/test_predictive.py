"""predictive() against closed forms: a tilt is felt by every site, with and without draws."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from pyro_ebm import VAE, Draws, InferenceWarning, LinearEnergy, QuadraticEnergy, importance, predictive, tilt

NUM = 4000


def images(x=None, *, num_data=3):
    """Draws z ~ N(0, I_2), x = (z_1, z_2, z_1 + z_2) + noise."""
    size = num_data if x is None else len(x)
    with pyro.plate("data", size, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = torch.cat([z, z.sum(-1, keepdim=True)], -1)
        return pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def check(values, mean, std, inflation=1.0):
    """Each entry of the mean and of the standard deviation within 4 standard errors."""
    n = len(values) / inflation
    mean, std = torch.as_tensor(mean), torch.as_tensor(std)
    assert ((values.mean(0) - mean).abs() < 4 * std / math.sqrt(n)).all()
    assert ((values.std(0) - std).abs() < 4 * std / math.sqrt(2 * n)).all()


# Resampling with replacement makes copies: its draws are worth fewer, here by less than this factor.
COPIES = 2.0


def test_untilted_model_is_run_forward():
    found = predictive(images, num_samples=NUM, seed=0)
    assert set(found) == {"z", "x"}
    assert found["z"].shape == (NUM, 3, 2) and found["x"].shape == (NUM, 3, 3)
    check(found["z"], 0.0, 1.0)
    check(found["x"], 0.0, torch.tensor([1.25, 1.25, 2.25]).sqrt())
    check(found["x"][..., :2] - found["z"], 0.0, 0.5)


def test_observed_values_are_redrawn():
    found = predictive(images, torch.full((2, 3), 100.0), num_samples=500, seed=0)
    assert found["x"].shape == (500, 2, 3) and found["x"].max() < 20


def test_zero_energy_changes_nothing_but_the_order():
    found = predictive(tilt(images, {"z": LinearEnergy([0.0, 0.0])}), num_samples=NUM, seed=0)
    check(found["z"], 0.0, 1.0, COPIES)
    check(found["x"][..., :2] - found["z"], 0.0, 0.5, COPIES)


def test_tilted_prior_predictive():
    a = torch.tensor([0.8, -0.4])
    found = predictive(tilt(images, {"z": LinearEnergy(a)}), num_samples=NUM, seed=0)
    assert "z_tilt" not in found
    check(found["z"], a, 1.0, COPIES)
    check(found["x"], torch.cat([a, a.sum()[None]]), torch.tensor([1.25, 1.25, 2.25]).sqrt(), COPIES)
    check(found["x"][..., :2] - found["z"], 0.0, 0.5, COPIES)


def test_data_are_resampled_one_by_one():
    a = torch.tensor([0.8, -0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jointly, the weights of 40 data would collapse
        found = predictive(tilt(images, {"z": LinearEnergy(a)}), num_data=40, num_samples=1000, seed=0)
    assert found["z"].shape == (1000, 40, 2)
    scores = (found["z"].mean(0) - a) * math.sqrt(1000 / COPIES)
    assert scores.abs().max() < 4.5  # the largest of 80
    correlation = torch.corrcoef(found["z"][..., 0].T) - torch.eye(40)
    assert correlation.abs().max() < 6 / math.sqrt(1000)
    kept = found["x"][..., :2] - found["z"]  # each datum keeps its own x
    assert (kept.std(0) < 0.6).all()


def test_tilt_of_the_data_site():
    a = torch.tensor([0.4, 0.0, 0.3])
    covariance = torch.tensor([[1.25, 0.0, 1.0], [0.0, 1.25, 1.0], [1.0, 1.0, 2.25]])
    found = predictive(tilt(images, {"x": LinearEnergy(a)}), num_samples=NUM, seed=0)
    check(found["x"], covariance @ a, covariance.diagonal().sqrt(), 2 * COPIES)
    loading = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    check(found["z"], loading.T @ a, 1.0, 2 * COPIES)


def test_two_sites_in_nested_plates():
    def model():
        with pyro.plate("outer", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("v", dist.Normal(u, 1.0))

    found = predictive(tilt(model, {"u": LinearEnergy(0.3), "v": LinearEnergy(0.2)}), num_samples=NUM, seed=0)
    assert found["u"].shape == (NUM, 2, 1) and found["v"].shape == (NUM, 2, 3)
    # precision-form: u has variance 1, each v = u + noise; cov(u, v) = 1, cov(v, v') = 1 + [v is v']
    check(found["u"], 0.3 + 3 * 0.2, 1.0, 2 * COPIES)
    check(found["v"], 0.3 + 0.2 * (3 + 1), math.sqrt(2), 2 * COPIES)


def test_data_that_share_a_parent_are_resampled_together():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(mu, 1.0))

    found = predictive(tilt(model, {"z": LinearEnergy(0.3)}), num_samples=NUM, seed=0)
    check(found["mu"], 0.9, 1.0, 2 * COPIES)
    check(found["z"], 1.2, math.sqrt(2), 2 * COPIES)


def test_a_site_outside_the_plate_hears_of_the_tilt_too():
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("sum", dist.Normal(z.sum(-1, keepdim=True), 0.5))

    found = predictive(tilt(model, {"z": LinearEnergy(0.6)}), num_samples=NUM, seed=0)
    check(found["z"], 0.6, 1.0, COPIES)
    check(found["sum"], 1.2, math.sqrt(2.25), COPIES)
    check(found["sum"] - found["z"].sum(-1, keepdim=True), 0.0, 0.5, COPIES)


def test_a_single_draw_follows_the_tilt():
    model = tilt(images, {"z": LinearEnergy([1.5, 0.0])})
    first = torch.stack([predictive(model, num_data=1, num_samples=1, seed=s)["z"][0, 0] for s in range(150)])
    check(first, torch.tensor([1.5, 0.0]), 1.0)


# With draws


def test_posterior_predictive_of_a_normal_mean():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 0.0])
    draws = importance(model, None, y, num_samples=50_000, seed=0)
    found = predictive(model, y, draws=draws, num_samples=NUM, seed=0)
    assert found["mu"].shape == (NUM,) and found["y"].shape == (NUM, 3)
    check(found["mu"], 0.75, 0.5, COPIES)
    check(found["y"], 0.75, math.sqrt(1.25), COPIES)


def test_weights_of_draws_are_honoured():
    values = torch.tensor([[-5.0, 5.0, 70.0]])[..., None, None].expand(1, 3, 3, 2)
    log_weights = torch.tensor([[0.25, 0.75, 0.0]]).log()
    draws = Draws(values={"z": values}, method="snis", log_weights=log_weights)
    found = predictive(tilt(images, {"z": LinearEnergy([1.0, 1.0])}), draws=draws, num_samples=NUM, seed=0)
    share = (found["z"] == 5.0).float().mean(0)
    assert ((share - 0.75).abs() < 4 * math.sqrt(0.75 * 0.25 / NUM)).all() and found["z"].max() == 5.0
    check(found["x"][..., :2] - found["z"], 0.0, 0.5)


def test_chains_are_merged():
    draws = Draws(values={"z": torch.randn(2, 50, 3, 2)}, method="nuts")
    found = predictive(images, draws=draws, num_samples=30, seed=0)
    assert all((row == draws.flat("z")).flatten(1).all(1).any() for row in found["z"])


def test_images_of_a_vae():
    torch.manual_seed(0)
    drop = nn.Dropout(0.5)
    vae = VAE((6,), 2, hidden=(8,), decoder=nn.Sequential(drop, nn.Linear(2, 6)))
    draws = Draws(values={"z": torch.ones(1, 4, 1, 2)}, method="nuts")
    found = predictive(tilt(vae.model, {"z": QuadraticEnergy(1.0)}), draws=draws, num_samples=2000, seed=0)
    assert vae.training and drop.training
    drop.eval()
    probability = vae.decode(torch.ones(2)).mean.detach()
    assert found["x"].shape == (2000, 1, 6)
    se = (probability * (1 - probability) / 2000).sqrt()
    assert ((found["x"].mean((0, 1)) - probability).abs() < 4 * se).all()


def test_deterministic_sites():
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)

    found = predictive(model, num_samples=5, seed=0)
    assert torch.equal(found["twice"], 2 * found["z"])
    tilted = predictive(tilt(model, {"z": LinearEnergy(1.0)}), num_samples=5, seed=0)
    assert torch.equal(tilted["twice"], 2 * tilted["z"])


def test_a_factor_of_the_user_is_respected_or_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("bonus", z)

    with pytest.raises(ValueError, match=r"factor\(s\) \['bonus'\], which running it forward cannot respect"):
        predictive(model)
    draws = importance(model, num_samples=20_000, seed=0)
    check(predictive(model, draws=draws, num_samples=NUM, seed=0)["z"], 1.0, 1.0, COPIES)


# State, warnings, errors


def test_seeds(rng_untouched):
    model = tilt(images, {"z": LinearEnergy([0.8, -0.4])})
    with rng_untouched():
        first, again, other = (predictive(model, num_samples=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["x"], again["x"]) and not torch.equal(first["x"], other["x"])


def test_double_precision():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    found = predictive(tilt(model, {"z": LinearEnergy([0.1, 0.0])}), num_samples=5, seed=0)
    assert found["z"].dtype == torch.float64


@pytest.mark.parametrize("energy", [LinearEnergy([5.0, 5.0]), QuadraticEnergy(-1.5)], ids=["far", "unbounded"])
def test_far_tilts_warn(energy):
    with pytest.warns(InferenceWarning, match="not reliable .Pareto k.*pass them as draws="):
        predictive(tilt(images, {"z": energy}), num_samples=100, seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_energies_that_are_not_finite(value):
    with pytest.raises(ValueError, match="weights .* are NaN, infinite or all zero"):
        predictive(tilt(images, {"z": lambda z: torch.full_like(z[..., 0], value)}), num_samples=10)


def test_an_energy_of_the_wrong_shape():
    with pytest.raises(ValueError, match="must return one number per batch element"):
        predictive(tilt(images, {"z": lambda z: z}), num_samples=10)


def test_tilted_site_missing_from_the_draws():
    draws = Draws(values={"x": torch.zeros(1, 5, 3, 3)}, method="nuts")
    with pytest.raises(ValueError, match=r"tilted site\(s\) \['z'\] are not among the draws \(\['x'\]\)"):
        predictive(tilt(images, {"z": LinearEnergy([1.0, 0.0])}), draws=draws)


def test_draws_of_another_model_or_other_data():
    with pytest.raises(ValueError, match=r"site 'w'.*which has one of the sites \['x', 'z'\]"):
        predictive(images, draws=Draws(values={"w": torch.zeros(1, 5)}, method="nuts"))
    with pytest.raises(ValueError, match=r"site 'z', of shape \(4, 2\), do not fit the model, which has \(3, 2\)"):
        predictive(images, draws=Draws(values={"z": torch.zeros(1, 5, 4, 2)}, method="nuts"))


def test_no_draws_asked_for():
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 0"):
        predictive(images, num_samples=0)


# Rows belong to draws


def noisy(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Normal(mu, 1e-3), obs=y)


LABELED = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (None, range(12)),
        (12, range(12)),
        (6, [0, 2, 4, 6, 8, 10]),  # two of each chain
        (5, [0, 2, 4, 7, 9]),
        (24, [i // 2 for i in range(24)]),
    ],
)
@pytest.mark.parametrize("chunk", [4096, 5])
def test_draws_keep_their_order(num_samples, expected, chunk, monkeypatch):
    monkeypatch.setattr("pyro_ebm.inference.predictive._CHUNK", chunk)
    found = predictive(noisy, draws=Draws({"mu": LABELED}, "nuts"), num_samples=num_samples, seed=0)
    assert found["mu"].tolist() == list(expected)
    assert (found["y"] - found["mu"][:, None]).abs().max() < 0.01


def test_weighted_draws_are_resampled():
    draws = Draws({"mu": LABELED}, "snis", log_weights=torch.where(LABELED > 9.5, 0.0, -math.inf))
    found = predictive(noisy, draws=draws, seed=0)
    assert found["y"].shape == (100, 2) and set(found["mu"].tolist()) == {10.0, 11.0}
    assert predictive(noisy, draws=draws, num_samples=30, seed=0)["y"].shape == (30, 2)


def test_samples_of_any_kind():
    mcmc = MCMC(NUTS(noisy), num_samples=7, warmup_steps=3, disable_progbar=True)
    mcmc.run(torch.zeros(2))
    samples = mcmc.get_samples()
    for draws in (mcmc, samples, {"mu": samples["mu"].numpy()}):
        assert torch.equal(predictive(noisy, draws=draws, seed=0)["mu"], samples["mu"])
    with pytest.raises(ValueError, match=r"'mu'.*has dimensions for chains and draws before"):
        predictive(noisy, draws=mcmc.get_samples(group_by_chain=True))


def test_draws_given_in_other_ways_are_told():
    y = torch.zeros(3)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0).expand(y.shape).to_event(1), obs=y)

    draws = Draws({"z": torch.zeros(4, 5, 2)}, "nuts")
    with pytest.raises(TypeError, match="takes draws by keyword, after the model's arguments: draws="):
        predictive(model, draws, y)
    with pytest.raises(ValueError, match=r"draws\['z'\], of shape \(4, 5, 2\), has dimensions for chains and draws"):
        predictive(model, y, draws=draws.values)
    assert predictive(model, y, draws=draws)["z"].shape == (20, 2)
