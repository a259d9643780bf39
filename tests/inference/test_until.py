"""Draws until they are worth what was asked for, and what is said when they are not."""

from __future__ import annotations

import math
import types

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import MALA, MCMC, ChEES, InferenceError, InferenceWarning, LinearEnergy, importance, tilt
from pyro_ebm.chain_statistics import ess_bulk, r_hat
from pyro_ebm.inference import until
from pyro_ebm.inference.importance import weighed
from pyro_ebm.inference.until import Target, importance_until, judged, run_until

pytestmark = pytest.mark.filterwarnings("ignore:.*chains disagree:pyro_ebm.InferenceWarning")


def model(loc=0.0, *, scale=1.0):
    pyro.sample("z", dist.Normal(torch.full((2,), loc), scale).to_event(1))
    pyro.sample("w", dist.LogNormal(0.0, 0.5))


def chains(kernel=ChEES, **options):
    options = {"num_chains": 16, "warmup_steps": 60, "seed": 0, "progress": False, **options}
    return MCMC(kernel(model), num_samples=1, **options)


def run(mcmc, target, began=0.0, args=(), kwargs=None):
    return run_until(mcmc, target, args, kwargs or {}, began=until.time.perf_counter() if began is None else began)


def weighted(a, target, seed=0, began=None, **options):
    began = until.time.perf_counter() if began is None else began
    tilted = tilt(model, {"z": LinearEnergy([a, 0.0])})
    return importance_until(tilted, None, target, (), {}, seed=seed, began=began, **options)


def smallest_and_largest(draws):
    sizes = torch.cat([torch.as_tensor(ess_bulk(value)).flatten() for value in draws.values.values()])
    hats = torch.cat([torch.as_tensor(r_hat(value)).flatten() for value in draws.values.values()])
    return float(sizes.min()), float(hats.max())


