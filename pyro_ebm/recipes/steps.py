"""The steps of the debias job: each a function of what earlier ones made, without state and without files."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ebm import datasets
from pyro_ebm.chain_statistics import ess_bulk
from pyro_ebm.datasets.splits import BiasedSplit, biased_split
from pyro_ebm.deadline import interruptions_pass
from pyro_ebm.diagnostics.balance import ClassBalance, LabelClassifier, class_balance
from pyro_ebm.energies import Energy, MLPEnergy
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import LogLikelihood, log_likelihood
from pyro_ebm.inference.sample import sample
from pyro_ebm.models.vae import VAE
from pyro_ebm.objectives.fit_tilt import fit_tilt
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.debias_config import DebiasConfig, Schedule
from pyro_ebm.tilts.normalizer import Normalizer
from pyro_ebm.tilts.tilt import TiltedModel, tilt
from pyro_ebm.training.checkpoints import Checkpoint
from pyro_ebm.training.fit import FitResult

__all__ = [
    "MAX_CHANCE",
    "decoded_labels",
    "draw",
    "draw_labeled",
    "fit_energy",
    "interruptions_end_the_job",
    "label_balance",
    "load_split",
    "new_energy",
    "prior_labels",
    "prior_model",
    "test_likelihood",
    "train_tilt",
]

# What chance may add to the total variation distance of a method's draws.
MAX_CHANCE = 0.01
# Labels are worth more or less than the last look promised; and no method gets out of hand.
_MARGIN, _MOST = 1.25, 4.0
# A batch of chains makes so many draws for each one of Pyro's kernels, in a fraction of the time.
_DRAWS_PER_STOCK_DRAW = 5
# Importance sampling weighs this many proposals for each draw a chain makes: they cost next to nothing.
_PROPOSALS_PER_DRAW = 10
# Few reference images need more posterior draws each, or the tilt overfits the draws.
_POSTERIOR_POINTS = 8_000
_TILT_BATCH = 128


def load_split(config: DebiasConfig) -> BiasedSplit:
    """The images asked for, split."""
    if config.data == "digits":
        found = datasets.digits(config.digits)
    else:
        loader = getattr(datasets, config.data)
        found = loader(config.data_root or "data", classes=config.digits)
    shares = dict(zip(config.digits, config.proportions, strict=True))
    return biased_split(found.images, found.labels, shares, config.fraction, config.seed)


def prior_model(vae: VAE) -> Any:
    """The prior of one z as a model of its own: what the tilted prior is sampled from."""

    def model() -> Tensor:
        return pyro.sample("z", vae.prior)

    return model


@contextmanager
def interruptions_end_the_job() -> Iterator[None]:
    """No warnings that an interruption left something usable: a job does not go on with what is half done."""
    with warnings.catch_warnings(), interruptions_pass():
        warnings.filterwarnings("ignore", message=r"(\w+: |training was )interrupted")
        yield


# ------------------------------------------------------------------------------------- the tilt


def new_energy(latent_dim: int, *, seed: int) -> MLPEnergy:
    """An energy of z; the seed decides its initial weights."""
    with forked_rng(seed):
        return MLPEnergy(latent_dim)


def fit_energy(
    energy: Energy, vae: VAE, reference: Tensor, schedule: Schedule, *,
    seed: int, progress: bool = True, checkpoint: Path | None = None,
) -> FitResult:  # fmt: skip
    """Maximum likelihood of the latent tilt on the reference images, encoder and decoder frozen.

    Args:
        energy: what learns.
        vae: it stands still.
        reference: (n, *event_shape), on the device of both.
        schedule: epochs, or steps where few images make few in an epoch.
        seed: of training.
        progress: show a progress bar.
        checkpoint: file that keeps the state of the run; where it is there, the run goes on from it.
    """
    # Quasi-random draws make log Z far less noisy, where there are few dimensions to fill; elsewhere many draws do.
    steps_per_epoch = math.ceil(len(reference) / _TILT_BATCH)
    normalize = Normalizer("qmc") if vae.latent_dim <= 8 else Normalizer(num_samples=4096)
    return fit_tilt(
        tilt(vae.model, {"z": energy}, normalize=normalize),
        vae.guide,
        reference,
        num_particles=max(32, _POSTERIOR_POINTS // len(reference)),
        max_steps=max(schedule.tilt_epochs, schedule.tilt_steps // steps_per_epoch) * steps_per_epoch,
        tolerance=None,  # the falling learning rate ends it: all methods get the same number of steps
        batch_size=_TILT_BATCH,
        folds=0,  # what was gained is measured on images of its own
        checkpoint=None if checkpoint is None else Checkpoint(checkpoint, resume="auto"),
        seed=seed,
        progress=progress,
    )


def train_tilt(
    vae: VAE, reference: Tensor, schedule: Schedule, *, seed: int, progress: bool = True
) -> tuple[Energy, FitResult]:
    """:func:`new_energy`, then :func:`fit_energy`."""
    energy = new_energy(vae.latent_dim, seed=seed)
    return energy, fit_energy(energy, vae, reference, schedule, seed=seed, progress=progress)


# ------------------------------------------------------------------------------------- sampling


def draw(
    config: DebiasConfig, method: str, *target: Any,
    guide: Any = None, share: float = 1.0, max_seconds: float | None = None,
) -> Draws:  # fmt: skip
    """Draws by one method.

    Args:
        config: how many, and by how many chains.
        method: of :func:`sample`.
        *target: a model and its arguments.
        guide: for starting points and proposals.
        share: of the number of draws that the settings name.
        max_seconds: budget of Pyro's kernels; that of the settings when ``None``.

    Raises:
        KeyboardInterrupt: also where the sampler would return the draws so far.
    """
    number = int((config.num_samples or 0) * share / (10 if config.quick else 1))
    total = max(number, 50 * config.num_chains)
    warmup_steps = 50 if config.quick else 200
    options: dict[str, Any] = {"progress": config.progress}
    num_chains = config.num_chains
    if method == "snis":
        total *= _PROPOSALS_PER_DRAW
    elif method in ("nuts", "hmc"):
        options |= {"warmup_steps": warmup_steps, "jit_compile": True}
        options["max_seconds"] = config.max_seconds if max_seconds is None else max_seconds
    else:  # one batch, in which many chains cost little more than one
        num_chains = 8 if method == "smc" else 64
        total *= _DRAWS_PER_STOCK_DRAW
        options |= {} if method == "smc" else {"warmup_steps": warmup_steps}
    with interruptions_end_the_job():
        draws = sample(
            *target, method=method, guide=guide, num_samples=max(total // num_chains, 50), num_chains=num_chains,
            seed=config.seed, **options,
        )  # fmt: skip
    if draws.notes.get("interrupted"):
        raise KeyboardInterrupt
    return draws


def draw_labeled(
    config: DebiasConfig, method: str, prior: TiltedModel, vae: VAE, classifier: LabelClassifier
) -> tuple[Draws, Tensor]:
    """Draws of the tilted prior, and the labels of their images.

    Draws anew, and more, until chance adds less than ``MAX_CHANCE`` to the distance of the labels from balance, where
    that takes at most four times the draws and fits into ``config.max_seconds``.
    """
    share, began = 1.0, time.perf_counter()
    while True:
        started = time.perf_counter()
        left = config.max_seconds - (started - began)
        draws = draw(config, method, prior, share=share, max_seconds=left)
        labels = decoded_labels(vae, draws.flat("z"), classifier)
        more = _MARGIN * (label_balance(draws, labels, classifier.classes_).chance / MAX_CHANCE) ** 2
        now = time.perf_counter()
        fits = (now - started) * more <= config.max_seconds - (now - began) and share * more <= _MOST
        if config.quick or more <= _MARGIN or not fits:
            return draws, labels
        share *= more


# -------------------------------------------------------------------------------------- judging


@torch.no_grad()
def decoded_labels(vae: VAE, z: Tensor, classifier: LabelClassifier) -> Tensor:
    """The label the classifier gives to each decoded z, (n,)."""
    z = z.to(next(vae.parameters()).device)
    return torch.cat([classifier.predict(vae.decode(part).mean) for part in z.split(2_000)])


def prior_labels(config: DebiasConfig, vae: VAE, classifier: LabelClassifier) -> Tensor:
    """Labels of decoded draws of the untilted prior."""
    with forked_rng(config.seed):
        z = vae.prior.sample((2_000 if config.quick else 20_000,))
    return decoded_labels(vae, z, classifier)


def label_balance(draws: Draws, labels: Tensor, classes: Sequence[int]) -> ClassBalance:
    """Class balance of the labels of draws, with the number of independent labels that they are worth."""
    if draws.log_weights is not None:
        return class_balance(labels, classes, weights=draws.weights)
    return class_balance(labels, classes, ess=_label_ess(labels, classes, draws.num_chains))


def _label_ess(labels: Tensor, classes: Sequence[int], num_chains: int) -> float:
    """Effective number of independent labels in chains of labels: the worst over the classes."""
    chains = labels.reshape(num_chains, -1)
    indicators = torch.stack([(chains == label).double() for label in classes], -1)
    ess = torch.as_tensor(ess_bulk(indicators))
    usable = ess[ess.isfinite()]
    return float(usable.min().clamp(1.0, labels.numel())) if len(usable) else 1.0


def test_likelihood(config: DebiasConfig, model: Any, vae: VAE, images: Tensor) -> LogLikelihood:
    """Log likelihood of the first test images."""
    num_images, num_samples = (50, 100) if config.quick else (500, 2000)
    images = images[:num_images].to(next(vae.parameters()).device)
    return log_likelihood(model, vae.guide, images, num_samples=num_samples, seed=config.seed)
