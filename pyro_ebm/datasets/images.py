"""Labeled images, and the torchvision sets that are read as such."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked

__all__ = ["ImageSet", "fashion_mnist", "image_set", "kmnist", "mnist"]

# A machine without a network should hear so in seconds; torchvision itself sets no timeout.
_PROBE_SECONDS = 10.0


@checked
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one integer label each.

    Args:
        images: float32 (n, channels, height, width), values in [0, 1].
        labels: int64 (n,).
        name: what the images are, for titles and file names.

    Raises:
        ValueError: images and labels of different length.
    """

    images: Tensor
    labels: Tensor
    name: str = "images"

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.images.ndim < 2 or len(self.images) != len(self.labels):
            raise ValueError(
                "images must have shape (n, *event_shape) and labels shape (n,), "
                f"got {tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one image."""
        return self.images.shape[1:]

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, sorted."""
        return tuple(self.labels.unique().tolist())

    @property
    def counts(self) -> dict[int, int]:
        """Class -> number of images."""
        values, counts = self.labels.unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def image_set(
    images: Tensor, labels: Tensor, *, scale: float, classes: Iterable[int] | None, name: str
) -> ImageSet:
    """Select classes, divide gray values by ``scale`` and add the channel axis.

    Args:
        images: (n, height, width), values in [0, scale].
        labels: (n,).
        scale: the gray value of white.
        classes: labels to keep; all when ``None``.
        name: name of the set.

    Raises:
        ValueError: an unknown class, or no class at all.
    """
    labels = labels.to(torch.int64)
    if classes is not None:
        keep = _checked_classes(classes, labels, name)
        index = torch.isin(labels, torch.tensor(keep))
        images, labels = images[index], labels[index]
    return ImageSet((images.to(torch.float32) / scale).unsqueeze(1), labels, name)


@checked
def mnist(
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    classes: Iterable[int] | None = None,
    download: bool = True,
) -> ImageSet:
    """Return MNIST, read from ``root/MNIST/raw`` and downloaded there first if need be.

    Args:
        root: folder that holds (or shall hold) the folder ``MNIST``.
        train: the 60,000 training images, else the 10,000 test images.
        classes: labels to keep; all when ``None``.
        download: fetch the files when they are missing.

    Returns:
        Images (n, 1, 28, 28) in [0, 1] and labels (n,); labels keep their values.

    Raises:
        FileNotFoundError: files are missing and were not, or could not be, downloaded.
        ValueError: an unknown class, or files that cannot be read.

    Reference:
        LeCun, Cortes and Burges (1998), "The MNIST database of handwritten digits".
    """
    return _load("MNIST", root, train=train, classes=classes, download=download)


@checked
def fashion_mnist(
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    classes: Iterable[int] | None = None,
    download: bool = True,
) -> ImageSet:
    """Return Fashion-MNIST; arguments, result and errors as for :func:`mnist`.

    Reference:
        Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST".
    """
    return _load("FashionMNIST", root, train=train, classes=classes, download=download)


@checked
def kmnist(
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    classes: Iterable[int] | None = None,
    download: bool = True,
) -> ImageSet:
    """Return Kuzushiji-MNIST; arguments, result and errors as for :func:`mnist`.

    Reference:
        Clanuwat et al. (2018), "Deep Learning for Classical Japanese Literature".
    """
    return _load("KMNIST", root, train=train, classes=classes, download=download)


def _load(
    name: str, root: str | os.PathLike[str], *, train: bool, classes: Iterable[int] | None, download: bool
) -> ImageSet:
    """Read one torchvision set of the idx family as an :class:`ImageSet`."""
    from torchvision import datasets

    source = getattr(datasets, name)
    folder = Path(root) / name / "raw"
    archives = [filename for filename, _ in source.resources]
    files = [archive.removesuffix(".gz") for archive in archives]
    if not all((folder / file).is_file() for file in files):
        if not download:
            raise FileNotFoundError(_how_to_get(name, folder, files, "and download=False", "Call with download=True"))
        _download(source, root, folder, archives)
    try:
        data = source(os.fspath(root), train=train, download=False)
    except (AssertionError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the {name} files in {folder} cannot be read ({error!r}); delete them and download them again"
        ) from error
    return image_set(data.data, data.targets, scale=255.0, classes=classes, name=_SHORT_NAMES[name])


_SHORT_NAMES = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist", "KMNIST": "kmnist"}


def _download(source: Any, root: str | os.PathLike[str], folder: Path, archives: Sequence[str]) -> None:
    """Let torchvision download (or only unpack) the files; any failure says how to get them."""
    files = [archive.removesuffix(".gz") for archive in archives]
    unpacking = all((folder / archive).is_file() for archive in archives)
    failure = None if unpacking else _unreachable(source.mirrors, archives[0])
    if failure is None:
        try:
            source(os.fspath(root), download=True)
            return
        except (EOFError, OSError, RuntimeError) as error:  # URLError is an OSError
            failure = error
    reason = f"and the download failed ({type(failure).__name__}: {str(failure).strip()})"
    raise FileNotFoundError(_how_to_get(source.__name__, folder, files, reason)) from failure


def _unreachable(mirrors: Sequence[str], filename: str) -> Exception | None:
    """Return ``None`` as soon as one mirror answers at all, else why the last one did not."""
    failure: Exception | None = None
    for mirror in mirrors:
        request = urllib.request.Request(f"{mirror}{filename}", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
                return None
        except urllib.error.HTTPError:
            return None
        except OSError as error:
            failure = error
    return failure


def _how_to_get(name: str, folder: Path, files: Sequence[str], reason: str, retry: str = "Try again") -> str:
    return (
        f"{name} is not complete in {folder}, {reason}. Expected there: {', '.join(files)}. "
        f"{retry} on a machine with a network, or copy these four files into that folder"
    )


def _checked_classes(classes: Iterable[int], labels: Tensor, name: str) -> list[int]:
    keep = sorted({int(value) for value in classes})
    known = labels.unique().tolist()
    unknown = [value for value in keep if value not in known]
    if unknown or not keep:
        what = f"unknown: {unknown}" if unknown else "got none"
        raise ValueError(f"classes must be among the labels of {name}, {known}; {what}")
    return keep
