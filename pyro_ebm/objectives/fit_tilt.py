"""fit_tilt(): the tilt of a frozen model by maximum likelihood on reference data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.checks import whole_number
from pyro_ebm.energies import Energy
from pyro_ebm.entry import entry
from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
from pyro_ebm.inference.importance import Data, posterior_draws
from pyro_ebm.modules import frozen
from pyro_ebm.objectives.cross_fit import CrossFit, HeldOut, cross_fit, parts_of
from pyro_ebm.objectives.likelihood import TiltELBO, TiltLikelihood, one_tilt
from pyro_ebm.objectives.running_control import RunningControl
from pyro_ebm.objectives.until_flat import UntilFlat
from pyro_ebm.randomness import fingerprint
from pyro_ebm.structure import prototype_trace
from pyro_ebm.tilts.normalizer import is_exchangeable
from pyro_ebm.tilts.tilt import TiltedModel
from pyro_ebm.training.callbacks import EpochEnd
from pyro_ebm.training.checkpoints import Checkpoint
from pyro_ebm.training.fit import FitResult, fit
from pyro_ebm.training.inputs import Tensors, in_memory

__all__ = ["fit_tilt"]

BOUNDS = ("auto", "exact", "elbo")
_MAX_DIMS, _JUDGED, _LEAST_SHARE = 4, 200, 0.2
_FEWEST_STEPS = 200  # before the gain is asked whether it moves
_PLEASANT = ("epochs", "flat")


@entry(gradients=True)
@checked
def fit_tilt(
    model: TiltedModel,
    guide: Callable[..., Any],
    x: Data,
    *,
    bound: str = "auto",
    num_particles: int = 32,
    control: float | None = None,
    learning_rate: float = 5e-3,
    max_steps: int = 3000,
    tolerance: float | None = 0.1,
    batch_size: int = 128,
    folds: int = 5,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Fit the energy of a tilted model to reference data, everything else frozen.

    Maximizes one of two measures of the same thing, with Adam:

    - ``"exact"``: ``sum_i log E_{p(z|x_i)}[exp(-E(z))] - n log Z``, the log likelihood of the tilted model less that
      of its base. Posterior draws of the base are made once, from the guide, and weighted by
      ``p(x, z) / q(z | x)``; after that neither encoder nor decoder runs.
    - ``"elbo"``: ``sum_i E_{q(z|x_i)}[-E(z)] - n log Z``, a lower bound of the former but for a constant, with new
      draws of the guide at every step (:class:`TiltELBO`).

    The first is sharper in few dimensions. In many, a network overfits the draws that were made once, and log Z,
    whose own draws never come near them, does not notice. New draws at every step prevent that: ``"auto"`` takes the
    ELBO beyond four dimensions, and wherever the weights rest on few draws.

    First, by cross-fitting: the energy is fitted without each of ``folds`` parts of the data in turn and measured on
    that part. That tells what it gains on data it has not seen, and how many steps are enough: where fewer than all
    were better by more than the error, the last fit, to all the data, takes as many. The learning rate is held until
    the gain stops moving by more than its error, then it falls to zero along a cosine.

    Args:
        model: what ``tilt(model, {"site": energy})`` returns: one tilted site, without random parents, of
            the same distribution for every datum, inside one plate (dim -1) along the data.
        guide: draws the latent sites given ``x``.
        x: reference data (n, *event); several in a tuple, or by the first arguments of model and guide in a dict; a
            ``Dataset`` or a ``DataLoader``, which is read once.
        bound: ``"exact"``, ``"elbo"`` or ``"auto"``: exact where the site has at most four dimensions and the weights
            of the ``num_particles`` draws of a datum are worth a fifth of these, in the median over (up to 200) data.
        num_particles: posterior draws per datum, for ``"exact"`` and for cross-fitting.
        control: decay of a running average of Z, for a model whose ``normalize`` has but tens of draws; see
            :class:`RunningControl`.
        learning_rate: of Adam, at the start.
        max_steps: steps of the optimizer at most, in whole passes over the data.
        tolerance: a gain of all the data together, in nats, that is not worth going on for. ``None``: all of
            ``max_steps``, with a learning rate that falls along one cosine from the first to the last.
        batch_size: data per step.
        folds: parts of the data that are left out in turn, at the cost of as many further fits; 0: no cross-fitting.
        checkpoint: file that keeps the state of the run, or a :class:`Checkpoint`, as in :func:`fit`. A run goes on
            with the same ``max_steps``; cross-fitting is done again.
        seed: of everything; ``None``: drawn from the global generator.
        progress: show a progress bar.

    Returns:
        As :func:`fit`; the loss is minus the log likelihood (or ELBO) gained per datum of the data seen, ``gain`` is
        what is gained on others. ``log_z`` is log Z of the tilt with its standard error, from 16,384 draws of the
        base: ``tilt(model, energies, normalize=float(log_z.value))`` and ``log_likelihood(..., log_z=log_z)`` take it.
        With an :class:`InferenceWarning` that it is not reliable, neither is the loss: the reference data then lie
        where the base has next to no mass.

    Raises:
        TypeError: a model that is not tilted; an energy that shows no parameters.
        ValueError: several tilted sites, or one that fit_tilt cannot treat (use ``fit`` with an ELBO then); an
            unknown ``bound``; a number out of its range.

    Warns:
        TrainingWarning: a gain that was still moving after ``max_steps``; one that is none on data not seen.
    """
    site, _ = one_tilt(model)
    if control is not None and not 0 <= control < 1:
        raise ValueError(f"control must be at least 0 and below 1, got {control!r}")
    _check(model.energies[site], site, bound, max_steps, tolerance, folds)
    kept = Checkpoint.of(checkpoint)
    saved = kept.saved() if seed is None and kept is not None else None
    if saved:
        seed = saved["seed"]  # the posterior draws must be the same again
    seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    data = in_memory("x", x, model, guide)
    base = _base_of(model, site, data)
    draw = functools.partial(posterior_draws, model.base_model, guide, num_samples=num_particles, seed=seed)
    with frozen(model, guide):
        if bound == "auto":
            small = base.event_shape.numel() <= _MAX_DIMS
            few = tuple(part[:: -(-len(part) // _JUDGED)] for part in data)
            bound = "exact" if small and _weights_serve(draw(few)[1]) else "elbo"
        parts = parts_of(len(data[0]), folds, seed)
        particles = _particles(draw(data), site) if bound == "exact" or parts else None
    options = (control, learning_rate, max_steps, tolerance, batch_size)
    job = _Job(model, guide, site, base, data, bound, particles, *options)
    crossed = job.cross_fit(parts, seed, progress) if parts else None
    if isinstance(crossed, FitResult):  # interrupted
        return crossed
    result = job.run(None, seed, progress, checkpoint=kept, epochs=crossed.epochs if crossed else None)
    _tell(result, job.moving, crossed, max_steps)
    # Where log Z misses most of the tilted mass, so did the loss: it may have fallen without end, and this warns.
    log_z = log_normalizer(base, model.energies[site], seed=seed)
    return dataclasses.replace(result, log_z=log_z, gain=crossed.gain if crossed else None)


@dataclasses.dataclass
class _Job:
    """The fits of one call: all alike but for the data they see."""

    model: TiltedModel
    guide: Callable[..., Any]
    site: str
    base: Distribution
    data: Tensors
    bound: str
    particles: tuple[Tensor, Tensor] | None
    control: float | None
    learning_rate: float
    max_steps: int
    tolerance: float | None
    batch_size: int
    moving: UntilFlat | None = None  # of the last fit

    def run(
        self, rows: Tensor | None, seed: int, progress: bool, *, epochs: int | None = None,
        checkpoint: Checkpoint | None = None, look: Callable[[int], None] | None = None,
    ) -> FitResult:  # fmt: skip
        """Fit to some rows, or to all data."""
        data = self.data if self.bound == "elbo" else self.particles
        assert data is not None
        data = data if rows is None else tuple(part[rows.to(part.device)] for part in data)
        num, self.moving = len(data[0]), None
        batch_size = min(self.batch_size, num)
        most = self._epochs(num) if epochs is None else epochs
        epochs = min(most, _ended_after(checkpoint) or most)

        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            if self.tolerance is None:
                return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=most)
            fewest = math.ceil(_FEWEST_STEPS / math.ceil(num / batch_size))
            self.moving = UntilFlat(optimizer, epochs=most, tolerance=self.tolerance / num, fewest=fewest)
            return self.moving

        def after_epoch(state: EpochEnd) -> None:
            if look is not None:
                look(state.epoch)
            if self.moving is not None and self.moving.finished and state.epoch < epochs:
                state.stop()

        objective: Any = TiltELBO() if self.bound == "elbo" else TiltLikelihood(self.base)
        result = fit(
            self.model,
            self.guide,
            data,
            objective=objective if self.control is None else RunningControl(objective, decay=self.control),
            train=self.model.energies[self.site],
            optimizer=functools.partial(torch.optim.Adam, lr=self.learning_rate),
            scheduler=schedule,
            epochs=epochs,
            batch_size=batch_size,
            validation=None,
            patience=None,
            checkpoint=checkpoint,
            seed=seed,
            callbacks=[after_epoch],
            progress=progress,
        )
        return dataclasses.replace(result, stopped="flat") if result.stopped == "callback" else result

    def _epochs(self, num: int) -> int:
        return math.ceil(self.max_steps / math.ceil(num / min(self.batch_size, num)))

    def cross_fit(self, parts: list[Tensor], seed: int, progress: bool) -> CrossFit | FitResult | None:
        """What the fits without each part tell; the result of one that was interrupted."""
        energy = self.model.energies[self.site]
        start = {name: value.detach().clone() for name, value in energy.state_dict().items()}
        assert self.particles is not None
        values, log_weights = self.particles
        held_out = HeldOut(self.base, energy, values, None if self.bound == "elbo" else log_weights, seed)
        ended: list[FitResult] = []

        def train(rows: Tensor, index: int, look: Callable[[int], None]) -> bool:
            energy.load_state_dict(start)
            ended.append(self.run(rows, fingerprint((), "fold", seed, index) % 2**62, progress, look=look))
            return ended[-1].stopped in _PLEASANT

        found = cross_fit(parts, held_out, train, self._epochs(len(self.data[0])))
        if ended[-1].stopped == "interrupted":
            return ended[-1]
        energy.load_state_dict(start)
        return found


def _ended_after(checkpoint: Checkpoint | None) -> int | None:
    """The epoch after which the run in a checkpoint had come to its end; None where it has not."""
    saved = None if checkpoint is None else checkpoint.saved()
    schedule = (saved or {}).get("scheduler") or {}
    ended = bool(schedule.get("flat_after")) and len(schedule["losses"]) >= schedule["ends_after"]
    return len(schedule["losses"]) if ended else None


def _check(energy: Energy, site: str, bound: str, max_steps: int, tolerance: float | None, folds: int) -> None:
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {BOUNDS}, got {bound!r}")
    whole_number("max_steps", max_steps)
    whole_number("folds", folds, at_least=0)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number of nats, at least 0, or None, got {tolerance!r}")
    if not any(p.requires_grad for p in energy.parameters()):
        raise TypeError(
            f"the energy of {site!r} shows no parameters that can learn: give tilt() the module that has them, or an "
            f"Energy that holds it; what a plain function uses cannot be seen (fit(..., train=module) trains it)"
        )


def _base_of(model: TiltedModel, site: str, data: Tensors) -> Distribution:
    """The distribution of the tilted site before the tilt."""
    node = prototype_trace(model.base_model, data, {}).nodes[site]
    base: Distribution = node["fn"]
    if node["is_observed"]:
        raise ValueError(
            f"fit_tilt needs a latent site, but {site!r} is observed; use fit(model, guide, x, train=energy)"
        )
    if model.structure(*data).ancestors[site] or not is_exchangeable(base):
        raise ValueError(
            f"fit_tilt needs a site whose distribution is the same for every datum, but {site!r} has random parents "
            f"or depends on inputs; use fit(model, guide, x, objective=pyro.infer.Trace_ELBO(), train=energy)"
        )
    return base


def _tell(result: FitResult, moving: UntilFlat | None, crossed: CrossFit | None, max_steps: int) -> None:
    if moving is not None and moving.still_moves and result.stopped == "epochs" and not (crossed and crossed.epochs):
        speed = f"by {moving.moving[0]:.2g} nats per datum from one sixth of the run to the next "
        warn_user(
            f"fit_tilt: the gain was still growing {speed if math.isfinite(moving.moving[0]) else ''}when the "
            f"max_steps={max_steps:,} came to an end: raise max_steps, or learning_rate",
            TrainingWarning,
        )
    if crossed is not None and crossed.gain.value < -2 * crossed.gain.se:
        warn_user(
            f"fit_tilt: on data it has not seen the tilt gains {float(crossed.gain.value):.3g} ± "
            f"{float(crossed.gain.se):.2g} nats per datum, less than nothing: it learns the reference data by heart; "
            f"use a simpler energy, more data or fewer steps",
            TrainingWarning,
        )


def _weights_serve(log_weights: Tensor) -> bool:
    """Whether posterior draws (n, num_particles) are worth a fifth of their number, for the median datum."""
    return float(importance_ess(log_weights).median()) >= _LEAST_SHARE * log_weights.shape[1]


def _particles(drawn: tuple[dict[str, Tensor], Tensor], site: str) -> tuple[Tensor, Tensor]:
    values, log_weights = drawn
    return values[site], log_weights
