"""Biased splits: exact counts, disjoint parts, reproducible, and clear about what cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ebm.datasets import BiasedSplit, biased_split, digits

COUNTS = {3: 100, 5: 80, 8: 120}
PROPORTIONS = [0.5, 0.3, 0.2]
HALVES = {"proportions": [0.5, 0.5, 0.0]}
PARTS = ["biased", "reference", "test", "classifier"]


def labeled(counts: dict[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Images that hold their own index, so that every part can be traced back."""
    y = torch.cat([torch.full((n,), label) for label, n in (counts or COUNTS).items()])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    return torch.arange(len(y), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), y


def indices(split: BiasedSplit, part: str) -> list[int]:
    return [int(i) for i in getattr(split, part).images[:, 0, 0, 0].tolist()]


def test_counts_follow_the_rule() -> None:
    # Budgets 60, 48, 72 allow 120, 160, 360 images: 120 it is, class 3 decides. Left: 40, 44, 96.
    split = biased_split(*labeled(), PROPORTIONS, 0.6)
    assert split.biased.counts == {3: 60, 5: 36, 8: 24}
    assert split.reference.counts == {3: 12, 5: 12, 8: 12}
    assert split.test.counts == {3: 12, 5: 12, 8: 12}
    assert split.classifier.counts == {3: 16, 5: 20, 8: 72}
    assert split.classes == (3, 5, 8)
    assert split.proportions == tuple(PROPORTIONS)
    assert split.sizes == {"biased": 120, "reference": 36, "test": 36, "classifier": 108}
    assert [getattr(split, part).name for part in PARTS] == PARTS


def test_parts_are_disjoint_complete_and_rightly_labeled() -> None:
    x, y = labeled()
    split = biased_split(x, y, PROPORTIONS, 0.6)
    everything = [i for part in PARTS for i in indices(split, part)]
    assert sorted(everything) == list(range(len(y)))
    for part in PARTS:
        assert torch.equal(getattr(split, part).labels, y[indices(split, part)])


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.85])
@pytest.mark.parametrize(
    "proportions", [[0.12, 0.33, 0.28, 0.20, 0.07], [0.2] * 5, [0.05, 0.05, 0.05, 0.05, 0.8]]
)
def test_digits_are_split_near_the_proportions(fraction: float, proportions: list[float]) -> None:
    data = digits(range(5))
    split = biased_split(data.images, data.labels, proportions, fraction)
    n = len(split.biased)
    for label, share in zip(split.classes, proportions, strict=True):
        assert abs(split.biased.counts[label] - n * share) < 1.0
        assert split.biased.counts[label] <= fraction * data.counts[label]
    # One image more would break the budget of some class.
    assert any(
        (n + 1) * share > int(fraction * data.counts[c])
        for c, share in zip(split.classes, proportions, strict=True)
    )
    assert len(set(split.reference.counts.values())) == 1
    assert len(set(split.test.counts.values())) == 1


def test_default_sizes_on_digits() -> None:
    data = digits(range(5))
    split = biased_split(data.images, data.labels, [0.12, 0.33, 0.28, 0.20, 0.07], 0.6)
    assert split.sizes == {"biased": 330, "reference": 105, "test": 105, "classifier": 361}


def test_seed_decides_and_the_global_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = (biased_split(*labeled(), PROPORTIONS, 0.6, 4) for _ in range(2))
    other = biased_split(*labeled(), PROPORTIONS, 0.6, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    for part in PARTS:
        assert indices(first, part) == indices(again, part)
        assert indices(first, part) != indices(other, part)


def test_parts_are_shuffled() -> None:
    labels = biased_split(*labeled(), PROPORTIONS, 0.6).biased.labels
    assert not torch.equal(labels, labels.sort().values)


def test_mapping_and_zero_share() -> None:
    split = biased_split(*labeled(), {8: 0.75, 5: 0.0, 3: 0.25}, 0.5)
    assert split.biased.counts == {3: 20, 8: 60}
    assert split.proportions == (0.25, 0.0, 0.75)
    assert split.reference.counts == {3: 18, 5: 18, 8: 18}


def test_sizes_can_be_asked_for() -> None:
    split = biased_split(*labeled(), PROPORTIONS, 0.6, reference_size=70, test_size=0)
    assert split.reference.counts == {3: 23, 5: 23, 8: 23}
    assert len(split.test) == 0
    assert split.test.images.shape == (0, 1, 2, 2)
    assert split.classifier.counts == {3: 17, 5: 21, 8: 73}


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ([0.5, 0.3, 0.3], r"proportions must sum to 1, but .* sum to 1.1; divide"),
        ([0.7, 0.5, -0.2], r"finite and not negative, got \[0.7, 0.5, -0.2\]"),
        ([float("nan"), 0.5, 0.5], "finite and not negative"),
        ([0.5, 0.5], r"one entry for each of the 3 classes \[3, 5, 8\], got 2"),
        ({3: 0.5, 4: 0.5}, r"exactly the classes \[3, 5, 8\]; unknown: \[4\], missing: \[5, 8\]"),
    ],
)
def test_bad_proportions(proportions: Sequence[float] | dict[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        biased_split(*labeled(), proportions, 0.6)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction must (lie strictly between 0 and 1|be a number), got {fraction}"):
        biased_split(*labeled(), PROPORTIONS, fraction)


@pytest.mark.parametrize(
    ("counts", "fraction", "options", "message"),
    [
        ({3: 100, 5: 1, 8: 120}, 0.6, {}, "class 3 has too few examples left for the biased set"),
        ({3: 2, 5: 80, 8: 120}, 0.5, HALVES, "class 3 .* examples left for the test set: 1 needed, 0 left"),
        ({3: 3, 5: 80, 8: 120}, 0.5, HALVES, "class 3 .* classifier set: 1 needed, 0 left; lower fraction"),
        (COUNTS, 0.6, {"reference_size": 150}, "class 3 .* reference set: 50 needed, 40 left"),
        (COUNTS, 0.6, {"test_size": 120}, "class 3 .* test set: 40 needed, 28 left"),
        (COUNTS, 0.6, {"reference_size": 2}, "reference_size must be at least 3 for 3 classes, got 2"),
        (COUNTS, 0.6, {"test_size": -3}, "test_size must be a whole number of at least 0, got -3"),
    ],
)
def test_no_examples_left(
    counts: dict[int, int], fraction: float, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        biased_split(*labeled(counts), **{"proportions": PROPORTIONS, "fraction": fraction, **options})


def test_bad_data() -> None:
    x, y = labeled()
    with pytest.raises(ValueError, match=r"same n > 0, got \(299, 1, 2, 2\) and \(300,\)"):
        biased_split(x[1:], y, PROPORTIONS, 0.6)
    with pytest.raises(ValueError, match="y must hold integer class labels"):
        biased_split(x, y + 0.5, PROPORTIONS, 0.6)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[[4, 7], 0, 1, 0] = bad
        with pytest.raises(ValueError, match="x must be finite, but 2 of 300 images"):
            biased_split(spoiled, y, PROPORTIONS, 0.6)
