"""Quadrature meets every closed form there is, and refuses what has none."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    QuadraticEnergy,
    TiltedDistribution,
    quadrature,
    tilt,
)


def standard(d=2):
    def model():
        return pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))

    return model


def close(value, expected, tolerance=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=tolerance,
        rtol=tolerance,
    )


@pytest.mark.parametrize("loc", [0.0, 3.3, -200.0])
@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0])
def test_gaussian_in_one_dimension(loc, scale):
    draws = quadrature(dist.Normal(loc, scale))
    assert draws.method == "quadrature"
    assert draws.values["z"].shape[0] == 1
    close(draws.log_z.value, 0.0)
    assert abs(float(draws.mean("z")) - loc) < 1e-3 * scale + 2e-7 * abs(loc)
    close(draws.std("z"), scale, 1e-3)
    assert float(draws.weights.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scale", [0.02, 1.0, 5.0])
def test_correlated_gaussian_in_two_dimensions(scale):
    loc, factor = torch.tensor([1.5, -2.0]), scale * torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    draws = quadrature(dist.MultivariateNormal(loc, scale_tril=factor))
    close(draws.log_z.value, 0.0)
    assert (draws.mean("z") - loc).abs().max() < 1e-3 * scale
    close(draws.std("z"), [scale, scale], 1e-3)
    z = draws.flat("z") - loc
    close((draws.weights[:, None] * z).T @ z / scale**2, [[1.0, 0.6], [0.6, 1.0]], 1e-3)


def test_linear_tilt():
    a = torch.tensor([1.0, -0.5])
    draws = quadrature(tilt(standard(), {"z": LinearEnergy(a)}))
    close(draws.log_z.value, 0.5 * float(a @ a))
    close(draws.mean("z"), a)
    close(draws.std("z"), [1.0, 1.0])


@pytest.mark.parametrize("c", [-0.9, 0.7, 50.0])
def test_quadratic_tilt(c):
    draws = quadrature(tilt(standard(), {"z": QuadraticEnergy(c)}))
    close(draws.log_z.value, -math.log(1 + c))
    close(draws.std("z"), [1 / math.sqrt(1 + c)] * 2)


def test_tilted_distribution_enters_without_its_log_z():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    draws = quadrature(TiltedDistribution(base, LinearEnergy([2.0, 0.0])))
    close(draws.log_z.value, 2.0)
    close(draws.mean("z"), [2.0, 0.0])


def test_bimodal_in_one_dimension():
    def log_prob(u):
        left, right = dist.Normal(-4.0, 0.05).log_prob(u[..., 0]), dist.Normal(5.0, 1.0).log_prob(u[..., 0])
        return torch.logaddexp(left + math.log(0.3), right + math.log(0.7)) + 7.0

    draws = quadrature(LogDensity(log_prob, 1))
    close(draws.log_z.value, 7.0)
    close(draws.mean("u"), [0.3 * -4 + 0.7 * 5], 1e-3)
    close(draws.weights[draws.flat("u")[:, 0] < 0].sum(), 0.3)


def test_bimodal_in_two_dimensions():
    modes = torch.tensor([[-3.0, 1.0], [2.0, 2.0]])

    def log_prob(u):
        components = dist.Normal(modes, torch.tensor([[0.3, 0.3], [0.1, 0.8]])).to_event(1)
        return (components.log_prob(u[..., None, :]) + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)

    draws = quadrature(LogDensity(log_prob, 2))
    close(draws.log_z.value, 0.0)
    close(draws.mean("u"), torch.tensor([0.25, 0.75]) @ modes)


@pytest.mark.parametrize(
    "law, mean",
    [
        (dist.LogNormal(0.3, 0.5), math.exp(0.3 + 0.125)),
        (dist.Beta(2.0, 5.0), 2 / 7),
        (dist.Gamma(0.7, 2.0), 0.35),
        (dist.Gamma(0.5, 2.0), 0.25),
        (dist.Uniform(-1.0, 3.0), 1.0),
        (dist.HalfNormal(2.0), 2 * math.sqrt(2 / math.pi)),
        (dist.Dirichlet(torch.tensor([1.0, 2.0, 5.0])), [1 / 8, 2 / 8, 5 / 8]),
        (dist.LKJCholesky(2, 1.5), [[1.0, 0.0], [0.0, None]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_constrained_support(law, mean):
    draws = quadrature(law)
    close(draws.log_z.value, 0.0, 3e-4)
    if isinstance(law, dist.LKJCholesky):
        close(draws.mean("z")[0], mean[0])
        close(draws.mean("z")[1, 0], 0.0)
    else:
        close(draws.mean("z"), mean, 3e-4)


def test_posterior_and_evidence_of_a_normal_mean():
    y = torch.tensor([1.0, 2.0, 0.5])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    draws = quadrature(model, y)
    precision = 1 / 4 + 3
    close(draws.mean("mu"), float(y.sum()) / precision)
    close(draws.std("mu"), precision**-0.5)
    marginal = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4.0)
    close(draws.log_z.value, float(marginal.log_prob(y)))


def test_error_estimate_covers_a_coarse_grid():
    with pytest.warns(InferenceWarning, match="9 points along each axis do not resolve"):
        draws = quadrature(dist.Normal(0.0, 1.0), num_points=9)
    error = abs(draws.log_z.value)
    assert 1e-4 < error < draws.log_z.se
    fine = quadrature(dist.Normal(0.0, 1.0))
    assert fine.log_z.se < 1e-5


def test_double_precision():
    draws = quadrature(dist.Normal(torch.tensor(1 / 3, dtype=torch.float64), 1.0))
    assert draws.values["z"].dtype == draws.log_weights.dtype == torch.float64
    assert float(draws.mean("z")) == pytest.approx(1 / 3, abs=1e-12)
    assert abs(draws.log_z.value) < 1e-12


def test_networks_in_double_precision():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    draws = quadrature(tilt(model, {"z": lambda z: net(z).squeeze(-1)}))
    assert draws.flat("z").dtype == torch.float64


@pytest.mark.parametrize("num_points", [64, 65])
def test_weights_do_not_depend_on_the_grid(num_points):
    draws = quadrature(tilt(standard(), {"z": lambda z: torch.tanh(2 * z[..., 0])}), num_points=num_points)
    fine = quadrature(tilt(standard(), {"z": lambda z: torch.tanh(2 * z[..., 0])}))
    close(draws.log_z.value, fine.log_z.value)
    close(draws.mean("z"), fine.mean("z"))


@pytest.mark.parametrize(
    "target",
    [
        LogDensity(lambda u: torch.zeros(u.shape[:-1]), 1),
        LogDensity(lambda u: -0.5 * u[..., 0] ** 2, 2),
        dist.Cauchy(0.0, 1.0),
        tilt(standard(), {"z": QuadraticEnergy(-1.5)}),
    ],
    ids=["flat", "flat in one direction", "heavy tails", "unbounded energy"],
)
def test_mass_at_the_edge_is_refused(target):
    with pytest.raises(ValueError, match="does not fall off|is NaN at"):
        quadrature(target)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_energies_that_are_not_finite_are_refused(value):
    energy = {"z": lambda z: torch.where(z[..., 0] > 1, value, z[..., 0])}
    with pytest.raises(ValueError, match="the log density is NaN"):
        quadrature(tilt(standard(), energy))


def test_hard_walls_are_fine():
    walled = tilt(standard(1), {"z": lambda z: torch.where(z[..., 0] > 0, 0.0, math.inf)})
    draws = quadrature(walled, num_points=20_001)
    close(draws.log_z.value, math.log(0.5), 1e-3)
    close(draws.mean("z"), [math.sqrt(2 / math.pi)], 1e-3)


def test_three_dimensions_are_refused():
    with pytest.raises(ValueError, match="1 or 2 dimensions, got 3"):
        quadrature(standard(3))


@pytest.mark.parametrize("option, value", [("num_points", 2), ("radius", 0.0)])
def test_impossible_grids_are_refused(option, value):
    limit = "positive and finite" if option == "radius" else "a whole number of at least 3"
    with pytest.raises(ValueError, match=f"{option} must be {limit}, got {value}"):
        quadrature(standard(1), **{option: value})


def test_wrong_target_is_refused():
    with pytest.raises(TypeError, match="target must be callable .a Pyro model., got int"):
        quadrature(3)


def wide_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(800.0, dtype=torch.float64), 2.0))
    pyro.sample("y", dist.Normal(z, 2.0), obs=torch.tensor(800.0, dtype=torch.float64))


DOUBLE = {"dtype": torch.float64}
FAR = {
    "far": (dist.Normal(500.0, 1.0), 0.0, 500.0, 1.0),
    "far_left": (dist.Normal(-5000.0, 1.0), 0.0, -5000.0, 1.0),
    "very_far": (dist.Normal(torch.tensor(1e9, **DOUBLE), 1.0), 0.0, 1e9, 1.0),
    "narrow": (dist.Normal(3.3, 1e-4), 0.0, 3.3, 1e-4),
    "narrow_at_zero": (dist.Normal(0.0, 1e-9), 0.0, 0.0, 1e-9),
    "far_and_narrow": (dist.Normal(torch.tensor(500.0, **DOUBLE), 1e-4), 0.0, 500.0, 1e-4),
    "wide": (dist.Normal(0.0, 1000.0), 0.0, 0.0, 1000.0),
    "positive": (dist.LogNormal(10.0, 0.01), 0.0, math.exp(10.00005), 220.28),
    "share": (dist.Beta(1000.0, 1.0), 0.0, 1000 / 1001, 0.000997),
    "tilted": (TiltedDistribution(dist.Normal(500.0, 1.0), LinearEnergy(2.0)), 1002.0, 502.0, 1.0),
    "model": (wide_model, -math.log(2 * math.sqrt(4 * math.pi)), 800.0, math.sqrt(2)),
    "two_dimensions": (dist.Normal(torch.tensor([300.0, -700.0]), 0.1).to_event(1), 0.0, [300.0, -700.0], [0.1, 0.1]),
    "far_ridge": (
        dist.MultivariateNormal(torch.tensor([300.0, -200.0], **DOUBLE), torch.tensor([[1, 0.9], [0.9, 1]], **DOUBLE)),
        0.0, [300.0, -200.0], [1.0, 1.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAR)
def test_far_and_narrow(name):
    target, log_z, mean, sd = FAR[name]
    draws = quadrature(target)
    (site,) = draws.values
    close(draws.log_z.value, log_z, 1e-3)
    sd = torch.as_tensor(sd, dtype=torch.float64)
    assert ((draws.mean(site).double() - torch.tensor(mean, **DOUBLE)).abs() < 0.01 * sd + 1e-6 * abs(sd)).all()
    torch.testing.assert_close(draws.std(site).double(), sd, rtol=2e-3, atol=0.0)


def test_what_the_grid_cannot_find_or_resolve_is_named():
    with pytest.raises(ValueError, match=r"too narrow for float32 so far from zero, at \[100.*give the model numbers"):
        quadrature(dist.Normal(1e5, 1.0))
    ridge = dist.MultivariateNormal(torch.zeros(2, **DOUBLE), torch.tensor([[1, 0.99999], [0.99999, 1]], **DOUBLE))
    with pytest.warns(InferenceWarning, match=r"1024 points along each axis do not resolve the density \(log Z"):
        draws = quadrature(ridge)
    assert float(draws.log_z.se) > 0.01 and draws.notes["grid"] == 1024
    with pytest.warns(InferenceWarning, match=r"11 points along each axis do not resolve"):
        quadrature(dist.Normal(0.0, 1.0), num_points=11)


def test_a_mass_that_is_never_found(monkeypatch):
    monkeypatch.setattr("pyro_ebm.inference.quadrature._ZOOMS", 2)
    with pytest.raises(ValueError, match="the grid does not find the mass of the density, last sought in"):
        quadrature(dist.Normal(500.0, 1.0))
