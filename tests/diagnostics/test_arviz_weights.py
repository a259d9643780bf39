"""ArviZ ignores weights: what it gets of weighted draws are draws of the target all the same."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Draws, InferenceWarning, importance, predictive, quadrature, sample, to_arviz
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import

Y = torch.tensor([0.3, -0.2, 1.1, 0.9, 0.5, 0.4, 1.3, 0.2])
MEAN, SD = float(Y.sum()) / 9, 1 / 3  # the prior's are 0 and 1


def model(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def weighted(ess_like=0.5, num=400, **changes):
    z = torch.randn(1, num, generator=torch.Generator().manual_seed(0))
    return Draws({"mu": z}, "snis", log_weights=(ess_like * z).log_softmax(-1), **changes)


def samplers():
    return {
        "auto": lambda: sample(model, Y, seed=0, progress=False),
        "quadrature": lambda: quadrature(model, Y),
        "smc": lambda: sample(model, Y, method="smc", num_samples=500, num_chains=4, seed=0, progress=False),
    }


@pytest.mark.parametrize("name", samplers())
def test_arviz_sees_the_posterior(name, rng_untouched):
    draws = samplers()[name]()
    assert draws.log_weights is not None
    with rng_untouched():
        tree = to_arviz(draws)
    mu = tree["posterior"]["mu"]
    assert mu.shape[0] == 4 and np.array_equal(mu.values, to_arviz(draws)["posterior"]["mu"].values)
    table = quiet_import("arviz").summary(tree, var_names=["mu"], **({"round_to": "none"} if arviz_is_1x() else {}))
    assert float(table.loc["mu", "mean"]) == pytest.approx(MEAN, abs=5 * SD / math.sqrt(mu.size))
    assert float(table.loc["mu", "sd"]) == pytest.approx(SD, rel=0.15)
    np.testing.assert_allclose(tree["posterior"]["twice"].values, 2 * mu.values, rtol=1e-6)
    attrs = tree["posterior"].attrs
    assert attrs["weighted"] == 0 and "draws" in attrs["resampled"] and "log_weight" not in tree.get("sample_stats", {})


def test_leave_one_out_agrees_with_the_closed_form():
    tree = to_arviz(sample(model, Y, seed=0, progress=False))
    loo = quiet_import("arviz").loo(tree)
    rest = Y.sum() - Y
    exact = float(dist.Normal(rest / 8, math.sqrt(1 + 1 / 8)).log_prob(Y).sum())
    assert float(loo.elpd if arviz_is_1x() else loo.elpd_loo) == pytest.approx(exact, abs=0.1)


def test_weights_can_be_kept():
    draws = weighted().with_model(model, Y)
    tree = to_arviz(draws, keep_weights=True)
    assert np.array_equal(tree["posterior"]["mu"].values, draws.values["mu"].numpy())
    assert np.array_equal(tree["sample_stats"]["log_weight"].values, draws.log_weights.numpy())
    attrs = tree["posterior"].attrs
    assert attrs["weighted"] == 1 and "keep_weights=False" in attrs["log_likelihood"] and "resampled" not in attrs
    assert "resampled" not in to_arviz(Draws(draws.values, "nuts"))["posterior"].attrs


def of_predictive(draws):
    return predictive(model, Y, draws=draws, seed=3)


def of_predictive_by_number(draws):
    return predictive(model, Y, draws=draws, num_samples=to_arviz(draws)["posterior"]["mu"].size, seed=3)


def of_all_points(draws):
    """As many as there are weighted draws, in their order."""
    return {"y": draws.flat("mu")[:, None] + torch.randn(draws.num_draws, len(Y))}


@pytest.mark.parametrize("predict", [of_predictive, of_predictive_by_number, of_all_points])
def test_predictions_belong_to_the_resampled_draws(predict):
    draws = importance(model, None, Y, num_samples=4000, seed=0)
    for chains in (None, 2):
        tree = to_arviz(draws, posterior_predictive=predict(draws), chains=chains)
        found, mu = tree["posterior_predictive"], tree["posterior"]["mu"]
        assert set(found.data_vars) == {"y"} and found["y"].shape == (*mu.shape, len(Y))
        assert mu.shape[0] == (chains or 4)
        noise = found["y"].values - mu.values[..., None]
        assert noise.std() == pytest.approx(1.0, rel=0.05)  # 1.1 if shuffled
        assert abs(np.corrcoef(noise.mean(-1).ravel(), mu.values.ravel())[0, 1]) < 0.1  # -.69 if shuffled


@pytest.mark.parametrize("keep", [False, True])
def test_other_numbers_of_predictions_are_one_chain(keep):
    draws = importance(model, None, Y, num_samples=4000, seed=0)
    predicted = predictive(model, Y, draws=draws, num_samples=100, seed=0)
    tree = to_arviz(draws, posterior_predictive=predicted, keep_weights=keep)
    assert tree["posterior_predictive"]["y"].shape == (1, 100, len(Y)) and set(tree["posterior_predictive"]) == {"y"}


@pytest.mark.parametrize(
    ("draws", "text"),
    [
        (weighted(2.5), r"the weights are worth \d+\.\d of 400 draws: draws resampled by them are copies of few"),
        (weighted(pareto_k=0.9), r"the weights have Pareto k = 0\.90 > 0\.62: draws"),
        (weighted(2.5, pareto_k=math.nan), r"the weights are worth .* draws and have Pareto k = nan > 0\.62: draws"),
    ],
)
def test_poor_weights_are_warned_of(draws, text):
    with pytest.warns(InferenceWarning, match=text) as record:
        tree = to_arviz(draws)
    assert len(record) == 1 and record[0].filename == __file__
    assert tree["posterior"]["mu"].size >= 100
    to_arviz(draws, keep_weights=True)  # silent: nothing is resampled
    to_arviz(Draws(draws.values, "quadrature", log_weights=draws.log_weights))  # nor is a grid worth less
