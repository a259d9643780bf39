"""NetCDF files: junk and damage are told by name, and what would not come back is not written."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from pyro_ebm import Draws, load_arviz, save_arviz, save_weights, to_arviz


@pytest.fixture
def tree():
    return to_arviz(Draws({"mu": torch.randn(2, 500)}, "nuts"))


@pytest.mark.parametrize("kind", ["empty", "text", "weights", "half", "beginning", "flipped", "no groups", "folder"])
def test_files_that_are_none_are_named(kind, tree, tmp_path):
    path = save_arviz(tree, tmp_path / "draws.nc")
    content = path.read_bytes()
    if kind == "weights":
        save_weights(torch.nn.Linear(1, 1), path)
    elif kind == "no groups":
        tree["posterior"].to_dataset().to_netcdf(path, engine="h5netcdf") if hasattr(
            tree["posterior"], "to_dataset"
        ) else tree["posterior"].to_netcdf(path, engine="h5netcdf")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = bytes(255 - byte for byte in content)
        parts = {"empty": b"", "text": b"a,b\n1,2\n", "half": content[: len(content) // 2], "beginning": content[:100]}
        path.write_bytes({**parts, "flipped": content[:600] + flipped[600:]}[kind])
    with pytest.raises(ValueError, match=r"path: .*draws.nc"):
        load_arviz(path)


def test_only_arviz_data_are_saved(tmp_path):
    for value in (3, None, "x", {"mu": torch.zeros(1, 2)}, Draws({"mu": torch.zeros(1, 2)}, "nuts")):
        with pytest.raises(TypeError, match=r"tree must be what to_arviz returns, got .*; pass to_arviz\(draws\)"):
            save_arviz(value, tmp_path / "x.nc")


@pytest.mark.parametrize("change", ["object", "attribute"])
def test_what_netcdf_cannot_hold_leaves_the_old_file(change, tree, tmp_path):
    path = save_arviz(tree, tmp_path / "draws.nc")
    before = path.read_bytes()
    posterior = tree["posterior"]
    if change == "attribute":
        posterior.attrs["model"] = {"a": object()}
    else:
        posterior["odd"] = ("axis", np.array([object(), 3], dtype=object))
    with pytest.raises(ValueError, match="tree cannot be written to .*draws.nc"):
        save_arviz(tree, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["draws.nc"]
