"""A tilt that runs away with a finite loss is stopped, and what it leaves is from before; healthy runs are not."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import Checkpoint, LinearEnergy, MLPEnergy, Normalizer, TiltELBO, TrainingWarning, fit, tilt
from pyro_ebm.tilts.listeners import weights_reported_to
from pyro_ebm.tilts.normalizer import site_log_normalizer
from pyro_ebm.training.guard import DegenerateWeightsError, WeightGuard


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def guide(x):
    """The posterior of data that determine their z."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1).to_event(1))


def data_at(place, num=256):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(1)) * 0.5 + torch.tensor([place, 0.0])


def run(energy, x, *, normalize=None, **options):
    tilted = tilt(model, {"z": energy}, normalize=normalize or Normalizer(num_samples=256))
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    settings = {"epochs": 60, "batch_size": 64, "seed": 0, "progress": False, "optimizer": adam}
    return fit(tilted, guide, x, objective=TiltELBO(), train=energy, **{**settings, **options})


def test_a_runaway_with_a_finite_loss_is_stopped():
    """Data eight standard deviations out: the best of 256 draws stays behind, and the loss falls without end."""
    energy = LinearEnergy([0.0, 0.0])
    match = r"log Z rests on [12]\.\d of 256 draws .* in epoch \d+ at step \d.*Regularize.*kept the weights of epoch \d"
    with pytest.warns(TrainingWarning, match=match):
        result = run(energy, data_at(8.0))
    assert result.stopped == "degenerate weights"
    assert result.train_loss[-1] < -36  # the least any tilt of this kind can have is -32
    assert 10 < result.best_epoch <= result.epochs < 40
    assert 5 < energy.a[0] < 12
    reference = LinearEnergy([0.0, 0.0])
    run(reference, data_at(8.0), epochs=result.best_epoch)
    assert torch.equal(energy.a, reference.a)


def test_the_checkpoint_ends_before_the_weights_degenerate(tmp_path):
    path = tmp_path / "run.pt"
    energy, again = LinearEnergy([0.0, 0.0]), LinearEnergy([0.0, 0.0])
    with pytest.warns(TrainingWarning):
        result = run(energy, data_at(8.0), checkpoint=Checkpoint(path, every=1))
    saved = torch.load(path, weights_only=True)
    assert result.best_epoch <= saved["epoch"] < result.epochs
    assert torch.equal(saved["best"][0]["a"], energy.a)
    with pytest.warns(TrainingWarning, match="log Z rests on"):
        repeated = run(again, data_at(8.0), checkpoint=Checkpoint(path, resume=True))
    assert repeated.train_loss == result.train_loss
    assert torch.equal(again.a, energy.a)


def test_a_run_that_is_over_before_the_guard_is_sure_says_so_too():
    """Twenty steps on data that one step of a wild learning rate leaves behind."""
    energy = LinearEnergy([0.0, 0.0])
    wild = functools.partial(torch.optim.SGD, lr=10.0)
    with pytest.warns(TrainingWarning, match="log Z rests on 1.* in epoch 5: .*kept the initial weights"):
        result = run(energy, data_at(8.0), epochs=5, optimizer=wild, patience=1)
    assert (result.stopped, result.epochs, result.best_epoch) == ("epochs", 5, 0)
    assert torch.equal(energy.a, torch.zeros(2))


@pytest.mark.parametrize(("method", "num_samples"), [("importance", 8), ("importance", 256), ("qmc", 256)])
def test_healthy_runs_go_on(method, num_samples):
    """One standard deviation: the tilt is found, however few the draws."""
    energy = LinearEnergy([0.0, 0.0])
    result = run(energy, data_at(1.0), normalize=Normalizer(method, num_samples), epochs=25, patience=None)
    assert result.stopped == "epochs"
    assert energy.a[0] > 0.7


def test_a_bad_start_recovers():
    """A first guess far off, whose weights are degenerate, is no reason to stop."""
    energy = LinearEnergy([6.0, 0.0])
    result = run(energy, data_at(1.0), epochs=25, patience=None)
    assert result.stopped == "epochs"
    assert abs(energy.a[0].item() - 1.0) < 1.0  # from five away; which noisy epoch is kept differs between machines


def test_a_step_now_and_then_is_no_reason():
    guard = WeightGuard(steps_per_epoch=10)
    for step in range(900):
        guard.judge([1.0 if step % 3 == 0 else 300.0], [1024], "here")
    guard.judge([], [], "here")
    assert not guard.doubtful
    with pytest.raises(DegenerateWeightsError, match=r"rests on 1\.\d of 1024 draws .* over 50 steps\) here"):
        for count in range(55):
            guard.judge([300.0, 1.1], [1024, 1024], "here")
            assert guard.doubtful or count < 9
    assert 9 < count < 50


def test_what_is_heard_is_the_effective_size():
    guard, energy = WeightGuard(10), MLPEnergy(2, hidden=(4,))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    heard = []

    def listener(log_weights):
        heard.append(log_weights)
        guard.listen(log_weights)

    with weights_reported_to(listener):
        value = site_log_normalizer(base, energy, Normalizer(num_samples=64), name="z")
    site_log_normalizer(base, energy, Normalizer(num_samples=64), name="z")
    assert len(heard) == 1 and heard[0].shape == (64,) and not heard[0].requires_grad
    torch.testing.assert_close(heard[0].exp().mean().log(), value.detach())
    (ess,), (num,) = guard.taken()
    assert num == 64
    torch.testing.assert_close(ess, 1 / heard[0].softmax(0).square().sum())
    assert guard.taken() == ([], [])


def test_one_datum_far_out_of_many_is_no_runaway():
    """A log Z for each datum: the median counts."""
    guard = WeightGuard(10)
    log_weights = torch.zeros(64, 5)
    log_weights[0, 0] = 100.0
    guard.listen(log_weights)
    assert float(guard.taken()[0][0]) == pytest.approx(64)
