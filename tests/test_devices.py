"""Everything is computed where its inputs are, whatever torch's default device; no generator meets another device.

`pytest --device cuda` runs the models on that device. Without one, the default device is "meta", whose tensors hold no
numbers: what the package makes there by oversight cannot meet the data.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._pytree import tree_flatten

import pyro_ebm
from pyro_ebm import HMC, MCMC, SMC, VAE, Annealing, ChEES, LinearEnergy, LogDensity, TiltedDistribution, tilt
from pyro_ebm.arviz_statistics import psis
from pyro_ebm.devices import synchronize
from pyro_ebm.diagnostics.ranks import uniform_band

PACKAGE = Path(pyro_ebm.__file__).parent
SHORT = {"seed": 0, "progress": False}
RANDOM = {"rand", "randn", "randint", "randperm", "normal"}


def faults(source: str) -> list[int]:
    """Lines where random numbers come from a generator but the device of the result is not said."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        given = {keyword.arg for keyword in call.keywords}
        is_random = isinstance(call.func, ast.Attribute) and call.func.attr in RANDOM
        if is_random and ast.unparse(call.func).startswith("torch.") and "generator" in given and "device" not in given:
            found.append(call.lineno)
    return found


def test_random_numbers_from_a_generator_say_where():
    """A generator of the CPU with torch's default device "cuda" is an error."""
    wrong = {str(path.relative_to(PACKAGE)): faults(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in wrong.items() if lines} == {}
    assert faults("torch.rand(3, generator=g)") == [1] and not faults("torch.rand(3, generator=g, device=d)")


class World:
    """A model with all its numbers on one device, and runs of it."""

    def __init__(self, device):
        zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)

        def model(x, y=None):
            z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
            with pyro.plate("data", len(x), device=str(device)):  # else Pyro's indices are on the default device
                pyro.sample("y", dist.Normal(z.sum(-1) * x, one[0]), obs=y)

        generator = torch.Generator().manual_seed(0)
        self.model, self.device = model, device
        self.x, self.y = torch.ones(3, device=device), torch.tensor([0.3, -0.2, 1.1], device=device)
        self.tilted = tilt(model, {"z": LinearEnergy([1.0, 0.0]).to(device)})
        self.density = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 2, like=zero)
        self.normal = dist.Normal(zero, one).to_event(1)
        self.images = torch.rand(60, 4, generator=generator).to(device)
        self.labels = (torch.arange(60) % 3).to(device)
        self.vae = VAE((4,), latent_dim=1, hidden=(4,)).to(device).eval()
        self.weighted = pyro_ebm.importance(model, None, self.x, self.y, num_samples=100, seed=0)
        self.mcmc = MCMC(HMC(model), 20, 10, num_chains=4, **SHORT)
        self.draws = self.mcmc.run(self.x, self.y)


def quick(model, *args, seed, **kwargs):
    return pyro_ebm.importance(model, None, *args, num_samples=400, seed=seed, **kwargs)


