"""How fit() takes its data apart: what is held apart, by which seed, in which batches."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.training.data import batches, checked_data, checked_validation
from pyro_ebm.training.sources import source_of, split_of, validation_of

CPU = torch.device("cpu")


def pair(num=10):
    return torch.arange(float(num))[:, None], torch.arange(num)


def split_data(data, validation, seed):
    """The tensors to train on, and those to validate on or None."""
    source = source_of("data", data)
    split = split_of(source, validation_of(validation, source), seed)
    return [None if part is None else part.tensors for part in split]


@pytest.mark.parametrize(
    ("share", "num", "held_apart"), [(0.1, 10, 1), (0.25, 10, 2), (0.5, 7, 4), (0.01, 10, 1), (0.99, 200, 198)]
)
def test_a_share_is_held_apart_and_nothing_is_lost(share, num, held_apart):
    train, validation = split_data(pair(num), share, seed=0)
    assert len(validation[0]) == held_apart and len(train[0]) == num - held_apart
    both = torch.cat([train[1], validation[1]])
    assert sorted(both.tolist()) == list(range(num))
    for x, y in (train, validation):
        assert torch.equal(x.squeeze(1).long(), y)  # rows stay together


def test_the_seed_decides_which(rng_untouched):
    with rng_untouched():
        first, again, other = (split_data(pair(100), 0.3, seed=seed)[1][1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.tolist() != sorted(first.tolist())


def test_nothing_is_held_apart_where_nothing_is_asked_for():
    for validation in (0, 0.0, None):
        train, rest = split_data(pair(), validation, seed=0)
        assert rest is None and torch.equal(train[1], torch.arange(10))


def test_data_given_for_validation_are_used_as_they_are():
    given = checked_validation([t[:3] for t in pair()], pair())
    train, validation = split_data(pair(), given, seed=0)
    assert torch.equal(train[1], pair()[1]) and torch.equal(validation[1], torch.arange(3))


def test_a_share_that_takes_all_is_refused():
    with pytest.raises(ValueError, match="validation=0.99 leaves none of 3 data to train on; pass None"):
        split_data(pair(3), 0.99, seed=0)
    with pytest.raises(ValueError, match="validation must be finite, got 1 NaN or infinite values of 2"):
        checked_validation(torch.tensor([1.0, math.nan]), (torch.ones(5),))
    with pytest.raises(ValueError, match=r"form of data, got shapes \[\(2,\)\] beside \[\(10, 1\), \(10,\)\]"):
        checked_validation(torch.ones(2), pair())


def test_one_tensor_or_several():
    x, y = pair()
    assert checked_data("data", x) == (x,)
    for data in ((x, y), [x, y]):
        found = checked_data("data", data)
        assert isinstance(found, tuple) and found[0] is x and found[1] is y
    with pytest.raises(ValueError, match=r"at least 1, got shapes \[\(0, 2\)\]"):
        checked_data("data", torch.ones(0, 2))
    with pytest.raises(TypeError, match=r"got Tensor, list; convert with torch\.as_tensor"):
        checked_data("data", (x, [1.0]))


def test_batches_as_they_lie_and_in_an_order():
    x, y = pair()
    lying = [part[1].tolist() for part in batches((x, y), 4, CPU)]
    assert lying == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    order = torch.tensor([9, 1, 4, 0, 2])
    taken = list(batches((x, y), 2, CPU, order))
    assert [part[1].tolist() for part in taken] == [[9, 1], [4, 0], [2]]
    assert all(torch.equal(a.squeeze(1).long(), b) for a, b in taken)
