"""MALA and ULA: the Langevin step by hand, MALA's correction, ULA's known bias and how it shrinks."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm import LogDensity, quadrature
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.kernel import State, Tuning
from pyro_ebm.inference.kernels.langevin import MALA, ULA

SKEWED = LogDensity(lambda u: (2 * u - u.exp()).sum(-1), 1)  # logarithm of gamma(2, 1)
FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}


def normal(scale, dim=1):
    return LogDensity(lambda u: -0.5 * ((u / scale) ** 2).sum(-1), dim)


def run(kernel, num_samples, warmup_steps=100, **options):
    options = {"num_chains": 256, "seed": 0, "progress": False, **options}
    return MCMC(kernel, num_samples, warmup_steps, **options).run()


def state_of(density, u, step_size, inverse_mass):
    tuning = Tuning(torch.tensor(step_size), torch.tensor(inverse_mass), torch.tensor(1.0))
    return State(u, *density.value_and_grad(u), tuning)


@pytest.mark.parametrize("kernel", [MALA, ULA])
def test_the_proposal_is_a_langevin_step(kernel):
    density = LogDensity(lambda u: (2 * u - u.exp()).sum(-1), 2)
    u, step_size, inverse_mass = torch.randn(6, 2), 0.3, torch.tensor([0.5, 4.0])
    state = state_of(density, u, step_size, inverse_mass.tolist())
    _, info = kernel(density).bind(density.value_and_grad, torch.Generator().manual_seed(5))(state)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(5))
    expected = u + step_size / 2 * inverse_mass * state.grad + (step_size * inverse_mass).sqrt() * noise
    torch.testing.assert_close(info.proposal, expected)
    assert info.n_steps == 1


def test_mala_accepts_by_the_ratio_of_both_proposals():
    u = torch.randn(50, 1).double()
    state = state_of(SKEWED, u, 1.2, [1.0])
    _, info = MALA(SKEWED).bind(SKEWED.value_and_grad, torch.Generator().manual_seed(5))(state)
    end = info.proposal
    _, grad = SKEWED.value_and_grad(end)

    def log_q(to, origin, gradient):
        return -((to - origin - 0.6 * gradient) ** 2).sum(-1) / 2.4

    log_ratio = SKEWED(end) - SKEWED(u) + log_q(u, end, grad) - log_q(end, u, state.grad)
    torch.testing.assert_close(info.acceptance_rate, log_ratio.clamp(max=0).exp())
    assert float(info.acceptance_rate.min()) < 0.9


@pytest.mark.parametrize("scale, step_size", [(1.0, 0.5), (1.0, 2.0), (0.5, 0.7)])
def test_ula_has_the_variance_of_its_formula(scale, step_size):
    draws = run(ULA(normal(scale), step_size=step_size, **FIXED), 400, num_chains=1024)
    u = draws.values["u"][..., 0].double()
    stationary = scale**2 / (1 - step_size / (4 * scale**2))
    squares = u.square().mean(1)  # one a chain: independent
    assert abs(squares.mean() - stationary) < 4 * squares.std() / math.sqrt(1024)
    assert abs(u.mean(1).mean()) < 4 * u.mean(1).std() / math.sqrt(1024)
    assert abs(stationary - scale**2) > 20 * squares.std() / math.sqrt(1024)  # the bias is there to be seen


def test_mala_has_no_bias_at_the_same_step_size():
    u = run(MALA(normal(1.0), step_size=2.0, **FIXED), 400, num_chains=1024).values["u"][..., 0].double()
    squares = u.square().mean(1)
    assert abs(squares.mean() - 1.0) < 4 * squares.std() / math.sqrt(1024)


def test_the_bias_of_ula_is_seen_against_a_grid_and_shrinks():
    grid = quadrature(SKEWED)
    exact = float(grid.std("u")) ** 2 + float(grid.mean("u")) ** 2
    biases, errors = [], []
    for step_size in (0.8, 0.4, 0.1):
        draws = run(ULA(SKEWED, step_size=step_size, **FIXED), 500, 200, num_chains=1024)
        squares = draws.values["u"][..., 0].double().square().mean(1)
        biases.append(float(squares.mean()) - exact)
        errors.append(float(squares.std()) / math.sqrt(1024))
    assert biases[0] > 2 * biases[1] - 4 * errors[1] > 0  # of first order or more
    assert biases[0] > 10 * errors[0] and biases[1] > 4 * errors[1] and biases[2] < biases[1] / 2


def test_ula_adapts_its_step_until_the_bias_is_small():
    draws = run(ULA(normal(3.0, 2)), 300, 200)
    assert float(draws.stats["acceptance_rate"].mean()) == pytest.approx(0.95, abs=0.02)
    assert float(draws.std("u").mean()) == pytest.approx(3.0, rel=0.15)


def test_ula_runs_away_beyond_its_stability():
    with pytest.warns(UserWarning, match="diverged"):
        draws = run(ULA(normal(0.5), step_size=1.1, **FIXED), 100, 0, num_chains=4)
    assert 30 < float(draws.values["u"].abs().max()) < 1e3  # there each step falls off a cliff


def test_ula_takes_steps_in_many_dimensions():
    """Where a Metropolis step would never be accepted, as on images: that is what it is for."""
    density = normal(1.0, 40_000)
    state = state_of(density, torch.randn(2, 40_000), 1.5, [1.0])
    after, info = ULA(density).bind(density.value_and_grad, torch.Generator().manual_seed(0))(state)
    assert (info.acceptance_rate == 0).all() and info.diverging.all()
    assert torch.equal(after.u, info.proposal)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_ula_stays_where_the_density_is(bad):
    density = LogDensity(lambda u: torch.where(u[..., 0] > 1, bad, -0.5 * (u**2).sum(-1)), 1)
    state = state_of(density, -torch.rand(500, 1), 1.0, [1.0])
    after, info = ULA(density).bind(density.value_and_grad, torch.Generator().manual_seed(0))(state)
    outside = info.proposal[:, 0] > 1
    assert int(outside.sum()) > 10 and torch.equal(info.diverging, outside)
    assert torch.equal(after.u, torch.where(outside[:, None], state.u, info.proposal))


@pytest.mark.parametrize("kernel", [MALA, ULA])
def test_what_diverges_is_not_taken(kernel):
    """A wall that the density falls off by 1e8 is as good as its end."""
    wall = LogDensity(lambda u: (-0.5 * u.square() - 1e8 * (u.abs() > 1).to(u)).sum(-1), 1)
    state = state_of(wall, torch.linspace(-0.9, 0.9, 64)[:, None], 0.5, [1.0])
    after, info = kernel(wall).bind(wall.value_and_grad, torch.Generator().manual_seed(0))(state)
    beyond = info.proposal[:, 0].abs() > 1
    assert beyond.any() and not beyond.all()
    assert torch.equal(info.diverging, beyond)
    assert torch.equal(after.u[beyond], state.u[beyond]) and (after.log_prob[beyond] > -1).all()
