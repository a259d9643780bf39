"""Label classifier, class proportions and their intervals, distances from a target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ebm.datasets import biased_split, digits
from pyro_ebm.diagnostics.balance import (
    ClassBalance,
    LabelClassifier,
    class_balance,
    fairness_discrepancy,
    total_variation,
)


@pytest.fixture(scope="module")
def split() -> Any:
    data = digits(range(5))
    return biased_split(data.images, data.labels, [0.12, 0.33, 0.28, 0.20, 0.07], 0.6)


@pytest.fixture(scope="module")
def classifier(split: Any) -> LabelClassifier:
    return LabelClassifier.fit(split.classifier.images, split.classifier.labels)


def accuracy(classifier: LabelClassifier, images: Tensor, labels: Tensor) -> float:
    return (classifier.predict(images) == labels).float().mean().item()


def test_classifier_is_right_on_images_it_has_not_seen(split: Any, classifier: LabelClassifier) -> None:
    images = torch.cat([split.biased.images, split.test.images])
    labels = torch.cat([split.biased.labels, split.test.labels])
    right = accuracy(classifier, images, labels)
    assert right > 0.97
    assert classifier.classes_ == (0, 1, 2, 3, 4)
    # The accuracy it reports is an estimate of this one; 361 and 435 images.
    assert abs(classifier.accuracy - right) < 4 * math.sqrt(0.02 * 0.98 * (1 / 361 + 1 / 435))


def test_reported_accuracy_is_not_that_on_the_training_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(400, 1, 4, 4, generator=generator), torch.arange(400) % 2
    noise = LabelClassifier.fit(images, labels)
    assert accuracy(noise, images, labels) > 0.65
    assert noise.accuracy < 0.5 + 4 * math.sqrt(0.25 / 400)


def test_probabilities_agree_with_labels_and_are_calibrated(split: Any, classifier: LabelClassifier) -> None:
    probabilities = classifier.predict_proba(split.biased.images)
    labels = classifier.predict(split.biased.images)
    assert probabilities.shape == (330, 5)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(330))
    assert torch.equal(labels, probabilities.argmax(-1))
    right = (labels == split.biased.labels).float().mean()
    assert abs(probabilities.amax(-1).mean() - right) < 0.05


def test_labels_need_not_start_at_zero_and_images_may_have_any_shape() -> None:
    data = digits([3, 8])
    for images in (data.images, data.images.flatten(1), data.images.double()):
        two = LabelClassifier.fit(images, data.labels)
        assert two.classes_ == (3, 8)
        assert two.predict_proba(images[:7]).shape == (7, 2)
        assert accuracy(two, images, data.labels) > 0.98
        assert two.predict(images[:0]).shape == (0,)


def test_same_seed_same_classifier(split: Any, classifier: LabelClassifier) -> None:
    again = LabelClassifier.fit(split.classifier.images, split.classifier.labels)
    assert torch.equal(again.predict_proba(split.test.images), classifier.predict_proba(split.test.images))
    assert again.accuracy == classifier.accuracy


def test_tiny_images_can_be_fitted_and_constant_ones_cannot() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    tiny = LabelClassifier.fit(torch.tensor([[0.0], [0.1], [0.9], [1.0]]), labels)
    assert tiny.predict(torch.tensor([[0.05], [0.95]])).tolist() == [0, 1]
    with pytest.raises(ValueError, match="images are all the same"):
        LabelClassifier.fit(torch.full((4, 1, 2, 2), 0.3), labels)


def test_bad_images_and_labels(classifier: LabelClassifier) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"got \(5, 1, 8, 8\) and \(6,\)"):
        LabelClassifier.fit(images[1:], labels)
    with pytest.raises(ValueError, match=r"two classes with two images each, got \{0: 6\}"):
        LabelClassifier.fit(images, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"two images each, got \{0: 5, 1: 1\}"):
        LabelClassifier.fit(images, torch.tensor([0, 0, 0, 0, 0, 1]))
    with pytest.raises(
        ValueError, match=r"shape \(n, \*\(1, 8, 8\)\) as those fitted on, got \(2, 1, 9, 9\)"
    ):
        classifier.predict(torch.rand(2, 1, 9, 9))
    images[3, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="images must be finite"):
        LabelClassifier.fit(images, labels)
    with pytest.raises(ValueError, match="images must be finite"):
        classifier.predict(images)


def labels_of(*counts: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_proportions_and_intervals_of_plain_counts() -> None:
    n, p = 2000, torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    balance = class_balance(labels_of(1000, 600, 400), range(4), num_bootstrap=4000)
    torch.testing.assert_close(balance.proportions, p)
    assert (balance.classes, balance.n, balance.ess, balance.prob) == ((0, 1, 2, 3), n, n, 0.95)
    assert balance.replicates.shape == (4000, 4)
    # Half widths are those of the normal approximation, up to the error of a bootstrap quantile.
    half = 1.96 * (p * (1 - p) / n).sqrt()
    for end in (balance.upper - p, p - balance.lower):
        assert ((end - half).abs() <= 0.15 * half).all()


def test_effective_sample_size_widens_the_intervals() -> None:
    labels = labels_of(500, 500)
    independent, correlated = class_balance(labels, (0, 1)), class_balance(labels, (0, 1), ess=100.0)
    ratio = ((correlated.upper - correlated.lower) / (independent.upper - independent.lower))[0]
    assert abs(ratio - math.sqrt(10.0)) < 0.4
    assert correlated.n == 1000
    assert correlated.ess == 100.0


def test_weights_count_and_lower_the_effective_sample_size() -> None:
    balance = class_balance(torch.tensor([0, 1, 1]), (0, 1), weights=torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(balance.proportions, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert balance.ess == pytest.approx(16 / 6)
    even = class_balance(torch.tensor([0, 1, 1]), (0, 1), weights=torch.full((3,), 5.0))
    assert even.ess == pytest.approx(3.0)
    assert even.proportions[1] == pytest.approx(2 / 3)


def test_bootstrap_is_decided_by_its_seed_alone() -> None:
    labels = labels_of(30, 20)
    first, again, other = (class_balance(labels, (0, 1), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.replicates, again.replicates)
    assert not torch.equal(first.replicates, other.replicates)


def covers(balance: ClassBalance, truth: float, target: list[float] | None = None) -> bool:
    low, high = balance.tv_interval(target)
    assert low <= balance.tv(target) <= high
    return low - 1e-12 <= truth <= high


@pytest.mark.parametrize("p", [[0.25, 0.25, 0.25, 0.25], [0.28, 0.24, 0.24, 0.24], [0.6, 0.2, 0.1, 0.1]])
def test_total_variation_interval_covers_the_truth(p: list[float]) -> None:
    generator, runs = torch.Generator().manual_seed(0), 200
    draws = torch.multinomial(torch.tensor(p), runs * 300, replacement=True, generator=generator)
    balances = [class_balance(row, range(4), num_bootstrap=200) for row in draws.view(runs, 300)]
    truth = total_variation(p)
    coverage = sum(covers(balance, truth) for balance in balances) / runs
    assert coverage > 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs)


def test_total_variation_interval_is_not_needlessly_wide() -> None:
    low, high = class_balance(labels_of(6000, 4000), (0, 1)).tv_interval()
    assert 0.08 < low < 0.1 < high < 0.12
    assert class_balance(labels_of(6000, 4000), (0, 1)).tv([0.6, 0.4]) == pytest.approx(0.0)


def test_what_chance_adds_is_the_distance_of_balanced_labels() -> None:
    """Over many sets of 160 balanced labels; the normal approximation says .063."""
    draws = torch.randint(5, (200, 160), generator=torch.Generator().manual_seed(0))
    balances = [class_balance(row, range(5), num_bootstrap=200) for row in draws]
    found = torch.tensor([balance.tv() for balance in balances])
    chance = torch.tensor([balance.chance for balance in balances]).mean()
    expected = 0.5 * 5 * math.sqrt(2 / math.pi * 0.16 / 160)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(200)
    assert abs(chance - expected) < 0.05 * expected
    without = torch.tensor([balance.tv_without_chance() for balance in balances])
    assert without.mean() < 0.45 * found.mean()


@pytest.mark.parametrize("shift", [0.03, 0.1, 0.2])
def test_taking_chance_off_leaves_true_distances(shift: float) -> None:
    p = 0.2 + shift * torch.tensor([0.6, 0.4, -0.3, -0.4, -0.3])
    draws = torch.multinomial(p, 200 * 160, replacement=True, generator=torch.Generator().manual_seed(1))
    balances = [class_balance(row, range(5), num_bootstrap=200) for row in draws.view(200, 160)]
    found = torch.tensor([balance.tv_without_chance() for balance in balances])
    assert abs(found.mean() - shift) < 0.35 * balances[0].chance
    against = balances[0].tv_without_chance(p)
    assert against == pytest.approx(math.sqrt(max(balances[0].tv(p) ** 2 - balances[0].chance ** 2, 0.0)))


def test_more_labels_leave_less_to_chance() -> None:
    few, many = (class_balance(labels_of(500, 500), (0, 1), ess=ess) for ess in (100.0, 1600.0))
    assert few.chance == pytest.approx(4 * many.chance, rel=0.1)


def test_distances_against_numbers_by_hand() -> None:
    p, target = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    assert total_variation(p) == pytest.approx(0.5 * (1 / 6 + 1 / 30 + 2 / 15))
    assert total_variation(p, target) == pytest.approx(0.3)
    assert fairness_discrepancy(p, target) == pytest.approx(math.sqrt(0.18))
    assert fairness_discrepancy([1.0, 0.0]) == pytest.approx(math.sqrt(0.5))
    assert total_variation(torch.full((7,), 1 / 7)) == pytest.approx(0.0, abs=1e-7)
    assert total_variation([1.0, 0.0], torch.tensor([0.0, 1.0])) == 1.0


@pytest.mark.parametrize("distance", [total_variation, fairness_discrepancy])
def test_bad_distributions(distance: Any) -> None:
    with pytest.raises(ValueError, match=r"p must be non-negative and sum to 1, got \[0.5, 0.6\]"):
        distance([0.5, 0.6])
    with pytest.raises(ValueError, match="target must be non-negative and sum to 1"):
        distance([0.5, 0.5], [1.5, -0.5])
    with pytest.raises(ValueError, match="same length, got 2 and 3"):
        distance([0.5, 0.5], [0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match=r"p must have shape \(classes,\), got \(2, 2\)"):
        distance(torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 4], {}, r"among the classes \[0, 1\], got also \[4\]"),
        ([], {}, "labels is empty"),
        ([0, 1], {"classes": (0, 1, 1)}, "classes must be distinct"),
        ([0, 1], {"weights": torch.ones(3)}, "weights must be 2 finite non-negative numbers"),
        ([0, 1], {"weights": torch.tensor([-1.0, 2.0])}, "not all zero, got 2"),
        ([0, 1], {"weights": torch.zeros(2)}, "not all zero"),
        ([0, 1], {"weights": torch.tensor([math.nan, 1.0])}, "finite non-negative"),
        ([0, 1], {"ess": math.nan}, "ess must be a number, got nan"),
        ([0, 1], {"ess": 0.0}, "ess must be finite and positive"),
        ([0, 1], {"prob": 95.0}, "prob must lie strictly between 0 and 1, got 95.0"),
        ([0, 1], {"num_bootstrap": 0}, "num_bootstrap must be a whole number of at least 1"),
    ],
)
def test_bad_counts(labels: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_balance(torch.tensor(labels), **{"classes": (0, 1), **options})