CASES = {
    "resample": lambda w: w.weighted.resample(5, generator=torch.Generator().manual_seed(0)),
    "equally weighted": lambda w: w.weighted.equally_weighted().values,
    "weights": lambda w: (w.draws.weights, w.weighted.weights, w.draws.mean("z"), w.weighted.std("z")),
    "get_samples": lambda w: w.mcmc.get_samples(5),
    "MCMC": lambda w: MCMC(HMC(w.model), 5, 5, num_chains=4, **SHORT).run(w.x, w.y),
    "ChEES": lambda w: MCMC(ChEES(w.density), 5, 30, num_chains=4, initial_params=w.normal.sample((4,)), **SHORT).run(),
    "SMC": lambda w: SMC(
        w.density, particles_per_island=8, num_islands=2, annealing=Annealing(base=w.normal), **SHORT
    ).run(),
    "annealed_importance": lambda w: pyro_ebm.annealed_importance(
        w.density, annealing=Annealing(base=w.normal), chains_per_group=4, num_groups=2, num_temperatures=2, **SHORT
    ),
    "importance": lambda w: quick(w.model, w.x, w.y, seed=0),
    "predictive": lambda w: pyro_ebm.predictive(w.model, w.x, w.y, num_samples=10, seed=0),
    "predictive, tilted": lambda w: pyro_ebm.predictive(w.tilted, w.x, w.y, num_samples=10, seed=0),
    "quadrature": lambda w: pyro_ebm.quadrature(w.density, num_points=51),
    "pyro_nuts": lambda w: pyro_ebm.pyro_nuts(w.model, w.x, w.y, num_samples=5, warmup_steps=5, num_chains=1, **SHORT),
    "log_normalizer": lambda w: tuple(w.tilted.log_normalizer(w.x, w.y, num_samples=64, seed=0)),
    "log_likelihood": lambda w: tuple(
        pyro_ebm.log_likelihood(w.vae.model, w.vae.guide, w.images, num_samples=4, seed=0)
    ),
    "LabelClassifier": lambda w: pyro_ebm.LabelClassifier.fit(w.images, w.labels).predict(w.images),
    "density_ratio": lambda w: pyro_ebm.density_ratio(w.images[:30], w.images[30:]),
    "biased_split": lambda w: pyro_ebm.biased_split(
        w.images, w.labels, [0.4, 0.3, 0.3], 0.5, reference_size=6, test_size=6
    ).biased.images,
}
# What is on the CPU wherever the inputs are: numbers to read
ON_CPU = {
    "fit": lambda w: pyro_ebm.fit(w.vae.model, w.vae.guide, w.images, epochs=1, **SHORT),
    "calibrate": lambda w: pyro_ebm.calibrate(w.model, w.x, sampler=quick, num_simulations=2, **SHORT),
    "class_balance": lambda w: pyro_ebm.class_balance(w.labels, (0, 1, 2)),
    "compare": lambda w: pyro_ebm.compare({"a": w.draws, "b": w.weighted}),
    "to_arviz": lambda w: pyro_ebm.to_arviz(w.draws),
    "diagnostics": lambda w: w.mcmc.diagnostics(),
    "uniform_band": lambda w: uniform_band(20, 9),
}
pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # runs of a few draws
SLOW = {"SMC", "annealed_importance", "calibrate", "LabelClassifier", "density_ratio", "pyro_nuts"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES | ON_CPU]


@pytest.fixture(scope="module")
def world(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return World(torch.device(request.config.getoption("--device")))


def devices_of(result) -> set[str]:
    """Types of the devices of all tensors in a result."""
    if dataclasses.is_dataclass(result):
        names = [field.name for field in dataclasses.fields(result) if field.name != "source"]
        result = {name: getattr(result, name) for name in names}
    return {leaf.device.type for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)}


@pytest.mark.parametrize("name", NAMES)
def test_results_lie_where_their_inputs_do(world, name):
    """Under another default device too."""
    expected = world.device.type if name in CASES else "cpu"
    with torch.device("meta"):
        found = devices_of((CASES | ON_CPU)[name](world))
    assert found <= {expected} and (found or name not in CASES)


def test_psis_of_the_device(world):
    smoothed, _ = psis(world.weighted.log_weights.flatten())
    assert smoothed.device.type == world.device.type


def test_draws_of_a_tilted_distribution(world):
    tilted = TiltedDistribution(world.normal, LinearEnergy([1.0, 0.0]).to(world.device))
    with torch.device("meta"):
        assert tilted.sample((4,)).device.type == world.device.type


@pytest.mark.parametrize("kind, waits", [("cuda", True), ("cpu", False)])
def test_a_clock_waits_for_the_device(monkeypatch, kind, waits):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(torch.device(kind))
    assert waited == ([torch.device(kind)] if waits else [])


def test_a_draws_seconds_are_measured_after_waiting(world, monkeypatch):
    waited = []
    monkeypatch.setattr("pyro_ebm.inference.chains.loop.synchronize", waited.append)
    MCMC(HMC(world.model), 2, 2, num_chains=2, **SHORT).run(world.x, world.y)
    assert waited == [world.device]
