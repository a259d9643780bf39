"""Running variances and covariances are those of all points; a dense mass matrix undoes correlations."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import HMC, MALA, MCMC, ChEES, LogDensity
from pyro_ebm.inference.kernels.kernel import Tuning
from pyro_ebm.inference.kernels.scales import RunningCovariance, RunningVariance, standardized

QUIET = {"seed": 0, "progress": False}
BATCHES = ((1, 1.0), (7, 2.0), (64, 0.1), (2, 5.0))


def shrunk(spread, n):
    return spread * n / (n + 5) + 1e-3 * 5 / (n + 5) * (torch.eye(len(spread)) if spread.ndim > 1 else 1)


def test_running_variance_is_the_variance():
    parts = [1000 + scale * torch.randn(n, 3, 2).double() for n, scale in BATCHES]
    running = RunningVariance()
    for part in parts:
        running.add(part)
    everything = torch.cat(parts)
    torch.testing.assert_close(running.regularized(), shrunk(everything.var(0).flatten(), 74).reshape(3, 2))
    assert running.count == 74


def test_running_covariance_is_the_covariance_within_blocks():
    mix = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0], [-1.0, 3.0, 1.0]]).double()
    parts = [1000 + scale * torch.randn(n, 3).double() @ mix.T for n, scale in BATCHES]
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1)).double()
    running = RunningCovariance(mask)
    for part in parts:
        running.add(part)
    torch.testing.assert_close(running.regularized(), shrunk(torch.cat(parts).T.cov(), 74).double() * mask)


def test_fewer_draws_than_coordinates_leave_a_factor():
    running = RunningCovariance(torch.ones(8, 8))
    running.add(1e6 * torch.randn(2, 8))
    tuning = running.tuned(Tuning(torch.tensor(1.0), torch.ones(8), torch.tensor(1.0)))
    assert bool(tuning.factor.isfinite().all()) and bool((tuning.factor.diagonal() > 0).all())


def test_standardized_points_are_uncorrelated():
    covariance = torch.tensor([[2.0, 1.8], [1.8, 2.0]])
    factor = torch.linalg.cholesky(covariance)
    tuning = Tuning(torch.tensor(1.0), covariance.diagonal(), torch.tensor(1.0), factor)
    points = torch.randn(1000, 2)
    torch.testing.assert_close(standardized(points @ factor.T, tuning), points, rtol=1e-4, atol=1e-5)


PRECISION = torch.linalg.inv(torch.tensor([[1.0, 0.995, 0.0], [0.995, 1.0, 0.0], [0.0, 0.0, 100.0]]))
CORRELATED = LogDensity(lambda u: -0.5 * ((u @ PRECISION) * u).sum(-1), 3)


@pytest.mark.parametrize("kernel", [HMC, ChEES, MALA])
def test_dense_mass_of_a_correlated_gaussian(kernel):
    """The covariance is found, the draws have it, and the steps no longer follow its narrowest direction."""
    covariance = torch.linalg.inv(PRECISION)
    runs = {}
    for full_mass in (False, True):
        made = kernel(CORRELATED, full_mass=full_mass)
        mcmc = MCMC(made, num_samples=3, warmup_steps=300, num_chains=64, **QUIET)
        runs[full_mass] = (mcmc.run(), made)
    dense, made = runs[True]
    found = made.inverse_mass_matrix[("u",)]
    correlation = float(found[0, 1] / (found[0, 0] * found[1, 1]).sqrt())
    assert correlation == pytest.approx(0.995, abs=0.003)
    assert float(dense.stats["step_size"][0, 0]) > 3 * float(runs[False][0].stats["step_size"][0, 0])
    ends = dense.values["u"][:, -1]  # one independent draw a chain
    whitened = ends @ torch.linalg.cholesky(PRECISION)
    assert torch.all((whitened.square().mean(0) - 1).abs() < 4 * (2 / 64) ** 0.5)
    assert covariance.shape == found.shape


def two_sites():
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(a[..., 0], 0.1))
    pyro.sample("c", dist.Normal(0.0, 3.0))
    pyro.sample("obs", dist.Normal(b, 10.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    ("full_mass", "shapes"),
    [
        (False, {("a", "b", "c"): (4,)}),
        ([], {("a", "b", "c"): (4,)}),
        (True, {("a", "b", "c"): (4, 4)}),
        ([("b", "a")], {("b", "a"): (3, 3), ("c",): (1,)}),
        ([("a",), ("c",)], {("a",): (2, 2), ("c",): (1, 1), ("b",): (1,)}),
    ],
)
def test_blocks_are_those_of_pyro(full_mass, shapes):
    kernel = HMC(two_sites, full_mass=full_mass)
    MCMC(kernel, 3, 60, num_chains=32, **QUIET).run()
    assert {names: tuple(value.shape) for names, value in kernel.inverse_mass_matrix.items()} == shapes


def test_a_block_holds_its_sites_in_its_order():
    kernel = HMC(two_sites, full_mass=[("b", "a")])
    MCMC(kernel, 3, 300, num_chains=64, **QUIET).run()
    found = kernel.inverse_mass_matrix[("b", "a")]
    expected = torch.tensor([[1.01, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)
    assert float(kernel.inverse_mass_matrix[("c",)]) == pytest.approx(9.0, rel=0.2)


def test_dense_mass_of_each_element_of_an_independent_plate():
    scale_tril = torch.linalg.cholesky(torch.tensor([[[1.0, 0.99], [0.99, 1.0]], [[1.0, -0.9], [-0.9, 1.0]]]))

    def model():
        with pyro.plate("data", 2, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale_tril))

    kernel = HMC(model, full_mass=True, independent="data")
    MCMC(kernel, 3, 200, num_chains=64, **QUIET).run()
    found = kernel.inverse_mass_matrix[("z",)]
    torch.testing.assert_close(found[:, 0, 1], torch.tensor([0.99, -0.9]), rtol=0, atol=0.15)


def test_full_mass_is_checked():
    with pytest.raises(ValueError, match="full_mass must be True, False or a list of tuples"):
        HMC(two_sites, full_mass=["a"])
    with pytest.raises(ValueError, match=r"full_mass names the site\(s\) \['a'\] more than once"):
        HMC(two_sites, full_mass=[("a", "b"), ("a",)])
    with pytest.raises(ValueError, match=r"full_mass names the site\(s\) \['x'\]; the latent sites are"):
        MCMC(HMC(two_sites, full_mass=[("x",)]), 5, 5, **QUIET).run()
