r"""``python -m benchmarks.density``: a prior learned by the sampling bound against the Gaussian prior, static MNIST.

The VAE of Lawson, Tucker, Dai and Ranganath (2019), "Energy-Inspired Models": 50 latent dimensions, networks
300-300, energy 100-100, K = 1,024, Adam 3e-4, batch 128. Both models get the same number of steps.

Static: each image is drawn once from its gray values, by a fixed seed. The first 50,000 training images are
trained on, as in the usual split.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from benchmarks.learning import Row, Rows, parser, seeded, train
from benchmarks.learning_report import write_report
from pyro_ebm import VAE, MLPEnergy, SamplingBound, log_likelihood, mnist, snis_log_likelihood, tilt
from pyro_ebm.datasets import ImageSet

MODELS = ("gaussian", "snis")
_DRAWS_FOR_LOG_Z = 2**18
_AFTER_TRAINING = ("epochs", "num_test", "num_samples")


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on."""

    epochs: int = 100
    latent_dim: int = 50
    hidden: tuple[int, ...] = (300, 300)
    energy_hidden: tuple[int, ...] = (100, 100)
    num_proposals: int = 1024
    lr: float = 3e-4
    batch_size: int = 128
    num_train: int = 50_000
    num_test: int = 1_000
    num_samples: int = 500
    seed: int = 0


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser("density", __doc__.splitlines()[0], epochs=Settings.epochs)
    options_parser.add_argument("--num-test", type=int, default=Settings.num_test, help="test images")
    options_parser.add_argument("--num-samples", type=int, default=Settings.num_samples, help="draws for each of them")
    options = options_parser.parse_args(arguments)
    settings = Settings(
        epochs=options.epochs, num_test=options.num_test, num_samples=options.num_samples, seed=options.seed
    )
    sets = [mnist(options.data, train=which) for which in (True, False)]
    run(Rows("density", again=options.again), settings, *sets, device=options.device)
    write_report()


def run(rows: Rows, settings: Settings, train_set: ImageSet, test_set: ImageSet, *, device: str = "cpu") -> None:
    """Train and measure both models; every row is kept as soon as it is done."""
    x = static(train_set.images[: settings.num_train], seed=1)
    test = static(test_set.images[: settings.num_test], seed=2)
    for name in MODELS:
        key = {**asdict(settings), "device": device}
        # More epochs go on from where fewer ended.
        checkpoint = rows.checkpoint(name, {k: v for k, v in key.items() if k not in _AFTER_TRAINING})
        make = functools.partial(_row, name, settings, x, test, device, checkpoint)
        row = rows.add(name, key, make)
        print(f"{name:10} log p(x) >= {row['mean']:.2f} +- {row['se']:.2f}, {row['train_seconds']:.0f} s", flush=True)


def static(images: Tensor, *, seed: int) -> Tensor:
    """Pixels drawn once from their gray values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(images, generator=generator)


def _row(name: str, settings: Settings, x: Tensor, test: Tensor, device: str, checkpoint: Path) -> Row:
    vae = seeded(settings.seed, lambda: VAE(x.shape[1:], settings.latent_dim, hidden=settings.hidden))
    budget = {
        "lr": settings.lr, "decay": False, "epochs": settings.epochs, "batch_size": settings.batch_size,
        "seed": settings.seed, "device": device, "checkpoint": checkpoint,
    }  # fmt: skip
    draws = {"num_samples": settings.num_samples, "seed": settings.seed}
    if name == "gaussian":
        trained = train(vae.model, vae.guide, x, [vae], objective=Trace_ELBO(), **budget)
        found = log_likelihood(vae.model, vae.guide, test.to(device), **draws)
        return {**trained, **summary(found.value)}
    energy = seeded(settings.seed + 1, lambda: MLPEnergy(settings.latent_dim, hidden=settings.energy_hidden))
    tilted = tilt(vae.model, {"z": energy})
    bound = SamplingBound(num_proposals=settings.num_proposals)
    trained = train(tilted, vae.guide, x, [vae, energy], objective=bound, **budget)
    test = test.to(device)
    found = snis_log_likelihood(tilted, vae.guide, test, num_proposals=settings.num_proposals, **draws)
    log_z = tilted.log_normalizer(test[:1], num_samples=_DRAWS_FOR_LOG_Z, seed=settings.seed)
    limit = log_likelihood(tilted, vae.guide, test, log_z=log_z, **draws)
    extras = {"tilted": float(limit.value.mean()), "log_z": float(log_z.value), "log_z_se": float(log_z.se)}
    return {**trained, **summary(found.value), **extras}


def summary(bound: Tensor) -> Row:
    """The mean over test images with its standard error, and each image's bound, for paired differences."""
    values = bound.double().cpu()
    return {
        "mean": float(values.mean()),
        "se": float(values.std() / math.sqrt(len(values))),
        "bounds": [round(value, 3) for value in values.tolist()],
    }


if __name__ == "__main__":
    main()
