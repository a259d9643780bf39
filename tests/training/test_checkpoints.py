from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from pyro_ebm import VAE, CheckpointError, load_weights, save_weights
from pyro_ebm.training import checkpoints


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def vae(hidden=(5,), **options):
    return VAE((4,), 2, hidden=hidden, **options)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def refuses(path, match, module=None):
    module = module or vae()
    before = weights(module)
    with pytest.raises(CheckpointError, match=match):
        load_weights(module, path)
    assert same(before, weights(module))


def test_weights_come_back_bit_for_bit(tmp_path):
    first, second = nn.Sequential(vae(), nn.BatchNorm1d(3)), nn.Sequential(vae(), nn.BatchNorm1d(3))
    first[1](torch.rand(5, 3))
    save_weights(first, tmp_path / "new" / "vae.pt")
    load_weights(second, str(tmp_path / "new" / "vae.pt"))
    assert same(weights(first), weights(second))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["vae.pt"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "vae.pt"
    first = vae()
    save_weights(first, path)

    def fails(payload, file):
        file.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointError, match="cannot write .*disk full; choose a file"):
        save_weights(vae(), path)
    monkeypatch.undo()
    again = vae()
    load_weights(again, path)
    assert same(weights(first), weights(again))
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, target = tmp_path / "vae.pt", tmp_path / "executed"
    payload = {"format": "pyro_ebm weights", "version": 1, "class": "VAE", "weights": Evil(target)}
    if zipped:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    refuses(path, "damaged, or holds something other than tensors and plain values .its code was not run")
    assert not target.exists()
    # The file is a live one: read without care, it does what it was made for.
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert target.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "vae.pt"
    save_weights(vae(), path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refuses(path, "cannot read .*vae.pt: it is damaged")


def test_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "vae.pt"
    save_weights(vae(), path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if "/data/" in name)
        content = archive.read(name)
    data = bytearray(path.read_bytes())
    data[data.index(content)] ^= 1
    path.write_bytes(data)
    refuses(path, "cannot read .*vae.pt: it is damaged")


def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "vae.pt"
    refuses(path, "there is no weights file at .*vae.pt; check the path")
    refuses(tmp_path, "there is no weights file at")
    path.write_text("not a checkpoint")
    refuses(path, "cannot read")
    torch.save(vae().state_dict(), path)
    refuses(path, "is no pyro_ebm weights file")
    torch.save([1, 2], path)
    refuses(path, r"is no pyro_ebm weights file \(found 'list'\)")
    torch.save({"format": "pyro_ebm weights", "version": 99}, path)
    refuses(path, "has format version 99, this library reads 1")
    torch.save({"format": "pyro_ebm weights", "version": 1}, path)
    refuses(path, r"holds the weights of \[None\], not of \['VAE'\]")
    torch.save({"format": "pyro_ebm weights", "version": 1, "class": "VAE", "weights": [3]}, path)
    refuses(path, "does not fit this VAE: it lacks")


def test_weights_of_another_module_are_named(tmp_path):
    path = tmp_path / "vae.pt"
    save_weights(vae(), path)
    refuses(path, r"holds the weights of \['VAE'\], not of \['Linear'\]", nn.Linear(2, 2))
    refuses(path, r"'encoder.layers.0.weight' is float32\[5, 4\] in the file and float32\[6, 4\]", vae((6,)))
    refuses(path, "is float32.* in the file and float64", vae().double())
    refuses(path, r"it lacks \['raw_scale'\]", vae(likelihood="gaussian_shared"))


def test_only_modules_have_weights(tmp_path):
    for call in (save_weights, load_weights):
        with pytest.raises(TypeError, match="module must be a torch Module, got dict"):
            call({}, tmp_path / "vae.pt")


def test_extra_state_is_kept(tmp_path):
    class Counting(nn.Module):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    first, second = Counting(), Counting()
    first.count = 3
    save_weights(first, tmp_path / "m.pt")
    load_weights(second, tmp_path / "m.pt")
    assert second.count == 3
    copies = checkpoints.weights_of([first])
    first.count = 4
    checkpoints.load_into([first], copies)
    assert first.count == 3
