"""One resumable run of training: its modules, optimizer, data and random states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.errors import CheckpointError
from pyro_ebm.tilts.listeners import weights_reported_to
from pyro_ebm.tilts.streams import log_z_stream
from pyro_ebm.training.checkpoints import load_into, require_match, weights_of, write
from pyro_ebm.training.data import Tensors
from pyro_ebm.training.guard import WeightGuard, require_finite
from pyro_ebm.training.identity import (
    description,
    differences,
    frozen_weights,
    settings_of_modules,
    settings_of_optimizer,
)
from pyro_ebm.training.minibatch import Shares, lone_datum_told, num_data_of
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.saved_run import require_possible
from pyro_ebm.training.selection import Average, Moving, within_error
from pyro_ebm.training.sources import Source
from pyro_ebm.training.steps import Batches, parts_of_steps
from pyro_ebm.training.validation import Judge, Judgment

__all__ = ["Group", "Progress", "Run"]

@dataclass
class Progress:
    """How far a run has come; epochs count from 1, and epoch 0 is before training."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    best_parts: list[float] = field(default_factory=list)
    kept_epoch: int = 0
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def latest(self) -> dict[str, float]:
        """Losses of the last epoch, for the progress bar."""
        curves = {"train": self.train_loss, "validation": self.validation_loss, **self.metrics}
        return {name: curve[-1] for name, curve in curves.items() if curve}


@dataclass
class Group:
    """Modules that learn together, and what their steps minimize.

    Args:
        modules: they learn; all others stand still meanwhile.
        parameters: those of their parameters that learn.
        loss: what is minimized.
        name: of the modules, for messages.
    """

    modules: Sequence[nn.Module]
    parameters: list[nn.Parameter]
    loss: Objective
    name: str = "train"
    checked: bool = False

    def check_reach(self, named: bool) -> None:
        """At the first step: do the gradients reach everything that was named to be trained?"""
        for index, module in enumerate(self.modules):
            if named and all(p.grad is None for p in module.parameters()):
                raise ValueError(
                    f"the loss does not depend on {self.name}[{index}] ({type(module).__name__}); leave it out of "
                    "train=, or check that model and guide use this very module"
                )
        if all(p.grad is None for p in self.parameters):
            raise ValueError("the loss does not depend on any parameter that is to be trained; check train=")
        self.checked = True