@pytest.fixture
def clock(monkeypatch):
    """The clock of until.py: so many seconds pass between any two looks at it."""
    now = types.SimpleNamespace(seconds=0.0, pace=0.0)

    def tick():
        now.seconds += now.pace
        return now.seconds

    monkeypatch.setattr(until, "time", types.SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr("pyro_ebm.deadline.time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_chains_stop_at_the_target(clock):
    draws = run(chains(), Target(400.0))
    ess, worst = smallest_and_largest(draws)
    assert draws.notes["stopped"] == "target" and draws.notes["target_ess"] == 400.0
    assert draws.notes["ess"] == pytest.approx(ess) and 1 < draws.notes["r_hat"] <= worst + 1e-6
    assert ess >= 400 and draws.notes["r_hat"] <= draws.notes["r_hat_limit"] < 1.05  # of sixteen short chains
    assert {draws.notes["least_ess_at"], draws.notes["worst_r_hat_at"]} <= {"z[0]", "z[1]", "w"}
    assert draws.num_draws == draws.notes["num_samples"] >= 50  # not what the runner was made with


def test_the_slowest_component_decides(clock):
    """Langevin steps in a coordinate of another scale, without a mass matrix, are slow there alone."""
    mcmc = MCMC(
        MALA(slow, adapt_mass_matrix=False), num_samples=1, warmup_steps=60, num_chains=16, seed=0, progress=False
    )
    with pytest.warns(InferenceWarning):
        draws = run(mcmc, Target(400.0, max_draws=60))
    per_site = {site: float(ess_bulk(value).min()) for site, value in draws.values.items()}
    assert per_site["fast"] > 400 > 3 * per_site["slow"]
    assert draws.notes["ess"] == pytest.approx(per_site["slow"]) and draws.notes["stopped"] == "num_samples"


def slow():
    pyro.sample("fast", dist.Normal(torch.zeros(2), 0.05).to_event(1))
    pyro.sample("slow", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_r_hat_counts_too(clock):
    """Enough draws long before the chains agree."""
    mcmc = MCMC(
        MALA(slow, adapt_mass_matrix=False), num_samples=1, warmup_steps=60, num_chains=16, seed=0, progress=False
    )
    with pytest.warns(InferenceWarning, match=r"R-hat [\d.]+ at slow\[\d\] \(at most 1\.\d+\)"):
        draws = run(mcmc, Target(10.0, max_draws=60))
    assert draws.notes["ess"] > 10 and draws.notes["stopped"] == "num_samples"
    assert draws.notes["r_hat"] > draws.notes["r_hat_limit"] > 1.01


def test_the_number_of_draws_is_a_limit(clock):
    with pytest.warns(InferenceWarning, match=r"chees: stopped by num_samples=70 with bulk ESS \d+ at \S+ \(asked"):
        draws = run(chains(), Target(1e6, max_draws=70))
    assert draws.num_draws == 70 and draws.notes["stopped"] == "num_samples"
    with pytest.raises(InferenceError, match="stopped by num_samples=70"):
        run(chains(strict=True), Target(1e6, max_draws=70))


@pytest.mark.parametrize("limit", [1, 3, 50])
def test_few_draws_allowed(clock, limit):
    with pytest.warns(InferenceWarning, match=f"num_samples={limit} with"):
        draws = run(chains(warmup_steps=5), Target(1e6, max_draws=limit))
    assert draws.num_draws == limit and math.isnan(draws.notes["ess"]) == (limit < 4)


def test_time_is_a_limit(clock, monkeypatch):
    """A draw that takes a second, eighty seconds: no doubling from 50 to 100."""
    extend = until.Chains.extend

    def slowly(self, num_draws, *, thin=1):
        extend(self, num_draws, thin=thin)
        clock.seconds += num_draws
        self.sampling_seconds = float(len(self.record))

    monkeypatch.setattr(until.Chains, "extend", slowly)
    with pytest.warns(InferenceWarning, match=r"chees: stopped by max_seconds=80 with bulk ESS \d+ at \S+ \(asked"):
        draws = run(chains(warmup_steps=20), Target(1e6, max_seconds=80.0))
    assert draws.num_draws == 80 and draws.notes["stopped"] == "max_seconds"
    with pytest.raises(InferenceError, match="chees: stopped by max_seconds=200"):
        run(chains(strict=True), Target(1e6, max_seconds=200.0), began=None)


def test_looking_takes_time_too(clock):
    clock.pace = 1.0  # a second a look, and the next one is to take longer
    with pytest.warns(InferenceWarning, match="stopped by max_seconds=10 "):
        run(chains(warmup_steps=20), Target(1e6, max_seconds=10.0))
    assert clock.seconds <= 10


def test_time_that_was_spent_before(clock):
    with pytest.raises(InferenceError, match="max_seconds=5 was spent and there are no draws yet"):
        run(chains(warmup_steps=20), Target(1e6, max_seconds=5.0), began=-10.0)


def test_one_chain_is_judged_by_its_ess(clock):
    draws = run(chains(num_chains=1, warmup_steps=100), Target(30.0))
    assert draws.notes["stopped"] == "target" and math.isnan(draws.notes["r_hat"]) and draws.notes["ess"] >= 30


def test_seeds_thinning_and_arguments(clock):
    settings = {"args": (3.0,), "kwargs": {"scale": 0.1}}
    first, again = (run(chains(thin=2), Target(100.0), **settings) for _ in range(2))
    assert all(torch.equal(first.values[site], again.values[site]) for site in first.values)
    assert first.values["z"].mean().item() == pytest.approx(3.0, abs=4 * 0.1 / first.notes["ess"] ** 0.5)
    plain = run(chains(), Target(100.0), **settings)
    assert torch.equal(first.values["z"][:, 0], plain.values["z"][:, 1])  # every second draw was kept


def test_ctrl_c_between_draws(clock, monkeypatch):
    count = until.Chains._count

    def interrupting(self, info, phase):
        count(self, info, phase)
        if phase == "draws" and len(self.record) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(until.Chains, "_count", interrupting)
    with pytest.warns(InferenceWarning, match=r"interrupted: kept 16 chain\(s\) of 30 draws"):
        draws = run(chains(), Target(1e6))
    assert draws.num_draws == 30 and draws.notes["stopped"] == "interrupted" and draws.notes["ess"] > 0


def test_ctrl_c_while_looking(clock, monkeypatch):
    looks = []

    def interrupted(values, target, superchains=None):
        if looks:
            raise KeyboardInterrupt
        looks.append(judged(values, target))
        return looks[0]

    monkeypatch.setattr(until, "judged", interrupted)
    with pytest.warns(InferenceWarning, match=r"interrupted: kept 16 chain\(s\) of 100 draws"):
        draws = run(chains(), Target(1e6))
    assert draws.notes["stopped"] == "interrupted" and draws.notes["ess"] == looks[0]["ess"]


def test_judged():
    target, good = Target(100.0), torch.randn(4, 500, 3)
    assert judged({"z": good}, target)["stopped"] == "target"
    constant = torch.cat([good, torch.ones(4, 500, 1)], -1)  # a zero of a Cholesky factor, say
    assert judged({"z": constant}, target) == judged({"z": good}, target)
    assert judged({"z": torch.ones(4, 500)}, target)["stopped"] == "num_samples"
    apart = good + 0.2 * torch.arange(4.0)[:, None, None]
    assert judged({"z": good, "w": apart}, target)["stopped"] == "num_samples"
    for bad in (math.nan, math.inf):
        broken = good.clone()
        broken[0, 0, 0] = bad
        found = judged({"z": broken}, target)
        assert found["stopped"] == "num_samples" and math.isnan(found["ess"])


@pytest.mark.parametrize(
    "ess, worst, growth",
    [(500.0, 1.001, 1.0), (800.0, 1.001, 0.5), (990.0, 1.0, 0.25), (5000.0, 1.015, 0.8), (math.nan, math.nan, 1.0)],
)
def test_growth(ess, worst, growth):
    assert until._growth({"ess": ess, "r_hat": worst, "r_hat_limit": 1.01}, Target(1000.0)) == pytest.approx(growth)


def test_weights_worth_the_target():
    draws = weighted(1.0, Target(150.0))
    assert draws.notes["stopped"] == "target" and draws.notes["ess"] >= 150 and draws.num_draws == 2000
    assert draws.notes["least_ess_at"] == "z[0]"  # the tilted coordinate
    same = importance(tilt(model, {"z": LinearEnergy([1.0, 0.0])}), num_samples=2000, seed=0)
    assert torch.equal(draws.values["z"], same.values["z"]) and torch.equal(draws.log_weights, same.log_weights)


def test_weights_that_need_more_draws():
    draws = weighted(1.0, Target(8000.0))
    share = math.exp(-1.0) / 2  # of the mean along a linear tilt, exp(-|a|^2) / (1 + |a|^2)
    assert draws.notes["stopped"] == "target" and 8000 <= draws.notes["ess"]
    assert draws.num_draws == pytest.approx(1.2 * 8000 / share, rel=0.2)


def test_weights_and_their_limits(clock):
    with pytest.warns(InferenceWarning, match=r"by num_samples=500 with ESS \d+ at z\[0\] \(asked for 5000\); "):
        draws = weighted(1.0, Target(5000.0, max_draws=500))
    assert draws.num_draws == 500 and draws.notes["stopped"] == "num_samples"
    with pytest.raises(InferenceError, match="stopped by num_samples=500"):
        weighted(1.0, Target(5000.0, max_draws=500), strict=True)


def test_weights_spend_the_time_allowed(clock, monkeypatch):
    def slowly(*args, num_samples, **kwargs):
        clock.seconds += num_samples / 4000
        return weighed(*args, num_samples=num_samples, **kwargs)

    monkeypatch.setattr(until, "weighed", slowly)
    with pytest.warns(InferenceWarning, match=r"snis: stopped by max_seconds=7.5 with ESS"):
        draws = weighted(1.0, Target(1e5, max_seconds=7.5))
    assert draws.notes["stopped"] == "max_seconds" and draws.num_draws == 26_000  # after 4,000 to see
    assert draws.seconds == clock.seconds == 7.5


def test_weights_that_more_draws_would_not_help():
    with pytest.warns(InferenceWarning, match="Pareto k") as record:
        draws = weighted(6.0, Target(2.0))
    assert len(record) == 1 and draws.notes["stopped"] == "pareto_k" and draws.num_draws == 2000
    with pytest.raises(InferenceError, match="Pareto k"):
        weighted(6.0, Target(2.0), strict=True)
    assert weighted(1.0, Target(100.0, max_k=-1.0)).notes["stopped"] == "pareto_k"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ess": 0.0}, "ess must be positive, got 0.0"),
        ({"ess": math.nan}, "ess must be positive, got nan"),
        ({"ess": 1.0, "max_seconds": -1.0}, "max_seconds must be positive, got -1.0"),
        ({"ess": 1.0, "max_draws": 0}, "num_samples must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_targets(settings, message):
    with pytest.raises(ValueError, match=message):
        Target(**settings)
