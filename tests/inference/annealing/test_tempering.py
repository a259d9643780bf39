"""The path between two distributions, what a kernel may be given as, temperatures and resampling."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import HMC, MALA, ChEES, LinearEnergy, LogDensity, TiltedDistribution, tilt
from pyro_ebm.inference.annealing.tempering import Path, Points, kernel_for, path_to
from pyro_ebm.inference.kernels.kernel import Tuning
from pyro_ebm.randomness import streams


def model():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def skewed(u):
    return -(u[..., 0].exp()) - 0.5 * (u[..., 1] - u[..., 0]).square()


def normal(dim, scale=1.0):
    return dist.Normal(torch.zeros(dim), scale).to_event(1)


def plain(dim=2, **options):
    return LogDensity(skewed, dim, **options)


# The path


def test_values_and_gradients_along_the_path():
    path = path_to(HMC(plain()), (), {}, base=normal(2, 2.0))
    with path.quiet():
        points = path.start(5, 3, seed=0)
    u = points.u.clone().requires_grad_()
    beta = torch.tensor([0.0, 0.3, 1.0])
    expected = (1 - beta) * normal(2, 2.0).log_prob(u) + beta * skewed(u)
    (grad,) = torch.autograd.grad(expected.sum(), u)
    for value, gradient in (path.value_and_grad(beta)(points.u), points.state(beta, NO_TUNING)[1:3]):
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, grad)
    torch.testing.assert_close(points.log_ratio(), (skewed(u) - normal(2, 2.0).log_prob(u)).detach())
    assert path.graph == "captured" and path.num_gradients == 2 * 15


NO_TUNING = Tuning(torch.ones(3), torch.ones(3, 2), torch.ones(()))


def test_an_end_without_say_may_be_infinite():
    zeros = torch.zeros(1, 2)
    points = Points(zeros[..., None], zeros + 1.0, zeros[..., None], zeros - math.inf, zeros[..., None] + math.nan)
    state = points.state(torch.tensor([0.0, 0.5]), Tuning(torch.ones(2), torch.ones(2, 1), torch.ones(())))
    assert state.log_prob.tolist() == [[1.0, -math.inf]] and state.grad[0, 0] == 0
    assert points._replace(log_target=zeros + math.nan).log_ratio().tolist() == [[-math.inf, -math.inf]]


def test_paths_begin_at_the_prior_the_guide_or_a_base():
    tilted = tilt(model, {"z": LinearEnergy([1.0, 2.0])})

    def guide():
        pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 0.1).to_event(1))

    prior = path_to(HMC(tilted), (), {}).start(500, 2, seed=0)
    torch.testing.assert_close(prior.log_ratio(), prior.u @ torch.tensor([1.0, 2.0]))
    guided = path_to(HMC(tilted), (), {}, guide=guide).start(500, 2, seed=0)
    assert abs(guided.u.mean() - 3) < 0.02
    torch.testing.assert_close(guided.log_base, dist.Normal(3.0, 0.1).log_prob(guided.u).sum(-1))
    based = path_to(HMC(tilted), (), {}, base=normal(2, 5.0)).start(500, 2, seed=0)
    assert 4 < based.u.std() < 6
    default = path_to(HMC(plain()), (), {}).start(500, 2, seed=0)
    torch.testing.assert_close(default.log_base, normal(2).log_prob(default.u))


def test_a_tilted_distribution_begins_at_its_base():
    target = TiltedDistribution(normal(2), LinearEnergy([1.0, 2.0]))
    points = path_to(HMC(target), (), {}).start(50, 2, seed=0)
    torch.testing.assert_close(points.log_ratio(), points.u @ torch.tensor([1.0, 2.0]))


def test_bases_and_guides_that_do_not_fit():
    with pytest.raises(ValueError, match="guide and base both given"):
        path_to(HMC(model), (), {}, guide=model, base=normal(2))
    with pytest.raises(ValueError, match="no sites for a guide to propose; give base="):
        path_to(HMC(plain()), (), {}, guide=model)
    for base in (normal(3), dist.Normal(torch.zeros(2), 1.0)):
        with pytest.raises(ValueError, match=r"base must have batch_shape \(\) and event_shape \(2,\), got"):
            path_to(HMC(plain()), (), {}, base=base)


def test_draws_of_the_base_and_moves_share_no_numbers(rng_untouched):
    with rng_untouched():
        path = path_to(HMC(plain()), (), {})
        seed, generator = streams(7, None, torch.device("cpu"))
        first, again = path.start(20, 2, seed=seed), path.start(20, 2, seed=seed)
    assert torch.equal(first.u, again.u)
    moves = torch.randn(first.u.shape, generator=generator)
    assert not torch.isin(moves, first.u).any()
    mine = torch.Generator()
    assert streams(7, mine, torch.device("cpu"))[1] is mine


# Kernels


def test_what_a_kernel_may_be_given_as():
    assert type(kernel_for(model, None)) is HMC
    made = kernel_for(model, ChEES, independent="data", vectorize="vmap")
    assert type(made) is ChEES and made.target is model and (made.independent, made.vectorize) == ("data", "vmap")
    given = MALA(model, step_size=0.3)
    assert kernel_for(model, given) is given
    with pytest.raises(TypeError, match="kernel must be one of ChEES, HMC, MALA"):
        kernel_for(model, "hmc")
    with pytest.raises(ValueError, match="kernel was made for another target.*kernel=MALA"):
        kernel_for(plain(), given)
    with pytest.raises(ValueError, match="independent='data' and a kernel made with independent=None"):
        kernel_for(model, given, independent="data")


def test_a_path_is_evaluated_not_trained():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.scale = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.ones(()))

        def forward(self):
            z = pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(self.drop(z) * self.scale, 1.0).to_event(1), obs=torch.ones(2))

    net = Net()
    path = path_to(HMC(net), (), {})
    assert isinstance(path, Path)
    with path.quiet():
        points = path.start(10, 2, seed=0)
        assert torch.equal(path.at(points.u).log_target, points.log_target)
        assert not net.training and not net.scale.requires_grad
    assert net.training and net.scale.requires_grad and not points.u.requires_grad