class Run:
    """Modules, optimizer, data and random states of one call of ``fit``.

    Args:
        groups: modules that learn, by the groups that take turns.
        optimizer: over all their parameters.
        data: to train on.
        judge: what takes the validation loss, or None.
        keep: ``"best"`` (with a judge), ``"last"``, or an average of the weights.
        shares: what a minibatch counts for.
        cut: how steps are cut from the data.
        clip_grad_norm: largest norm of a gradient, or None.
        seed: of the order of the data.
        named: whether the user named the modules, so that each must matter to the loss.
        found: modules behind model and guide; those of which nothing learns stay in ``eval()`` mode.
        scheduler: of the learning rate, or None.
        each_step: whether the scheduler is stepped after each step, and not after each epoch.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        optimizer: torch.optim.Optimizer,
        data: Source,
        judge: Judge | None,
        *,
        keep: str | Average,
        shares: Shares,
        cut: Batches,
        clip_grad_norm: float | None,
        seed: int,
        named: bool,
        found: Sequence[nn.Module] = (),
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        each_step: bool = False,
    ) -> None:
        self.groups, self.optimizer, self.scheduler = groups, optimizer, scheduler
        self.trained = list({id(m): m for group in groups for m in group.modules}.values())
        self.parameters = list({id(p): p for group in groups for p in group.parameters}.values())
        self.objectives = list({id(group.loss): group.loss for group in groups}.values())
        self.data, self.judge, self.cut, self.each_step = data, judge, cut, each_step
        self.keeping, self.shares = keep, shares
        for loss in self.objectives if shares.weighted else ():
            loss.leave_uncaptured("its data have weights")
        self.moving = Moving(self.parameters, keep.decay) if isinstance(keep, Average) else None
        self.clip_grad_norm, self.seed = clip_grad_norm, seed
        self.device = self.parameters[0].device
        self.order = torch.Generator().manual_seed(seed + 1)
        self.progress = Progress()
        self.guard = WeightGuard(math.ceil(data.num_batches(cut.size) / cut.accumulate))
        self.best = weights_of(self.trained)
        self._named, self._found = named, list(found)
        self._frozen = [m for m in found if not any(p.requires_grad for p in m.parameters())]
        self._resumable: dict[str, Any] = {}
        self._fixed: dict[str, Any] = {}
        self._settings_now: list[Any] | None = None
        # As they are before a step is taken: schedulers and objectives change their own.
        self._settings = {
            "optimizer settings": settings_of_optimizer(optimizer),
            "scheduler settings": description(scheduler and scheduler.state_dict()),
            "objective": [loss.description for loss in self.objectives],
            "model": settings_of_modules(found),
            "clip_grad_norm": clip_grad_norm,
            "validation settings": None if judge is None else judge.settings,
            "scheduler by": "step" if each_step else "epoch",
        }

    def one_epoch(self) -> None:
        """One pass over the data, and what it did to the validation loss."""
        train_loss = self._train()
        require_finite([_norm(self.parameters).item()], ["norm of the weights"], self._where("the end"))
        with self.as_kept():
            judged = Judgment(train_loss, {}, train_loss, []) if self.judge is None else self._validate(self.judge)
            require_finite([judged.loss, judged.score], ["validation loss", "monitored metric"], self._where("the end"))
            self._forget_best_of_another_loss()
            chosen = weights_of(self.trained) if self._is_kept(judged) else None
        if self.scheduler is not None and not self.each_step:
            step: Callable[..., None] = self.scheduler.step
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            step(judged.score) if plateau else step()
        past = self.progress
        past.epoch += 1
        past.train_loss.append(train_loss)
        if self.judge is not None:
            past.validation_loss.append(judged.loss)
            for name, value in judged.metrics.items():
                past.metrics.setdefault(name, []).append(value)
        # What is no basis for a choice among weights ends no training either.
        if not self.guard.doubtful and (judged.score < past.best_loss or self.judge is None):
            past.best_epoch, past.best_loss, past.best_parts = past.epoch, judged.score, judged.parts
        if chosen is not None:
            self.best, past.kept_epoch = chosen, past.epoch

    def _forget_best_of_another_loss(self) -> None:
        """Losses before a setting was changed, as callbacks do that let a weight grow, cannot be compared."""
        settings = [settings_of_modules(self._found), None]
        given = self.groups[0].loss.given
        if not isinstance(given, FunctionType):
            settings[1] = description(given)
        if self._settings_now is not None and settings != self._settings_now:
            self.progress.best_loss, self.progress.best_parts = math.inf, []
        self._settings_now = settings

    def _is_kept(self, judged: Judgment) -> bool:
        """Whether these weights take the place of those kept so far: the last wins where noise decides."""
        if self.guard.doubtful:
            return False
        if self.judge is None or self.keeping != "best":
            return True
        past = self.progress
        return within_error(judged.score, judged.parts, past.best_loss, past.best_parts, nats=self.judge.nats)

    def as_kept(self) -> AbstractContextManager[None]:
        """Within this block the modules hold what is kept of an epoch: the weights, or their average."""
        return nullcontext() if self.moving is None else self.moving.in_place()

    def _train(self) -> float:
        """One pass over the data; the mean loss of the first group's steps."""
        num, total = 0, 0.0
        batches = self.data.batches(self.cut.size, self.device, self.order)
        for step, parts in enumerate(parts_of_steps(batches, self.cut.accumulate), start=1):
            losses = []
            for group in self.groups:
                if step == 1 or len(self.groups) > 1:
                    self._set_modes(group)
                losses.append(self._step(group, step, parts))
            if self.moving is not None:
                self.moving.update()
            if self.each_step and self.scheduler is not None:
                self.scheduler.step()
            size = sum(map(num_data_of, parts))
            total, num = total + losses[0] * size, num + size
        return total / num

    def _set_modes(self, group: Group) -> None:
        for module in self.trained:
            module.eval()
        for module in group.modules:
            module.train()
        # A tilted model that learns may hold a base model that does not.
        for module in self._frozen:
            module.eval()

    def _step(self, group: Group, step: int, parts: Sequence[Tensors]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(group, step, parts)
        if len(self.groups) > 1:
            self._drop_gradients_outside(group)
        if not group.checked:
            group.check_reach(self._named)
        norm = _norm([p.grad for p in group.parameters if p.grad is not None])
        sizes, draws = self.guard.taken()
        # One transfer from the device for all of them.
        value, norm_value, *ess = torch.stack([t.to(loss) for t in (loss, norm, *sizes)]).tolist()
        where = self._where(f"step {step}")
        require_finite([value, norm_value], ["loss", "norm of the gradient"], where)
        self.guard.judge(ess, draws, where)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(group.parameters, self.clip_grad_norm, norm)
        self.optimizer.step()
        return value

    def _gradients(self, group: Group, step: int, parts: Sequence[Tensors]) -> Tensor:
        """Put the gradients of a step into the parameters; return its loss per datum."""
        losses, size, epoch = [], sum(map(num_data_of, parts)), self.progress.epoch
        for index, part in enumerate(parts):
            batch = self.shares.arguments(part)
            stream = (self.seed, epoch, step, group.name, *([index] if index else []))
            # A part of the step is its share of the mean over the parts.
            divisor = self.shares.divisor(part) * size / num_data_of(part)
            counting = self.shares.counting(part)
            with lone_datum_told(part), weights_reported_to(self.guard.listen), log_z_stream(*stream), counting:
                losses.append(group.loss.gradients(group.parameters, *batch, num=divisor, epoch=epoch + 1))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _drop_gradients_outside(self, group: Group) -> None:
        """What some ELBOs leave in other groups; an optimizer passes over parameters without gradient."""
        inside = {id(p) for p in group.parameters}
        for p in self.parameters:
            if id(p) not in inside:
                p.grad = None

    def _validate(self, judge: Judge) -> Judgment:
        for module in self.trained:
            module.eval()
        return judge(self.progress.epoch + 1)

    def _where(self, place: str) -> str:
        return f"in epoch {self.progress.epoch + 1} at {place}"

    def kept(self) -> str:
        """Which weights the modules hold after :meth:`restore_best`, in words."""
        kept = self.progress.kept_epoch
        why = ", the best so far" if self.keeping == "best" else ""
        return f"kept the weights of epoch {kept}{why}" if kept else "kept the initial weights"

    def restore_best(self) -> None:
        """Put the best weights so far into the modules."""
        load_into(self.trained, self.best)

    @property
    def resumes_after(self) -> int:
        """The epoch after which a checkpoint written now goes on."""
        return int(self._resumable.get("epoch", 0))

    def keep(self, wanted: bool) -> None:
        """Copy the state at the end of an epoch: what an interruption in the next one resumes from."""
        # A checkpoint ends with the last epoch that is worth going on from.
        if not wanted or self.guard.doubtful:
            return
        on_gpu = self.device.type == "cuda"
        self._resumable = {
            **asdict(self.progress),
            "weights": weights_of(self.trained),
            "best": self.best,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "order": self.order.get_state(),
            "objectives": [loss.state() for loss in self.objectives],
            "weight_sizes": list(self.guard.recent),
            "average": None if self.moving is None else self.moving.state(),
            "last settings": self._settings_now,
        }

    def save(self, path: str | Path) -> None:
        """Write the state kept last."""
        seconds = {"seconds": self.progress.seconds}
        write({**self._resumable, **seconds, **self._identity()}, path, kind="checkpoint")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        if not self._fixed:
            turns = len(self.groups) > 1
            self._fixed = {
                "classes": [type(module).__name__ for module in self.trained],
                "optimizer_class": type(self.optimizer).__name__,
                "scheduler_class": type(self.scheduler).__name__,
                "seed": self.seed,
                "batch_size": self.cut.size,
                "accumulate": self.cut.accumulate,
                "data": self.data.fingerprint(),
                "validation": None if self.judge is None else self.judge.source.fingerprint(),
                "keep": repr(self.keeping),
                "frozen weights": frozen_weights(self._found, self.parameters),
                # None for one group, which is what older files have.
                "groups": [[self.trained.index(m) for m in g.modules] for g in self.groups] if turns else None,
                **self._settings,
            }
        return self._fixed

    def load(self, saved: dict[str, Any], path: str) -> None:
        """Continue from a checkpoint; raise CheckpointError where it is not one of this run."""
        for part in ("weights", "best"):
            require_match(saved.get("classes"), saved.get(part), self.trained, path)
        for name, value in self._identity().items():
            for difference in differences(saved.get(name), value, name):
                raise CheckpointError(
                    f"{path} is of another run: {difference}; "
                    "call fit with the arguments of the run that wrote it, or start anew with resume=False"
                )
        require_possible(saved, path, self.trained, self.optimizer)
        try:
            fields = {name: saved[name] for name in Progress.__dataclass_fields__}
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
            self.order.set_state(saved["order"])
            states = saved.get("objectives", [None] * len(self.objectives))
            for loss, state in zip(self.objectives, states, strict=True):
                loss.load_state(state)
            self.guard.recent.extend(saved.get("weight_sizes", []))
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            if self.moving is not None:
                self.moving.load_state(saved["average"])
            self._settings_now = saved["last settings"]
            self.progress = Progress(**fields)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); restore it from a copy, or start anew with resume=False"
            ) from error
        self.best = saved["best"]
        load_into(self.trained, saved["weights"])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([t.detach() for t in tensors], foreach=None)
