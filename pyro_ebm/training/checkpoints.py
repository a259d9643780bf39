"""Files of weights and of training runs: written whole or not at all, read without executing code in them."""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.checks import whole_number
from pyro_ebm.errors import CheckpointError
from pyro_ebm.files import replacing, write_whole

__all__ = ["Checkpoint", "load_weights", "save_weights"]

_VERSION = 1
Weights = list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A file that keeps a training run: ``fit(..., checkpoint=Checkpoint("run.pt", resume=True))``.

    A path in its place keeps the run without going on from what is there.

    Args:
        path: of the file; an older one is replaced.
        every: epochs between two writes; the end or an interruption is written as well.
        resume: continue from the file, exactly as if the run had never stopped. ``"auto"``: where it is there; a cell
            with it can be run until it is through.

    Raises:
        ValueError: ``every`` below 1, or another ``resume``.

    Example:
        >>> Checkpoint("run.pt", every=5, resume="auto").every
        5
    """

    path: str | Path
    _: KW_ONLY
    every: int = 10
    resume: bool | str = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise TypeError(f"path must be the path of a file, got {type(self.path).__name__}")
        whole_number("every", self.every)
        if self.resume not in (True, False, "auto"):
            raise ValueError(f'resume must be True, False or "auto", got {self.resume!r}')

    @classmethod
    def of(cls, given: Checkpoint | str | Path | None) -> Checkpoint | None:
        """What was given, a path made one, None where no run is to be kept."""
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, str | Path):
            raise TypeError(f"checkpoint must be a path or a Checkpoint(path, ...), got {type(given).__name__}")
        return cls(given)

    def saved(self) -> dict[str, Any] | None:
        """The run to go on with; None for a new one.

        Raises:
            CheckpointError: no file to continue from, one that cannot be read, or no way to write one.
        """
        wanted = Path(self.path).is_file() if self.resume == "auto" else self.resume
        saved = read(self.path, kind="checkpoint") if wanted else None
        if saved and not isinstance(saved.get("seed"), int):
            raise CheckpointError(f"{self.path} is damaged: it has no seed; start anew with resume=False")
        require_writable(self.path)
        return saved


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write a module's parameters and buffers to a file that :func:`load_weights` reads.

    The file appears whole or not at all; folders that are missing are made.

    Args:
        module: any module, for instance a VAE or an energy.
        path: file to write; an existing one is replaced.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    payload = {"class": type(module).__name__, "weights": dict(module.state_dict())}
    write(payload, path, kind="weights")


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Read weights written by :func:`save_weights` into a module built the same way.

    No code in the file is executed, and on any error the module stays as it was.

    Args:
        module: a module with the same class, parameter names, shapes and dtypes.
        path: file to read.

    Raises:
        CheckpointError: the file is missing, damaged, carries code, or belongs to another module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    payload = read(path, kind="weights")
    require_match([payload.get("class")], [payload.get("weights")], [module], path)
    module.load_state_dict(payload["weights"])


def write(payload: Mapping[str, Any], path: str | Path, *, kind: str) -> None:
    """Write a file that :func:`read` reads, whole or not at all."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:  # a path it would keep inside
            torch.save({"format": f"pyro_ebm {kind}", "version": _VERSION, **payload}, file)
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; choose a file in a folder that can be written and has space left"
        ) from error


def require_writable(path: str | Path) -> None:
    """Find out before hours of training whether a file can be written there later."""
    path = Path(path)
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        write_whole(probe, b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; choose a file in a folder that can be written"
        ) from error


def read(path: str | Path, *, kind: str) -> dict[str, Any]:
    """The payload of a file made by :func:`write`; nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no {kind} file at {path}; check the path, or start without it")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums it writes.
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can fail anywhere in the unpickler.
    except Exception as error:
        raise CheckpointError(
            f"cannot read {path}: it is damaged, or holds something other than tensors and plain values "
            f"(its code was not run); restore the file from a copy or make it anew ({type(error).__name__})"
        ) from error
    found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
    if found != f"pyro_ebm {kind}":
        raise CheckpointError(f"{path} is no pyro_ebm {kind} file (found {found!r}); give the path of one")
    if payload.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {payload.get('version')!r}, this library reads {_VERSION}; "
            "read it with the version of pyro_ebm that wrote it"
        )
    return payload


def weights_of(modules: Sequence[nn.Module]) -> Weights:
    """Copies of the state dicts of the modules."""
    return [
        {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in module.state_dict().items()
        }
        for module in modules
    ]


def load_into(modules: Sequence[nn.Module], weights: Weights) -> None:
    """Put copies made by :func:`weights_of` back."""
    for module, state in zip(modules, weights, strict=True):
        module.load_state_dict(state)


def require_match(classes: Any, weights: Any, modules: Sequence[nn.Module], path: str | Path) -> None:
    """Raise a CheckpointError unless the saved state dicts are those of the modules."""
    names = [type(module).__name__ for module in modules]
    if classes != names or not isinstance(weights, list) or len(weights) != len(names):
        raise CheckpointError(
            f"{path} holds the weights of {classes}, not of {names}; "
            "pass the modules it was written from, in the same order"
        )
    for saved, module in zip(weights, modules, strict=True):
        problem = _difference(saved, module.state_dict())
        if problem:
            raise CheckpointError(
                f"{path} does not fit this {type(module).__name__}: {problem}; "
                "build the module with the arguments it had when the file was written"
            )


def _difference(saved: Any, wanted: Mapping[str, Any]) -> str | None:
    """What differs in names, shapes or dtypes, in words; None where nothing does."""
    if not isinstance(saved, dict) or saved.keys() != wanted.keys():
        names = set(saved) if isinstance(saved, dict) else set()
        missing, extra = sorted(wanted.keys() - names), sorted(map(str, names - wanted.keys()))
        return f"it lacks {missing[:5]} and has {extra[:5]} too many"
    for name, value in wanted.items():
        kinds = [_kind(saved[name]), _kind(value)]
        if kinds[0] != kinds[1]:
            return f"{name!r} is {kinds[0]} in the file and {kinds[1]} in the module"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
