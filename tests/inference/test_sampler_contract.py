"""What every sampler promises: one result type, its shapes, its seeds, and no side effects."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Draws, QuadraticEnergy, importance, pyro_hmc, pyro_nuts, quadrature, sample, tilt
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import HMC, ChEES
from pyro_ebm.inference.kernels.langevin import MALA, ULA

# Runs this short cannot be trusted, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")

FAST = {"num_samples": 8, "warmup_steps": 6, "num_chains": 2, "progress": False}


def batched(kernel):
    def run(model, *args, seed=None):
        return MCMC(kernel(model), 8, 6, num_chains=2, seed=seed, progress=False).run(*args)

    return run


SAMPLERS = {
    "importance": lambda model, *args, seed=None: importance(model, None, *args, num_samples=50, seed=seed),
    "nuts": lambda model, *args, seed=None: pyro_nuts(model, *args, seed=seed, **FAST),
    "hmc": lambda model, *args, seed=None: pyro_hmc(model, *args, seed=seed, **FAST),
    "sample": lambda model, *args, seed=None: sample(model, *args, method="nuts", seed=seed, **FAST),
    "quadrature": lambda model, *args, seed=None: quadrature(model, *args, num_points=33),
    "chees": batched(ChEES),
    "batched_hmc": batched(HMC),
    "mala": batched(MALA),
    "ula": batched(ULA),
}
CHAINS = ("nuts", "hmc", "sample", "chees", "batched_hmc", "mala", "ula")
SHAPES = {"importance": (1, 50), **dict.fromkeys(CHAINS, (2, 8))}
RANDOM = list(SHAPES)


def model(y):
    s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=y.dtype), 0.5))
    with pyro.plate("one", 1, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=y.dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, s[..., None]).to_event(1), obs=y)


def target():
    return tilt(model, {"z": QuadraticEnergy(1.0)})


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    return request.param


def test_shapes_and_dtypes(sampler, dtype):
    draws = SAMPLERS[sampler](target(), torch.full((1, 1), 0.5, dtype=dtype), seed=0)
    assert isinstance(draws, Draws)
    lead = SHAPES.get(sampler, (1, draws.num_draws))
    assert set(draws.values) == {"s", "z"}
    assert draws.values["s"].shape == lead and draws.values["z"].shape == (*lead, 1, 1)
    assert all(value.dtype == dtype for value in draws.values.values())
    assert (draws.values["s"] > 0).all() and draws.values["z"].isfinite().all()
    assert "lp" in draws.stats and all(stat.shape == lead for stat in draws.stats.values())
    assert draws.observed.keys() == {"y"} if sampler != "quadrature" else True
    assert not any(value.requires_grad for value in [*draws.values.values(), *draws.stats.values()])
    assert math.isfinite(draws.seconds) and draws.num_gradients is not None


def test_weights_or_chains(sampler, dtype):
    draws = SAMPLERS[sampler](target(), torch.full((1, 1), 0.5, dtype=dtype), seed=0)
    if sampler in ("importance", "quadrature"):
        assert draws.num_chains == 1 and draws.log_weights.shape == (1, draws.num_draws)
        assert draws.log_weights.dtype == dtype
        assert float(draws.log_weights.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        assert math.isfinite(draws.log_z.value) and draws.log_z.se >= 0
    else:
        assert draws.log_weights is None and draws.log_z is None and draws.pareto_k is None


def test_seeds(sampler, rng_untouched):
    y = torch.full((1, 1), 0.5)
    with rng_untouched():
        first, again, other = (SAMPLERS[sampler](target(), y, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.values[site], again.values[site]) for site in first.values)
    assert all(torch.equal(first.stats[name], again.stats[name]) for name in first.stats)
    if sampler in RANDOM:
        assert not torch.equal(first.values["z"], other.values["z"])


@pytest.mark.parametrize("name", RANDOM)
def test_without_a_seed_the_global_generator_advances(name):
    y = torch.full((1, 1), 0.5)
    first, second = SAMPLERS[name](target(), y), SAMPLERS[name](target(), y)
    assert not torch.equal(first.values["z"], second.values["z"])


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_independent(name):
    values = SAMPLERS[name](target(), torch.full((1, 1), 0.5), seed=0).values["z"]
    assert not torch.equal(values[0], values[1])


def test_parameters_of_the_energy_are_left_alone(sampler):
    energy = QuadraticEnergy(1.0)
    SAMPLERS[sampler](tilt(model, {"z": energy}), torch.full((1, 1), 0.5), seed=0)
    assert energy.c.requires_grad and energy.c.grad is None and energy.c.item() == 1.0


def test_deterministic_sites_are_no_data(sampler):
    def with_deterministic():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)

    draws = SAMPLERS[sampler](with_deterministic, seed=0)
    assert set(draws.values) == {"z"} and not draws.observed
