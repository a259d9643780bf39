"""Warm-up: step sizes, scales and trajectory lengths find known values, from far away, for few and many chains."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LogDensity
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.adaptation import (
    Adaptation,
    Rescue,
    _chees_gradient,
    _windows,
    initial_tuning,
)
from pyro_ebm.inference.kernels.hmc import HMC, ChEES
from pyro_ebm.inference.kernels.kernel import Info, State, Tuning
from pyro_ebm.inference.kernels.langevin import MALA

QUIET = {"seed": 0, "progress": False}


def normal(scales):
    scales = torch.as_tensor(scales)
    return LogDensity(lambda u: -0.5 * ((u / scales) ** 2).sum(-1), scales.shape[-1])


def warmed(kernel, u, num_steps):
    chains = Chains(kernel, kernel.density(), u, generator=torch.Generator().manual_seed(0))
    chains.warm_up(num_steps)
    return chains


# Step sizes


@pytest.mark.parametrize("kernel", [HMC, ChEES, MALA])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("mass", [True, False])
def test_acceptance_comes_near_its_target(kernel, scale, mass):
    options = {} if kernel is MALA else {"max_steps": 20}
    each = kernel(normal([scale] * 5 + [scale / 2] * 5), adapt_mass_matrix=mass, **options)
    chains = warmed(each, scale * torch.randn(64, 10), 200)
    chains.extend(100)
    rates = torch.stack([rates for rates, _, _ in chains.record.infos])
    found = torch.stack([each.average_acceptance(rate) for rate in rates]).mean()
    # whole numbers of steps, and shares of a length, make the acceptance of HMC a ragged function of the step size
    assert float(found) == pytest.approx(each.target_accept_prob, abs=0.06 if kernel is MALA else 0.25)


def test_step_size_is_in_units_of_the_scales_when_these_are_learned():
    sizes = [float(warmed(MALA(normal([s])), s * torch.randn(64, 1), 200).state.tuning.step_size) for s in (1e-2, 1e2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


def test_nothing_is_adapted_that_should_not_be():
    kernel = ChEES(
        normal([1.0]), step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False, adapt_trajectory=False
    )
    tuning = warmed(kernel, 5 * torch.randn(64, 1), 50).state.tuning
    assert float(tuning.step_size) == pytest.approx(0.3)
    assert float(tuning.trajectory_length) == 1.0 and tuning.inverse_mass.tolist() == [1.0]


def test_without_warm_up_a_step_size_is_searched():
    sizes = {s: float(warmed(HMC(normal([s])), s * torch.randn(8, 1), 0).state.tuning.step_size) for s in (1e-3, 1e3)}
    assert 2e-4 < sizes[1e-3] < 4e-3 and 2e2 < sizes[1e3] < 4e3


def test_one_step_size_for_each_datum():
    """Noise scales that differ by 10,000: each datum has the step size and the scale that are its own."""
    scales = torch.logspace(-2, 2, 5)[:, None]
    density = LogDensity(lambda u: -0.5 * ((u / scales) ** 2).sum(-1), 1, batch=torch.Size([5]))
    for mass in (True, False):
        kernel = MALA(density, adapt_mass_matrix=mass)
        chains = warmed(kernel, scales * torch.randn(64, 5, 1), 200)
        chains.extend(100)
        rates = torch.stack([rates for rates, _, _ in chains.record.infos]).mean((0, 1))
        assert rates.shape == (5,) and rates.tolist() == pytest.approx([0.574] * 5, abs=0.1)
        tuning = chains.state.tuning
        if mass:
            assert tuning.inverse_mass.sqrt()[:, 0].tolist() == pytest.approx(scales[:, 0].tolist(), rel=0.2)
        else:
            lengths = tuning.step_size.sqrt() / scales[:, 0]
            assert lengths.tolist() == pytest.approx([float(lengths.mean())] * 5, rel=0.3)


def test_one_chain_that_cannot_move_does_not_stop_the_others():
    """Beyond 50 the gradient is NaN: whatever starts there stays there, until it is moved to where others are."""

    def log_prob(u):
        return (-0.5 * u**2 + 0 * torch.where(u > 50, u * 0, 1.0).sqrt()).sum(-1)

    u = torch.randn(64, 1)
    u[3] = 60.0
    for kernel in (ChEES, HMC, MALA):
        chains = warmed(kernel(LogDensity(log_prob, 1), adapt_mass_matrix=False), u, 100)
        assert 0.3 < float(chains.state.tuning.step_size) < 5
        assert chains.rescued == 1 and float(chains.state.u.abs().max()) < 6 and 0.6 < float(chains.state.u.std()) < 1.4


def test_chees_is_not_stopped_by_a_wall():
    """Half of the trajectories end outside of the support, at any step size."""
    density = LogDensity(lambda u: torch.where(u[..., 0] > 0, -0.5 * (u**2).sum(-1), -torch.inf), 1)
    chains = warmed(ChEES(density), torch.rand(128, 1), 200)
    assert float(chains.state.tuning.step_size) > 0.3
    chains.extend(200)
    u = torch.stack(chains.record.u, 1).double()
    assert float(u.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)


# Scales


@pytest.mark.parametrize("kernel", [HMC, ChEES, MALA])
@pytest.mark.parametrize("start", ["narrow", "wide"])
def test_scales_are_the_standard_deviations(kernel, start):
    scales = torch.tensor([0.05, 1.0, 20.0])
    u = 0.1 * torch.randn(64, 3) if start == "narrow" else 5 * scales * torch.randn(64, 3)
    found = warmed(kernel(normal(scales)), u, 400).state.tuning.inverse_mass.sqrt()
    assert found.tolist() == pytest.approx(scales.tolist(), rel=0.15)


@pytest.mark.parametrize("warmup_steps", [1, 2, 5, 9, 10, 20, 21, 100, 500, 3000])
def test_windows_double_and_leave_time_for_the_step_size(warmup_steps):
    inside, ends = _windows(warmup_steps)
    assert max(ends) == inside[-1] == warmup_steps - warmup_steps // 5 - 1
    assert inside[0] == warmup_steps // 10 and all(end in inside for end in ends)
    lengths = torch.tensor([inside[0] - 1, *sorted(ends)]).diff()
    assert (lengths[1:] >= 2 * lengths[:-1]).all() and (len(lengths) == 1 or lengths.min() >= 10)


def test_initial_scales():
    u = torch.randn(64, 2) * torch.tensor([5.0, 0.0]) + 1
    tuning = initial_tuning(HMC(normal([1.0, 1.0])), u)
    assert float(tuning.inverse_mass[0]) == pytest.approx(float(u[:, 0].var()), rel=0.1)
    assert float(tuning.inverse_mass[1]) == 1  # all start at one point: that says nothing
    assert initial_tuning(HMC(normal([1.0, 1.0])), u[:4]).inverse_mass.tolist() == [1, 1]
    assert initial_tuning(HMC(normal([1.0, 1.0]), adapt_mass_matrix=False), u).inverse_mass.tolist() == [1, 1]


# Trajectory lengths


def criterion(length, u, velocity):
    """Change of the squared distance to the center along the exact dynamics of a Gaussian; one, for one length."""
    end = u * torch.cos(length) + velocity * torch.sin(length)
    return 0.25 * (end.square().sum(-1) - u.square().sum(-1)).square().mean()


def test_gradient_of_the_criterion():
    u, velocity = torch.randn(20_000, 2).double(), torch.randn(20_000, 2).double()
    u, velocity = u - u.mean(0), velocity - velocity.mean(0)
    length = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(criterion(length, u, velocity), length)
    time = length.detach()
    info = Info(
        acceptance_rate=torch.ones(20_000).double(),
        diverging=torch.zeros(20_000, dtype=torch.bool),
        energy=torch.zeros(20_000).double(),
        n_steps=7,
        proposal=3 * (u * time.cos() + velocity * time.sin()) + 5,
        velocity=-u * time.sin() + velocity * time.cos(),
        time=time,
    )
    one = torch.ones((), dtype=torch.float64)
    before = State(3 * u + 5, u[:, 0], u, Tuning(one, torch.full((2,), 9.0).double(), one))
    assert float(slope) > 0.1
    torch.testing.assert_close(_chees_gradient(before, info), slope * length.detach())


def test_rejected_and_broken_proposals_have_no_say():
    u, velocity = torch.randn(100, 2), torch.randn(100, 2)
    one, rates = torch.ones(()), torch.ones(100)
    before = State(u, u[:, 0], u, Tuning(one, torch.ones(2), one))
    end, arrival = u + velocity, velocity.clone()
    rates[50:] = 0
    info = Info(rates, rates == 0, rates, 1, end, arrival, one)
    expected = _chees_gradient(before, info)
    end[50:], arrival[50:] = torch.nan, torch.inf
    assert torch.equal(_chees_gradient(before, info), expected) and bool(expected.isfinite())


@pytest.mark.parametrize("start", [0.1, 3.5])
def test_chees_learns_the_length_for_a_gaussian(start):
    """Uniform shares of a length T make the criterion largest at tan(2 T) = 2 T, T = 2.25, in units of the scale."""
    kernel = ChEES(normal([3.0] * 10), trajectory_length=start)
    length = float(warmed(kernel, 3 * torch.randn(128, 10), 400).state.tuning.trajectory_length)
    assert 1.2 < length < 3.2


def test_correlation_needs_longer_trajectories():
    precision = torch.linalg.inv(0.99 * torch.ones(2, 2) + 0.01 * torch.eye(2))
    density = LogDensity(lambda u: -0.5 * torch.einsum("...i,ij,...j", u, precision, u), 2)
    length = float(warmed(ChEES(density), torch.randn(128, 2), 400).state.tuning.trajectory_length)
    assert length > 2


def test_length_follows_the_scales():
    """A length learned while one scale was a hundred times too small is not kept when scales are set."""
    kernel = ChEES(normal([1.0, 300.0]))
    tuning = warmed(kernel, torch.randn(64, 2), 300).state.tuning
    assert float(tuning.trajectory_length) < 10
    tuning = tuning._replace(trajectory_length=torch.tensor(50.0))
    adaptation = Adaptation(kernel, State(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 2), tuning), 10)
    lengths = [
        float(adaptation._trajectory.rescale(torch.ones(2), torch.tensor(after)))
        for after in ([0.5, 100.0], [0.1, 0.1], [1.0, 3.0], [100.0, 1.0])  # smaller and similar ones say nothing
    ]
    assert lengths == pytest.approx([5.0, 5.0, 5.0, kernel.trajectory_length])


@pytest.mark.filterwarnings("ignore:.*chains disagree:pyro_ebm.InferenceWarning")
def test_scales_of_the_median_datum_decide_on_the_length():
    """With many data the largest change is noise: lengths would shrink at every window."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    kernel = ChEES(model, independent="data")
    draws = MCMC(kernel, 5, 200, num_chains=8, seed=0, progress=False).run(torch.zeros(200, 2))
    assert 0.9 < draws.notes["trajectory_length"] < 4


