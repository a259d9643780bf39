"""Entry points that run a model for many values, held against models that do not broadcast and some that do."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LinearEnergy, LogDensity, Normalizer, calibrate, importance, predictive, sample, tilt
from pyro_ebm.structure import DoesNotBroadcast, prototype_trace
from tests.zoo.case import kinds
from tests.zoo.cases import CASES, cases

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")  # Wishart draws in single precision
BY_NAME = {case.name: case for case in CASES}
HANDFUL = ["nested_plates", "group_indexing", "matrix_times_vector", "slices", "shape_asserts", "gaussian_process"]
HANDFUL += ["writes_into_a_buffer", "prints_and_items"]


@pytest.mark.parametrize("case", cases(lambda case: case.has_density and not case.fills_param_store))
def test_log_density(case):
    """By the first way that a gradient can go through, which it says; refused by name where there is none."""
    continuous, discrete = kinds(case)
    if not continuous:
        with pytest.raises(ValueError, match="no continuous latent sample sites"):
            LogDensity.from_model(case.model, *case.args, **case.kwargs)
        return
    if case.ways[0] == "loop":
        with pytest.raises(DoesNotBroadcast, match="in an outer plate .*; under torch.vmap") as caught:
            LogDensity.from_model(case.model, *case.args, **case.kwargs)
        assert caught.value.ways == ("plate", "vmap")
        return
    density = LogDensity.from_model(case.model, *case.args, **case.kwargs)
    assert density.target.vectorize == ("vmap" if discrete else case.ways[0])  # discrete sites are summed out
    u = 0.1 * torch.randn(7, density.dim).to(density.like)
    value, grad = density.value_and_grad(u)
    assert value.isfinite().all() and grad.isfinite().all()
    moved = 1e-2 * torch.randn(density.dim).to(density.like)
    slope = (density(u + moved) - density(u - moved)) / 2
    tolerance = 2e-3 * float(value.abs().max().clamp(1))
    torch.testing.assert_close((grad * moved).sum(-1), slope, rtol=0.05, atol=tolerance, check_dtype=False)


def test_a_support_without_a_transform_is_refused_by_name():
    with pytest.raises(ValueError, match=r"site 'W' \(Wishart\) has a support that no transform .* LKJCholesky"):
        LogDensity.from_model(BY_NAME["wishart"].model)


def test_a_density_without_a_prior_to_draw_from():
    case = BY_NAME["improper_uniform"]
    density = LogDensity.from_model(case.model, *case.args)
    u = torch.linspace(-1.0, 1.0, 5)[:, None]
    expected = dist.Normal(u, 1.0).log_prob(case.args[0]).sum(-1)
    torch.testing.assert_close(density(u) - density(u)[0], expected - expected[0])


@pytest.mark.parametrize("name", HANDFUL)
def test_predictive(name):
    """Prior predictive of the data, and the data given draws of the latent sites."""
    case = BY_NAME[name]
    drawn = predictive(case.model, *case.args, num_samples=200, seed=0)
    draws = importance(case.model, None, *case.args, num_samples=200, seed=0, **case.kwargs)
    given = predictive(case.model, *case.args, draws=draws, num_samples=200, seed=0)
    for site, value in drawn.items():
        assert value.shape == given[site].shape and value.shape[0] == 200 and value.isfinite().all()
    for site in draws.values:  # rows of the draws, chosen by weight
        assert torch.isin(given[site], draws.values[site]).all()
    assert (drawn["y" if "y" in drawn else "steps"].std(0) > 0.5).all()


@pytest.mark.parametrize("name", [name for name in HANDFUL if name not in ("slices", "gaussian_process")])
def test_log_z_of_a_tilt_at_the_data(name):
    """E = -c . y with y Gaussian: log Z = c . Cov(y) c / 2, by many runs of the model forward."""
    case = BY_NAME[name]
    y = case.args[-1]
    c = torch.full(y.shape, 0.1)
    event = len(prototype_trace(case.model, case.args, {}).nodes["y"]["fn"].event_shape)
    energy = LinearEnergy(c if event else torch.tensor(0.1))
    tilted = tilt(case.model, {"y": energy}, normalize=Normalizer(num_samples=300))
    found = tilted.log_normalizer(*case.args, num_samples=400, seed=0)
    assert tilted.structure(*case.args).way == (case.draws or case.ways)[0]
    many = predictive(case.model, *case.args, num_samples=2000, seed=1)["y"].double().flatten(1)
    covariance = torch.cov(many.T) if many.shape[1] > 1 else many.var()
    exact = 0.005 * float(covariance.sum())
    assert abs(float(torch.as_tensor(found.value).double().mean()) - exact) < 5 * float(found.se.max()) + 0.1 * exact


@pytest.mark.parametrize("name", ["group_indexing", "writes_into_a_buffer"])
def test_calibrate(name):
    case = BY_NAME[name]
    draws = functools.partial(importance, num_samples=200)
    result = calibrate(
        case.model, *case.args, sampler=lambda model, *args, seed: draws(model, None, *args, seed=seed),
        num_simulations=6, num_draws=9, seed=0, progress=False,
    )  # fmt: skip
    assert result.num_simulations == 6 and not result.failures
    assert any(name.startswith("a") for name in result.ranks) and "log_likelihood" in result.ranks


@pytest.mark.parametrize("method", ["chees", "smc"])
@pytest.mark.parametrize("name", ["group_indexing", "one_plate"])
def test_batched_samplers_say_which_way_ran(method, name):
    case = BY_NAME[name]
    options = {"warmup_steps": 60} if method == "chees" else {}
    draws = sample(
        case.model, *case.args, method=method, num_samples=100, num_chains=8, seed=0, vectorize="auto", progress=False,
        **options,
    )  # fmt: skip
    assert draws.notes["vectorize"] == case.ways[0] and draws.notes["graph"] == "captured"
    (site, (mean, sd)), *_ = case.answers.items()
    assert ((draws.mean(site) - torch.as_tensor(mean)).abs() < 0.4 * torch.as_tensor(sd)).all()


def test_chains_of_a_model_whose_prior_cannot_be_drawn():
    case = BY_NAME["improper_uniform"]
    draws = sample(case.model, *case.args, method="chees", num_samples=50, num_chains=32, seed=0, progress=False)
    mean, sd = case.answers["z"]
    assert draws.notes["init"] == "uniform" and abs(float(draws.mean("z")) - mean) < 0.5 * sd


def test_sample_by_every_model_that_importance_serves():
    draws = sample(BY_NAME["python_branch"].model, torch.tensor(0.4), method="snis", num_samples=200, num_chains=1)
    assert draws.notes["vectorize"] == "loop"
    assert abs(float(draws.mean("z")) - 0.2) < 5 * math.sqrt(0.5 / draws.notes["ess"])


def test_validation_is_left_as_it_was():
    with pyro.validation_enabled(True):
        importance(BY_NAME["shape_asserts"].model, None, *BY_NAME["shape_asserts"].args, num_samples=100, seed=0)
        assert dist.Normal(0.0, 1.0)._validate_args
