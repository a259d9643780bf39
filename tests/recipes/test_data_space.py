"""ReconstructionEnergy: what it computes, whose parameters it owns, and what it can be trained to."""

from __future__ import annotations

import copy

import torch

from pyro_ebm import (
    VAE,
    Energy,
    LinearEnergy,
    LogDensity,
    MLPEnergy,
    ObservedTiltLikelihood,
    ReconstructionEnergy,
    fit,
    importance,
    noncentered,
    tilt,
)


def small_vae():
    torch.manual_seed(0)
    return VAE((4,), latent_dim=2, likelihood="gaussian_shared", hidden=(8,))


def test_it_is_the_energy_of_the_decoded_mean():
    vae, inner = small_vae(), LinearEnergy(torch.arange(4.0))
    x = torch.randn(3, 5, 4)
    energy = ReconstructionEnergy(inner, vae)
    assert isinstance(energy, Energy)
    expected = inner(vae.decode(vae.encode(x).base_dist.loc).base_dist.loc)
    torch.testing.assert_close(energy(x), expected)


def test_it_owns_the_parameters_of_the_energy_alone():
    inner = MLPEnergy(4)
    energy = ReconstructionEnergy(inner, small_vae())
    assert list(energy.parameters()) == list(inner.parameters())


def test_training_moves_the_energy_and_not_the_vae():
    vae = small_vae()
    before = copy.deepcopy(vae.state_dict())
    energy = ReconstructionEnergy(MLPEnergy(4, hidden=(8,)), vae)
    initial = copy.deepcopy(energy.state_dict())
    x = vae.model(num_data=200).detach()
    x = x[x[:, 0] > x[:, 0].median()]
    tilted = tilt(vae.model, {"x": energy})
    options = {"validation": None, "patience": None, "epochs": 40, "batch_size": 100, "progress": False}
    result = fit(tilted, vae.guide, x, objective=ObservedTiltLikelihood(), train=energy, seed=0, **options)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert any(not torch.equal(initial[name], value) for name, value in energy.state_dict().items())
    assert min(result.train_loss) < 0  # more likely than under the VAE


def test_samplers_see_it():
    vae = small_vae()
    energy = ReconstructionEnergy(LinearEnergy(torch.ones(4)), vae)
    noise = noncentered(tilt(vae.model, {"x": energy}))
    weights = importance(noise, num_samples=50, seed=0).log_weights
    assert weights.std() > 1e-4
    _, grad = LogDensity.from_model(noise).value_and_grad(torch.randn(3, 6))
    assert grad.isfinite().all()
