"""NaN, infinity and complex numbers where a number should be: an error or a warning says so, and never a number."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm
from pyro_ebm import (
    ConvEnergy,
    Draws,
    GaussianMixture2D,
    InferenceError,
    LinearEnergy,
    LogDensity,
    MLPEnergy,
    MomentEnergy,
    QuadraticEnergy,
    TiltedDistribution,
    class_balance,
    compare,
    density_ratio,
    fit_moments,
    log_normalizer,
    plot_compare,
    quadrature,
    tilt,
)
from pyro_ebm.arviz_statistics import psis
from pyro_ebm.diagnostics.ranks import uniform_ecdf, uniform_p_value
from pyro_ebm.energies import as_energy, gaussian_log_normalizer
from pyro_ebm.inference.annealing.log_normalizer import METHODS

BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)
I = 1j * torch.ones(2)  # noqa: E741
NAN = torch.tensor([1.0, math.nan])


def first(value):
    return value[..., :1]


def sampler(*, holes=0, method="chees", weights=None):
    values = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    values.view(-1)[:holes] = math.nan
    return Draws({"z": values}, method, log_weights=weights)


COEFFICIENTS = {
    "LinearEnergy": lambda bad: LinearEnergy(bad),
    "LinearEnergy, scalar": lambda bad: LinearEnergy(bad[1]),
    "QuadraticEnergy": lambda bad: QuadraticEnergy(bad[1]),
    "scaled": lambda bad: LinearEnergy([1.0, 0.0]) * bad[1],
    "scaled by a parameter": lambda bad: nn.Parameter(bad[1]) * LinearEnergy([1.0, 0.0]),
    "MomentEnergy": lambda bad: MomentEnergy(first, bad),
    "fit_moments": lambda bad: fit_moments(BASE, MomentEnergy(lambda v: v), bad, num_samples=800, seed=0),
    "gaussian_log_normalizer": lambda bad: gaussian_log_normalizer(LinearEnergy([1.0, 0.0]), bad, torch.ones(2)),
    "class_balance weights": lambda bad: class_balance(torch.tensor([0, 1]), (0, 1), weights=bad),
    "class_balance labels": lambda bad: class_balance(bad, (0, 1)),
    "total_variation": lambda bad: pyro_ebm.total_variation(bad),
    "density_ratio": lambda bad: density_ratio(torch.randn(20, 2), bad.expand(20, 2)),
    "mean_confidence": lambda bad: pyro_ebm.mean_confidence(bad[None]),
    "class_diversity": lambda bad: pyro_ebm.class_diversity(
        bad[:, None], torch.zeros(2), torch.randn(2, 1), torch.zeros(2), (0,)
    ),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("bad", [NAN, I], ids=["nan", "complex"])
def test_coefficients_and_data(name, bad):
    with pytest.raises((ValueError, TypeError), match=r"must be|multiplied by must|proportions|non-negative"):
        COEFFICIENTS[name](bad)


VALUES = {
    "linear": (LinearEnergy([1.0, 2.0]), I),
    "linear scalar": (LinearEnergy(1.0), I),
    "quadratic": (QuadraticEnergy(1.0), I),
    "mlp": (MLPEnergy(2, hidden=(4,)), I),
    "conv": (ConvEnergy((1, 4, 4), channels=(2,)), 1j * torch.ones(1, 4, 4)),
    "scaled": (2.0 * LinearEnergy([1.0, 2.0]), I),
    "sum": (LinearEnergy([1.0, 2.0]) + QuadraticEnergy(1.0), I),
    "moments": (MomentEnergy(lambda v: v, [1.0, 2.0]), I),
}


@pytest.mark.parametrize("name", VALUES)
def test_complex_values(name):
    energy, value = VALUES[name]
    with pytest.raises(TypeError, match="must be real numbers, got torch.complex64"):
        energy(value)


def turned(value):
    return (value * 1j).sum(-1)


COMPLEX = {
    "tilt": lambda: tilt(lambda: pyro.sample("z", BASE), {"z": turned})(),
    "log_normalizer": lambda: log_normalizer(BASE, turned),
    "TiltedDistribution": lambda: TiltedDistribution(BASE, turned).log_prob(torch.zeros(2)),
    "LogDensity": lambda: LogDensity(turned, 2)(torch.zeros(3, 2)),
    "mixture": lambda: GaussianMixture2D().kl(turned),
    "draws": lambda: Draws({"z": torch.ones(1, 3) * 1j}, "chees"),
    "psis": lambda: psis(torch.ones(50) * 1j),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_energies_and_draws(name):
    with pytest.raises(TypeError, match="must be real numbers, got torch.complex64"):
        COMPLEX[name]()


def nowhere(value):
    return value.sum(-1) * math.nan


def elsewhere(value):
    return torch.full(value.shape[:-1], math.inf)


UNDEFINED = {
    "kl": lambda e: GaussianMixture2D().kl(e),
    "density_error": lambda e: GaussianMixture2D().density_error(as_energy(e)),
    "log_prob": lambda e: TiltedDistribution(BASE, e).log_prob(torch.zeros(2)),
    "sample": lambda e: TiltedDistribution(BASE, e).sample((3,)),
    "quadrature": lambda e: quadrature(TiltedDistribution(BASE, e)),
    "fit_moments": lambda e: fit_moments(
        TiltedDistribution(BASE, e), MomentEnergy(first), [0.5], num_samples=800, seed=0
    ),
    "predictive": lambda e: pyro_ebm.predictive(tilt(lambda: pyro.sample("z", BASE), {"z": e}), num_samples=5, seed=0),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_a_tilt_by_nan_is_none(name):
    with pytest.raises((ValueError, InferenceError), match=r"NaN|not finite|nan"):
        UNDEFINED[name](nowhere)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num", [-3, 0, 1, 2.5, True])
def test_numbers_of_draws_for_log_z(method, num):
    with pytest.raises(ValueError, match=r"num_samples must be a whole number of at least [12]"):
        log_normalizer(BASE, LinearEnergy([1.0, 0.0]), method=method, num_samples=num, seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_log_z_of_nan_is_no_number(method):
    with pytest.warns() if method in ("importance", "qmc") else pytest.raises((InferenceError, ValueError)):
        found = log_normalizer(BASE, nowhere, method=method, num_samples=200, seed=0)
        assert not found.value.isfinite()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("entry_point", ["compare", "plot"])
def test_a_reference_with_holes_is_refused(entry_point, named):
    good, holed = sampler(), sampler(holes=1)
    draws = {"good": good, "holed": holed} if named else {"good": good}
    run = compare if entry_point == "compare" else plot_compare
    with pytest.raises(ValueError, match=r"reference: values of site 'z' must be finite, .* for 1 of 800, .*\(0, 0\)"):
        run(draws, reference="holed" if named else holed)


def test_a_reference_without_weights_is_refused():
    with pytest.raises(ValueError, match="reference: its weights are NaN"):
        compare({"good": sampler()}, reference=sampler(method="snis", weights=torch.full((4, 200), math.nan)))


def test_an_entry_with_holes_is_told():
    assert "draws or weights not finite" in compare({"holed": sampler(holes=3)})["verdict"].item()


@pytest.mark.parametrize("function", [uniform_ecdf, uniform_p_value])
@pytest.mark.parametrize("ranks", [[0.0, math.nan], [0.5, 1.0], [3, 10], [-1, 2], []])
def test_ranks_are_whole_numbers(function, ranks):
    with pytest.raises(ValueError, match="ranks must be integers from 0 to num_draws = 9"):
        function(torch.tensor(ranks), 9)


def gaussian(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


X = torch.ones(3) * 1j
DATA = {
    "snis": lambda: pyro_ebm.sample(gaussian, X, method="snis", num_samples=10),
    "chees": lambda: pyro_ebm.sample(gaussian, X, method="chees", num_samples=10, progress=False),
    "smc": lambda: pyro_ebm.sample(gaussian, X, method="smc", num_samples=10, progress=False),
    "nuts": lambda: pyro_ebm.sample(gaussian, X, method="nuts", num_samples=10, progress=False),
    "auto": lambda: pyro_ebm.sample(gaussian, X, progress=False),
    "log_likelihood": lambda: pyro_ebm.log_likelihood(gaussian, posterior, X, num_samples=10),
    "posterior_draws": lambda: pyro_ebm.posterior_draws(gaussian, posterior, X, num_samples=10),
}


@pytest.mark.parametrize("entry_point", DATA)
def test_complex_data_are_named_by_their_site(entry_point):
    with pytest.raises(TypeError, match="the value of site 'x' must be real numbers, got torch.complex64"):
        DATA[entry_point]()


def test_log_z_of_a_complex_number():
    with pytest.raises(TypeError, match="normalize must be real numbers"):
        tilt(gaussian, {"z": LinearEnergy(1.0)}, normalize=torch.tensor(1j))
