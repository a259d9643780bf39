"""What the benchmarks of learning share: options, training, rows kept one by one, and LEARNING.md."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from pyro_ebm import Checkpoint, fit

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"

Row = dict[str, Any]


def parser(name: str, description: str | None, *, epochs: int) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--data", default="data", help="folder that holds MNIST, downloaded there if need be")
    made.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    made.add_argument("--epochs", type=int, default=epochs, help="passes over the training images, for every model")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--again", action="store_true", help="run also what is stored with the same settings")
    return made


class Rows:
    """Rows by name in ``results/NAME.json``: written one by one, and not run again with the same settings."""

    def __init__(self, name: str, *, folder: Path = RESULTS, again: bool = False) -> None:
        self.name, self.folder, self.again = name, folder, again
        self.cache = (FOLDER if folder == RESULTS else folder) / "cache"
        self.file = folder / f"{name}.json"
        self.rows: dict[str, Row] = stored(name, folder).get("rows", {})

    def add(self, key: str, settings: dict[str, Any], make: Callable[[], Row]) -> Row:
        """The stored row, or the one that ``make`` returns, with what it was made by and on."""
        found = self.rows.get(key)
        settings = json.loads(json.dumps(settings))
        if found is None or self.again or found["settings"] != settings:
            found = {"settings": settings, **make(), "machine": describe()}
            self.rows[key] = found
            self._write()
        return found

    def checkpoint(self, key: str, settings: dict[str, Any]) -> Path:
        """Where the training with these settings is kept: an interrupted one goes on from there."""
        digest = hashlib.blake2b(json.dumps([key, settings], sort_keys=True).encode(), digest_size=6).hexdigest()
        file = self.cache / f"{self.name}-{key.replace(' ', '-')}-{digest}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.again:
            file.unlink(missing_ok=True)
        return file

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".json.tmp")
        draft.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        draft.replace(self.file)


def stored(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What a results file holds; empty where there is none."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def train(
    model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, modules: list[nn.Module], *,
    objective: Any, lr: float, decay: bool, epochs: int, batch_size: int, seed: int, device: str,
    checkpoint: Path,
) -> Row:  # fmt: skip
    """Adam up to the given number of epochs, from the checkpoint if there is one; the loss at the end, the seconds."""
    for module in modules:
        module.to(device)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    result = fit(
        model, guide, x, objective=objective, train=modules, epochs=epochs, batch_size=batch_size, seed=seed,
        optimizer=functools.partial(torch.optim.Adam, lr=lr), scheduler=cosine if decay else None,
        validation=None, patience=None, checkpoint=Checkpoint(checkpoint, every=1, resume="auto"),
    )  # fmt: skip
    if result.stopped != "epochs":
        raise RuntimeError(f"training ended early: {result.stopped} after {result.epochs} epochs")
    return {
        "train_loss": result.train_loss[-1],
        "train_seconds": result.seconds,
        "steps": result.epochs * -(-len(x) // batch_size),
    }


def seeded(seed: int, make: Callable[[], nn.Module]) -> Any:
    """A module whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
