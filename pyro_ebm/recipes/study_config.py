"""Settings of the debias study: the grid, what is checked before any work, and which results belong together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from pyro_ebm.annotations import checked
from pyro_ebm.recipes.debias_config import DebiasConfig, Schedule

__all__ = ["GRID", "METHODS", "Cell", "StudyConfig"]

METHODS = ("biased", "reference_only", "fine_tuned", "importance_weighted", "tilt", "constraint")
# Of digits, and of the larger sets.
GRID: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "reference_sizes": ((25, 105), (50, 250, 1000, 3425)),
    "latent_dims": ((2, 10), (2, 10, 32, 64)),
    "seeds": ((0, 1, 2), (0, 1, 2)),
}
_WITHOUT_REFERENCE = ("biased", "constraint")
# Raise it when a change of the code makes cells computed before it incomparable with later ones.
_VERSION = 2


class Cell(NamedTuple):
    """One cell of the grid; ``reference_size`` is 0 for methods that use no reference images."""

    method: str
    latent_dim: int
    seed: int
    reference_size: int

    @property
    def name(self) -> str:
        """What its file and the progress bar call it."""
        size = f"-n{self.reference_size}" if self.reference_size else ""
        return f"{self.method}-d{self.latent_dim}-s{self.seed}{size}"


@checked
@dataclass(frozen=True)
class StudyConfig:
    """Settings of :func:`debias_study`.

    Args:
        data: one of ``"digits"`` (bundled), ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``.
        data_root: folder with the torchvision data; downloaded there when missing.
        digits: classes to use.
        proportions: share of each of them in the biased set; sums to one.
        fraction: largest share of any class that the biased set may take, in (0, 1).
        reference_sizes: numbers of balanced reference images, rounded down to equal classes; the smaller sets lie
            inside the larger. ``None``: 25, 105 for digits, else 50, 250, 1000, 3425.
        latent_dims: dimensions of z. ``None``: 2, 10 for digits, else 2, 10, 32, 64.
        seeds: of split, initial weights, training and sampling. ``None``: 0, 1, 2.
        methods: any of ``METHODS``.
        quick: short training, few draws and, where not given, a small grid.
        progress: show a progress bar.
    """

    data: str = "digits"
    data_root: str | Path | None = None
    digits: tuple[int, ...] = DebiasConfig.digits
    proportions: tuple[float, ...] = DebiasConfig.proportions
    fraction: float = DebiasConfig.fraction
    reference_sizes: tuple[int, ...] | None = None
    latent_dims: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    methods: tuple[str, ...] = METHODS
    quick: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        defaults = {name: grid[self.data != "digits"] for name, grid in GRID.items()}
        least = {"reference_sizes": 2 * len(self.digits), "latent_dims": 1, "seeds": 0}
        for name, default in defaults.items():
            given = getattr(self, name)
            quick = default[-1:] if name == "reference_sizes" else default[:1]
            chosen = (quick if self.quick else default) if given is None else tuple(index(item) for item in given)
            if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < least[name]:
                raise ValueError(f"{name} must be different numbers of at least {least[name]}, got {given}")
            object.__setattr__(self, name, tuple(sorted(chosen)))
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        if not methods or len({*methods} & {*METHODS}) < len(methods):
            raise ValueError(f"methods must be among {METHODS}, each once, got {methods}")
        object.__setattr__(self, "methods", tuple(method for method in METHODS if method in methods))
        checked = self.job(self.dims[0], self.cells[0].seed)
        for name in ("digits", "proportions"):
            object.__setattr__(self, name, getattr(checked, name))

    def job(self, latent_dim: int, seed: int) -> DebiasConfig:
        """The settings of the debias job with the same data."""
        return DebiasConfig(
            data=self.data, data_root=self.data_root, digits=self.digits, proportions=self.proportions,
            fraction=self.fraction, latent_dim=latent_dim, methods=("snis",), seed=seed, quick=self.quick,
            progress=False,
        )  # fmt: skip

    @property
    def dims(self) -> tuple[int, ...]:
        return self.latent_dims or ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.reference_sizes or ()

    @property
    def schedule(self) -> Schedule:
        """How long each model is trained."""
        return Schedule.of(self.job(self.dims[0], 0))

    @property
    def num_generated(self) -> int:
        """Images generated to judge a model by; with fewer, chance alone moves the total variation distance."""
        if self.quick:
            return 1_000
        return 10_000 if self.data == "digits" else 20_000

    @property
    def cells(self) -> list[Cell]:
        """The grid, seed by seed: what an interrupted study has finished is a smaller study."""
        return [
            Cell(method, dim, seed, size)
            for seed in self.seeds or ()
            for dim in self.dims
            for method in self.methods
            for size in ((0,) if method in _WITHOUT_REFERENCE else self.sizes)
        ]

    @property
    def fingerprint(self) -> str:
        """The same for two studies whose cells may stand in one table."""
        grid = ("reference_sizes", "latent_dims", "seeds", "methods", "data_root", "progress")
        settings: dict[str, Any] = {k: v for k, v in asdict(self).items() if k not in grid}
        text = json.dumps([_VERSION, settings, asdict(self.schedule)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
