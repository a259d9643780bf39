"""How different the images of one class are from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.checks import finite_numbers

__all__ = ["class_diversity"]


@checked
def class_diversity(
    images: Tensor, labels: Tensor, real_images: Tensor, real_labels: Tensor, classes: Sequence[int]
) -> Tensor:
    r"""How far apart the images of one class are, relative to real images of that class.

    For each class the root mean squared distance of two different generated images over that of two real ones:
    1 where they vary as much as real ones, 0 where a class has collapsed to one image.

    Args:
        images: (n, *event_shape), generated.
        labels: (n,) their predicted labels.
        real_images: (m, *event_shape), not trained on.
        real_labels: (m,) their true labels; at least two images of each class, not all the same.
        classes: the classes, in the order of the result.

    Returns:
        (classes,) float64; 0 for a class with fewer than two generated images.

    Raises:
        ValueError: lengths or shapes that differ, or a class without two different real images.

    Example:
        >>> real, labels = torch.tensor([[0.0], [2.0]]), torch.tensor([7, 7])
        >>> class_diversity(real / 2, labels, real, labels, (7,)).tolist()
        [0.5]
    """
    for name, data, marks in (("", images, labels), ("real_", real_images, real_labels)):
        if data.ndim < 2 or len(data) != len(marks) or data.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{name}images must have shape (n, *event_shape) and {name}labels shape (n,), generated and real of "
                f"one shape, got {tuple(data.shape)} and {tuple(marks.shape)}"
            )
        finite_numbers(f"{name}images", data)
    wanted = _mean_squared_distances(real_images, real_labels, classes)
    if not bool((wanted > 0).all()):
        lacking = [label for label, spread in zip(classes, wanted.tolist(), strict=True) if not spread > 0]
        raise ValueError(f"real_images must hold two different images of each class, not so for {lacking}")
    return (_mean_squared_distances(images, labels, classes) / wanted).sqrt()


def _mean_squared_distances(images: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean squared distance of two different images by class: twice the sum of the pixels' sample variances."""
    found = []
    for label in classes:
        members = images.detach()[labels == label].flatten(1).double()
        found.append(2.0 * members.var(0).sum().item() if len(members) > 1 else 0.0)
    return torch.tensor(found, dtype=torch.float64)
