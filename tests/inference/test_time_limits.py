"""A limit of time holds within every function that runs a model, and what was done by then comes back with a word."""

from __future__ import annotations

import math
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    HMC,
    MCMC,
    SMC,
    ChEES,
    ImproperError,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    QuadraticEnergy,
    annealed_importance,
    importance,
    log_normalizer,
    pyro_hmc,
    pyro_nuts,
    sample,
    tilt,
)
from pyro_ebm.deadline import OutOfTime, check_time, finishing, limited, time_left, time_limit

BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def prior():
    pyro.sample("z", BASE)


def one_by_one():
    z = pyro.sample("z", BASE)
    pyro.sample("y", dist.Normal(z[0] if z[1] > 0 else z[0] + 0.5, 1.0), obs=torch.tensor(3.0))


far = tilt(prior, {"z": LinearEnergy([9.0, 0.0])})
MANY = {"num_samples": 10**6, "progress": False, "seed": 0}
SLOW = {"num_moves": 10**6, "progress": False, "seed": 0}
AIS = {"chains_per_group": 8, "num_groups": 2, "num_temperatures": 10**5, "progress": False, "seed": 0}
DOORS = {
    **{method: {"method": method, **MANY} for method in ("chees", "mala", "ula", "nuts", "hmc")},
    "auto": {"method": "auto", "ess": 1e9, **MANY},
    "chees to an ess": {"method": "chees", "ess": 1e9, **MANY},
    "smc": {"method": "smc", "num_chains": 2, "num_samples": 16, **SLOW},
}
CALLS = {
    **{name: lambda s, o=options: sample(far, max_seconds=s, **o) for name, options in DOORS.items()},
    "snis to an ess": lambda s: sample(one_by_one, method="snis", ess=1e9, max_seconds=s),
    "snis": lambda s: sample(one_by_one, method="snis", num_samples=10**6, max_seconds=s),
    "importance": lambda s: importance(one_by_one, num_samples=10**6, max_seconds=s),
    "MCMC": lambda s: MCMC(ChEES(far), 10**6, max_seconds=s, progress=False).run(),
    "MCMC of Pyro's": lambda s: MCMC(
        pyro.infer.NUTS(far), 10**6, 50, num_chains=2, max_seconds=s, progress=False
    ).run(),
    "pyro_nuts": lambda s: pyro_nuts(far, max_seconds=s, **MANY),
    "pyro_hmc": lambda s: pyro_hmc(far, max_seconds=s, **MANY),
    "SMC": lambda s: SMC(far, particles_per_island=16, num_islands=2, max_seconds=s, **SLOW).run(),
    "annealed_importance": lambda s: annealed_importance(far, max_seconds=s, **AIS),
    **{
        f"log_normalizer by {method}": lambda s, m=method: log_normalizer(
            BASE, LinearEnergy([1.0, 0.0]), method=m, num_samples=10**6, max_seconds=s, seed=0
        )
        for method in ("importance", "qmc")
    },
    **{
        f"log_normalizer by {method}": lambda s, m=method: log_normalizer(
            BASE, LinearEnergy([9.0, 0.0]), method=m, num_samples=200, max_seconds=s, seed=0
        )
        for method in ("smc", "bridge", "ais")
    },
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that strikes one with each look: nothing depends on how busy the machine is."""
    now = types.SimpleNamespace(seconds=0)

    def tick():
        now.seconds += 1
        return now.seconds

    monkeypatch.setattr("pyro_ebm.deadline.time", types.SimpleNamespace(perf_counter=tick))
    for module in ("sample", "auto", "until", "importance_sampler"):
        still = types.SimpleNamespace(perf_counter=lambda: now.seconds)
        monkeypatch.setattr(f"pyro_ebm.inference.{module}.time", still, raising=False)
    return now


@pytest.mark.parametrize("name", CALLS)
def test_time_ends_it(name, clock):
    """Within a fifth of the limit, with a result or an error that says so."""
    limit = 40 if name in ("log_normalizer by smc", "log_normalizer by bridge", "log_normalizer by ais") else 400
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InferenceWarning)
        found = CALLS[name](limit)
    assert 0.9 * limit <= clock.seconds <= 1.2 * limit
    told = " ".join(str(warning.message) for warning in caught)
    assert "limit of time" in told or "max_seconds" in told
    values = found.values.values() if hasattr(found, "values") else (found.value,)
    assert all(value.numel() and bool(value.isfinite().all()) for value in values)


ENDLESS = {
    "pyro_hmc": lambda s: pyro_hmc(prior, trajectory_length=9e5, init="uniform", max_seconds=s, **MANY),
    "MCMC of Pyro's": lambda s: MCMC(
        pyro.infer.HMC(prior, step_size=0.1, trajectory_length=9e5), 10, 0, max_seconds=s, progress=False
    ).run(),
    "MCMC": lambda s: MCMC(
        HMC(prior, step_size=0.1, trajectory_length=9e5, max_steps=10**9), 10, 0, max_seconds=s, progress=False
    ).run(),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_time_ends_a_single_step(name, clock):
    """The clock is read at each gradient, not between steps that may never end."""
    with pytest.raises(InferenceError, match="max_seconds=100 was spent .*and there are no draws yet"):
        ENDLESS[name](100)
    assert 80 <= clock.seconds <= 120  # chains in turn have equal shares


@pytest.mark.parametrize("name", CALLS)
def test_no_time_at_all_is_an_error_that_says_so(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        with pytest.raises(InferenceError, match=r"max_seconds=.* was spent.* and there are no draws yet"):
            CALLS[name](1e-9)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "5", True])
@pytest.mark.parametrize("name", CALLS)
def test_a_limit_is_a_positive_number(name, bad):
    with pytest.raises((ValueError, TypeError), match="max_seconds must be (positive|a number)"):
        CALLS[name](bad)


def test_limits_within_limits(clock):
    with time_limit(100) as outer, time_limit(1000) as inner:
        assert inner.at == outer.at
        with time_limit(5):
            with pytest.raises(OutOfTime):
                for _ in range(10):
                    check_time()
            with finishing():
                check_time()
        told = "max_seconds=5 was spent on 3 steps and there are no draws yet"
        with pytest.raises(InferenceError, match=told), limited(5):
            clock.seconds += 6
            raise OutOfTime("on 3 steps")
        clock.seconds += 100
        with pytest.raises(OutOfTime), limited(5):  # the limit around it is spent, too
            check_time()
        assert time_left() == 0.0
    assert time_left() == float("inf")


@pytest.mark.parametrize("method", ["smc", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bridge", "ais"))])
@pytest.mark.parametrize("energy", [QuadraticEnergy(-2.0), lambda z: -(z**4).sum(-1)], ids=["quadratic", "quartic"])
def test_a_tilt_without_a_log_z_is_named(energy, method):
    """No limit of time is needed: particles that run away, or get nowhere, end it."""
    with pytest.raises(ImproperError, match="the target seems improper"):
        log_normalizer(BASE, energy, method=method, num_samples=64, seed=0)


def test_a_way_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("pyro_ebm.inference.annealing.population._MOST_EVALUATIONS", 5)
    with pytest.warns(InferenceWarning, match=r"smc: given up \(100,000 evaluations"):
        draws = SMC(far, particles_per_island=64, num_islands=2, progress=False, seed=0).run()
    assert draws.notes["stopped"] == "max_evaluations" and draws.notes["temperatures"][-1] == 1


def test_a_jump_worth_few_draws_does_not_know_its_error(clock):
    smc = SMC(far, particles_per_island=128, num_islands=4, max_seconds=60, **SLOW)
    with pytest.warns(InferenceWarning, match=r"weights worth \d+\.\d of 512.*log Z is uncertain by inf"):
        assert smc.run().log_z.se == float("inf")


def test_particles_weighted_to_the_target_in_one_step_follow_it(clock):
    """An early end costs particles, and leaves draws and log Z right."""
    near = tilt(prior, {"z": LinearEnergy([1.0, 0.0])})  # N((1, 0), I), log Z = 1/2
    smc = SMC(near, particles_per_island=1000, num_islands=8, max_seconds=60, **SLOW)
    with pytest.warns(InferenceWarning, match=r"the limit of time at inverse temperature .* worth [\d.]+ of 8000"):
        draws = smc.run()
    distinct = len(draws.values["z"].flatten(0, 1).unique(dim=0))
    assert draws.notes["stopped"] == "max_seconds" and 1000 < distinct < 8000
    assert torch.allclose(draws.mean("z"), torch.tensor([1.0, 0.0]), atol=4 / (8000 * math.exp(-1)) ** 0.5)
    assert abs(draws.log_z.value - 0.5) < 4 * draws.log_z.se
