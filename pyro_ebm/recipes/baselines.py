"""What one could do with biased images and a small balanced set instead of a tilt."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pyro_ebm.diagnostics.density_ratio import DensityRatio, density_ratio
from pyro_ebm.models.vae import VAE
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.debias_config import Schedule
from pyro_ebm.training.checkpoints import Checkpoint
from pyro_ebm.training.fit import FitResult, fit
from pyro_ebm.training.sources import Weighted

__all__ = ["fine_tune", "fit_vae", "new_vae", "train_vae", "train_weighted"]

_LEARNING_RATE = 1e-3
# Few images need a larger share to stop by: a tenth of 50 is too few to see overfitting in.
_FEW, _VALIDATION, _VALIDATION_OF_FEW = 500, 0.1, 0.2


def new_vae(images: Tensor, latent_dim: int, schedule: Schedule, *, seed: int) -> VAE:
    """A VAE for images (n, *event_shape) with the widths of the schedule; the seed decides its initial weights."""
    with forked_rng(seed):
        return VAE(images.shape[1:], latent_dim, hidden=schedule.hidden)


def train_vae(
    images: Tensor, latent_dim: int, schedule: Schedule, *,
    weights: Tensor | None = None, budget: int | None = None, seed: int, progress: bool = True,
) -> tuple[VAE, FitResult]:  # fmt: skip
    """Train a new VAE: :func:`new_vae`, then :func:`fit_vae`.

    Returns:
        The VAE and its training curves.
    """
    vae = new_vae(images, latent_dim, schedule, seed=seed)
    return vae, fit_vae(vae, images, schedule, weights=weights, budget=budget, seed=seed, progress=progress)


def fine_tune(
    vae: VAE, images: Tensor, schedule: Schedule, *, budget: int | None = None, seed: int, progress: bool = True
) -> tuple[VAE, FitResult]:
    """Train a copy of a VAE on; arguments as in :func:`fit_vae`."""
    tuned = copy.deepcopy(vae)
    return tuned, fit_vae(tuned, images, schedule, budget=budget, seed=seed, progress=progress)


def train_weighted(
    biased: Tensor, reference: Tensor, latent_dim: int, schedule: Schedule, *, seed: int, progress: bool = True
) -> tuple[VAE, FitResult, DensityRatio]:
    """Train a VAE on both sets, the biased images weighted by an estimated density ratio.

    Reference images have weight one; biased ones ``p_reference / p_biased``, with mean one. The other arguments
    are those of :func:`fit_vae`.

    Returns:
        The VAE, its training curves, and the density ratio at the biased images.

    Reference:
        Choi, Grover, Singh, Shu and Ermon (2020), "Fair Generative Modeling via Weak Supervision".
    """
    ratio = density_ratio(reference, biased, seed=seed)
    weights = torch.cat([ratio.weights(), torch.ones(len(reference))])
    images = torch.cat([biased, reference])
    vae, result = train_vae(images, latent_dim, schedule, weights=weights, seed=seed, progress=progress)
    return vae, result, ratio


def fit_vae(
    vae: VAE, images: Tensor, schedule: Schedule, *,
    weights: Tensor | None = None, budget: int | None = None, seed: int, progress: bool = True,
    checkpoint: Path | None = None,
) -> FitResult:  # fmt: skip
    """Train a VAE as it is.

    Args:
        vae: what learns.
        images: (n, *event_shape).
        schedule: widths, epochs, batch size and patience.
        weights: (n,) of the images; equal when ``None``.
        budget: give as many gradient steps as so many images would get, where that is more, and hold more of a
            small set apart to stop by; ``None``: the epochs of the schedule.
        seed: of training.
        progress: show a progress bar.
        checkpoint: file that keeps the state of the run; where it is there, the run goes on from it.

    Returns:
        Its training curves.
    """
    share, stretch = _VALIDATION, 1
    if budget is not None:
        share = _VALIDATION_OF_FEW if len(images) < _FEW else _VALIDATION
        wanted = _steps(budget, _VALIDATION, schedule.vae_batch)
        stretch = max(1, round(wanted / _steps(len(images), share, schedule.vae_batch)))
    return fit(
        vae.model,
        vae.guide,
        images if weights is None else Weighted(images, weights),
        objective=TraceMeanField_ELBO(),
        optimizer=functools.partial(torch.optim.Adam, lr=_LEARNING_RATE),
        epochs=schedule.vae_epochs * stretch,
        batch_size=schedule.vae_batch,
        validation=share,
        patience=schedule.patience * stretch,
        checkpoint=None if checkpoint is None else Checkpoint(checkpoint, resume="auto"),
        seed=seed,
        progress=progress,
    )


def _steps(num_images: int, validation: float, batch_size: int) -> int:
    """Gradient steps in an epoch."""
    return max(1, math.ceil(num_images * (1.0 - validation) / batch_size))
