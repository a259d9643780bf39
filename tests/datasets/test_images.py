"""Torchvision's sets: read from files, and what is said when the files are missing."""

from __future__ import annotations

import gzip
import io
import os
import struct
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from pyro_ebm.datasets import ImageSet, fashion_mnist, kmnist, mnist

SETS = [
    ("MNIST", mnist, "mnist"),
    ("FashionMNIST", fashion_mnist, "fashion_mnist"),
    ("KMNIST", kmnist, "kmnist"),
]
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
REAL = Path(os.environ.get("PYRO_EBM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def idx_bytes(values: torch.Tensor) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + bytes(values.flatten().tolist())


def write_idx(root: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a set of 12 training and 6 test images, labels 0, 1, 2, 0, 1, 2, ..."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    written = {}
    for part, n in (("train", 12), ("t10k", 6)):
        images = torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)
        images[0, 0, :2] = torch.tensor([0, 255])
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(n) % 3))
        written[part] = images
    return written


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the network must not be touched")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("folder", "load", "name"), SETS)
def test_files_are_read(tmp_path: Path, folder: str, load: Callable[..., ImageSet], name: str) -> None:
    written = write_idx(tmp_path, folder)
    for part, train in (("train", True), ("t10k", False)):
        data = load(tmp_path, train=train)
        assert data.name == name
        assert data.images.dtype == torch.float32
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == [i % 3 for i in range(len(written[part]))]
        assert data.images.shape == (len(written[part]), 1, 28, 28)
        torch.testing.assert_close(data.images[:, 0] * 255, written[part].float())
        assert data.images.min() == 0.0
        assert data.images.max() == 1.0


@pytest.mark.usefixtures("no_network")
def test_classes_are_selected(tmp_path: Path) -> None:
    written = write_idx(tmp_path, "MNIST")["train"]
    data = mnist(str(tmp_path), classes=(0, 2), download=False)
    assert data.counts == {0: 4, 2: 4}
    torch.testing.assert_close(data.images[1, 0] * 255, written[2].float())
    with pytest.raises(ValueError, match=r"labels of mnist, \[0, 1, 2\]; unknown: \[5\]"):
        mnist(tmp_path, classes=[5])


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("folder", "load", "name"), SETS)
def test_missing_files_without_download(
    tmp_path: Path, folder: str, load: Callable[..., ImageSet], name: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path, download=False)
    text = str(caught.value)
    assert str(tmp_path / folder / "raw") in text
    assert all(file in text for file in FILES)
    assert "Call with download=True on a machine with a network, or copy these four files" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_network")
def test_one_missing_file_is_enough(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    (tmp_path / "MNIST" / "raw" / FILES[3]).unlink()
    with pytest.raises(FileNotFoundError, match="MNIST is not complete"):
        mnist(tmp_path, download=False)


def test_no_network_is_reported_before_any_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(request: urllib.request.Request, *, timeout: float) -> Any:
        asked.append((request.get_method(), request.full_url))
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    with pytest.raises(
        FileNotFoundError, match="download failed .URLError.*not known.*Expected there"
    ) as caught:
        mnist(tmp_path)
    assert isinstance(caught.value.__cause__, urllib.error.URLError)
    assert [method for method, _ in asked] == ["HEAD"] * len(torchvision.datasets.MNIST.mirrors)


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("reset"), RuntimeError("Error downloading x"), PermissionError("denied")],
)
def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        # A server that answers, even with an error, counts as reachable.
        raise urllib.error.HTTPError("url", 403, "forbidden", {}, io.BytesIO())  # type: ignore[arg-type]

    def fail(self: Any) -> None:
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(
        FileNotFoundError, match=f"{type(failure).__name__}.*or copy these four files"
    ) as caught:
        kmnist(tmp_path)
    assert caught.value.__cause__ is failure


def test_download_that_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO())
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: write_idx(tmp_path, "MNIST"))
    assert len(mnist(tmp_path, train=False)) == 6


def test_archives_are_unpacked_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, "MNIST")
    folder = tmp_path / "MNIST" / "raw"
    for file in FILES:
        (folder / f"{file}.gz").write_bytes(gzip.compress((folder / file).read_bytes()))
        (folder / file).unlink()
    # Torchvision takes an archive that is already there when its checksum fits.
    resources = [(f"{file}.gz", None) for file in FILES]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert len(mnist(tmp_path)) == 12


@pytest.mark.usefixtures("no_network")
def test_truncated_file(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / FILES[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"MNIST files in .* cannot be read .*; delete them and download"):
        mnist(tmp_path)


def test_image_set_wants_one_label_an_image() -> None:
    with pytest.raises(ValueError, match=r"images must have shape .*got \(3, 1, 2, 2\) and \(2,\)"):
        ImageSet(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.skipif(
    not (REAL / "MNIST" / "raw" / FILES[2]).is_file(), reason="real MNIST is not on this machine"
)
def test_real_mnist() -> None:
    data = mnist(REAL, train=False, classes=range(5), download=False)
    assert data.counts == {0: 980, 1: 1135, 2: 1032, 3: 1010, 4: 982}
    assert data.images.shape == (5139, 1, 28, 28)
