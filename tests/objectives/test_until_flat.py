"""When a learning rate that is held begins to fall."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_ebm.objectives.until_flat import UntilFlat


def schedule(epochs=1000, tolerance=1e-3, fewest=20):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1)
    return UntilFlat(optimizer, epochs=epochs, tolerance=tolerance, fewest=fewest)


def rates(found, losses):
    seen = []
    for loss in losses:
        if found.finished:
            break
        seen.append(found.optimizer.param_groups[0]["lr"])
        found.step(loss)
    return seen


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_held_while_the_loss_falls_and_then_down_to_zero(noise):
    generator = torch.Generator().manual_seed(0)
    losses = [5 * math.exp(-t / 60) + noise * float(torch.randn((), generator=generator)) for t in range(1000)]
    found = schedule(tolerance=1e-2, fewest=100)
    seen = rates(found, losses)
    assert found.finished and found.flat_after > 120  # it has fallen by a factor of e^2 and more
    assert all(rate == 0.1 for rate in seen[: found.flat_after])
    assert len(seen) == found.ends_after == found.flat_after + math.ceil(found.flat_after / 3) < 1000
    assert found.optimizer.param_groups[0]["lr"] == 0 and not found.still_moves
    assert all(a >= b for a, b in zip(seen[:-1], seen[1:], strict=True))


def test_a_slow_fall_under_much_noise_is_seen():
    """A fiftieth of the noise per epoch adds up."""
    generator = torch.Generator().manual_seed(0)
    losses = [-0.02 * t + float(torch.randn((), generator=generator)) for t in range(400)]
    found = schedule(epochs=400, fewest=200)
    rates(found, losses)
    assert found.flat_after == 300 and found.ends_after == 400 and found.still_moves


def test_the_last_quarter_is_for_the_fall_whatever_the_loss_does():
    found = schedule(epochs=40)
    seen = rates(found, [-float(t) for t in range(40)])
    assert len(seen) == 40 and found.flat_after == 30 and found.still_moves


@pytest.mark.parametrize("at", [10, 25, 60, 110])
def test_it_goes_on_from_its_state(at):
    losses = [3 * math.exp(-t / 20) + 0.01 * math.sin(t) for t in range(300)]
    whole, first, second = schedule(), schedule(), schedule()
    expected = rates(whole, losses)
    seen = rates(first, losses[:at])
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert seen + rates(second, losses[at:]) == expected


def test_one_epoch_is_enough():
    found = schedule(epochs=1)
    assert len(rates(found, [1.0, 1.0])) == 1
