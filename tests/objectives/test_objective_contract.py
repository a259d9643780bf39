"""What every objective keeps to: one number summed over the batch, gradients, seeds, precision, resumed runs."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from pyro_ebm import (
    HMC,
    VAE,
    Checkpoint,
    ContrastiveDivergence,
    Energy,
    FirstOrder,
    MLPEnergy,
    NoiseContrastive,
    ObservedTiltLikelihood,
    ReplayBuffer,
    RunningControl,
    TiltELBO,
    TiltLikelihood,
    fit,
    tilt,
)
from pyro_ebm.objectives.sampling_bound import SamplingBound
from pyro_ebm.objectives.short_run import ShortRun

# name -> (makes the objective of a VAE, tilted site)
OBJECTIVES = {
    "TiltELBO": (lambda vae: TiltELBO(), "z"),
    "TiltLikelihood": (lambda vae: TiltLikelihood(vae.prior), "z"),
    "RunningControl": (lambda vae: RunningControl(TiltELBO()), "z"),
    "ObservedTiltLikelihood": (lambda vae: ObservedTiltLikelihood(), "x"),
    "CD": (lambda vae: ContrastiveDivergence(num_steps=2, alpha=0.1, gradient_penalty=0.1), "z"),
    "persistent CD": (
        lambda vae: ContrastiveDivergence(kernel=HMC, num_steps=1, buffer=ReplayBuffer(capacity=80), alpha=0.1),
        "z",
    ),
    "NoiseContrastive": (lambda vae: NoiseContrastive(num_noise=2), "z"),
    "NoiseContrastive, normalized": (lambda vae: NoiseContrastive(normalize=True), "z"),
    "NoiseContrastive of data": (lambda vae: NoiseContrastive(), "x"),
    "FirstOrder": (lambda vae: FirstOrder(alpha=0.1, gradient_penalty=0.1), "z"),
    "FirstOrder of data": (lambda vae: FirstOrder(alpha=0.1, num_samples=10), "x"),
    "SamplingBound": (lambda vae: SamplingBound(num_proposals=16), "z"),
    "ShortRun": (lambda vae: ShortRun(prior_steps=2, posterior_steps=2), "z"),
}
# Their losses hold a part that does not depend on the energy.
WITH_LIKELIHOOD = ("SamplingBound", "ShortRun")


class Constant(Energy):
    def __init__(self, value=0.7):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, value):
        return self.value.expand(value.shape[:-1]) + 0.0 * value.sum(-1)


class Problem:
    """A VAE, its tilt, data, and one objective; the same for the same seed."""

    def __init__(self, name, *, num=24, energy=None, dtype=torch.float32, normalize=True):
        make, site = OBJECTIVES[name]
        torch.manual_seed(5)
        self.vae = VAE((4,), latent_dim=2, hidden=(8,)).to(dtype)
        self.energy = energy or MLPEnergy(4 if site == "x" else 2, hidden=(6,)).to(dtype)
        self.objective = make(self.vae)
        self.tilted = tilt(self.vae.model, {site: self.energy}, normalize=normalize)
        x = (torch.rand(num, 4) > 0.3).to(dtype)
        values = torch.randn(num, 3, 2, dtype=dtype)
        self.data = (values, torch.zeros(num, 3, dtype=dtype) - math.log(3)) if name == "TiltLikelihood" else (x,)

    def loss(self, times=1):
        data = [torch.cat([part] * times) for part in self.data]
        return self.objective(self.tilted, self.vae.guide, *data)

    def fit(self, *, epochs=3, seed=0, **options):
        return fit(
            self.tilted,
            self.vae.guide,
            self.data,
            objective=self.objective,
            train=self.energy,
            optimizer=functools.partial(torch.optim.Adam, lr=0.02),
            epochs=epochs,
            batch_size=8,
            seed=seed,
            progress=False,
            **options,
        )

    def weights(self):
        return nn.utils.parameters_to_vector(self.energy.parameters()).detach()


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_in_the_precision_of_the_data(name, dtype):
    loss = Problem(name, dtype=dtype).loss()
    assert loss.shape == () and loss.dtype == dtype and loss.isfinite()
    assert loss.requires_grad


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WITH_LIKELIHOOD])
def test_summed_over_the_batch(name):
    """With a constant energy nothing but the number of data matters to the tilt's part of the loss."""
    normalize = 0.3 if name in ("TiltELBO", "ObservedTiltLikelihood") else True
    problem = Problem(name, energy=Constant(), normalize=normalize)
    once, thrice = problem.loss().detach(), problem.loss(times=3).detach()
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-4, atol=1e-3)
    assert once > 0.1 or name in ("TiltLikelihood", "RunningControl")  # c - log Z is zero


def test_gradients_reach_the_energy_and_tilts_alone_leave_the_rest(name):
    problem = Problem(name)
    problem.loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in problem.energy.parameters())
    assert all(p.grad.abs().sum() > 0 for p in problem.energy.net[0].parameters())
    if name not in (*WITH_LIKELIHOOD, "ObservedTiltLikelihood"):
        assert all(p.grad is None for p in problem.vae.parameters())


def test_same_seed_same_weights_and_the_global_generator_untouched(name, rng_untouched):
    runs = []
    for seed in (1, 1, 2):
        problem = Problem(name)
        before = problem.weights()
        with rng_untouched():
            result = problem.fit(seed=seed)
        assert result.stopped == "epochs" and not torch.equal(before, problem.weights())
        runs.append((problem.weights(), result.train_loss, result.validation_loss))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert runs[0][1] != runs[2][1]


def test_a_resumed_run_is_the_run_that_never_stopped(name, tmp_path):
    whole, parts = Problem(name), Problem(name)
    expected = whole.fit(epochs=4)
    parts.fit(epochs=2, checkpoint=tmp_path / "run.pt")
    parts = Problem(name)  # nothing but the file is left
    result = parts.fit(epochs=4, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert torch.equal(whole.weights(), parts.weights())
    assert (result.train_loss, result.validation_loss) == (expected.train_loss, expected.validation_loss)


def test_the_rest_of_the_model_stays_as_it_is(name):
    problem = Problem(name)
    before = nn.utils.parameters_to_vector(problem.vae.parameters()).detach().clone()
    problem.fit(epochs=1)
    assert torch.equal(before, nn.utils.parameters_to_vector(problem.vae.parameters()).detach())


def test_the_docstring_says_whether_log_z_enters(name):
    text = " ".join(Problem(name).objective.__class__.__doc__.split())
    assert "log Z" in text and "gradient" in text
