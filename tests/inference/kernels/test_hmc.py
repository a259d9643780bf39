"""Batched HMC and ChEES step by step: the integrator, acceptance, divergences, lengths of trajectories."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LogDensity
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import HMC, ChEES, Stride, hamiltonian_step, leapfrog
from pyro_ebm.inference.kernels.kernel import State, Tuning

GAUSSIAN = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 2)
SKEWED = LogDensity(lambda u: (2 * u - u.exp()).sum(-1), 2)  # logarithms of gamma(2, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(density, u, *, step_size=0.1, scales=1.0, length=1.0):
    size = torch.as_tensor(step_size, dtype=u.dtype).expand(u.shape[1:-1])
    inverse_mass = (torch.as_tensor(scales, dtype=u.dtype) ** 2).expand(u.shape[1:])
    return State(u, *density.value_and_grad(u), Tuning(size, inverse_mass, torch.tensor(length, dtype=u.dtype)))


def bind(kernel, density=None):
    return kernel.bind((density or kernel.target).value_and_grad, generator())


# The integrator


def stride_of(state):
    return Stride(HMC(GAUSSIAN)).update(state.tuning)


@pytest.mark.parametrize("scales", [1.0, [0.5, 3.0]])
def test_leapfrog_can_be_run_backwards(scales):
    u, velocity = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    state = start(SKEWED, u, scales=scales)
    end, arrival = leapfrog(SKEWED.value_and_grad, state, velocity, stride_of(state), 7)
    assert (end[0] - u).abs().min() > 1e-3
    back = start(SKEWED, end[0], scales=scales)
    again, departure = leapfrog(SKEWED.value_and_grad, back, -arrival, stride_of(back), 7)
    torch.testing.assert_close(again[0], u)
    torch.testing.assert_close(-departure, velocity)
    torch.testing.assert_close(end[1], SKEWED(end[0]))
    torch.testing.assert_close(end[2], SKEWED.value_and_grad(end[0])[1])


def test_leapfrog_keeps_volume():
    def flow(point):
        state = start(SKEWED, point[None, :2])
        end, arrival = leapfrog(SKEWED.value_and_grad, state, point[None, 2:], stride_of(state), 3)
        return torch.cat([end[0][0], arrival[0]])

    point, h = torch.randn(4).double(), 1e-5
    columns = [(flow(point + h * e) - flow(point - h * e)) / (2 * h) for e in torch.eye(4).double()]
    assert float(torch.linalg.det(torch.stack(columns, 1))) == pytest.approx(1.0, abs=1e-8)


def test_leapfrog_error_is_of_second_order():
    u, velocity = torch.randn(50, 2).double(), torch.randn(50, 2).double()
    errors = []
    for steps in (10, 20, 40):
        state = start(GAUSSIAN, u, step_size=1.0 / steps)
        end, _ = leapfrog(GAUSSIAN.value_and_grad, state, velocity, stride_of(state), steps)
        errors.append(float((end[0] - (u * math.cos(1.0) + velocity * math.sin(1.0))).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)


# One transition


def test_accepts_with_the_metropolis_probability():
    u = torch.randn(20_000, 1)
    density = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 1)
    state = start(density, u, step_size=1.6)
    after, info = bind(HMC(density, num_steps=1, adapt_step_size=False))(state)
    moved = (after.u != u).any(-1)
    assert torch.equal(torch.where(moved[:, None], info.proposal, u), after.u)
    rate = info.acceptance_rate
    assert 0.3 < float(rate.mean()) < 0.9
    for low, high in ((0.0, 0.5), (0.5, 0.9), (0.9, 1.1)):
        some = (rate >= low) & (rate < high)
        share, expected = moved[some].float().mean(), rate[some].mean()
        assert abs(share - expected) <= 4 * math.sqrt(0.25 / int(some.sum()))
    velocity = info.velocity[moved].square().sum(-1)
    energy = 0.5 * velocity - density(info.proposal[moved])
    torch.testing.assert_close((info.energy[moved] - energy).clamp(max=0.0).exp(), rate[moved], atol=1e-4, rtol=1e-4)


def test_state_belongs_together_after_a_step():
    u = torch.randn(200, 2)
    after, _ = bind(HMC(SKEWED, num_steps=3))(start(SKEWED, u, step_size=0.9))
    moved = (after.u != u).any(-1)
    assert 10 < int(moved.sum()) < 190
    value, grad = SKEWED.value_and_grad(after.u)
    torch.testing.assert_close(after.log_prob, value)
    torch.testing.assert_close(after.grad, grad)
    assert after.iteration == 1


@pytest.mark.parametrize("kernel", [HMC, ChEES])
def test_steps_are_pure(kernel):
    state = start(GAUSSIAN, torch.randn(4, 2))
    before = [each.clone() for each in (state.u, state.log_prob, state.grad)]
    first, _ = kernel(GAUSSIAN).bind(GAUSSIAN.value_and_grad, generator(3))(state)
    second, _ = kernel(GAUSSIAN).bind(GAUSSIAN.value_and_grad, generator(3))(state)
    assert torch.equal(first.u, second.u) and first.tuning is state.tuning
    assert all(torch.equal(a, b) for a, b in zip(before, (state.u, state.log_prob, state.grad), strict=True))


@pytest.mark.parametrize("kernel", [HMC, ChEES])
def test_one_transition_keeps_the_law(kernel):
    """Exact draws remain exact, whatever the step size: no warm-up, and the starts are no velocities."""

    def model():
        pyro.sample("z", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))

    fixed = {"step_size": 0.7, "adapt_step_size": False, "adapt_mass_matrix": False, "trajectory_length": 1.4}
    z = MCMC(kernel(model, **fixed), 2, 0, num_chains=20_000, init="prior", seed=0, progress=False).run()
    values = z.values["z"][:, -1].double()
    assert z.stats["acceptance_rate"].mean() < 0.98
    for found, exact in ((values, 2.0), (values**2, 6.0), (values.log(), 1 - 0.5772157)):
        assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / math.sqrt(20_000)).all()


def test_velocities_have_nothing_to_do_with_the_starting_points():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    kernel = HMC(model, step_size=0.08, num_steps=10, adapt_step_size=False, adapt_mass_matrix=False)
    z = MCMC(kernel, 1, 0, num_chains=4000, init="prior", seed=0, progress=False).run().values["z"]
    assert float(z.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_impossible_proposals_are_refused_and_counted(bad):
    density = LogDensity(lambda u: torch.where(u[..., 0] > 0, bad, -0.5 * (u**2).sum(-1)), 1)
    state = start(density, -torch.rand(500, 1), step_size=1.5)
    after, info = bind(HMC(density, num_steps=1, adapt_step_size=False))(state)
    outside = info.proposal[:, 0] > 0
    assert 50 < int(outside.sum()) < 450
    assert torch.equal(info.diverging, outside) and (info.acceptance_rate[outside] == 0).all()
    assert (after.u <= 0).all() and after.log_prob.isfinite().all()


def test_energy_errors_above_a_thousand_are_divergences():
    state = start(GAUSSIAN, torch.randn(10, 2), step_size=3.0)
    after, info = bind(HMC(GAUSSIAN, num_steps=12, adapt_step_size=False))(state)
    assert info.diverging.all() and torch.equal(after.u, state.u)
    assert info.diverging.dtype == torch.bool and (info.acceptance_rate == 0).all()


def test_each_datum_accepts_on_its_own():
    density = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 1, batch=torch.Size([2]))
    state = start(density, torch.randn(1000, 2, 1), step_size=[0.1, 1.9])
    after, info = bind(HMC(density, num_steps=1, adapt_step_size=False))(state)
    assert info.acceptance_rate.shape == (1000, 2) and info.time.tolist() == pytest.approx([0.1, 1.9])
    moved = (after.u != state.u).all(-1).float().mean(0)
    assert moved[0] > 0.99 and moved[1] < 0.96


# How far


@pytest.mark.parametrize("step_size, steps", [(0.01, 157), (0.5, 3), (1.05, 1), (1.0, 2), (1.55, 1), (9.0, 1)])
def test_length_of_fixed_trajectories(step_size, steps):
    """Nearest to pi / 2, and never near pi, where a Gaussian returns its mirror image and nothing mixes."""
    _, info = bind(HMC(GAUSSIAN))(start(GAUSSIAN, torch.zeros(3, 2), step_size=step_size, length=math.pi / 2))
    assert info.n_steps == steps


def test_number_of_steps_and_its_limit():
    state = start(GAUSSIAN, torch.zeros(3, 2), step_size=0.01, length=10.0)
    assert bind(HMC(GAUSSIAN, num_steps=4, adapt_step_size=False))(state)[1].n_steps == 4
    assert bind(HMC(GAUSSIAN, max_steps=5))(state)[1].n_steps == 5
    assert bind(ChEES(GAUSSIAN, max_steps=5))(state)[1].n_steps == 5


def test_chees_goes_a_quasi_random_share():
    state, step = start(GAUSSIAN, torch.zeros(3, 2), step_size=0.016, length=2.0), bind(ChEES(GAUSSIAN))
    lengths = []
    for _ in range(8):
        state, info = step(state)
        lengths.append(info.n_steps)
        assert float(info.time) == pytest.approx(0.016 * info.n_steps)
    assert lengths == [63, 32, 94, 16, 79, 47, 110, 8]


def test_harmonic_mean_of_acceptance():
    rates = torch.tensor([[0.5, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = ChEES(GAUSSIAN).average_acceptance(rates)
    assert found.tolist() == pytest.approx([0.75, 0.0])
    many = torch.full((1024,), 0.8)
    many[0] = 1e-12
    assert float(ChEES(GAUSSIAN).average_acceptance(many)) > 0.7  # one chain does not rule over a thousand
    assert float(HMC(GAUSSIAN).average_acceptance(rates[:, 0])) == pytest.approx(2.5 / 3)


def test_unadjusted_steps_are_taken_without_a_metropolis_test():
    state = start(GAUSSIAN, torch.full((50, 2), 12.0), step_size=2.5)
    after, info = hamiltonian_step(
        GAUSSIAN.value_and_grad, state, generator(), stride=stride_of(state), num_steps=1, adjusted=False
    )
    assert (info.acceptance_rate == 0).all() and torch.equal(after.u, info.proposal)


# Arguments


@pytest.mark.parametrize(
    "kernel, options, message",
    [
        (HMC, {"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        (HMC, {"target_accept_prob": 1.0}, "target_accept_prob must be a number between 0 and 1, both excluded"),
        (HMC, {"trajectory_length": -1.0}, "trajectory_length must be a number between 0 and"),
        (HMC, {"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        (ChEES, {"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        (ChEES, {"num_steps": 5}, "num_steps: ChEES learns the length of its trajectories; use HMC"),
        (HMC, {"vectorize": "processes"}, r"vectorize must be one of \('auto', 'plate', 'vmap'\), got"),
    ],
)
def test_bad_options(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        kernel(GAUSSIAN, **options)


def test_bad_targets():
    with pytest.raises(TypeError, match="model must be a Pyro model, a distribution or a LogDensity, got str"):
        HMC("model")
    with pytest.raises(ValueError, match="give one of model and potential_fn"):
        HMC()
    with pytest.raises(TypeError, match="tree_depth"):
        HMC(GAUSSIAN, tree_depth=10)
    with pytest.raises(ValueError, match="the target of this kernel is a LogDensity, which takes no arguments"):
        HMC(GAUSSIAN).density(torch.zeros(3))
    with pytest.raises(ValueError, match="independent= belongs to a model"):
        HMC(GAUSSIAN, independent="data").density()


def test_distributions_are_targets():
    density = ChEES(dist.Gamma(2.0, 1.0)).density()
    assert density.dim == 1 and (density.constrain(torch.randn(4, 1))["z"] > 0).all()
