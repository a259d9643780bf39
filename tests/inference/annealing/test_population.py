"""How islands tune each other: each by the particles of all others, and all of them alike in the end."""

from __future__ import annotations

import pytest
import torch

from pyro_ebm import MALA, LogDensity
from pyro_ebm.inference.annealing.population import Pace, Population, _Mover
from pyro_ebm.inference.annealing.tempering import Points
from pyro_ebm.inference.kernels.kernel import Info, Tuning


def population_of(u):
    zeros = u.new_zeros(u.shape[:-1])
    tuning = Tuning(u.new_ones(u.shape[1:-1]), torch.ones_like(u[0]), u.new_ones(()))
    return Population(Points(u, zeros, u * 0, zeros, u * 0), zeros[0], zeros[0].double(), tuning)


def info_of(acceptance_rate):
    proposal = acceptance_rate[..., None]
    return Info(acceptance_rate, acceptance_rate > 1, acceptance_rate, 1, proposal, proposal, torch.ones(()))


def mover():
    return _Mover(None, MALA(LogDensity(lambda u: -u.square().sum(-1), 2)), Pace(), torch.Generator())


@pytest.mark.parametrize("batch", [(), (2,)])
def test_an_island_is_tuned_by_all_others(batch):
    u = torch.randn(50, 3, *batch, 2, generator=torch.Generator().manual_seed(0))
    rate = torch.rand(50, 3, *batch, generator=torch.Generator().manual_seed(1))
    scaled, faster = u.clone(), rate.clone()
    scaled[:, 0] *= 5
    faster[:, 0] = 1.0
    before, after = (mover()._rescaled(population_of(x)).inverse_mass for x in (u, scaled))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(before[0], u.var(0)[1:].log().mean(0).exp())
    assert (after[1:] > 4 * before[1:]).all()
    state = population_of(u).points.state(torch.ones(3, *batch), population_of(u).tuning)
    before, after = (mover()._retuned(state, info_of(x)).step_size for x in (rate, faster))
    torch.testing.assert_close(after[0], before[0])
    assert (after[1:] > before[1:]).all()


def test_a_single_island_is_tuned_on_itself():
    u = torch.randn(50, 1, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mover()._rescaled(population_of(u)).inverse_mass, u.var(0))


@pytest.mark.parametrize("islands", [1, 2, 16])
def test_step_sizes_of_islands_come_together(islands):
    """However far apart they begin; their acceptance falls as they grow."""
    u = torch.zeros(4, islands, 1)
    wanted = mover().kernel.target_accept_prob
    tuning = population_of(u).tuning._replace(step_size=torch.linspace(-1, 1, islands).exp())
    state = population_of(u).points.state(torch.ones(islands), tuning)
    for _ in range(100):
        rate = (wanted - 0.5 * state.tuning.step_size.log()).clamp(0, 1).expand(4, islands)
        state = state._replace(tuning=mover()._retuned(state, info_of(rate)))
    torch.testing.assert_close(state.tuning.step_size, torch.ones(islands), atol=1e-4, rtol=0)


def test_scales_that_an_island_cannot_tell_stay():
    u = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    u[:, 1, 0] = 7.0
    found = mover()._rescaled(population_of(u)).inverse_mass
    torch.testing.assert_close(found[0, 0], u[:, 2, 0].var().sqrt())  # of a variance and the 1 from before
    assert found.isfinite().all() and (found > 0).all()
