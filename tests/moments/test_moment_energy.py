"""MomentEnergy: minus a linear combination of features, whose multipliers may come later."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import LinearEnergy, MomentEnergy, TiltedDistribution


def powers(z):
    return torch.stack([z, z**2], -1)


def test_value_gradient_and_batch_axes():
    energy = MomentEnergy(powers, [2.0, -0.5])
    z = torch.randn(3, 4, 5, requires_grad=True)
    value = energy(z)
    torch.testing.assert_close(value, -2 * z + 0.5 * z**2)
    value.sum().backward()
    torch.testing.assert_close(z.grad, -2 + z.detach())
    torch.testing.assert_close(energy.multipliers.grad, -torch.stack([z.sum(), (z**2).sum()]).detach())


def test_sums_and_scalings():
    z = torch.randn(7, 2)
    linear, moment = LinearEnergy([1.0, -2.0]), MomentEnergy(lambda z: z, [0.5, 1.0])
    torch.testing.assert_close((linear + 2.0 * moment)(z), -(z @ torch.tensor([2.0, 0.0])))


def test_dtypes_and_counts():
    energy = MomentEnergy(lambda v: nn.functional.one_hot(v, 3), [1.0, 0.0, -1.0])
    assert energy(torch.tensor([0, 2])).tolist() == [-1.0, 1.0]
    assert MomentEnergy(lambda z: z, [1.0, 2.0])(torch.ones(3, 2).double()).dtype == torch.float64


def test_multipliers_come_later_and_travel_in_state_dicts():
    energy = MomentEnergy(powers)
    assert not list(energy.parameters())
    with pytest.raises(ValueError, match="no multipliers yet: fit_moments"):
        energy(torch.zeros(3))
    energy.set_multipliers([1.0, 2.0])
    parameter = energy.multipliers
    energy.set_multipliers(torch.tensor([3.0, 4.0]))
    assert energy.multipliers is parameter and parameter.tolist() == [3.0, 4.0] and parameter.requires_grad
    fresh = MomentEnergy(powers)
    fresh.load_state_dict(energy.state_dict())
    torch.testing.assert_close(fresh(torch.ones(2)), energy(torch.ones(2)))
    inside = nn.Sequential(MomentEnergy(powers))
    inside.load_state_dict(nn.Sequential(energy).state_dict())
    assert inside[0].multipliers.tolist() == [3.0, 4.0]


def test_modules_behind_the_features_are_found():
    net = nn.Linear(2, 3)
    assert any(part is net for part in MomentEnergy(net, [1.0, 0.0, 0.0]).modules())
    assert any(part is net for part in MomentEnergy(net.forward, [1.0, 0.0, 0.0]).modules())


def test_log_z_follows_features_that_are_trained_elsewhere():
    scale = torch.tensor(1.0)
    tilted = TiltedDistribution(dist.Normal(0.0, 1.0), MomentEnergy(lambda z: (scale * z)[..., None], [1.0]))
    before = tilted.log_prob(torch.tensor(0.0)).item()
    scale.fill_(2.0)  # log Z is 2 and no more 1/2
    assert tilted.log_prob(torch.tensor(0.0)).item() < before - 1.0


def test_errors():
    with pytest.raises(TypeError, match="features must be callable, got float"):
        MomentEnergy(1.0)
    with pytest.raises(ValueError, match=r"multipliers must be finite, .* got shape \(2,\): \[1.0, nan\]"):
        MomentEnergy(powers, [1.0, float("nan")])
    with pytest.raises(TypeError, match=r"multipliers must be a tensor or a sequence of numbers or None, got 1.0"):
        MomentEnergy(powers, 1.0)
    with pytest.raises(ValueError, match="multipliers must be 2, one for each feature, got 3"):
        MomentEnergy(powers, [1.0, 2.0, 3.0], names=["mean", "square"])
    with pytest.raises(ValueError, match=r"features must return shape \(\*batch, 3\), got \(4, 2\)"):
        MomentEnergy(powers, [1.0, 2.0, 3.0])(torch.zeros(4))
    with pytest.raises(ValueError, match="a single feature needs a last dimension of one"):
        MomentEnergy(lambda z: z.sum(), [1.0])(torch.zeros(4))
    with pytest.raises(TypeError, match="features must return a tensor, got ndarray"):
        MomentEnergy(lambda z: z.numpy(), [1.0])(torch.zeros(4))
