"""The 8 x 8 digits that come with scikit-learn: no file, no network."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyro_ebm.annotations import checked

from .images import ImageSet, image_set

__all__ = ["digits"]


@checked
def digits(classes: Iterable[int] | None = None) -> ImageSet:
    """Return scikit-learn's 1,797 handwritten digits.

    Args:
        classes: the digits to keep, for instance ``range(5)``; all ten when ``None``.

    Returns:
        Images (n, 1, 8, 8) in [0, 1] and labels (n,); labels keep their values.

    Raises:
        ValueError: a class that is not among 0-9, or an empty selection.

    Reference:
        Alpaydin and Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI.

    Example:
        >>> digits(range(5)).images.shape
        torch.Size([901, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.as_tensor(bunch.images), torch.as_tensor(bunch.target)
    return image_set(images, labels, scale=16.0, classes=classes, name="digits")
