"""fit(): the one training loop, for VAEs, tilts and any other Pyro model and guide."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ebm.checks import whole_number
from pyro_ebm.display import number, table
from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.estimates import Estimate
from pyro_ebm.modules import evaluation_mode, modules_of, name_of
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import tilt_of
from pyro_ebm.training.callbacks import Callback, checked_callbacks, tell
from pyro_ebm.training.checkpoints import Checkpoint, load_weights, save_weights
from pyro_ebm.training.guard import TrainingStopped
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.run import Group, Run
from pyro_ebm.training.sources import source_of, split_of, validation_of

__all__ = ["Checkpoint", "FitResult", "fit", "load_weights", "save_weights"]

Data = Any  # tensors, arrays, tables, tuples of them, a Dataset, a DataLoader
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class FitResult:
    """What a training run did; the weights are in the modules themselves.

    Attributes:
        train_loss: mean loss per datum of each epoch, over weights that moved meanwhile; of the first group's
            steps where groups take turns.
        validation_loss: loss per datum at the end of each epoch; empty without validation.
        best_epoch: epoch, counted from 1, whose weights were kept; 0: the weights before training.
        epochs: epochs finished, those before a resume included.
        stopped: ``"epochs"``, ``"early stopping"``, ``"callback"``, ``"interrupted"``, ``"non-finite loss"`` or
            ``"degenerate weights"`` (log Z came to rest on one or two draws of its base).
        seconds: wall-clock seconds, those before a resume included.
        seed: the seed used; pass it for the same run again.
        log_z: log Z of the tilt that :func:`fit_tilt` learned and its standard error; None elsewhere.
    """

    train_loss: list[float] = field(repr=False)
    validation_loss: list[float] = field(repr=False)
    best_epoch: int
    epochs: int
    stopped: str
    seconds: float
    seed: int
    log_z: Estimate | None = None

    def _repr_html_(self) -> str:
        rows = [["training", *_shown_losses(self.train_loss, self.best_epoch)]]
        if self.validation_loss:
            rows.append(["validation", *_shown_losses(self.validation_loss, self.best_epoch)])
        seconds = f"{self.seconds:.3g} s"
        facts = [f"{self.epochs:,} epochs", f"stopped: {self.stopped}", seconds, f"seed {self.seed}"]
        if self.log_z is not None:
            facts.append(f"log Z {float(self.log_z.value):.3f} ± {float(self.log_z.se):.2g}")
        kept = f"the weights kept are those of epoch {self.best_epoch:,}" if self.best_epoch else "no epoch was better"
        return table("FitResult", facts, ["loss per datum", "first", "kept", "last"], rows, [kept])


def _shown_losses(losses: list[float], best_epoch: int) -> list[str]:
    """The first, the kept and the last one, as text."""
    kept = losses[best_epoch - 1] if 0 < best_epoch <= len(losses) else math.nan
    return [number(loss) for loss in (losses[0] if losses else math.nan, kept, losses[-1] if losses else math.nan)]


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    objective: Any = None,
    train: nn.Module | Sequence[nn.Module] | Sequence[Sequence[nn.Module]] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    validation: float | Data | None = 0.1,
    patience: int | None = 10,
    clip_grad_norm: float | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> FitResult:
    """Train a model and guide by stochastic gradients on an ELBO, or on any other loss.

    Afterwards the trained modules hold the weights of the epoch with the lowest validation loss
    (train loss where there is no validation; the last epoch where that loss is no measure of fit) and are
    in ``eval()`` mode. All other modules behind ``model`` and ``guide`` stay bit-identical, in ``eval()`` mode
    throughout. All randomness comes from ``seed``; the global torch generator is left as it was, except for
    the one number drawn from it where ``seed`` is None.

    Training ends before its time where a loss, a gradient or a weight is not finite, and where the estimate of
    log Z rests on one or two draws for an epoch (and at least 50 steps): an energy that runs away shows itself
    there while its loss still falls. The best weights from before are kept, and a checkpoint too ends before.

    Args:
        model: a Pyro model, called with one minibatch of each data tensor.
        guide: its guide, called with the same.
        data: a tensor, array or table, or several with the same first dimension, along which minibatches are taken: a
            tuple, or a dict by the first arguments of model and guide. Of a ``Dataset`` items are read when their
            minibatch comes. A ``DataLoader`` has its own batches (no ``batch_size=``) and order: it follows ``seed``,
            and resumes exactly, unless it has its own generator.
        objective: a Pyro ELBO such as ``pyro.infer.Trace_ELBO()`` (the default), or a function
            ``(model, guide, *batch)`` that returns the loss as a scalar, summed over the batch. An object
            may also have ``validation(model, guide, *batch)``, the loss to validate with where its own is no
            measure of fit, and ``state_dict()`` with ``load_state_dict()``, of tensors and plain values, which
            checkpoints then hold. A sequence: one for each group of ``train``.
        train: the module or modules that learn; None: all that are found behind model and guide. Groups,
            as in ``[[vae], [energy]]``, take turns: with each minibatch each group makes a step while the others
            stand still, in ``eval()`` mode. The first group's objective validates.
        optimizer: makes a torch optimizer from the list of parameters; Adam with lr=1e-3 by default.
        scheduler: makes a torch learning-rate scheduler from the optimizer, stepped after each epoch; for
            instance ``functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)``.
        epochs: passes over the data, those before a resume included.
        batch_size: data per step.
        validation: share of the data held apart, or other data in the form of ``data``, or None. The
            validation loss is taken in ``eval()`` mode and with the same noise at each epoch.
        patience: stop after so many epochs without a better loss; None: never.
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
    _check_numbers(epochs, batch_size, patience, clip_grad_norm, seed)
    source = source_of("data", data, model, guide)
    held_apart = validation_of(validation, source, model, guide)
    checked_callbacks(callbacks)
    losses = _objectives(objective, train, model, guide)
    kept = Checkpoint.of(checkpoint)
    saved = None if kept is None else kept.saved()
    if seed is None:
        seed = saved["seed"] if saved else int(torch.randint(2**62, (), device="cpu"))
    with forked_rng(seed), warnings.catch_warnings():
        # The loop finds these itself and says more about them.
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
        found = modules_of(model, guide)
        _set_up(found, losses[0], lambda: source.first(batch_size))
        groups = _modules_to_train(train, found)
        with _only_training([m for group in groups for m in group], found) as parameters:
            made = _make_optimizer(optimizer, parameters)
            run = Run(
                _with_losses(groups, losses, parameters), made,
                *split_of(source, held_apart, seed),
                batch_size=batch_size, clip_grad_norm=clip_grad_norm, seed=seed, named=train is not None,
                scheduler=_make_scheduler(scheduler, made),
                frozen=[m for m in found if not any(p.requires_grad for p in m.parameters())],
            )  # fmt: skip
            if saved and kept:
                run.load(saved, str(kept.path))
            bar = _bar(epochs, run.progress.epoch, _bar_name(model) if progress else None)
            stopped, trouble = _loop(run, epochs, patience, kept, bar, callbacks)
    if trouble:
        warn_user(trouble, TrainingWarning)
    past = run.progress
    return FitResult(
        past.train_loss, past.validation_loss, past.best_epoch, past.epoch, stopped, past.seconds, seed
    )


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


