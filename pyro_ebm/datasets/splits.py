"""A biased training set with balanced reference and test sets, all disjoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import Array, as_tensor

from .images import ImageSet

__all__ = ["BiasedSplit", "biased_split"]

# Of the class with fewest images left, 30 % go to each balanced set; the rest fits the label classifier.
_BALANCED_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class BiasedSplit:
    """Four disjoint parts of one labeled set.

    Args:
        biased: what the base model is trained on; classes in the proportions asked for.
        reference: small, every class equally often; what the tilt learns from.
        test: every class equally often; only for evaluation.
        classifier: all that remains, not balanced; what the label classifier is fitted on.
        classes: the classes, sorted.
        proportions: the class proportions asked for, in the order of ``classes``.
    """

    biased: ImageSet
    reference: ImageSet
    test: ImageSet
    classifier: ImageSet
    classes: tuple[int, ...]
    proportions: tuple[float, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Part -> number of images."""
        return {part: len(getattr(self, part)) for part in ("biased", "reference", "test", "classifier")}


@checked
def biased_split(
    x: Array,
    y: Array,
    proportions: Sequence[float] | Mapping[int, float],
    fraction: float,
    seed: int = 0,
    *,
    reference_size: int | None = None,
    test_size: int | None = None,
) -> BiasedSplit:
    """Split labeled images into a biased set and, from what remains, balanced sets.

    The biased set is the largest one with the given proportions that takes at most ``fraction`` of
    every class: ``n = floor(min_c floor(fraction n_c) / p_c)``. Of the images then left of the
    rarest class, 30 % set the size per class of the reference set and 30 % that of the test set.

    Args:
        x: images (n, *event_shape), finite.
        y: integer labels (n,).
        proportions: share of each class in the biased set, in the order of the sorted labels, or a
            mapping from class to share; sums to one. A share of zero leaves that class out.
        fraction: largest share of any class that the biased set may take, in (0, 1).
        seed: of the split; the global random state is neither read nor changed.
        reference_size: images in the reference set, rounded down to equal classes.
        test_size: images in the test set, rounded down to equal classes; 0 for no test set.

    Returns:
        The parts, each shuffled; the same seed gives the same split.

    Raises:
        ValueError: images that are not finite, lengths or proportions that do not fit, a fraction
            outside (0, 1), a class with too few images for one of the parts.
    """
    x = as_tensor(x)
    y = _checked_data(x, as_tensor(y))
    classes = tuple(y.unique().tolist())
    shares = _checked_proportions(proportions, classes)
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    counts = [int((y == label).sum()) for label in classes]
    sizes = _sizes_per_class(counts, classes, shares, fraction, reference_size, test_size)

    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {part: [] for part in sizes}
    for position, label in enumerate(classes):
        index = (y == label).nonzero().squeeze(1)
        index = index[torch.randperm(len(index), generator=generator, device="cpu")]
        pieces = index.split([size[position] for size in sizes.values()])
        for part, piece in zip(parts, pieces, strict=True):
            parts[part].append(piece)

    def gather(part: str) -> ImageSet:
        index = torch.cat(parts[part])
        index = index[torch.randperm(len(index), generator=generator, device="cpu")]
        return ImageSet(x[index], y[index], part)

    return BiasedSplit(**{part: gather(part) for part in parts}, classes=classes, proportions=shares)


def _checked_data(x: Tensor, y: Tensor) -> Tensor:
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or len(y) == 0:
        raise ValueError(
            "x must have shape (n, *event_shape) and y shape (n,) with the same n > 0, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x.flatten(1))).any(1).sum())
        raise ValueError(
            f"x must be finite, but {bad} of {len(x)} images hold NaN or infinity; drop or impute them"
        )
    if y.is_floating_point() and not torch.equal(y, y.round()):
        raise ValueError("y must hold integer class labels, got values that are not whole numbers")
    return y.to("cpu", torch.int64)


def _checked_proportions(
    proportions: Sequence[float] | Mapping[int, float], classes: tuple[int, ...]
) -> tuple[float, ...]:
    if isinstance(proportions, Mapping):
        unknown = [label for label in proportions if label not in classes]
        missing = [label for label in classes if label not in proportions]
        if unknown or missing:
            raise ValueError(
                f"proportions must name exactly the classes {list(classes)}; unknown: {unknown}, "
                f"missing: {missing} (give 0 to leave a class out)"
            )
        proportions = [proportions[label] for label in classes]
    shares = tuple(float(share) for share in proportions)
    if len(shares) != len(classes):
        raise ValueError(
            f"proportions must have one entry for each of the {len(classes)} classes {list(classes)}, "
            f"got {len(shares)}"
        )
    if not all(math.isfinite(share) and share >= 0.0 for share in shares):
        raise ValueError(f"proportions must be finite and not negative, got {list(shares)}")
    total = math.fsum(shares)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(
            f"proportions must sum to 1, but {list(shares)} sum to {total:.6g}; divide them by their sum"
        )
    return shares


def _sizes_per_class(
    counts: Sequence[int],
    classes: tuple[int, ...],
    shares: tuple[float, ...],
    fraction: float,
    reference_size: int | None,
    test_size: int | None,
) -> dict[str, list[int]]:
    """Number of images by part and class; every class is used up."""
    biased = _biased_counts([math.floor(fraction * count + 1e-9) for count in counts], shares)
    for label, taken, share in zip(classes, biased, shares, strict=True):
        if share > 0.0 and taken == 0:
            _raise_empty(label, "biased", "raise fraction or the proportion of this class")
    left = [count - taken for count, taken in zip(counts, biased, strict=True)]
    default = max(1, math.floor(_BALANCED_SHARE * min(left)))
    reference = _per_class("reference_size", reference_size, default, len(classes), minimum=1)
    test = _per_class("test_size", test_size, default, len(classes), minimum=0)
    for part, used, needed in (
        ("reference", 0, reference),
        ("test", reference, test),
        ("classifier", reference + test, 1),
    ):
        for label, count in zip(classes, left, strict=True):
            if count - used < needed:
                have = f"{needed} needed, {max(0, count - used)} left"
                _raise_empty(label, part, f"{have}; lower fraction or the sizes asked for")
    rest = [count - reference - test for count in left]
    return {
        "biased": biased,
        "reference": [reference] * len(classes),
        "test": [test] * len(classes),
        "classifier": rest,
    }


def _biased_counts(budgets: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Largest set with these shares inside the budgets; rounding up by largest remainder."""
    total = min(
        math.floor(budget / share + 1e-9)
        for budget, share in zip(budgets, shares, strict=True)
        if share > 0.0
    )
    counts = [math.floor(total * share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda c: counts[c] - total * shares[c])
    for c in by_remainder[: total - sum(counts)]:
        counts[c] += 1
    return counts


def _per_class(name: str, size: int | None, default: int, num_classes: int, *, minimum: int) -> int:
    if size is None:
        return default
    if size < minimum * num_classes:
        raise ValueError(
            f"{name} must be at least {minimum * num_classes} for {num_classes} classes, got {size}"
        )
    return int(size) // num_classes


def _raise_empty(label: int, part: str, why: str) -> None:
    raise ValueError(f"class {label} has too few examples left for the {part} set: {why}")
