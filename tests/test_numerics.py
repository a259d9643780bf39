"""Points at which numbers fail: linear algebra of every kind, checks and Python's arithmetic, by every entry point."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer

from pyro_ebm import (
    HMC,
    MCMC,
    SMC,
    ChEES,
    LogDensity,
    annealed_importance,
    importance,
    noncentered,
    pyro_nuts,
    quadrature,
    sample,
)
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.numerics import FailuresAsNaN, by_halves, failed_numerically, until_numbers_hold
from pyro_ebm.structure import batched_run

Y = torch.tensor([0.3, -0.2, 0.5])
EDGE = 0.8


def matrix(r, bad):
    """The identity, or beyond the edge what has no factor, no inverse or no eigenvalues."""
    beyond = (r > EDGE)[..., None, None]
    return torch.where(beyond, bad, torch.eye(3) + 0 * r[..., None, None])


def by_math(r):
    values = [0 * math.log(EDGE - float(x)) for x in r.detach().flatten()]
    return torch.tensor(values).reshape(r.shape)


def by_check(r):
    return 0 * dist.Normal(0.0, EDGE - r, validate_args=True).log_prob(Y[0])


# Each adds nothing where it works, and fails beyond the edge.
KINDS = {
    "cholesky": lambda r: 0 * torch.linalg.cholesky(matrix(r, -torch.eye(3))).sum((-1, -2)),
    "inverse": lambda r: 0 * torch.linalg.inv(matrix(r, torch.ones(3, 3))).sum((-1, -2)),
    "solve": lambda r: 0 * torch.linalg.solve(matrix(r, torch.ones(3, 3)), Y[:, None]).sum((-1, -2)),
    "lu": lambda r: 0 * torch.linalg.lu_factor(matrix(r, torch.ones(3, 3)))[0].sum((-1, -2)),
    "eigh": lambda r: 0 * torch.linalg.eigh(matrix(r, math.nan * torch.eye(3)))[0].sum(-1),
    "svd": lambda r: 0 * torch.linalg.svdvals(matrix(r, math.nan * torch.eye(3))).sum(-1),
    "normal": lambda r: 0 * dist.MultivariateNormal(torch.zeros(3), matrix(r, -torch.eye(3))).log_prob(Y),
    "precision": lambda r: 0
    * dist.MultivariateNormal(torch.zeros(3), precision_matrix=matrix(r, -torch.eye(3))).log_prob(Y),
    "check": by_check,
    "math": by_math,
}


def model_of(kind):
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        pyro.factor("f", KINDS[kind](r))

    return model


# A normal cut off at the edge.
RATIO = math.exp(-(EDGE**2) / 2) / math.sqrt(2 * math.pi) / (0.5 * (1 + math.erf(EDGE / math.sqrt(2))))
MEAN, SD = -RATIO, math.sqrt(1 - EDGE * RATIO - RATIO**2)


def chains(kernel, model, **options):
    return MCMC(kernel(model), 100, 100, num_chains=32, seed=0, progress=False, **options).run()


ENTRY_POINTS = {
    "chees": lambda model: chains(ChEES, model),
    "vmap": lambda model: chains(ChEES, model, vectorize="vmap"),
    "noncentered": lambda model: chains(HMC, noncentered(model)),
    "smc": lambda model: SMC(model, particles_per_island=128, num_islands=4, seed=0, progress=False).run(),
    "importance": lambda model: importance(model, num_samples=400, seed=0),
    "snis": lambda model: sample(model, method="snis", ess=200, seed=0, progress=False),
    "quadrature": lambda model: quadrature(model),
    "nuts": lambda model: pyro_nuts(model, num_samples=60, warmup_steps=40, num_chains=1, seed=0, progress=False),
    "stock": lambda model: MCMC(infer.NUTS(model), 60, 40, seed=0, progress=False).run(),
}


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # the wall at the edge is one for every trajectory
@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("kind", ["cholesky", "check"])
def test_a_point_at_which_numbers_fail_has_no_density(entry, kind):
    draws = ENTRY_POINTS[entry](model_of(kind))
    name = "r" if "r" in draws.values else "r_decentered"
    worth = 30 if entry in ("nuts", "stock") else 150
    assert float(draws.mean(name)) == pytest.approx(MEAN, abs=4.5 * SD / worth**0.5)
    used = draws.values[name] if draws.log_weights is None else draws.values[name][draws.log_weights > -torch.inf]
    assert float(used.max()) <= EDGE + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["plate", "vmap", "loop"])
def test_many_runs_of_a_model_and_its_density(kind, way):
    """Value, gradient and graph at points of which one fails: those of the others are what each has alone."""
    if kind == "math" and way == "vmap":
        pytest.skip("Python's arithmetic needs numbers")
    r = torch.tensor([0.1, 1.0, -0.4])
    measured = batched_run(model_of(kind), values={"r": r}, vectorize=way).measured
    assert measured["f"].tolist() == [0.0, -math.inf, 0.0] and bool(measured["r"][[0, 2]].isfinite().all())
    if way == "loop":
        return
    density = LogDensity.from_model(model_of(kind), vectorize=way)
    for function in (density.value_and_grad, captured(density.value_and_grad, torch.zeros(3, 1))):
        function(torch.zeros(3, 1))
        value, grad = function(r[:, None])
        assert value.isfinite().tolist() == [True, False, True]
        torch.testing.assert_close(value[[0, 2]], -0.5 * r[[0, 2]] ** 2 - 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(grad[[0, 2], 0], -r[[0, 2]])
        assert not bool(function(torch.ones(3, 1))[0].isfinite().any())


def test_graphs_of_linear_algebra_are_recorded():
    for kind in ("cholesky", "inverse", "solve", "lu", "normal", "precision", "check"):
        density = LogDensity.from_model(model_of(kind))
        assert captured(density.value_and_grad, torch.randn(16, 1)).kind == "captured", kind


@pytest.mark.parametrize("kind", ["cholesky", "math"])
def test_functions_of_points_fail_at_their_own(kind):
    density = LogDensity(lambda u: KINDS[kind](u[..., 0]) - 0.5 * u.square().sum(-1), 1)
    u = torch.tensor([0.1, 1.0, -0.4, 2.0])[:, None].expand(4, 1).reshape(2, 2, 1)
    assert density(u).isfinite().tolist() == [[True, False], [True, False]]
    value, grad = density.value_and_grad(u)
    assert value.isfinite().tolist() == [[True, False], [True, False]] and bool(grad[:, 0].isfinite().all())


def test_log_z_and_likelihoods_of_points_that_fail():
    mass = 0.5 * (1 + math.erf(EDGE / math.sqrt(2)))
    ais = annealed_importance(model_of("cholesky"), num_temperatures=20, seed=0, progress=False)
    assert float(ais.value) == pytest.approx(math.log(mass), abs=5 * float(ais.se))
    estimate = importance(model_of("cholesky"), num_samples=4000, seed=0).log_z
    assert float(estimate.value) == pytest.approx(math.log(mass), abs=5 * float(estimate.se))


def test_a_model_that_never_works_says_why():
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), -torch.eye(2) + 0 * r), obs=torch.zeros(2))

    for method in ("chees", "snis", "nuts"):
        with pytest.raises((ValueError, RuntimeError), match="covariance_matrix"):
            sample(model, method=method, progress=False)


def test_errors_of_the_program_are_not_numbers():
    assert not any(map(failed_numerically, (KeyError("x"), TypeError("singular"), RuntimeError("shape mismatch"))))
    assert all(map(failed_numerically, (ZeroDivisionError(), ValueError("math domain error"))))

    def run(start, stop):
        if stop > 3:
            raise ZeroDivisionError
        return stop - start

    assert by_halves(run, 5) == [(2, 2), (1, 1), (1, None), (1, None)]
    with pytest.raises(ValueError, match="0 math domain error"):
        until_numbers_hold(lambda attempt: (_ for _ in ()).throw(ValueError(f"{attempt} math domain error")))
    with pytest.raises(KeyError):
        by_halves(lambda start, stop: {}["x"], 4)


def test_only_the_matrix_that_fails_is_nan():
    matrices = torch.stack([torch.eye(2), -torch.eye(2), 4 * torch.eye(2)]).requires_grad_()
    with FailuresAsNaN():
        factor = torch.linalg.cholesky(matrices)
        (grad,) = torch.autograd.grad(factor.diagonal(dim1=-2, dim2=-1).sum(), matrices)
    assert factor.isnan().flatten(1).any(1).tolist() == grad.isnan().flatten(1).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(factor[2], 2 * torch.eye(2))