def _set_up(found: list[nn.Module], loss: Objective, batch: Callable[[], Sequence[Tensor]]) -> None:
    """Call once what makes its parameters only when it is first called, as Pyro's autoguides do."""
    if any(isinstance(m, PyroModule) or not any(True for _ in m.parameters()) for m in found):
        state = loss.state()
        with torch.no_grad(), evaluation_mode(*found):
            loss.value(*batch())
        loss.load_state(state)


def _takes_turns(train: Any) -> bool:
    """Whether the modules to train are in groups."""
    return isinstance(train, Sequence) and any(isinstance(item, Sequence) for item in train)


def _objectives(
    objective: Any, train: Any, model: Callable[..., Any], guide: Callable[..., Any]
) -> list[Objective]:
    """One objective, or one for each group of modules to train."""
    if not isinstance(objective, Sequence) or isinstance(objective, str):
        return [Objective(objective, model, guide)]
    num_groups = len(train) if _takes_turns(train) else 1
    if len(objective) != num_groups:
        raise ValueError(
            f"objective must be one objective or one for each group of train=, got {len(objective)} for "
            f"{num_groups} group(s); groups are written train=[[vae], [energy]]"
        )
    made: dict[int, Objective] = {}
    for index, item in enumerate(objective):
        made.setdefault(id(item), Objective(item, model, guide, f"objective[{index}]"))
    return [made[id(item)] for item in objective]


