"""Where a job keeps the steps it has finished: a file for each, written whole or not at all, for ``resume`` to read."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_ebm import __version__
from pyro_ebm.errors import CheckpointError, TrainingWarning, warn_user
from pyro_ebm.estimates import BoundedEstimate, Estimate
from pyro_ebm.files import require_writable, write_whole
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.inference.importance import LogLikelihood
from pyro_ebm.training.checkpoints import load_into, read, require_match, weights_of, write
from pyro_ebm.training.fit import FitResult

__all__ = ["JobFolder", "results_folder"]

# What a step may return beside tensors, modules and plain values, by name.
_RECORDS: dict[str, type] = {c.__name__: c for c in (BoundedEstimate, Draws, Estimate, FitResult, LogLikelihood)}


@contextmanager
def results_folder(out: str | Path | None) -> Iterator[Path | None]:
    """The folder ``out`` with its ``figures``: made, and tried, before any work.

    Folders that were made here and are still empty at an error are taken away again.

    Raises:
        OSError: a folder that cannot be written to.
    """
    if out is None:
        yield None
        return
    folder = Path(out)
    made = [each for each in (folder / "figures", folder, *folder.parents) if not each.exists()]
    try:
        _prepare(folder)
        yield folder
    except BaseException:
        for each in made:  # the deepest first
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
        raise


def _prepare(folder: Path) -> None:
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        require_writable(folder / "summary.json")
    except OSError as error:
        raise OSError(
            f"out={os.fspath(folder)!r} cannot be written to ({error.strerror or error}); choose another folder"
        ) from error


class JobFolder:
    """The finished steps of one job, and the seconds that each took.

    Args:
        folder: that of the results; steps go into ``steps`` in it. ``None``: nothing is kept.
        settings: of the job. One that goes on must have the same.
        data: a checksum of the data, likewise.
        resume: go on with what is there; else a job begun there earlier is forgotten.

    Attributes:
        seconds: by stage, those before a resume included.
        resumed: names of the steps that were read and not computed.

    Raises:
        CheckpointError: ``resume`` where there is no job, or one of other settings, data or version.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], data: int, *, resume: bool) -> None:
        self.folder = None if folder is None else folder / "steps"
        self.seconds: dict[str, float] = {}
        self.resumed: list[str] = []
        if self.folder is None:
            return
        job = {"pyro_ebm": __version__, "data": data, "settings": dict(settings)}
        if resume:
            _require_same(self.folder, job)
        else:
            _forget(self.folder)
            write_whole(self.folder / "job.json", json.dumps(job, indent=1) + "\n")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block that keeps nothing to those of a stage."""
        began = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - began)

    def step(self, stage: str, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns: now, or when the job came here before.

        Args:
            stage: its seconds are counted there.
            name: of the file.
            make: returns tensors, draws, log likelihoods, plain values, or tuples and dictionaries of these.

        Returns:
            The value on the CPU.
        """
        saved = self._read(name, stage, _unpacked)
        if saved is not None:
            return saved[0]
        began = time.perf_counter()
        value = _packed(make())
        self._keep(stage, name, value, time.perf_counter() - began)
        return _unpacked(value)

    def model(
        self, stage: str, module: nn.Module, train: Callable[..., FitResult], name: str = ""
    ) -> FitResult:
        """Train a module, or give it the weights that it had when the job came here before.

        Args:
            stage: its seconds are counted there.
            module: as it is before training.
            train: trains it; called with ``checkpoint``, a file from which it goes on where that is there.
            name: of the file; that of the stage by default.

        Raises:
            KeyboardInterrupt: also where training came to an end by an interruption.
        """
        name = name or stage
        saved = self._read(name, stage, lambda value: (dict(value["weights"]), _unpacked(value["fit"])))
        if saved is not None and self.folder is not None:
            weights, fitted = saved[0]
            require_match([type(module).__name__], [weights], [module], self.folder / f"{name}.pt")
            load_into([module], [weights])
            module.eval()
            return fitted
        began = time.perf_counter()
        checkpoint = None if self.folder is None else self.folder / f"{name}.checkpoint.pt"
        result = train(checkpoint=checkpoint)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        kept = {"weights": weights_of([module])[0], "fit": _packed(result)}
        self._keep(stage, name, kept, max(time.perf_counter() - began, result.seconds))
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return result

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _read(self, name: str, stage: str, unpacked: Callable[[Any], Any]) -> tuple[Any] | None:
        """What a finished step returned, in a tuple; None where it has to be computed, again if it is damaged."""
        path = None if self.folder is None else self.folder / f"{name}.pt"
        if path is None or not path.is_file():
            return None
        try:
            saved = read(path, kind="step")
            seconds, value = float(saved["seconds"]), unpacked(saved["value"])
        # What was put there by hand can fail anywhere in the records.
        except Exception as error:
            warn_user(
                f"{path} cannot be used ({error}); the step is computed again and the file replaced", TrainingWarning
            )
            return None
        self.resumed.append(name)
        self.add(stage, seconds)
        return (value,)

    def _keep(self, stage: str, name: str, value: Any, seconds: float) -> None:
        self.add(stage, seconds)
        if self.folder is not None:
            write({"value": value, "seconds": seconds}, self.folder / f"{name}.pt", kind="step")


def _forget(folder: Path) -> None:
    """Take away the steps of an earlier job, and nothing else that may lie there."""
    # The name of the job first: steps without one are those of no job.
    (folder / "job.json").unlink(missing_ok=True)
    for path in folder.glob("*.pt"):
        path.unlink(missing_ok=True)


def _require_same(folder: Path, job: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless the job in the folder is this one."""
    try:
        found = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        before, now = _flat(found), _flat(json.loads(json.dumps(job)))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"there is no job to go on with in out={os.fspath(folder.parent)!r}; start one without resume"
        ) from error
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"the job in out={os.fspath(folder.parent)!r} had {name}={before.get(name)!r}, here it is "
                f"{now.get(name)!r}; go on with the settings and data it had, or start anew without resume"
            )


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    return {**job["settings"], **{name: value for name, value in job.items() if name != "settings"}}


def _packed(value: Any) -> Any:
    """Plain values and tensors that a file can hold and nothing in it needs to be executed for."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Source):  # the job knows its models
        return None
    name = type(value).__name__
    if name in _RECORDS:
        if dataclasses.is_dataclass(value):
            parts = {each.name: _packed(getattr(value, each.name)) for each in dataclasses.fields(value)}
        else:
            parts = {str(index): _packed(part) for index, part in enumerate(value.__getnewargs__())}
        return {"record": name, "parts": parts}
    if isinstance(value, Mapping):
        return {"mapping": {key: _packed(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return type(value)(_packed(item) for item in value)
    return value.item() if hasattr(value, "item") else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and "record" in value:
        kind, parts = _RECORDS[value["record"]], {k: _unpacked(v) for k, v in value["parts"].items()}
        return kind(**parts) if dataclasses.is_dataclass(kind) else kind(*parts.values())
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value["mapping"].items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpacked(item) for item in value)
    return value
