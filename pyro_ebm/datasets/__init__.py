"""Labeled images: bundled digits, torchvision's sets, and biased splits of either."""

from __future__ import annotations

from .digits import digits
from .images import ImageSet, fashion_mnist, kmnist, mnist
from .splits import BiasedSplit, biased_split

__all__ = ["BiasedSplit", "ImageSet", "biased_split", "digits", "fashion_mnist", "kmnist", "mnist"]