def _modules_to_train(train: Any, found: list[nn.Module]) -> list[list[nn.Module]]:
    """The modules that learn, in groups that take turns; one group unless ``train`` is nested."""
    if train is None:
        trained = [m for m in found if any(p.requires_grad for p in m.parameters())]
        if not trained:
            raise ValueError(
                "no module with parameters was found behind model and guide; "
                "name what shall learn with train=, for instance train=vae"
            )
        return [trained]
    groups = list(train) if _takes_turns(train) else [[train] if isinstance(train, nn.Module) else train]
    for group in groups:
        if not isinstance(group, Sequence) or not group or not all(isinstance(m, nn.Module) for m in group):
            raise TypeError(
                "train must be a torch.nn.Module or a sequence of them, or a sequence of such sequences that take "
                f"turns, got {train!r}"
            )
    for name, group in zip(_group_names(groups), groups, strict=True):
        for index, module in enumerate(group):
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"{name}[{index}] ({type(module).__name__}) has no parameters that can learn; "
                    "leave it out, or set requires_grad on its parameters"
                )
    return [list(group) for group in groups]


def _group_names(groups: Sequence[Any]) -> list[str]:
    return ["train"] if len(groups) == 1 else [f"train[{index}]" for index in range(len(groups))]


def _with_losses(
    groups: list[list[nn.Module]], losses: list[Objective], parameters: list[nn.Parameter]
) -> list[Group]:
    losses = losses * len(groups) if len(losses) == 1 else losses
    made = []
    for name, modules, loss in zip(_group_names(groups), groups, losses, strict=True):
        inside = {id(p) for module in modules for p in module.parameters()}
        made.append(Group(modules, [p for p in parameters if id(p) in inside], loss, name))
    return made


@contextlib.contextmanager
def _only_training(trained: list[nn.Module], found: list[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Freeze all but the trained modules, and undo that afterwards; yield the parameters that learn."""
    trained = list({id(m): m for m in trained}.values())
    parameters = list({id(p): p for m in trained for p in m.parameters() if p.requires_grad}.values())
    learning = {id(p) for p in parameters}
    modes = [(sub, sub.training) for m in [*found, *trained] for sub in m.modules()]
    flags = [(p, p.requires_grad) for m in found for p in m.parameters()]
    try:
        for sub, _ in modes:
            sub.training = False
        for p, _ in flags:
            p.requires_grad_(id(p) in learning)
        yield parameters
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for p in parameters:
            p.grad = None
        for sub, mode in modes:
            sub.training = mode
    for module in trained:
        module.eval()


def _make_optimizer(make: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = functools.partial(torch.optim.Adam, lr=1e-3) if make is None else make
    advice = "pass a function of the parameters, for instance functools.partial(torch.optim.Adam, lr=1e-3)"
    if isinstance(make, torch.optim.Optimizer | pyro.optim.PyroOptim) or not callable(make):
        raise TypeError(f"optimizer must make a torch optimizer, got {type(make).__name__}; {advice}")
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch optimizer, got {type(made).__name__}; {advice}")
    return made


def _make_scheduler(make: Any, optimizer: torch.optim.Optimizer) -> Any:
    if make is None:
        return None
    made = make(optimizer) if callable(make) else make
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler) or made.optimizer is not optimizer:
        raise TypeError(
            f"scheduler must be a function of the optimizer that makes a torch learning-rate scheduler for "
            f"it, got {type(made).__name__}; for instance "
            f"functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)"
        )
    return made


def _check_numbers(epochs: Any, batch_size: Any, patience: Any, clip_grad_norm: Any, seed: Any) -> None:
    counts = {"epochs": epochs, "batch_size": batch_size}
    if patience is not None:
        counts["patience"] = patience
    for name, count in counts.items():
        whole_number(name, count)
    if clip_grad_norm is not None and not 0 < clip_grad_norm < math.inf:
        raise ValueError(f"clip_grad_norm must be a finite number above zero or None, got {clip_grad_norm!r}")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**62):
        raise ValueError(f"seed must be None or a whole number from 0 to 2**62 - 1, got {seed!r}")