# Few chains, short warm-ups


@pytest.mark.parametrize("kernel", [HMC, ChEES, MALA])
@pytest.mark.parametrize("num_chains", [1, 2])
def test_few_chains(kernel, num_chains):
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([0.3, 3.0])).to_event(1))

    z = MCMC(kernel(model), 1000, 400, num_chains=num_chains, init="uniform", **QUIET).run()
    assert z.mean("z").tolist() == pytest.approx([0.0, 5.0], abs=0.6)
    assert z.std("z").tolist() == pytest.approx([0.3, 3.0], rel=0.15)


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("kernel", [HMC, ChEES, MALA])
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("num_chains", [1, 32])
def test_warm_ups_of_any_length(kernel, warmup_steps, num_chains):
    draws = MCMC(kernel(normal([1.0, 2.0])), 5, warmup_steps, num_chains=num_chains, **QUIET).run()
    assert draws.values["u"].isfinite().all() and (draws.stats["step_size"] > 0).all()


# Chains that start too far out


def far_out(stuck):
    u = torch.arange(12.0).reshape(4, 3, 1)
    state = State(u, u[..., 0], -u, Tuning(torch.ones(3), torch.ones(3, 1), torch.tensor(1.0)))
    rate = torch.where(stuck, 0.0, 0.8)
    info = Info(rate, stuck, u[..., 0], 1, u, u, torch.ones(3))
    return state, info


