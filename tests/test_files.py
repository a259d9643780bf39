"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pyro_ebm import CheckpointError, LinearEnergy, load_weights, save_weights
from pyro_ebm.files import replacing, write_whole


@pytest.mark.parametrize("content", ["a\nline of \u00e4\u00f6\u00fc\r\n", b"\x00\xffbytes"], ids=["text", "bytes"])
def test_text_and_bytes_are_written_as_they_are(content, tmp_path):
    path = tmp_path / "a folder" / "with another" / "file"
    for _ in range(2):  # the second replaces the first
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["file"]


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def save(path):
    save_weights(LinearEnergy([1.0, 2.0]), path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("write", [lambda path: write_whole(path, "new"), save], ids=["text", "weights"])
def test_a_write_that_fails_leaves_the_old_file(write, step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_weights(LinearEnergy([3.0, 4.0]), path)
    before = path.read_bytes()
    owner = os if step == "fsync" else Path
    monkeypatch.setattr(owner, step, full_disk)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        write(path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == before
    monkeypatch.undo()
    energy = LinearEnergy([0.0, 0.0])
    load_weights(energy, path)
    assert energy.a.tolist() == [3.0, 4.0]


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "old"


def test_weights_are_the_same_bytes_wherever_they_lie(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_weights(LinearEnergy(torch.ones(3)), tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
