"""RunningControl against the exact gradient of log Z, and what it leaves as it is."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from pyro_ebm import (
    Checkpoint,
    ContrastiveDivergence,
    LinearEnergy,
    MLPEnergy,
    NoiseContrastive,
    Normalizer,
    ObservedTiltLikelihood,
    ReplayBuffer,
    RunningControl,
    TiltELBO,
    TiltLikelihood,
    fit,
    tilt,
)

BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)
A = torch.tensor([1.0, 0.0])


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", BASE)


def guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


def tilted(energy, seed=0):
    return tilt(model, {"z": energy}, normalize=Normalizer(num_samples=16, seed=seed))


def negative_phases(objective, steps=4000):
    """Gradients of log Z at E = -A.z: the data stand at zero, and their part of the gradient is zero."""
    values, weights = torch.zeros(1, 1, 2), torch.zeros(1, 1)
    found = []
    for step in range(steps):
        energy = LinearEnergy(A)
        loss = objective(tilted(energy, seed=step), None, values, weights)
        found.append(torch.autograd.grad(loss, [energy.a])[0][0])
    return torch.stack(found[100:])


@pytest.fixture(scope="module")
def gradients():
    """8,000 losses, for slow tests; what trains below sees a wrong average too."""
    plain = TiltLikelihood(BASE)
    return negative_phases(plain), negative_phases(RunningControl(plain, decay=0.95))


@pytest.mark.slow
def test_bias_of_the_gradient_falls(gradients):
    """Exact: the mean of N(A, I), 1. A ratio of 16 draws has a bias of some -0.13."""
    plain, controlled = (found - 1.0 for found in gradients)
    assert plain.mean() < -0.08
    assert abs(controlled.mean()) < abs(plain.mean()) / 2  # nearly four standard errors above what is expected


@pytest.mark.slow
def test_noise_of_the_gradient_rises_as_documented(gradients):
    plain, controlled = gradients
    assert 1.4 < controlled.std() / plain.std() < 2.8


@pytest.mark.parametrize("objective", [TiltELBO(), Trace_ELBO()])
def test_loss_is_that_of_the_objective_and_so_is_the_first_gradient(objective):
    x, energy = torch.randn(20, 2), MLPEnergy(2, hidden=(8,))
    control = RunningControl(objective)
    plain = objective if isinstance(objective, TiltELBO) else objective.differentiable_loss

    def loss_and_gradient(function, seed):
        torch.manual_seed(3)
        loss = function(tilted(energy, seed), guide, x)
        return loss, *torch.autograd.grad(loss, list(energy.parameters()), allow_unused=True)[:2]

    for step in range(3):
        found, expected = (loss_and_gradient(each, step) for each in (control, plain))
        torch.testing.assert_close(found[0], expected[0])
        assert torch.allclose(found[1], expected[1]) == (step == 0)


def test_decay_zero_changes_nothing():
    x = torch.randn(30, 2)
    runs = []
    for objective in (TiltELBO(), RunningControl(TiltELBO(), decay=0)):
        energy = LinearEnergy([0.0, 0.0])
        fit(tilted(energy), guide, x, objective=objective, train=energy, epochs=4, batch_size=10, validation=None,
            seed=0, progress=False)  # fmt: skip
        runs.append(energy.a.detach().clone())
    assert torch.equal(*runs)


@pytest.mark.slow
def test_tilt_with_few_draws_is_less_too_sharp():
    """Aggregate posterior N(A, (1 + 0.25) I) in mean: maximum likelihood is a = A; 16 draws overshoot."""
    x = A + torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0) + A
    found = {}
    for name, objective in {"plain": TiltELBO(), "control": RunningControl(TiltELBO(), decay=0.9)}.items():
        energy = LinearEnergy([0.0, 0.0])
        fit(tilted(energy), guide, x, objective=objective, train=energy, epochs=30, batch_size=100, validation=None,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.02), seed=0, progress=False,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30))  # fmt: skip
        found[name] = float((energy.a.detach() - A).norm())
    assert found["plain"] > 0.1
    assert found["control"] < 0.8 * found["plain"]  # .43 to .70 over four seeds


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    x, results = torch.randn(60, 2), []
    for epochs in ((6,), (3, 6)):
        energy = LinearEnergy([0.0, 0.0])
        for num in epochs:
            fit(tilted(energy), guide, x, objective=RunningControl(TiltELBO()), train=energy, epochs=num, batch_size=20,
                validation=None, seed=1, progress=False,
                checkpoint=Checkpoint(tmp_path / f"{len(epochs)}.pt", resume=num != epochs[0]))  # fmt: skip
        results.append(energy.a.detach().clone())
    assert torch.equal(*results)


def test_state_of_the_objective_inside_is_kept():
    inner = ContrastiveDivergence(buffer=ReplayBuffer(capacity=20))
    state = RunningControl(inner).state_dict()
    other = RunningControl(ContrastiveDivergence(buffer=ReplayBuffer(capacity=20)))
    other.load_state_dict(state)
    assert state["objective"].keys() == inner.state_dict().keys()
    assert other.state_dict()["averages"] == []


def test_validation_is_the_loss_unless_the_objective_brings_one():
    x, energy = torch.randn(8, 2), MLPEnergy(2, hidden=(8,))
    plain = RunningControl(TiltELBO())
    assert not hasattr(plain, "validation")
    assert RunningControl(ContrastiveDivergence()).validation.__self__.__class__ is ContrastiveDivergence
    with torch.no_grad():
        plain(tilted(energy), guide, x)
    assert plain.state_dict()["averages"] == []  # what is only looked at is not averaged


def test_observed_tilt():
    def observed(x=None):
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("x", BASE, obs=x)

    energy = LinearEnergy(A)
    model = tilt(observed, {"x": energy}, normalize=Normalizer(num_samples=32))
    control = RunningControl(ObservedTiltLikelihood())
    loss = control(model, None, torch.zeros(5, 2))
    loss.backward()
    assert len(control.state_dict()["averages"]) == 1 and bool(energy.a.grad.isfinite().all())


class TestRefusals:
    @pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "0.9", True])
    def test_decay(self, decay):
        with pytest.raises((ValueError, TypeError), match="decay must be (at least 0 and below 1|a number)"):
            RunningControl(TiltELBO(), decay=decay)

    @pytest.mark.parametrize("objective", [None, TiltELBO, 3])
    def test_objective(self, objective):
        with pytest.raises(TypeError, match=r"objective must be an instance such as TiltELBO\(\)"):
            RunningControl(objective)

    def test_objective_without_log_z(self):
        with pytest.raises(ValueError, match="NoiseContrastive samples no log Z here"):
            RunningControl(NoiseContrastive())(tilted(MLPEnergy(2, hidden=(8,))), guide, torch.zeros(3, 2))

    def test_log_z_of_each_datum(self):
        def varied(x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

        model = tilt(varied, {"z": MLPEnergy(2, hidden=(8,))})
        with pytest.raises(ValueError, match="it differs from datum to datum"):
            RunningControl(TiltELBO())(model, guide, torch.randn(3, 2))

    def test_elbo_that_does_its_own_backward_pass(self):
        with pytest.raises((TypeError, NotImplementedError)):
            RunningControl(TraceGraph_ELBO())(tilted(LinearEnergy(A)), guide, torch.zeros(3, 2))
