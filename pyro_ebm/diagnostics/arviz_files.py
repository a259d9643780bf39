"""ArviZ data in NetCDF files, the same on both ArviZ lines: written whole or not at all, told by name when damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.checks import file_path
from pyro_ebm.files import write_whole

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["load_arviz", "save_arviz"]


@checked
def save_arviz(tree: Any, path: str | Path) -> Path:
    """Write what :func:`to_arviz` returned to a NetCDF file; returns its path.

    The file is made in memory and read again there before it is written: an older one is replaced whole or not at all.

    Args:
        tree: ``InferenceData`` or ``DataTree``.
        path: of the file; its folder exists.

    Raises:
        TypeError: ``tree`` is neither.
        ValueError: no such folder; values or attributes that NetCDF cannot hold, or not so that they come back.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from pyro_ebm import Draws, load_arviz, save_arviz, to_arviz
        >>> tree = to_arviz(Draws({"mu": torch.randn(4, 100)}, "nuts"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_arviz(save_arviz(tree, Path(folder) / "draws.nc"))
        >>> again["posterior"]["mu"].shape
        (4, 100)
    """
    import xarray as xr

    target = file_path("path", path)
    data = _as_tree(tree)
    if not target.parent.is_dir():
        raise ValueError(f"path: the folder {target.parent} does not exist; create it first")
    try:
        # Not into the file: HDF5 that cannot write to it takes the interpreter down.
        with memoryview(data.to_netcdf(None, engine="h5netcdf", encoding=_compressed(data))) as written:
            content = bytes(written)  # a view that outlives its buffer takes it down, too
        with xr.open_datatree(_opened(content), engine="h5netcdf") as again:
            different = _difference(data, again.load())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # xarray and h5py raise many kinds
        raise ValueError(f"tree cannot be written to {target} as NetCDF: {error}; leave out or rename it") from error
    if different:
        raise ValueError(f"tree cannot be written to {target}: {different} would not come back as it is; leave it out")
    write_whole(target, content)
    return target


@checked
def load_arviz(path: str | Path) -> Any:
    """Read a file of :func:`save_arviz` into memory, as ``InferenceData`` or ``DataTree``.

    Raises:
        ValueError: no file there, or one that is no NetCDF, is damaged or holds no groups.
    """
    given = file_path("path", path)
    if not given.is_file():
        raise ValueError(f"path: there is no file {given}")
    import xarray as xr

    try:
        with xr.open_datatree(given, engine="h5netcdf") as tree:
            loaded = tree.load()
        found = loaded if arviz_is_1x() else _as_inference_data(loaded)
    except Exception as error:  # xarray and h5py raise many kinds
        raise ValueError(
            f"path: {given} cannot be read as NetCDF: it is damaged or of another kind; restore it from a copy, or "
            f"write it anew with save_arviz ({type(error).__name__}: {error})"
        ) from error
    if not loaded.children:
        raise ValueError(
            f"path: {given} holds no groups such as posterior; give a file that save_arviz or ArviZ wrote"
        )
    return found


def _as_tree(tree: Any) -> xr.DataTree:
    """The same data as xarray's tree, which ArviZ 1.x has already."""
    import xarray as xr

    if isinstance(tree, xr.DataTree):
        return tree
    inference_data = None if arviz_is_1x() else quiet_import("arviz").InferenceData
    if inference_data is None or not isinstance(tree, inference_data):
        raise TypeError(f"tree must be what to_arviz returns, got {type(tree).__name__}; pass to_arviz(draws)")
    made = xr.DataTree.from_dict({name: tree[name] for name in tree.groups()})
    made.attrs = dict(tree.attrs)
    return made


def _as_inference_data(tree: xr.DataTree) -> Any:
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    return quiet_import("arviz").InferenceData(attrs=dict(tree.attrs), **groups)


def _compressed(tree: xr.DataTree) -> Mapping[str, Any]:
    """Settings of the file: all numbers compressed, as ArviZ does."""
    return {
        node.path: {str(name): {"zlib": True} for name, value in node.variables.items() if value.dtype.kind in "iufb"}
        for node in tree.subtree
    }


def _opened(content: Any) -> Any:
    from io import BytesIO

    return BytesIO(content)


def _difference(tree: xr.DataTree, again: xr.DataTree) -> str | None:
    """The first group or variable that did not come back, in words."""
    groups = {node.path: node.to_dataset() for node in again.subtree}
    for node in tree.subtree:
        before, after = node.to_dataset(), groups.get(node.path)
        if after is None:
            return f"group {node.path}"
        for name, value in before.variables.items():
            if name not in after.variables or not value.equals(after.variables[name]):
                return f"{name!r} of group {node.path}"
    return None
