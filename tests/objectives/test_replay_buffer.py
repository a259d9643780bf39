"""ReplayBuffer: shares, slots, growth, replacement, and the same draws again."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm import ReplayBuffer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(num):
    return torch.zeros(num, 2)


def stepped(buffer, num, source, steps=1):
    """Chains that count the steps they have made."""
    for _ in range(steps):
        starts, slots = buffer.draw(num, zeros, source)
        buffer.put(starts + 1, slots)
    return starts, slots


def test_the_first_step_starts_anew_and_the_next_goes_on():
    buffer, source = ReplayBuffer(capacity=100, fresh=0.0), generator()
    starts, slots = stepped(buffer, 8, source)
    assert torch.equal(starts, zeros(8)) and sorted(slots.tolist()) == list(range(8))
    assert len(buffer) == 8 and torch.equal(buffer.values, torch.ones(8, 2))
    starts, slots = stepped(buffer, 8, source)
    assert torch.equal(starts, torch.ones(8, 2)) and len(buffer) == 8
    assert torch.equal(buffer.values, 2 * torch.ones(8, 2))


def test_share_of_fresh_starts():
    fresh, num, steps = 0.2, 50, 40
    buffer, source = ReplayBuffer(capacity=1000, fresh=fresh), generator()
    stepped(buffer, num, source)
    anew = sum(int((stepped(buffer, num, source)[0][:, 0] == 0).sum()) for _ in range(steps))
    total = num * steps
    assert abs(anew - fresh * total) < 4 * math.sqrt(total * fresh * (1 - fresh))
    assert len(buffer) == num + anew  # each chain that starts anew takes a slot of its own while there are any


@pytest.mark.parametrize("fresh", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [16, 20])
def test_every_slot_at_most_once_and_never_beyond_capacity(fresh, capacity):
    buffer, source = ReplayBuffer(capacity=capacity, fresh=fresh), generator(1)
    for num in (16, 3, 16, 7, 16):
        starts, slots = buffer.draw(num, zeros, source)
        assert starts.shape == (num, 2) and len(set(slots.tolist())) == num
        assert 0 <= int(slots.min()) and int(slots.max()) < capacity
        buffer.put(starts + 1, slots)
        assert len(buffer) <= capacity
    if fresh == 1.0:
        assert len(buffer) == capacity and torch.equal(starts, zeros(16))


def test_full_buffers_replace_chains_at_random():
    buffer, source = ReplayBuffer(capacity=40, fresh=0.5), generator(2)
    stepped(buffer, 20, source, steps=60)
    ages = buffer.values[:, 0]
    assert len(buffer) == 40
    # each visit is a restart with probability 1/2: ages are geometric with mean 2
    assert abs(ages.mean() - 2.0) < 4 * math.sqrt(2 / 40)
    assert ages.max() > 2 and ages.min() == 1


def test_a_small_batch_takes_a_random_part():
    buffer, source = ReplayBuffer(capacity=100, fresh=0.0), generator(3)
    stepped(buffer, 60, source)
    seen = torch.cat([buffer.draw(6, zeros, source)[1] for _ in range(100)])
    counts = torch.bincount(seen, minlength=60).double()
    assert counts.numel() == 60
    assert ((counts - 10).abs() < 5 * math.sqrt(10)).all()


def test_same_generator_same_draws(rng_untouched):
    runs = []
    for _ in range(2):
        buffer, source = ReplayBuffer(capacity=30, fresh=0.3), generator(4)
        with rng_untouched():
            stepped(buffer, 10, source, steps=5)
        runs.append(buffer.values)
    assert torch.equal(*runs)


def test_a_loaded_buffer_goes_on_as_the_saved_one():
    first, source = ReplayBuffer(capacity=30, fresh=0.3), generator(5)
    stepped(first, 10, source, steps=4)
    state, place = first.state_dict(), source.get_state()
    second = ReplayBuffer(capacity=30, fresh=0.3)
    second.load_state_dict(state)
    stepped(first, 10, source, steps=3)
    source.set_state(place)
    stepped(second, 10, source, steps=3)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(state["values"], second.values[: len(state["values"])])  # the state was a copy


def test_an_empty_buffer_is_saved_and_loaded():
    buffer = ReplayBuffer(capacity=5)
    buffer.load_state_dict(ReplayBuffer(capacity=5).state_dict())
    assert len(buffer) == 0 and len(buffer.values) == 0
    stepped(buffer, 5, generator())
    buffer.load_state_dict(ReplayBuffer(capacity=5).state_dict())
    assert len(buffer) == 0


def test_values_are_kept_without_gradients():
    buffer = ReplayBuffer(capacity=4)
    starts, slots = buffer.draw(4, zeros, generator())
    buffer.put(starts.requires_grad_() * 2, slots)
    assert not buffer.values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    buffer = ReplayBuffer(capacity=4, fresh=0.0)
    for _ in range(2):
        starts, slots = buffer.draw(3, lambda num: torch.zeros(num, 2, dtype=dtype), generator())
        assert starts.dtype == dtype
        buffer.put(starts, slots)


def test_errors():
    with pytest.raises(ValueError, match="capacity must be a whole number of at least 1, got 0"):
        ReplayBuffer(capacity=0)
    with pytest.raises(ValueError, match="fresh must be a share between 0 and 1, got 1.5"):
        ReplayBuffer(fresh=1.5)
    buffer = ReplayBuffer(capacity=4)
    with pytest.raises(ValueError, match="at least the number of chains in a step, 5, got 4"):
        buffer.draw(5, zeros, generator())
    stepped(buffer, 4, generator())
    with pytest.raises(ValueError, match=r"event shape of the buffer, \(2,\), got \(3,\)"):
        buffer.put(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="holds 4 chains, this one has room for 3"):
        ReplayBuffer(capacity=3).load_state_dict(buffer.state_dict())
