"""fit(): the one training loop, for VAEs, tilts and any other Pyro model and guide."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.display import number, table
from pyro_ebm.entry import entry
from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.estimates import Estimate
from pyro_ebm.modules import modules_of, name_of, own_parameters
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import tilt_of
from pyro_ebm.training.callbacks import Callback, checked_callbacks, tell
from pyro_ebm.training.checkpoints import Checkpoint, load_weights, save_weights
from pyro_ebm.training.first_look import first_look
from pyro_ebm.training.groups import modules_to_train, objectives_of, only_training, with_losses
from pyro_ebm.training.guard import TrainingStopped
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.run import Run
from pyro_ebm.training.selection import Average, keep_of
from pyro_ebm.training.sources import Source, Weighted, source_of, split_of, validation_of
from pyro_ebm.training.steps import Batches, EachStep, make_scheduler
from pyro_ebm.training.validation import Judge, Validation, judged_size

__all__ = [
    "Average",
    "Batches",
    "Checkpoint",
    "EachStep",
    "FitResult",
    "Validation",
    "Weighted",
    "fit",
    "load_weights",
    "save_weights",
]

Data = Any  # tensors, arrays, tables, tuples of them, a Dataset, a DataLoader
Trained = nn.Module | str  # the name of a pyro.param
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_PATIENCE, _PATIENT_STEPS = 10, 500  # epochs, and the steps that they make at least
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class FitResult:
    """What a training run did; the weights are in the modules themselves.

    Attributes:
        train_loss: mean loss per datum of each epoch, over weights that moved meanwhile; of the first group's
            steps where groups take turns.
        validation_loss: loss per datum at the end of each epoch; empty without validation.
        best_epoch: epoch, counted from 1, with the lowest validation loss (the best metric, where one is monitored);
            without validation the last one.
        epochs: epochs finished, those before a resume included.
        stopped: ``"epochs"``, ``"early stopping"``, ``"callback"``, ``"interrupted"``, ``"non-finite loss"`` or
            ``"degenerate weights"`` (log Z came to rest on one or two draws of its base); of :func:`fit_tilt` also
            ``"flat"``: the gain had stopped moving.
        seconds: wall-clock seconds, those before a resume included.
        seed: the seed used; pass it for the same run again.
        log_z: log Z of the tilt that :func:`fit_tilt` learned and its standard error; None elsewhere.
        kept_epoch: the epoch whose weights were kept; 0: the weights before training.
        metrics: name -> value at the end of each epoch, of the metrics of :class:`Validation`.
        gain: what :func:`fit_tilt` gains per datum on data it has not seen, by cross-fitting, with its standard error;
            None elsewhere, and without ``folds``.
    """

    train_loss: list[float] = field(repr=False)
    validation_loss: list[float] = field(repr=False)
    best_epoch: int
    epochs: int
    stopped: str
    seconds: float
    seed: int
    log_z: Estimate | None = None
    kept_epoch: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict, repr=False)
    gain: Estimate | None = None

    def _repr_html_(self) -> str:
        rows = [["training", *_shown_losses(self.train_loss, self.kept_epoch)]]
        if self.validation_loss:
            rows.append(["validation", *_shown_losses(self.validation_loss, self.kept_epoch)])
        seconds = f"{self.seconds:.3g} s"
        facts = [f"{self.epochs:,} epochs", f"stopped: {self.stopped}", seconds, f"seed {self.seed}"]
        if self.log_z is not None:
            facts.append(f"log Z {float(self.log_z.value):.3f} ± {float(self.log_z.se):.2g}")
        if self.gain is not None:
            facts.append(f"gain on data not seen {float(self.gain.value):.3f} ± {float(self.gain.se):.2g} per datum")
        kept = f"the weights kept are those of epoch {self.kept_epoch:,}" if self.kept_epoch else "no epoch was better"
        return table("FitResult", facts, ["loss per datum", "first", "kept", "last"], rows, [kept])


def _shown_losses(losses: list[float], kept_epoch: int) -> list[str]:
    """The first, the kept and the last one, as text."""
    kept = losses[kept_epoch - 1] if 0 < kept_epoch <= len(losses) else math.nan
    return [number(loss) for loss in (losses[0] if losses else math.nan, kept, losses[-1] if losses else math.nan)]


@entry(gradients=True)
@checked
def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    objective: Any = None,
    train: Trained | Sequence[Trained] | Sequence[Sequence[Trained]] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | EachStep | None = None,
    epochs: int = 100,
    batch_size: int | Batches = 128,
    validation: float | Data | Validation | None = 0.1,
    keep: str | Average | None = None,
    patience: int | str | None = "auto",
    clip_grad_norm: float | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> FitResult:
    """Train a model and guide by stochastic gradients on an ELBO, or on any other loss.

    Afterwards the trained modules hold the weights that ``keep`` says, by default those of the last epoch of which
    validation cannot say that it is worse than the best, and are in ``eval()`` mode. All other modules behind
    ``model`` and ``guide`` stay bit-identical, in ``eval()`` mode throughout. All randomness comes from ``seed``; the
    global torch generator is left as it was, except for the one number drawn from it where ``seed`` is None.

    A minibatch counts as in Pyro's ``plate(size, subsample_size=)``: sites outside the plate of the data belong to all
    data, and have their KL once per pass and not once per minibatch.

    Training ends before its time where a loss, a gradient or a weight is not finite, and where the estimate of
    log Z rests on one or two draws for an epoch (and at least 50 steps): an energy that runs away shows itself
    there while its loss still falls. The best weights from before are kept, and a checkpoint too ends before.

    Args:
        model: a Pyro model, called with one minibatch of each data tensor.
        guide: its guide, called with the same.
        data: a tensor, array or table, or several with the same first dimension, along which minibatches are taken: a
            tuple, or a dict by the first arguments of model and guide. Of a ``Dataset`` items are read when their
            minibatch comes. A ``DataLoader`` has its own batches (no ``batch_size=``) and order: it follows ``seed``,
            and resumes exactly, unless it has its own generator. :class:`Weighted` gives each datum a weight. None: the
            model holds its data, takes no arguments, and an epoch is one step (with ``validation=None``).
        objective: a Pyro ELBO such as ``pyro.infer.Trace_ELBO()`` (the default), or a function
            ``(model, guide, *batch)`` that returns the loss as a scalar, summed over the batch. An object
            may also have ``validation(model, guide, *batch)``, the loss to validate with where its own is no
            measure of fit, and ``state_dict()`` with ``load_state_dict()``, of tensors and plain values, which
            checkpoints then hold. With an argument ``epoch`` it is told the epoch, from 1 on (a weight of the KL
            that grows). A :class:`CapturedLoss` makes the steps of small models faster. A sequence: one for each
            group of ``train``.
        train: the modules that learn, and names of ``pyro.param`` that do; None: all that are found behind model and
            guide, and every ``pyro.param`` that they meet. Groups,
            as in ``[[vae], [energy]]``, take turns: with each minibatch each group makes a step while the others
            stand still, in ``eval()`` mode. The first group's objective validates.
        optimizer: makes a torch optimizer from the list of parameters; Adam with lr=1e-3 by default.
        scheduler: makes a torch learning-rate scheduler from the optimizer, stepped after each epoch (within
            ``EachStep(...)`` after each step); for instance
            ``functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)``.
        epochs: passes over the data, those before a resume included.
        batch_size: data per step, or :class:`Batches`, of which several make a step.
        validation: share of the data held apart, or other data in the form of ``data``, or None; or a
            :class:`Validation`, which adds metrics. The validation loss is taken in ``eval()`` mode, as the mean over
            several draws, the same at each epoch, those of log Z included.
        keep: which weights the modules hold afterwards. ``"best"``: those of the last epoch whose validation loss is
            no higher than the lowest by more than their difference is known. ``"last"``. ``"average"`` or an
            :class:`Average`: a moving average over the steps. None: the best where there is validation and the
            objective is the same at each epoch, the last elsewhere. Where a callback changes a setting of a module or
            the objective (a float, a flag), losses from before are no longer compared.
        patience: stop after so many epochs without a lower validation loss; None: never. ``"auto"``: 10 epochs, and as
            many as make 500 steps; never without validation.
        clip_grad_norm: largest norm of the gradient of a step.
        checkpoint: file that keeps the state of the run, or a :class:`Checkpoint`, which also says how often it is
            written and whether the run goes on from it.
        seed: seed of split, order and noise; None: drawn from the global generator.
        callbacks: functions called after each epoch with an :class:`EpochEnd`; ``state.stop()`` ends the training.
            To TensorBoard: ``lambda state: writer.add_scalar("loss", state.train_loss[-1], state.epoch)``. Where one
            raises, the epoch is in the checkpoint first.
        progress: show a progress bar.

    Returns:
        Losses per datum by epoch, the epoch that was kept, and why training stopped.

    Raises:
        TypeError, ValueError: an argument out of its range; data with NaN or infinite values; a loss
            that does not depend on what is to be trained.
        CheckpointError: a checkpoint that cannot be read or written, or is that of another run.

    Example:
        >>> import torch
        >>> from pyro_ebm import VAE, fit
        >>> vae = VAE((4,), latent_dim=1, hidden=(8,))
        >>> x = torch.rand(64, 4)
        >>> result = fit(vae.model, vae.guide, x, epochs=3, batch_size=32, seed=0, progress=False)
        >>> result.stopped, len(result.validation_loss)
        ('epochs', 3)
    """
    cut = Batches.of(batch_size)
    _check_numbers(epochs, patience, clip_grad_norm, seed)
    source = source_of("data", data, model, guide)
    wanted = Validation.of(validation)
    held_apart = validation_of(None if wanted is None else wanted.data, source, model, guide)
    checked_callbacks(callbacks)
    losses = objectives_of(objective, train, model, guide)
    kept = Checkpoint.of(checkpoint)
    saved = None if kept is None else kept.saved()
    if seed is None:
        seed = saved["seed"] if saved else int(torch.randint(2**62, (), device="cpu"))
    train_on, judge_on = split_of(source, held_apart, seed)
    keep = keep_of(keep, validated=judge_on is not None, changing=losses[0].changes)
    patience = _patience(patience, judge_on, losses[0], train_on.num_batches(cut.size) / cut.accumulate)
    found = modules_of(model, guide)
    with forked_rng(seed), warnings.catch_warnings(), own_parameters(model, guide):
        # The loop finds these itself and says more about them.
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
        surveyed = first_look(
            losses, source, train_on, judge_on, batch_size=cut.size, found=found, seed=seed,
            judged_size=0 if wanted is None or judge_on is None else judged_size(wanted, judge_on, cut.size),
        )  # fmt: skip
        groups = modules_to_train(train, found, surveyed.params)
        with only_training([m for group in groups for m in group], found) as parameters:
            made = _make_optimizer(optimizer, parameters)
            judge = None if wanted is None or judge_on is None else Judge(
                wanted, judge_on, losses[0], surveyed.shares,
                batch_size=cut.size, seed=seed + 2, device=parameters[0].device,
            )  # fmt: skip
            run = Run(
                with_losses(groups, losses, parameters), made, train_on, judge,
                keep=keep, shares=surveyed.shares,
                cut=cut, clip_grad_norm=clip_grad_norm, seed=seed, named=train is not None,
                scheduler=make_scheduler(scheduler, made), each_step=isinstance(scheduler, EachStep),
                found=found,
            )  # fmt: skip
            if saved and kept:
                run.load(saved, str(kept.path))
            bar = _bar(epochs, run.progress.epoch, _bar_name(model) if progress else None)
            stopped, trouble = _loop(run, epochs, patience, kept, bar, callbacks)
    if trouble:
        warn_user(trouble, TrainingWarning)
    past = run.progress
    return FitResult(
        past.train_loss, past.validation_loss, past.best_epoch, past.epoch, stopped, past.seconds, seed,
        kept_epoch=past.kept_epoch, metrics=past.metrics,
    )  # fmt: skip


def _loop(
    run: Run, epochs: int, patience: int | None, checkpoint: Checkpoint | None, bar: Any,
    callbacks: Sequence[Callback],
) -> tuple[str, str | None]:
    """Run the epochs; return why they ended and, where that was no regular end, what to tell."""
    past, started, seconds_before = run.progress, time.perf_counter(), run.progress.seconds
    exhausted = asked = False
    try:
        with bar:
            run.keep(checkpoint is not None)
            while past.epoch < epochs and not asked and not (exhausted := _exhausted(run, patience)):
                run.one_epoch()
                past.seconds = seconds_before + time.perf_counter() - started
                run.keep(checkpoint is not None)
                bar.update()
                bar.set_postfix(past.latest())
                if checkpoint is not None and past.epoch % checkpoint.every == 0:
                    run.save(checkpoint.path)
                with run.as_kept():
                    asked = tell(callbacks, run, None if checkpoint is None else checkpoint.path)
            exhausted = exhausted or _exhausted(run, patience)
        stopped, trouble = "callback" if asked else "early stopping" if exhausted else "epochs", None
        if run.guard.doubtful:
            trouble = f"{run.guard.problem(f'in epoch {past.epoch}')}; {run.kept()}"
    except KeyboardInterrupt:
        stopped, trouble = "interrupted", f"training was interrupted in epoch {past.epoch + 1}; {run.kept()}"
        if checkpoint is not None:
            again = f"checkpoint=Checkpoint({str(checkpoint.path)!r}, resume=True)"
            trouble += f"; {again} continues after epoch {run.resumes_after}"
    except TrainingStopped as error:
        stopped, trouble = error.reason, f"{error}; {run.kept()}"
    finally:
        run.restore_best()
    past.seconds = seconds_before + time.perf_counter() - started
    if checkpoint is not None:
        run.save(checkpoint.path)
    return stopped, trouble


def _exhausted(run: Run, patience: int | None) -> bool:
    # Epochs in which log Z means nothing end otherwise: their weights recover, or the guard stops the run.
    past = run.progress
    return patience is not None and past.epoch - past.best_epoch >= patience and not run.guard.doubtful


def _bar(epochs: int, done: int, name: str | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=epochs, initial=done, disable=name is None, desc=name, unit="epoch")


def _bar_name(model: Callable[..., Any]) -> str:
    """What is trained, in a word: ``tilt``, ``vae`` of ``vae.model``, the name of a function."""
    if tilt_of(model) is not None:
        return "tilt"
    name = name_of(model)
    return name.rpartition(".")[0].lower() or name.strip("<>")


def _make_optimizer(make: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = functools.partial(torch.optim.Adam, lr=1e-3) if make is None else make
    advice = "pass a function of the parameters, for instance functools.partial(torch.optim.Adam, lr=1e-3)"
    if isinstance(make, torch.optim.Optimizer | pyro.optim.PyroOptim) or not callable(make):
        raise TypeError(f"optimizer must make a torch optimizer, got {type(make).__name__}; {advice}")
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch optimizer, got {type(made).__name__}; {advice}")
    return made


def _patience(patience: Any, judge_on: Source | None, loss: Objective, steps: float) -> int | None:
    """How many epochs to wait for a better loss: by itself ten, and of few steps as many as make five hundred."""
    judged = judge_on is not None and not loss.changes
    if patience is None or (patience == "auto" and not judged):
        return None
    if not judged:
        why = "the objective changes with the epoch" if judge_on is not None else "there is no validation loss"
        raise ValueError(f"patience={patience} has nothing to go by: {why}; pass patience=None, or validation=")
    return max(_PATIENCE, math.ceil(_PATIENT_STEPS / steps)) if patience == "auto" else int(patience)


def _check_numbers(epochs: Any, patience: Any, clip_grad_norm: Any, seed: Any) -> None:
    counts = {"epochs": epochs}
    if patience is not None and patience != "auto":
        counts["patience"] = patience
    for name, count in counts.items():
        whole_number(name, count)
    if clip_grad_norm is not None and not 0 < clip_grad_norm < math.inf:
        raise ValueError(f"clip_grad_norm must be a finite number above zero or None, got {clip_grad_norm!r}")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**62):
        raise ValueError(f"seed must be None or a whole number from 0 to 2**62 - 1, got {seed!r}")
