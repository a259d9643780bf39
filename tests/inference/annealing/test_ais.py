"""Annealed importance sampling in both directions: bounds that bracket log Z, and stay close."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    HMC,
    MALA,
    ULA,
    Annealing,
    ChEES,
    Draws,
    Estimate,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    QuadraticEnergy,
    TiltedDistribution,
    quadrature,
    tilt,
)
from pyro_ebm.estimates import BoundedEstimate
from pyro_ebm.inference.annealing.ais import annealed_importance, bridge, schedule_of
from pyro_ebm.inference.annealing.population import Population, Rung
from pyro_ebm.inference.kernels.kernel import Tuning

A = 3 * torch.linspace(-1, 1, 10) / torch.linspace(-1, 1, 10).norm()


def prior():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def ten():
    return pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))


def run(target, *args, seed=0, **options):
    options = {"chains_per_group": 16, "num_groups": 16, "num_temperatures": 16} | options
    shared = {name: options.pop(name) for name in set(options) & set(Annealing.__dataclass_fields__)}
    return annealed_importance(target, *args, annealing=Annealing(**shared), seed=seed, progress=False, **options)


def brackets(log_z, truth, *, max_gap=1.0):
    assert log_z.lower < truth < log_z.upper, (log_z, truth)
    assert log_z.upper - log_z.lower < max_gap, log_z
    assert 0 < log_z.se < 0.2 and abs(log_z.value - truth) < 4 * log_z.se, (log_z, truth)


# Exact answers


@pytest.mark.parametrize("kernel", [None, ChEES, MALA], ids=["HMC", "ChEES", "MALA"])
def test_a_linear_tilt_in_ten_dimensions(kernel):
    brackets(run(tilt(ten, {"z": LinearEnergy(A)}), kernel=kernel, num_temperatures=24), 4.5)


@pytest.mark.slow
def test_the_pair_brackets_the_truth_in_at_least_95_of_100_runs():
    target = tilt(ten, {"z": LinearEnergy(A)})
    runs = [run(target, seed=seed, chains_per_group=32, num_groups=16, num_temperatures=24) for seed in range(100)]
    held = sum(bool(found.lower < 4.5 < found.upper) for found in runs)
    assert held >= 95
    assert sum(float(found.upper - found.lower) for found in runs) / 100 < 0.3
    z = torch.tensor([(found.value - 4.5) / found.se for found in runs])
    # Student's t with 15 degrees of freedom has standard deviation 1.07
    assert abs(float(z.mean())) < 4 * 1.07 / 10 and 0.8 < float(z.std()) < 1.5


def test_a_skewed_tilt_and_a_guide():
    def guide():
        pyro.sample("z", dist.Normal(torch.tensor([-0.5, 0.5]), 1.5).to_event(1))

    tilted = tilt(prior, {"z": lambda z: 2 * torch.tanh(2 * z[..., 0] + z[..., 1]) - z[..., 1].sin()})
    truth = quadrature(tilted).log_z.value
    brackets(run(tilted), truth, max_gap=0.5)
    brackets(run(tilted, guide=guide), truth, max_gap=0.5)


def test_a_posterior_with_a_constrained_support():
    def model(y):
        s = pyro.sample("s", dist.HalfCauchy(torch.tensor(1.0)))
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("y", dist.Normal(1.0, s), obs=y)

    y = torch.tensor([2.0, -0.5, 1.3])
    brackets(run(model, y), quadrature(model, y).log_z.value)


def test_a_function_with_a_base():
    density = LogDensity(lambda u: -0.5 * ((u - 2) / 0.5).square().sum(-1), 3)
    truth = 1.5 * math.log(2 * math.pi) + 3 * math.log(0.5)
    brackets(run(density, base=dist.Normal(torch.zeros(3), 2.0).to_event(1), num_temperatures=32), truth)


def test_independent_data():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.tensor([[0.0], [2.0], [-3.5]])
    found = run(model, x, independent="data", chains_per_group=32)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 0])
    assert found.lower.shape == found.upper.shape == found.value.shape == (3,)
    for k in range(3):
        brackets(BoundedEstimate(*(part[k] for part in (*found, found.lower, found.upper))), truth[k])


def test_draws_that_are_given():
    target = tilt(ten, {"z": LinearEnergy(A)})
    z = A + torch.randn(600, 10)
    for draws in ({"z": z}, Draws({"z": z.reshape(4, 150, 10)}, "nuts")):
        brackets(run(target, draws=draws, num_temperatures=24), 4.5)
    # Draws of another distribution: the upper bound knows nothing else
    with pytest.warns(InferenceWarning, match="the lower bound lies above the upper one.*give draws="):
        found = run(target, draws={"z": z - 3 * A}, num_temperatures=24)
    assert found.upper < 4.5
    with pytest.raises(ValueError, match="draws must be at least as many as chains, 256, got 100"):
        run(target, draws={"z": z[:100]})
    weighted = Draws({"z": z[None]}, "snis", log_weights=torch.zeros(1, 600))
    with pytest.raises(ValueError, match="draws must weigh the same, got weighted ones"):
        run(target, draws=weighted)


def test_bounds_close_with_more_temperatures():
    target = tilt(ten, {"z": LinearEnergy(A)})
    coarse, fine = (run(target, num_temperatures=n) for n in (8, 40))
    assert fine.upper - fine.lower < 0.5 * (coarse.upper - coarse.lower)


def test_zero_energy_has_log_z_zero():
    found = run(tilt(prior, {"z": QuadraticEnergy(0.0)}))
    assert max(abs(float(part)) for part in (*found, found.lower, found.upper)) < 1e-6


def test_hard_walls_leave_the_upper_bound_loose():
    with pytest.warns(InferenceWarning, match="the bounds lie .* nats apart: more num_temperatures"):
        found = run(tilt(prior, {"z": lambda z: torch.where(z[..., 0] > 1, 0.0, math.inf)}))
    truth = math.log(0.15865525)
    assert found.lower < truth < found.upper and abs(found.value - truth) < 4 * found.se


# The parts


def test_bridge_of_normal_work():
    """Work N(m, s^2) upward with log Z = m + s^2 / 2 is N(m + s^2, s^2) downward."""
    generator = torch.Generator().manual_seed(0)
    up = 1.0 + 1.5 * torch.randn(4000, 50, dtype=torch.float64, generator=generator)
    down = 1.0 + 2.25 + 1.5 * torch.randn(4000, 50, dtype=torch.float64, generator=generator)
    found = bridge(up, down)
    assert abs(found.mean() - 2.125) < 4 * found.std() / math.sqrt(50) and found.std() < 0.05
    assert bridge(torch.full((3,), 0.7), torch.full((3,), 0.7)).item() == pytest.approx(0.7)
    dead = torch.cat([up, torch.full_like(up, -math.inf)])  # half the base is forbidden
    error = bridge(dead, torch.cat([down, down]) + math.log(1.0)) - (2.125 - math.log(2))
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(50) + 1e-3


def test_schedules_go_evenly_between_the_rungs_of_the_pilot():
    def rung(beta, ess, size):
        tuning = Tuning(torch.tensor([size, [5.0, 5.0]]), torch.ones(2, 2, 1), torch.ones(()))
        return Rung(torch.tensor([beta, beta]), tuning, torch.tensor(ess), 1.0, 1)

    # Two data, two groups. Steps of distance 1, 1, 1/2, and 1, 1
    far, half = math.exp(-1), math.exp(-0.25)
    ladder = [
        rung([0.2, 0.5], [far, far], [1.0, 1.0]),
        rung([0.6, 1.0], [far, far], [0.25, 4.0]),
        rung([1.0, 1.0], [half, 1.0], [0.5, 9.0]),
    ]
    pilot = Population(None, ladder[-1].beta, None, ladder[-1].tuning, ladder)
    schedule = schedule_of(pilot, 5)
    expected = torch.tensor([[0.0, 0.0], [0.1, 0.2], [0.2, 0.4], [0.4, 0.6], [0.6, 0.8], [1.0, 1.0]])
    torch.testing.assert_close(schedule.beta, expected[:, None].expand(6, 2, 2))
    sizes = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25, 0.5])
    torch.testing.assert_close(schedule.step_size[:, 0, 0], sizes)
    assert (schedule.step_size[:, 1] == 5).all() and schedule.step_size[3, 0, 1] == pytest.approx(4**0.2)


def test_the_result_is_an_estimate_with_bounds():
    log_z = BoundedEstimate(*torch.tensor([1.0, 0.1, 0.5, 1.5]))
    value, se = log_z
    assert isinstance(log_z, Estimate) and value == log_z.value == 1.0 and se == log_z.se
    for other in (copy.deepcopy(log_z), pickle.loads(pickle.dumps(log_z))):
        assert (other.value, other.se, other.lower, other.upper) == (1.0, log_z.se, 0.5, 1.5)
    assert "lower=0.5, upper=1.5" in repr(log_z)


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")  # few chains
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    found = run(TiltedDistribution(base, QuadraticEnergy(1.0)), chains_per_group=2, num_temperatures=4)
    assert all(part.dtype == dtype and part.shape == () for part in (*found, found.lower, found.upper))


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")  # few chains
def test_seeds(rng_untouched):
    density = LogDensity(lambda u: -u.square().sum(-1), 2)
    short = {"chains_per_group": 2, "num_temperatures": 3}
    with rng_untouched():
        one, two, other = (run(density, seed=seed, **short) for seed in (1, 1, 2))
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        a, b = (run(density, seed=None, generator=g, **short) for g in generators)
    assert one == two and one.lower == two.lower and one.value != other.value and a == b
    assert run(density, seed=None, **short).value != run(density, seed=None, **short).value


# What is wrong


def test_errors():
    for options, message in (
        ({"num_groups": 1}, "num_groups must be a whole number of at least 2"),
        ({"chains_per_group": 1}, "chains_per_group must be a whole number of at least 2, got 1"),
        ({"num_temperatures": 0}, "num_temperatures must be a whole number of at least 1, got 0"),
        ({"prob": 1.0}, "prob must lie between 0 and 1, got 1.0"),
        ({"kernel": ULA}, "kernel must leave its target invariant, which ULA does not"),
        ({"kernel": HMC(ten)}, "kernel was made for another target"),
        ({"generator": torch.Generator()}, "seed and generator both given"),
    ):
        with pytest.raises(ValueError, match=message):
            run(prior, **options)


def test_bounds_that_say_little_are_named():
    target = tilt(ten, {"z": LinearEnergy(2 * A)})
    with pytest.warns(InferenceWarning, match=r"ais: the bounds lie \d.* nats apart: more num_temperatures"):
        found = run(target, num_temperatures=3)
    assert found.lower < 18 < found.upper
    with pytest.raises(InferenceError, match="nats apart"):
        run(target, num_temperatures=3, strict=True)


def test_a_target_that_the_base_never_meets():
    with pytest.raises(InferenceError, match="zero .* at all 16 particles of island"):
        run(tilt(prior, {"z": lambda z: z.sum(-1) * 0 + math.inf}))