def test_stuck_chains_are_moved_to_where_others_of_their_datum_are():
    stuck = torch.zeros(4, 3, dtype=torch.bool)
    stuck[2, 0] = stuck[:3, 1] = stuck[:, 2] = True
    state, info = far_out(stuck)
    rescue, generator = Rescue(100), torch.Generator().manual_seed(0)
    for _ in range(19):
        assert rescue.update(state, info, generator) is state
    moved = rescue.update(state, info, generator)
    assert rescue.count == 4  # where all are stuck, none is moved
    assert torch.equal(moved.u[~stuck], state.u[~stuck]) and torch.equal(moved.u[:, 2], state.u[:, 2])
    assert float(moved.u[2, 0, 0]) in (0.0, 3.0, 9.0) and (moved.u[:3, 1] == state.u[3, 1]).all()
    assert torch.equal(moved.log_prob, moved.u[..., 0]) and torch.equal(moved.grad, -moved.u)
    origin = rescue.origin[..., 0]  # whose start each chain has from now on
    assert origin[:, 1].tolist() == [3, 3, 3, 3] and origin[:, 2].tolist() == [0, 1, 2, 3]
    assert torch.equal(moved.u[:, 0], state.u[origin[:, 0], 0])


def test_no_chain_is_moved_at_the_end_of_the_warm_up():
    stuck = torch.zeros(4, 3, dtype=torch.bool)
    stuck[0] = True
    state, info = far_out(stuck)
    rescue = Rescue(50)
    places = [rescue.update(state, info, torch.Generator().manual_seed(0)) for _ in range(50)]
    assert [i + 1 for i, place in enumerate(places) if place is not state] == [20, 40]


@pytest.mark.parametrize("kernel", [ChEES, HMC])
def test_chains_in_the_tail_of_a_half_cauchy_prior_come_back(kernel):
    """At a thousand times the posterior's scale no trajectory of the others' step size is accepted."""
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def schools():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    draws = MCMC(kernel(schools), 60, 200, num_chains=512, init="prior", seed=1, progress=False).run()
    assert draws.notes["rescued"] > 0
    assert float(draws.stats["acceptance_rate"].mean(1).min()) > 0.3
    assert float(draws.values["tau"].max()) < 150
