"""Densities that read and write by a mask are captured, with the numbers they have eagerly; others stay eager."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch

from pyro_ebm import LogDensity, sample
from pyro_ebm.inference.density.capture import captured


def of_function(log_prob):
    def value_and_grad(u):
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = log_prob(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    return value_and_grad


def outside_is_kept(u):
    y = u.pow(3)
    outside = u.abs() > 1
    y[outside] = u[outside]
    return -y.pow(2).sum(-1)


def outside_is_a_number(u):
    y = -u.pow(2)
    y[u.abs() > 1] = -1.0
    return y.sum(-1)


def constant_mask(u):
    rows = torch.tensor([True, False, True])
    return -u[:, rows].pow(2).sum(-1) - u.pow(4).sum(-1)


def chosen(u):
    return -u.pow(2).sum(-1) + u[u > 0].sum()


def counted(u):
    places = torch.nonzero(u > 0)
    return -u.pow(2).sum(-1) + u[places[:, 0], places[:, 1]].sum()


def spline(kind):
    torch.manual_seed(0)
    transform = getattr(transforms, kind)(3, count_bins=4)

    def model():
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform]))

    return LogDensity.from_model(model).value_and_grad


SERVED = {
    "kept": lambda: of_function(outside_is_kept),
    "number": lambda: of_function(outside_is_a_number),
    "constant mask": lambda: of_function(constant_mask),
    "coupling": lambda: spline("spline_coupling"),
    "autoregressive": lambda: spline("spline_autoregressive"),
    "elementwise": lambda: spline("Spline"),
}


SLOW = ("autoregressive", "elementwise")  # to record


@pytest.mark.parametrize("scale", [0.01, 1.5])  # none outside, and some
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SERVED])
def test_captured_wherever_it_was_recorded(name, scale):
    function = SERVED[name]()
    graph = captured(function, scale * torch.randn(5, 3))
    assert graph.kind == "captured", graph.problem
    for other in (0.01, 0.5, 1.5, 30.0):
        u = other * torch.randn(5, 3)
        for ours, theirs in zip(graph(u), function(u), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("log_prob", [chosen, counted])
def test_shapes_that_depend_on_values_stay_eager(log_prob):
    function = of_function(log_prob)
    graph = captured(function, torch.randn(5, 3))
    assert graph.kind == "eager" and graph.problem
    u = torch.randn(5, 3)
    torch.testing.assert_close(graph(u), function(u))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # so few steps
def test_a_prior_that_is_a_spline_flow_is_sampled_by_its_graph():
    torch.manual_seed(2)
    transform = transforms.spline_coupling(2, count_bins=3)
    prior = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform])

    def model():
        pyro.sample("z", prior)

    draws = sample(model, method="mala", num_samples=20, warmup_steps=30, num_chains=8, seed=0, progress=False)
    assert draws.notes["graph"] == "captured" and draws.values["z"].isfinite().all()
