"""Where a study keeps what it has finished: a file for each cell and each biased VAE, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyro_ebm.errors import CheckpointError, TrainingWarning, warn_user
from pyro_ebm.files import write_whole
from pyro_ebm.models.vae import VAE
from pyro_ebm.recipes.study_config import Cell
from pyro_ebm.training.checkpoints import load_weights, save_weights

__all__ = ["StudyStore"]

Row = dict[str, Any]


class StudyStore:
    """Finished cells and biased VAEs of one study, in a folder that several processes may share.

    Args:
        folder: where; ``None``: in memory only.
        fingerprint: of the settings; what was made with others is neither read nor overwritten.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._rows: dict[Cell, Row] = {}

    def row(self, cell: Cell) -> Row | None:
        """What is known of a cell; None where it is not finished, with a warning where its file is damaged."""
        path = self._path("cells", cell.name, "json")
        if cell not in self._rows and path is not None and path.is_file():
            try:
                row = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
                _require_row(row, cell)
            except (ValueError, OSError) as error:
                _warn_of_damage(path, error)
                return None
            self._rows[cell] = row
        return self._rows.get(cell)

    def keep_row(self, cell: Cell, row: Row) -> None:
        """Keep a cell's row; numbers that are not finite become null, which JSON can hold."""
        self._rows[cell] = row
        path = self._path("cells", cell.name, "json")
        if path is not None:
            write_whole(path, json.dumps(row, indent=1, allow_nan=False) + "\n")

    def load_vae(self, vae: VAE, seed: int) -> bool:
        """Read the weights of the biased VAE of this latent dimension and seed; False where there are none to use."""
        path = self._vae_path(vae, seed)
        if path is None or not path.is_file():
            return False
        try:
            load_weights(vae, path)
            if not all(bool(torch.isfinite(p).all()) for p in vae.parameters()):
                raise CheckpointError(f"{path} holds weights that are not finite")
        except CheckpointError as error:
            _warn_of_damage(path, error)
            return False
        return True

    def keep_vae(self, vae: VAE, seed: int) -> None:
        """Write the weights that :meth:`load_vae` reads."""
        path = self._vae_path(vae, seed)
        if path is not None:
            save_weights(vae, path)

    def _vae_path(self, vae: VAE, seed: int) -> Path | None:
        return self._path("vaes", f"d{vae.latent_dim}-s{seed}", "pt")

    def _path(self, kind: str, name: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / kind / f"{name}-{self.fingerprint}.{suffix}"


def _require_row(row: Any, cell: Cell) -> None:
    """A ValueError unless it is the row of this cell, with a number or nothing where numbers belong."""
    if not isinstance(row, dict) or any(row.get(key) != value for key, value in cell._asdict().items()):
        raise ValueError(f"it is not the row of cell {cell.name}")
    for name in ("tv", "fairness_discrepancy", "log_likelihood", "confidence", "diversity", "kl", "seconds"):
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"its {name} is no number: {value!r}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which no study writes")


def _warn_of_damage(path: Path, error: Exception) -> None:
    warn_user(f"{path} cannot be used ({error}); it is made anew and replaced", TrainingWarning)
