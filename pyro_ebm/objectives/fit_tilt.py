"""fit_tilt(): the tilt of a frozen model by maximum likelihood on reference data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.arrays import Array, as_tensor
from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
from pyro_ebm.inference.importance import posterior_draws
from pyro_ebm.modules import frozen
from pyro_ebm.objectives.likelihood import TiltELBO, TiltLikelihood, one_tilt
from pyro_ebm.objectives.running_control import RunningControl
from pyro_ebm.structure import prototype_trace
from pyro_ebm.tilts.normalizer import is_exchangeable
from pyro_ebm.tilts.tilt import TiltedModel
from pyro_ebm.training.checkpoints import Checkpoint
from pyro_ebm.training.fit import FitResult, fit

__all__ = ["fit_tilt"]

BOUNDS = ("auto", "exact", "elbo")
_MAX_DIMS, _JUDGED, _LEAST_SHARE = 4, 200, 0.2


def fit_tilt(
    model: TiltedModel,
    guide: Callable[..., Any],
    x: Array,
    *,
    bound: str = "auto",
    num_particles: int = 32,
    control: float | None = None,
    learning_rate: float = 5e-3,
    epochs: int = 100,
    batch_size: int = 128,
    validation: float | None = 0.1,
    patience: int | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Fit the energy of a tilted model to reference data, everything else frozen.

    Maximizes one of two measures of the same thing, with Adam and a learning rate that falls to zero along a cosine:

    - ``"exact"``: ``sum_i log E_{p(z|x_i)}[exp(-E(z))] - n log Z``, the log likelihood of the tilted model less that
      of its base. Posterior draws of the base are made once, from the guide, and weighted by
      ``p(x, z) / q(z | x)``; after that neither encoder nor decoder runs.
    - ``"elbo"``: ``sum_i E_{q(z|x_i)}[-E(z)] - n log Z``, a lower bound of the former but for a constant, with new
      draws of the guide at every step (:class:`TiltELBO`).

    The first is sharper in few dimensions. In many, a network overfits the draws that were made once, and log Z,
    whose own draws never come near them, does not notice. New draws at every step prevent that: ``"auto"`` takes the
    ELBO beyond four dimensions, and wherever the weights rest on few draws.

    Args:
        model: what ``tilt(model, {"site": energy})`` returns: one tilted site, without random parents, of
            the same distribution for every datum, inside one plate (dim -1) along the data.
        guide: draws the latent sites given ``x``.
        x: reference data (n, *event).
        bound: ``"exact"``, ``"elbo"`` or ``"auto"``: exact where the site has at most four dimensions and the weights
            of the ``num_particles`` draws of a datum are worth a fifth of these, in the median over (up to 200) data.
        num_particles: posterior draws per datum, for ``"exact"``.
        control: decay of a running average of Z, for a model whose ``normalize`` has but tens of draws; see
            :class:`RunningControl`.
        learning_rate: of Adam, at the start.
        epochs: passes over the reference data.
        batch_size: data per step.
        validation: share held apart; the weights of the best epoch on it are kept. ``None``: use all data.
        patience: stop after so many epochs without a better loss; ``None``: never.
        checkpoint: file that keeps the state of the run, or a :class:`Checkpoint`, as in :func:`fit`. A run goes on
            with the same ``epochs``: they set how fast the learning rate falls.
        seed: of everything; ``None``: drawn from the global generator.
        progress: show a progress bar.

    Returns:
        As :func:`fit`; the loss is minus the log likelihood (or ELBO) gained per datum. ``log_z`` is log Z of the tilt
        with its standard error, from 16,384 draws of the base: ``tilt(model, energies, normalize=float(log_z.value))``
        and ``log_likelihood(..., log_z=log_z)`` take it. With an :class:`InferenceWarning` that it is not reliable,
        neither is the loss: the reference data then lie where the base has next to no mass.

    Raises:
        TypeError: a model that is not tilted.
        ValueError: several tilted sites, or one that fit_tilt cannot treat (use ``fit`` with an ELBO then); an
            unknown ``bound``.
    """
    site, _ = one_tilt(model)
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {BOUNDS}, got {bound!r}")
    kept = Checkpoint.of(checkpoint)
    saved = kept.saved() if seed is None and kept is not None else None
    if saved:
        seed = saved["seed"]  # the posterior draws must be the same again
    seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    x = as_tensor(x)
    node = prototype_trace(model.base_model, (x,), {}).nodes[site]
    base = node["fn"]
    if node["is_observed"]:
        raise ValueError(
            f"fit_tilt needs a latent site, but {site!r} is observed; use fit(model, guide, x, train=energy)"
        )
    if model.structure(x).ancestors[site] or not is_exchangeable(base):
        raise ValueError(
            f"fit_tilt needs a site whose distribution is the same for every datum, but {site!r} has random parents "
            f"or depends on inputs; use fit(model, guide, x, objective=pyro.infer.Trace_ELBO(), train=energy)"
        )
    draw = functools.partial(posterior_draws, model.base_model, guide, num_samples=num_particles, seed=seed)
    with frozen(model, guide):
        if bound == "auto":
            small = base.event_shape.numel() <= _MAX_DIMS
            bound = "exact" if small and _weights_serve(draw(x[:: -(-len(x) // _JUDGED)])[1]) else "elbo"
        objective: Any = TiltELBO() if bound == "elbo" else TiltLikelihood(base)
        objective = objective if control is None else RunningControl(objective, decay=control)
        data = x if bound == "elbo" else _particles(draw(x), site)
    result = fit(
        model,
        guide,
        data,
        objective=objective,
        train=model.energies[site],
        optimizer=functools.partial(torch.optim.Adam, lr=learning_rate),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
        batch_size=min(batch_size, len(x)),
        validation=validation,
        patience=patience,
        checkpoint=kept,
        seed=seed,
        progress=progress,
    )
    # Where log Z misses most of the tilted mass, so did the loss: it may have fallen without end, and this warns.
    return dataclasses.replace(result, log_z=log_normalizer(base, model.energies[site], seed=seed))


def _weights_serve(log_weights: Tensor) -> bool:
    """Whether posterior draws (n, num_particles) are worth a fifth of their number, for the median datum."""
    return float(importance_ess(log_weights).median()) >= _LEAST_SHARE * log_weights.shape[1]


def _particles(drawn: tuple[dict[str, Tensor], Tensor], site: str) -> tuple[Tensor, Tensor]:
    values, log_weights = drawn
    return values[site], log_weights
