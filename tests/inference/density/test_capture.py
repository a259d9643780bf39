"""The captured graph does what the function does, everywhere, without what does not depend on the point."""

from __future__ import annotations

import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ebm import VAE, InferenceError, LinearEnergy, LogDensity, MLPEnergy, tilt
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.density import capture
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.inference.kernels.hmc import HMC


class Operations(TorchDispatchMode):
    """Names of the tensor operations that ran, and the largest tensor they made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 3, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def shapes():
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("L", dist.LKJCholesky(3, 1.5))
    pyro.sample("s", dist.Gamma(2.0, 1.0))


def in_place(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    loc = torch.zeros(z.shape[:-1] + (2,))
    loc[..., 0] = z[..., 0]
    loc[..., 1] = z[..., 1] * z[..., 2]
    loc += 1
    pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


def with_vae(**options):
    torch.manual_seed(0)
    vae = VAE((6,), 2, hidden=(8,))
    return LogDensity.from_model(tilt(vae.model, {"z": MLPEnergy(2)}), torch.rand(3, 6), **options)


DENSITIES = {
    "hierarchy": lambda: LogDensity.from_model(hierarchy, torch.randn(3)),
    "vmap": lambda: LogDensity.from_model(hierarchy, torch.randn(3), vectorize="vmap"),
    "constrained": lambda: LogDensity.from_model(shapes),
    "in place": lambda: LogDensity.from_model(in_place, torch.randn(2)),
    "constrained, vmap": lambda: LogDensity.from_model(shapes, vectorize="vmap"),
    "tilted posterior": with_vae,
    "independent": lambda: with_vae(independent="data"),
    "function": lambda: LogDensity(lambda u: -u.pow(2).sum(-1), 3),
}


def same_everywhere(function, density, chains):
    for scale in (0.3, 1.0, 3.0):
        u = scale * torch.randn(chains, *density.batch, density.dim)
        before = u.clone()
        for _ in range(2):  # the graph keeps nothing from call to call
            for ours, theirs in zip(function(u), density.value_and_grad(u), strict=True):
                torch.testing.assert_close(ours, theirs)
                assert not ours.requires_grad
        assert torch.equal(u, before)


@pytest.mark.parametrize("name", DENSITIES)
def test_captured_is_eager_at_new_points(name):
    density = DENSITIES[name]()
    function = captured(density.value_and_grad, torch.randn(7, *density.batch, density.dim))
    assert function.kind == "captured" and function.problem is None
    same_everywhere(function, density, 7)


def test_double_precision():
    density = LogDensity(lambda u: torch.special.gammaln(u.exp()).neg().sum(-1), 2, like=torch.zeros(0).double())
    u = torch.randn(5, 2).double()
    value, grad = captured(density.value_and_grad, u)(u)
    assert value.dtype == grad.dtype == torch.float64 and torch.equal(value, density(u))


def test_the_model_runs_no_more():
    calls = []

    def model():
        calls.append(1)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    density = LogDensity.from_model(model)
    function = captured(density.value_and_grad, torch.randn(4, 1))
    calls.clear()
    function(torch.randn(4, 1))
    assert not calls


def test_what_does_not_depend_on_the_point_is_computed_once():
    """The scatter of 10,000 data enters as a number; only what meets the parameter is left."""
    y = torch.randn(10_000)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        spread = ((y - y.mean()).square().exp() + y.abs().log()).logsumexp(0)
        pyro.factor("data", -0.5 * len(y) * (mu - y.mean()) ** 2 - spread)

    density = LogDensity.from_model(model)
    u = torch.randn(4, 1)
    function = captured(density.value_and_grad, u)
    with Operations() as eager:
        density.value_and_grad(u)
    with torch.no_grad(), Operations() as graph:
        function(u)
    assert eager.largest == 10_000 and graph.largest <= 8
    assert len(graph.names) < len(eager.names) / 3
    assert not any(name.startswith(("exp", "log", "mean")) for name in graph.names)
    same_everywhere(function, density, 4)


# What cannot be captured


def test_a_branch_on_values_stays_eager():
    def log_prob(u):
        return -u.pow(2).sum(-1) if bool(u.sum() > 0) else -u.abs().sum(-1)

    density = LogDensity(log_prob, 2)
    function = captured(density.value_and_grad, torch.randn(4, 2))
    assert function.kind == "eager" and "data-dependent control flow" in function.problem
    same_everywhere(function, density, 4)


def test_a_branch_that_hides_its_values_stays_eager():
    """What numpy sees is a constant to the graph: found by comparing at other points."""

    def log_prob(u):
        shift = float(u.detach().numpy().sum()) if type(u.detach()) is torch.Tensor else 0.0
        return -u.pow(2).sum(-1) + shift

    function = captured(LogDensity(log_prob, 2).value_and_grad, torch.randn(4, 2))
    assert function.kind == "eager" and function.problem


def test_a_random_density_stays_eager():
    density = LogDensity(lambda u: -u.pow(2).sum(-1) + torch.randn(u.shape[:-1]), 2)
    function = captured(density.value_and_grad, torch.randn(4, 2))
    assert function.kind == "eager" and function.problem == "its operations depend on the values, or it is random"
    u = torch.zeros(4, 2)
    assert not torch.equal(function(u)[0], function(u)[0])


def test_the_reason_is_in_the_notes():
    def log_prob(u):
        return -u.pow(2).sum(-1) if bool((u < 99).all()) else -u.abs().sum(-1)

    notes = [
        MCMC(HMC(LogDensity(each, 1)), 3, 5, num_chains=32, seed=0, progress=False).run().notes
        for each in (log_prob, lambda u: -u.pow(2).sum(-1))
    ]
    assert notes[0]["graph"] == "eager" and "data-dependent" in notes[0]["graph_problem"]
    assert notes[1]["graph"] == "captured" and "graph_problem" not in notes[1]


# Weights


def test_parameters_that_want_gradients_are_left_alone():
    energy = LinearEnergy([1.0, 2.0])
    closure = nn.Parameter(torch.ones(2))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", (z * closure).sum(-1) - energy(z))

    density = LogDensity.from_model(model)
    function = captured(density.value_and_grad, torch.randn(5, 2))
    assert function.kind == "captured"
    same_everywhere(function, density, 5)
    for parameter in (closure, *energy.parameters()):
        assert parameter.requires_grad and parameter.grad is None


def test_the_next_run_sees_new_weights():
    energy = LinearEnergy([0.0])
    model = tilt(lambda: pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1)), {"z": energy})
    mcmc = MCMC(HMC(model), 100, 50, num_chains=64, seed=0, progress=False)
    first = float(mcmc.run().mean("z"))
    with torch.no_grad():
        energy.a.fill_(3.0)
    second = float(mcmc.run().mean("z"))
    assert abs(first) < 0.2 and abs(second - 3) < 0.2


# torch.compile


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_is_eager_at_new_points():
    density = with_vae(independent="data")
    function = captured(density.value_and_grad, torch.randn(7, 3, 2), compile=True)
    assert function.kind == "compiled"
    same_everywhere(function, density, 7)


def test_a_failing_compiler_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(capture.torch, "compile", fail)
    with pytest.raises(InferenceError, match=r"failed \(RuntimeError: no g\+\+ here\); if that is for want of a C\+\+"):
        captured(LogDensity(lambda u: -u.pow(2).sum(-1), 1).value_and_grad, torch.randn(3, 1), compile=True)
