r"""``python -m benchmarks.log_normalizers``: estimates of log Z against exact answers, over many seeds.

A standard normal tilted by a linear or a quadratic energy, whose log Z is known. The energy is as strong in every
dimension: so many nats (KL) from the tilted distribution to its base. Each method takes its default number of draws.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from scipy.optimize import brentq

from benchmarks.learning import Row, Rows
from benchmarks.learning_report import write_report
from pyro_ebm import InferenceWarning, LinearEnergy, QuadraticEnergy, log_normalizer
from pyro_ebm.energies import gaussian_log_normalizer
from pyro_ebm.estimates import BoundedEstimate
from pyro_ebm.inference.annealing.log_normalizer import METHODS

ENERGIES = ("linear", "quadratic")


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on."""

    seeds: int = 30
    dims: tuple[int, ...] = (2, 8, 32, 64)
    kl: float = 2.0
    far_dim: int = 8
    far_kl: float = 5.0
    num_samples: int | None = None


def main(arguments: list[str] | None = None) -> None:
    options_parser = argparse.ArgumentParser(prog="python -m benchmarks.log_normalizers", description=__doc__)
    options_parser.add_argument("--seeds", type=int, default=Settings.seeds, help="calls of each method on each target")
    options_parser.add_argument("--again", action="store_true", help="run also what is stored with the same settings")
    options_parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="run these only")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(Rows("log_normalizers", again=options.again), Settings(seeds=options.seeds), options.methods)
    write_report()


def run(rows: Rows, settings: Settings, methods: Sequence[str] = METHODS) -> None:
    """The methods on every target; every row is kept as soon as it is done."""
    for energy, dim, kl in targets(settings):
        for method in methods:
            key = {
                "energy": energy, "dim": dim, "kl": kl, "method": method, "seeds": settings.seeds,
                "num_samples": settings.num_samples, "device": "cpu",
            }  # fmt: skip
            make = functools.partial(_row, tilt_of(energy, dim, kl), dim, method, settings)
            name = f"{energy} {dim}-D {kl:g} {method}"
            row = rows.add(name, key, make)
            print(f"{name:30} rms {row['rms']:.4f}, z^2 {row['mean_z2']:.2f}, {row['seconds']:.2f} s", flush=True)


def targets(settings: Settings) -> Iterator[tuple[str, int, float]]:
    """Kind of energy, dimensions, and nats from the base."""
    for dim in settings.dims:
        for energy in ENERGIES:
            yield energy, dim, settings.kl
    for energy in ENERGIES:
        yield energy, settings.far_dim, settings.far_kl


def tilt_of(energy: str, dim: int, kl: float) -> LinearEnergy | QuadraticEnergy:
    """The energy that puts a standard normal ``kl`` nats away: N(a, I) by |a|^2 / 2, N(0, I / s) by log s + 1/s - 1."""
    if energy == "linear":
        return LinearEnergy(torch.full((dim,), math.sqrt(2 * kl / dim)))
    each = 2 * kl / dim
    s = brentq(lambda s: math.log(s) + 1 / s - 1 - each, 1.0, math.exp(1 + each))
    return QuadraticEnergy(s - 1)


def _row(energy: LinearEnergy | QuadraticEnergy, dim: int, method: str, settings: Settings) -> Row:
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    exact = float(gaussian_log_normalizer(energy, torch.zeros(dim), torch.ones(dim)).detach())
    found, warned = [], []
    began = time.process_time()
    for seed in range(settings.seeds):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", InferenceWarning)
            found.append(log_normalizer(base, energy, method=method, num_samples=settings.num_samples, seed=seed))
        warned.append(any(issubclass(each.category, InferenceWarning) for each in given))
    seconds = (time.process_time() - began) / settings.seeds
    error = torch.tensor([float(each.value) for each in found], dtype=torch.float64) - exact
    se = torch.tensor([float(each.se) for each in found], dtype=torch.float64)
    row = {**summary(error, se, torch.tensor(warned)), "seconds": seconds}
    brackets = [bool(each.lower < exact < each.upper) for each in found if isinstance(each, BoundedEstimate)]
    return {**row, "held": sum(brackets)} if brackets else row


def summary(error: torch.Tensor, se: torch.Tensor, warned: torch.Tensor) -> Row:
    """How large errors are, how large they are said to be, and how often they are larger than that."""
    z = (error / se).abs()
    return {
        "rms": float(error.square().mean().sqrt()),
        "mean_se": float(se.mean()),
        "mean_z2": float(z.square().mean()),
        "beyond_two": int((z > 2).sum()),
        "beyond_four": int((z > 4).sum()),
        "beyond_four_silently": int(((z > 4) & ~warned).sum()),
        "largest_z": float(z.max()),
        "warned": int(warned.sum()),
    }


if __name__ == "__main__":
    main()
