r"""``python -m benchmarks.outliers``: one digit is left out of the training images and is to be found in the test set.

The protocol of Zenati et al. (2018) and of Pang et al. (2020): train on all digits but one, score the whole test set,
report the area under precision-recall (average precision) with the left-out digit as the positive class. A plain
VAE, and the same networks with an energy on the latent, trained jointly by the sampling bound.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmarks.learning import Row, Rows, parser, seeded, train
from benchmarks.learning_report import DIGITS, SCORES, write_report
from pyro_ebm import VAE, Energy, MLPEnergy, SamplingBound, mnist, tilt
from pyro_ebm.datasets import ImageSet
from pyro_ebm.tilts.normalizer import sampled_log_normalizer

MODELS = ("vae", "tilted")
_DRAWS_FOR_LOG_Z = 2**17


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on."""

    epochs: int = 8
    latent_dim: int = 24
    hidden: tuple[int, ...] = (400, 200)
    energy_hidden: tuple[int, ...] = (128, 128)
    num_proposals: int = 2048
    lr: float = 1e-3
    batch_size: int = 256
    num_samples: int = 5
    mode_steps: int = 10
    num_bootstrap: int = 30
    seed: int = 0


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser("outliers", __doc__.splitlines()[0], epochs=Settings.epochs)
    options_parser.add_argument("--digits", type=int, nargs="+", choices=range(10), default=list(DIGITS))
    options_parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = options_parser.parse_args(arguments)
    sets = [mnist(options.data, train=which) for which in (True, False)]
    settings = Settings(epochs=options.epochs, seed=options.seed)
    rows = Rows("outliers", again=options.again)
    for digit in options.digits:
        run(rows, settings, digit, *sets, models=options.models, device=options.device)
    write_report()


def run(
    rows: Rows, settings: Settings, digit: int, train_set: ImageSet, test_set: ImageSet, *,
    models: list[str] | tuple[str, ...] = MODELS, device: str = "cpu",
) -> None:  # fmt: skip
    """One digit left out: a row for each model, kept as soon as it is done."""
    x = train_set.images[train_set.labels != digit]
    outlier = (test_set.labels == digit).numpy()
    for name in models:
        key, label = {**asdict(settings), "device": device}, f"{digit} {name}"
        checkpoint = rows.checkpoint(label, key)
        make = functools.partial(_row, name, settings, x, test_set.images, outlier, device, checkpoint)
        row = rows.add(label, key, make)
        shown = ", ".join(f"{score} {value:.3f}" for score, value in row["auprc"].items())
        print(f"without {digit}, {name}: {shown}; {row['train_seconds']:.0f} s", flush=True)


def _row(
    name: str, settings: Settings, x: Tensor, test: Tensor, outlier: np.ndarray, device: str, checkpoint: Path
) -> Row:
    vae = seeded(settings.seed, lambda: VAE(x.shape[1:], settings.latent_dim, hidden=settings.hidden))
    energy = seeded(settings.seed + 1, lambda: MLPEnergy(settings.latent_dim, hidden=settings.energy_hidden))
    budget = {
        "lr": settings.lr, "decay": True, "epochs": settings.epochs, "batch_size": settings.batch_size,
        "seed": settings.seed, "device": device, "checkpoint": checkpoint,
    }  # fmt: skip
    if name == "vae":
        trained = train(vae.model, vae.guide, x, [vae], objective=Trace_ELBO(), **budget)
        energy = None
    else:
        bound = SamplingBound(num_proposals=settings.num_proposals)
        trained = train(tilt(vae.model, {"z": energy}), vae.guide, x, [vae, energy], objective=bound, **budget)
    found = scores(
        vae, energy, test.to(device), num_samples=settings.num_samples, mode_steps=settings.mode_steps,
        seed=settings.seed,
    )  # fmt: skip
    return {**trained, **precision(found, outlier, repeats=settings.num_bootstrap, seed=settings.seed)}


def scores(
    vae: VAE, energy: Energy | None, x: Tensor, *, num_samples: int, mode_steps: int, seed: int, batch_size: int = 500
) -> dict[str, Tensor]:
    """Every score of ``SCORES`` for each image, (n,); those of an energy only where there is one."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        log_z = 0.0 if energy is None else float(_log_z(vae, energy, seed))
        parts = [_scores(vae, energy, log_z, part, num_samples, mode_steps) for part in x.split(batch_size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _log_z(vae: VAE, energy: Energy, seed: int) -> Tensor:
    # A stream of its own: the draws of the posterior are the same with and without a tilt.
    return sampled_log_normalizer(vae.prior, energy, num_samples=_DRAWS_FOR_LOG_Z, seed=seed).value


def _scores(
    vae: VAE, energy: Energy | None, log_z: float, x: Tensor, num_samples: int, mode_steps: int
) -> dict[str, Tensor]:
    def tilt_of(z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[:-1]) if energy is None else energy(z)

    def joint(z: Tensor) -> Tensor:
        return vae.decode(z).log_prob(x) + vae.prior.log_prob(z) - tilt_of(z)

    with torch.no_grad():
        posterior = vae.encode(x)
        z = posterior.sample((num_samples,))
        law = vae.decode(z)
        reconstruction, energies = -law.log_prob(x), tilt_of(z)
        rate = posterior.log_prob(z) - vae.prior.log_prob(z) + energies + log_z
        log_weights = -reconstruction - rate
        excess = (reconstruction - law.entropy()).mean(0)
        found = {
            "log_p": math.log(num_samples) - log_weights.logsumexp(0),
            "elbo": -log_weights.mean(0),
            "joint_mean": -joint(posterior.mean),
            "reconstruction": reconstruction.mean(0),
            "squared_error": (law.mean - x).square().flatten(2).sum(-1).mean(0),
            "rate": rate.mean(0),
            "excess": excess,
            "excess_rate": excess + rate.mean(0),
            "excess_over_ink": (excess + rate.mean(0)) / x.flatten(1).sum(-1),
        }
        if energy is not None:
            found |= {"energy": energies.mean(0), "excess_energy": excess + energies.mean(0)}
    found["joint_mode"] = -joint(_mode(joint, posterior.mean, mode_steps)).detach()
    return found


def _mode(joint: Any, start: Tensor, steps: int) -> Tensor:
    """Adam upwards from the posterior mean."""
    z = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(-joint(z).sum(), z)
        optimizer.step()
    return z.detach()


def precision(found: dict[str, Tensor], outlier: np.ndarray, *, repeats: int, seed: int) -> Row:
    """Average precision of each score, with its standard error over bootstrapped test sets."""
    rng = np.random.default_rng(seed)
    picks = [rng.integers(len(outlier), size=len(outlier)) for _ in range(repeats)]
    values = {name: found[name].double().numpy() for name in SCORES if name in found}
    return {
        "auprc": {name: float(average_precision_score(outlier, v)) for name, v in values.items()},
        "se": {
            name: float(np.std([average_precision_score(outlier[pick], v[pick]) for pick in picks], ddof=1))
            for name, v in values.items()
        },
    }


if __name__ == "__main__":
    main()
