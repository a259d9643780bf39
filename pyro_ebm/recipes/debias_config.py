"""Settings of the debias job: what it checks before any work, and how long it trains for which data."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number

__all__ = ["DATASETS", "METHODS", "NUM_SAMPLES", "QUICK", "DebiasConfig", "Schedule"]

# Those of sample() but "auto": a comparison names what it compares. Not imported, so that --help is quick.
METHODS = ("snis", "chees", "nuts", "hmc", "mala", "ula", "smc")
DATASETS = ("digits", "mnist", "fashion_mnist", "kmnist")
# Of digits, and of the larger sets: a total variation distance near zero takes some hundred effective draws per class
# to be seen.
NUM_SAMPLES = (4_000, 12_000)
QUICK = "A quick run: it shows that everything works, and its numbers mean nothing."
_DEFAULT_PROPORTIONS = (0.12, 0.33, 0.28, 0.20, 0.07)


@checked
@dataclass(frozen=True)
class DebiasConfig:
    """Settings of :func:`debias`.

    Args:
        data: one of ``"digits"`` (bundled), ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``.
        data_root: folder with the torchvision data; downloaded there when missing.
        digits: classes to use.
        proportions: share of each of them in the biased set; sums to one.
        fraction: largest share of any class that the biased set may take, in (0, 1).
        latent_dim: dimensions of z.
        methods: samplers to run, those of :func:`sample` except ``"auto"``.
        num_samples: draws of the tilted prior per MCMC method, over all chains (``None``: 4,000 for digits,
            else 12,000); importance sampling weighs ten times as many. Up to four times the number is drawn where
            so many are needed for labels by which the class balance can be told, and time allows.
        num_chains: chains of ``"nuts"`` and ``"hmc"``; the others run 64 as one batch.
        max_seconds: what a sampler may spend on one target; ``"nuts"`` and ``"hmc"`` stop there with the draws so far.
        seed: of everything.
        baselines: also train a VAE on the reference set alone, and fine-tune the biased one on it.
        device: where to train and to sample: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ... Results are on the CPU.
        quick: short training and few draws, to see that everything runs: the numbers mean nothing.
        progress: show progress bars.
    """

    data: str = "digits"
    data_root: str | Path | None = None
    digits: tuple[int, ...] = (0, 1, 2, 3, 4)
    proportions: tuple[float, ...] = _DEFAULT_PROPORTIONS
    fraction: float = 0.6
    latent_dim: int = 2
    methods: tuple[str, ...] = ("snis", "chees", "nuts", "hmc")
    num_samples: int | None = None
    num_chains: int = 4
    max_seconds: float = 120.0
    seed: int = 0
    baselines: bool = False
    device: str = "cpu"
    quick: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        self._normalize()
        if self.data not in DATASETS:
            raise ValueError(f"data must be one of {DATASETS}, got {self.data!r}")
        if len(set(self.digits)) != len(self.digits) or len(self.digits) < 2:
            raise ValueError(f"digits must be at least two different classes, got {self.digits}")
        if len(self.proportions) != len(self.digits):
            raise ValueError(
                f"proportions must have one entry per class in digits {self.digits}, got {self.proportions}"
            )
        total = math.fsum(self.proportions)
        if not abs(total - 1) <= 1e-6 or min(self.proportions) < 0:
            raise ValueError(
                f"proportions must sum to 1 and not be negative, got {self.proportions} (sum {total:.6g})"
            )
        if not self.methods or len({*self.methods} & {*METHODS}) < len(self.methods):
            raise ValueError(f"methods must be among {METHODS}, each once, got {self.methods}")
        for name in ("latent_dim", "num_chains"):
            whole_number(name, getattr(self, name))
        if (self.num_samples or 0) < 4 * self.num_chains:
            raise ValueError(f"num_samples must be at least 4 per chain, got {self.num_samples}")
        if not 0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds must be a positive number, got {self.max_seconds}")
        from pyro_ebm.devices import checked_device  # loads torch, which --help does without

        checked_device(self.device)

    def command(self, out: str | Path | None = None) -> str:
        """The shell command that runs this job; options that have their default are left out."""
        usual = DebiasConfig() if self.data == DebiasConfig.data else DebiasConfig(data=self.data)
        words = ["pyro-ebm", "debias"]
        if self.data != DebiasConfig.data:
            words += ["--data", self.data]
        for name in (each.name for each in fields(self) if each.name != "progress"):
            value = getattr(self, name)
            if value == getattr(usual, name):
                continue
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return shlex.join(words if out is None else [*words, "--out", os.fspath(out)])

    def _normalize(self) -> None:
        """Ranges, arrays and their numbers become Python's own, which summary.json can hold."""
        plain: dict[str, Any] = {
            name: index(getattr(self, name)) for name in ("latent_dim", "num_chains", "seed")
        }
        default = NUM_SAMPLES[self.data != "digits"]
        plain["num_samples"] = default if self.num_samples is None else index(self.num_samples)
        plain["max_seconds"], plain["device"] = float(self.max_seconds), str(self.device)
        plain["digits"] = tuple(index(digit) for digit in self.digits)
        plain["proportions"] = tuple(float(share) for share in self.proportions)
        plain["methods"] = self.methods if isinstance(self.methods, str) else tuple(self.methods)
        for name, value in plain.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Schedule:
    """How long and how wide to train for one data set."""

    hidden: tuple[int, ...]
    vae_epochs: int
    vae_batch: int
    tilt_epochs: int
    patience: int
    tilt_steps: int = 0  # at least so many, where a small reference set makes few in an epoch

    @classmethod
    def of(cls, config: DebiasConfig) -> Schedule:
        if config.data == "digits":
            full = cls((256, 128), 400, 64, 150, 40)
        else:
            full = cls((1024, 512, 256), 30, 128, 100, 10, 1000)
        if not config.quick:
            return full
        vae_epochs, tilt_epochs = max(full.vae_epochs // 10, 2), max(full.tilt_epochs // 10, 2)
        return cls((64, 32), vae_epochs, full.vae_batch, tilt_epochs, 10, full.tilt_steps // 10)
