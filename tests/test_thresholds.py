"""The limits of R-hat, k and effective draws; the messages of all who judge by them name the one that holds."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    InferenceWarning,
    LinearEnergy,
    MomentEnergy,
    TiltedDistribution,
    arviz_statistics,
    compare,
    fit_moments,
    importance,
    log_likelihood,
    log_normalizer,
    predictive,
    sample,
    tilt,
    to_arviz,
)
from pyro_ebm.thresholds import (
    MAX_R_HAT,
    R_HAT_OF_DISAGREEMENT,
    above,
    least_ess,
    pareto_k_limit,
    weights_problem,
)

BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def model():
    pyro.sample("z", BASE)


FAR = tilt(model, {"z": LinearEnergy([3.0, 0.0])})


@pytest.mark.parametrize(
    "num_draws, limit",
    [(1, 0.0), (10, 0.0), (11, 0.0397), (25, 0.2847), (100, 0.5), (1000, 2 / 3), (2154, 0.69999), (2155, 0.7)],
)
def test_the_limit_of_k_rises_with_the_draws(num_draws, limit):
    assert pareto_k_limit(num_draws) == pytest.approx(limit, abs=5e-5)


def test_a_run_warns_later_than_a_table_judges():
    assert 1 < MAX_R_HAT < R_HAT_OF_DISAGREEMENT


JUDGES = {
    "importance": lambda num: importance(FAR, num_samples=num, seed=0),
    "snis": lambda num: sample(FAR, method="snis", num_samples=num, num_chains=1, seed=0),
    "log_normalizer": lambda num: log_normalizer(BASE, LinearEnergy([3.0, 0.0]), num_samples=num, seed=0),
}


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
@pytest.mark.parametrize("num, limit", [(100, "0.5"), (1000, "0.67"), (4000, "0.7")])
def test_warnings_name_the_limit_of_their_number_of_draws(judge, num, limit):
    with pytest.warns(InferenceWarning, match=rf"Pareto k = \d.\d\d > {limit}[,)]"):
        judge(num)


def test_a_k_between_the_limits_is_trusted_with_many_draws_only():
    energy = LinearEnergy([1.5, 0.0])
    found = {}
    for num in (100, 10_000):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draws = importance(tilt(model, {"z": energy}), num_samples=num, seed=2)
        found[num] = (draws.pareto_k, bool(caught), compare({"x": draws}).verdict["x"])
    few, many = found[100], found[10_000]
    assert 0.5 < few[0] < 0.7 and few[1] and f"pareto_k {few[0]:.2f} > 0.5" in few[2]
    assert many[0] < 0.7 and not many[1] and "pareto_k" not in many[2]


def test_predictive_and_moments_name_it_too():
    with pytest.warns(InferenceWarning, match=r"Pareto k = \d.\d\d > 0.7, effective sample size"):
        predictive(FAR, num_samples=10, seed=0)
    moments = MomentEnergy(lambda v: v[..., :1])
    with pytest.warns(InferenceWarning, match=r"Pareto k = \d.\d\d, trusted up to 0.67; effective"):
        fit_moments(BASE, moments, [2.5], method="importance", num_samples=1000, seed=0)


@pytest.mark.parametrize(
    ("value", "said"), [(1.3, "1.30 > 1.05"), (1.051, "1.051 > 1.05"), (1.05003, "1.05003 > 1.05")]
)
def test_what_is_above_a_limit_looks_so(value, said):
    assert above(value, 1.05) == said


def narrow():
    z = pyro.sample("z", BASE)
    pyro.sample("y", dist.Normal(z.sum(-1), 0.004), obs=torch.tensor(1.0))


def plated(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.001), obs=x)


def prior(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def resampled_for_arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        draws = importance(narrow, num_samples=2000, seed=0)
    return to_arviz(draws)


STEEP = LinearEnergy([4.0, 0.0])
FEW = {
    "importance": lambda: importance(narrow, num_samples=2000, seed=0),
    "snis": lambda: sample(narrow, method="snis", num_samples=2000, num_chains=1, seed=0),
    "snis_to_an_ess": lambda: sample(narrow, method="snis", ess=4, num_samples=2000, num_chains=1, seed=0),
    "to_arviz": resampled_for_arviz,
    "log_normalizer": lambda: log_normalizer(BASE, STEEP, num_samples=2000, seed=0),
    "tilted_log_normalizer": lambda: tilt(model, {"z": STEEP}).log_normalizer(num_samples=2000, seed=0),
    "forward_log_normalizer": lambda: tilt(narrow, {"y": LinearEnergy(4.0)}).log_normalizer(num_samples=2000, seed=0),
    "tilted_distribution": lambda: TiltedDistribution(BASE, STEEP).log_normalizer(num_samples=2000, seed=0),
    "tilted_distribution_draws": lambda: TiltedDistribution(BASE, STEEP).sample((10,)),
    "predictive": lambda: predictive(tilt(model, {"z": STEEP}), num_samples=10, seed=0),
    "log_likelihood": lambda: log_likelihood(plated, prior, torch.zeros(2), num_samples=1000, seed=0),
    "fit_moments": lambda: fit_moments(
        BASE, MomentEnergy(lambda v: v[..., :1]), [2.6], method="importance", num_samples=2000, seed=0
    ),
}


@pytest.mark.parametrize("entry_point", FEW)
def test_few_effective_draws_are_warned_of_whatever_k(entry_point, monkeypatch):
    monkeypatch.setattr(arviz_statistics, "_psislw", lambda logs: (logs, 0.1))
    with pytest.warns(InferenceWarning, match=r"effective|worth"):
        FEW[entry_point]()


def test_how_few_is_few():
    assert [least_ess(num) for num in (20, 200, 1000, 10_000)] == pytest.approx([1.0, 10.0, 50.0, 50.0])
    assert weights_problem(0.1, 49.0, 10_000).startswith("effective sample size 49.0 < 50 of 10000")
    assert weights_problem(float("nan"), 5000.0, 10_000).startswith("Pareto k = nan > 0.7")
    assert weights_problem(0.1, float("nan"), 10_000) and not weights_problem(0.1, 51.0, 10_000)
