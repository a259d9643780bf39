"""Files of weights and of training runs: written whole or not at all, read without executing code in them."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_ebm import files
from pyro_ebm.annotations import checked
from pyro_ebm.checks import file_path
from pyro_ebm.errors import CheckpointError
from pyro_ebm.files import replacing

__all__ = ["Checkpoint", "load_weights", "save_weights"]

_VERSION = 1
_KEEP_TENSORS = "a file holds tensors, numbers, text and tuples, lists and dictionaries of these; keep one of them"
Weights = list[dict[str, Any]]


@checked
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
        file_path("path", self.path)
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


@checked
def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write a module's parameters and buffers to a file that :func:`load_weights` reads.

    The file appears whole or not at all, after it was read again and found the same; folders that are missing are made.

    Args:
        module: any module, for instance a VAE or an energy.
        path: file to write; an existing one is replaced.

    Raises:
        CheckpointError: the file cannot be written, or would not come back as it is.
    """
    weights = dict(module.state_dict())
    empty = [name for name, value in weights.items() if isinstance(value, Tensor) and _holds_nothing(value)]
    if empty:
        raise CheckpointError(
            f"cannot write {path}: {empty[0]!r} of the {type(module).__name__} holds no numbers yet (a lazy layer "
            "before its first call, or device 'meta'); call the module once, or move it to a real device"
        )
    payload = {"class": type(module).__name__, "weights": weights}
    write(payload, path, kind="weights")


@checked
def load_weights(module: nn.Module, path: str | Path) -> None:
    """Read weights written by :func:`save_weights` into a module built the same way.

    No code in the file is executed, and on any error the module stays as it was.

    Args:
        module: a module with the same class, parameter names, shapes and dtypes.
        path: file to read.

    Raises:
        CheckpointError: the file is missing, damaged, carries code, or belongs to another module.
    """
    payload = read(path, kind="weights")
    if payload.get("weights") and any(isinstance(m, AutoGuide) and m.prototype_trace is None for m in module.modules()):
        raise CheckpointError(
            f"this {type(module).__name__} makes its parameters at its first call and has none yet: call it once with "
            f"the arguments of its model, then load {path} into it"
        )
    require_match([payload.get("class")], [payload.get("weights")], [module], path)
    module.load_state_dict(payload["weights"])


def write(payload: Mapping[str, Any], path: str | Path, *, kind: str) -> None:
    """Write a file that :func:`read` reads, whole or not at all."""
    file_path("path", path)
    whole = {"format": f"pyro_ebm {kind}", "version": _VERSION, **payload}
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file:  # a path it would keep inside
                torch.save(whole, file)
            _require_same(whole, temporary, kind)
    except OSError as error:
        raise CheckpointError(error.strerror or str(error)) from error
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    except RuntimeError as error:  # of torch, for a full disk
        raise CheckpointError(
            f"cannot write {path}: {error}; choose a file in a folder that can be written and has space left"
        ) from error
    except Exception as error:  # what cannot be pickled fails in many ways
        lost = _what_does_not_come_back(whole) or str(error)
        raise CheckpointError(f"cannot write {path}: {lost}; {_KEEP_TENSORS}") from error


def _require_same(whole: Mapping[str, Any], path: Path, kind: str) -> None:
    """Raise a CheckpointError unless a file just written holds what it was given."""
    try:
        good, why = _same(whole, read(path, kind=kind)), "it is not the same"
    except CheckpointError as error:
        good, why = False, str(error.__cause__)
    if not good:
        lost = _what_does_not_come_back(whole) or f"what was written does not come back ({why})"
        raise CheckpointError(f"{lost}; {_KEEP_TENSORS}")


def _same(meant: Any, found: Any) -> bool:
    """Whether two nests of tensors and plain values are the same to the last bit."""
    if isinstance(meant, Tensor):
        return isinstance(found, Tensor) and _kind(meant) == _kind(found) and _same_numbers(meant, found)
    if isinstance(meant, Mapping):
        same = isinstance(found, Mapping) and list(meant) == list(found)
        return same and all(_same(meant[key], found[key]) for key in meant)
    if isinstance(meant, list | tuple):
        same = isinstance(found, list | tuple) and len(meant) == len(found)
        return same and all(_same(a, b) for a, b in zip(meant, found, strict=True))
    return bool(meant == found) or (meant != meant and found != found)


def _same_numbers(meant: Tensor, found: Tensor) -> bool:
    one, other = (t if t.layout == torch.strided else t.to_dense() for t in (meant.detach().cpu(), found))
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _what_does_not_come_back(value: Any, name: str = "") -> str | None:
    """The innermost entry that a file cannot hold, in words; None where there is none."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        within = f" of {name}" if name else ""
        found = (_what_does_not_come_back(part, f"entry {key!r}{within}") for key, part in parts)
        return next((lost for lost in found if lost), None)
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        found = torch.load(buffer, map_location="cpu", weights_only=True)
        return None if _same(value, found) else f"{name} ({type(value).__name__}) would come back as another value"
    except Exception as error:  # pickle fails in many ways
        return f"{name} ({type(value).__name__}) is no tensor and no plain value ({type(error).__name__})"


def _holds_nothing(value: Tensor) -> bool:
    return value.is_meta or nn.parameter.is_lazy(value)


def require_writable(path: str | Path) -> None:
    """Find out before hours of training whether a file can be written there later."""
    try:
        files.require_writable(path)
    except OSError as error:
        raise CheckpointError(error.strerror or str(error)) from error


def read(path: str | Path, *, kind: str) -> dict[str, Any]:
    """The payload of a file made by :func:`write`; nothing in it is executed."""
    path = file_path("path", path)
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
