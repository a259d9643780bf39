"""One resumable run of training: its modules, optimiser, data and random states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from pyro_ebm.checkpoints import load_into, require_match, weights_of, write
from pyro_ebm.errors import CheckpointError
from pyro_ebm.parameters import forked_rng
from pyro_ebm.training_data import Tensors, batches, checksum

__all__ = ["NonFiniteError", "Objective", "Progress", "Run"]

_REMEDY = (
    "lower the learning rate, pass clip_grad_norm, or look for what is unbounded: an energy unbounded "
    "below (missing log Z), a scale that goes to zero"
)


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight became NaN or infinite; the text says where and what to do."""


class Objective:
    """A Pyro ELBO or a function as a loss to take gradients of.

    Args:
        objective: None for ``Trace_ELBO()``, a Pyro ELBO, or ``(model, guide, *batch) -> scalar``.
        model: the model.
        guide: the guide.
    """

    def __init__(self, objective: Any, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        for name, item in {"model": model, "guide": guide}.items():
            if not callable(item):
                raise TypeError(f"{name} must be callable, got {type(item).__name__}")
        objective = pyro.infer.Trace_ELBO() if objective is None else objective
        is_elbo = isinstance(objective, pyro.infer.ELBO)
        if isinstance(objective, type) or not (is_elbo or callable(objective)):
            got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
            raise TypeError(
                f"objective must be a Pyro ELBO or a function (model, guide, *batch) -> loss, got {got}; "
                "pass an instance such as pyro.infer.Trace_ELBO()"
            )
        self.elbo = objective
        self.args = (model, guide)
        self._loss = getattr(objective, "differentiable_loss", None) if is_elbo else objective

    def value(self, *batch: Tensor) -> float:
        """The loss summed over the batch, without gradients."""
        with torch.no_grad():
            loss = self.elbo.loss(*self.args, *batch) if self._loss is None else self._tensor(*batch)
        return float(loss)

    def gradients(self, parameters: list[nn.Parameter], *batch: Tensor) -> Tensor:
        """Put the gradients of the loss per datum into the parameters; return that loss."""
        num = batch[0].shape[0]
        if self._loss is not None:
            loss = self._tensor(*batch) / num
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on any parameter that is to be trained; check train=, and that "
                    "model and guide use these modules without detach() or no_grad()"
                )
            loss.backward(inputs=parameters)
            return loss.detach()
        # RenyiELBO, TraceGraph_ELBO and their like insist on doing the backward pass themselves.
        model, guide = self.args
        loss = self.elbo.loss_and_grads(_with_parameter_site(model), guide, *batch)
        for p in parameters:
            if p.grad is not None:
                p.grad /= num
        return torch.as_tensor(loss, dtype=parameters[0].dtype, device=parameters[0].device) / num

    def _tensor(self, *batch: Tensor) -> Tensor:
        loss = self._loss(*self.args, *batch)  # type: ignore[misc]
        # An ELBO in which nothing is learned or stochastic is a plain number.
        loss = torch.as_tensor(loss) if isinstance(loss, int | float) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective must return one number, the loss summed over the batch, got {got}; add .sum()"
            )
        return loss.reshape(())


def _with_parameter_site(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with a site of type "param": without one these ELBOs skip the backward pass."""

    def marked(*args: Any) -> Any:
        _parameter_site(torch.zeros(()), name="_fit")
        return model(*args)

    return marked


# Unlike pyro.param, it leaves the global parameter store alone.
_parameter_site = effectful(lambda value: value, type="param")


@dataclass
class Progress:
    """How far a run has come; epochs count from 1, and epoch 0 is before training."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)

    def latest(self) -> dict[str, float]:
        """Losses of the last epoch, for the progress bar."""
        curves = {"train": self.train_loss, "validation": self.validation_loss}
        return {name: curve[-1] for name, curve in curves.items() if curve}


class Run:
    """Modules, optimiser, data and random states of one call of ``fit``.

    Args:
        loss: what is minimised.
        trained: the modules that learn, in the order of the checkpoint.
        parameters: those of their parameters that learn.
        optimizer: over these parameters.
        data: to train on.
        validation: to validate on, or None.
        batch_size: data per step.
        clip_grad_norm: largest norm of a gradient, or None.
        seed: of the order of the data and the noise of the validation.
        named: whether the user named the modules, so that each must matter to the loss.
        frozen: modules that must stay in ``eval()`` mode.
        scheduler: of the learning rate, stepped after each epoch, or None.
    """

    def __init__(
        self,
        loss: Objective,
        trained: Sequence[nn.Module],
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        data: Tensors,
        validation: Tensors | None,
        *,
        batch_size: int,
        clip_grad_norm: float | None,
        seed: int,
        named: bool,
        frozen: Sequence[nn.Module] = (),
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.loss, self.trained, self.parameters, self.optimizer = loss, trained, parameters, optimizer
        self.data, self.validation, self.batch_size = data, validation, batch_size
        self.clip_grad_norm, self.seed = clip_grad_norm, seed
        self.device = parameters[0].device
        self.order = torch.Generator().manual_seed(seed + 1)
        self.progress = Progress()
        self.best = weights_of(trained)
        self._named, self._checked, self._frozen = named, False, frozen
        self._resumable: dict[str, Any] = {}
        self._fixed: dict[str, Any] = {}

    def one_epoch(self) -> None:
        """One pass over the data, and what it did to the validation loss."""
        train_loss = self._train()
        self._require_finite([_norm(self.parameters).item()], ["norm of the weights"], "the end")
        loss = train_loss if self.validation is None else self._validate(self.validation)
        self._require_finite([loss], ["validation loss"], "the end")
        best = weights_of(self.trained) if loss < self.progress.best_loss else None
        if self.scheduler is not None:
            step: Callable[..., None] = self.scheduler.step
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            step(loss) if plateau else step()
        past = self.progress
        past.epoch += 1
        past.train_loss.append(train_loss)
        if self.validation is not None:
            past.validation_loss.append(loss)
        if best is not None:
            self.best, past.best_epoch, past.best_loss = best, past.epoch, loss

    def _train(self) -> float:
        for module in self.trained:
            module.train()
        # A tilted model that learns may hold a base model that does not.
        for module in self._frozen:
            module.eval()
        num, total = self.data[0].shape[0], 0.0
        order = torch.randperm(num, generator=self.order)
        for step, batch in enumerate(batches(self.data, self.batch_size, self.device, order), start=1):
            total += self._step(step, batch) * batch[0].shape[0]
        return total / num

    def _step(self, step: int, batch: Tensors) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss.gradients(self.parameters, *batch)
        if not self._checked:
            self._check_reach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = _norm(gradients)
        # One transfer from the device for both numbers.
        values = torch.stack([loss, norm.to(loss)]).tolist()
        self._require_finite(values, ["loss", "norm of the gradient"], f"step {step}")
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, norm)
        self.optimizer.step()
        return values[0]

    def _check_reach(self) -> None:
        """At the first step: do the gradients reach everything that was named to be trained?"""
        for index, module in enumerate(self.trained):
            if self._named and all(p.grad is None for p in module.parameters()):
                raise ValueError(
                    f"the loss does not depend on train[{index}] ({type(module).__name__}); leave it out of "
                    "train=, or check that model and guide use this very module"
                )
        if all(p.grad is None for p in self.parameters):
            raise ValueError("the loss does not depend on any parameter that is to be trained; check train=")
        self._checked = True

    def _validate(self, data: Tensors) -> float:
        for module in self.trained:
            module.eval()
        # The same noise at each epoch, so that a difference between epochs is one between weights.
        with forked_rng(self.seed + 2):
            total = sum(self.loss.value(*batch) for batch in batches(data, self.batch_size, self.device))
        return total / data[0].shape[0]

    def _require_finite(self, values: list[float], names: list[str], where: str) -> None:
        for value, name in zip(values, names, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the {name} became {value} in epoch {self.progress.epoch + 1} at {where}; {_REMEDY}"
                )

    def kept(self) -> str:
        """Which weights the modules hold after :meth:`restore_best`, in words."""
        best = self.progress.best_epoch
        return f"kept the weights of epoch {best}, the best so far" if best else "kept the initial weights"

    def restore_best(self) -> None:
        """Put the best weights so far into the modules."""
        load_into(self.trained, self.best)

    def keep(self, wanted: bool) -> None:
        """Copy the state at the end of an epoch: what an interruption in the next one resumes from."""
        if not wanted:
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
        }

    def save(self, path: str | Path) -> None:
        """Write the state kept last."""
        seconds = {"seconds": self.progress.seconds}
        write({**self._resumable, **seconds, **self._identity()}, path, kind="checkpoint")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        if not self._fixed:
            self._fixed = {
                "classes": [type(module).__name__ for module in self.trained],
                "optimizer_class": type(self.optimizer).__name__,
                "scheduler_class": type(self.scheduler).__name__,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "data": checksum(self.data),
                "validation": checksum(self.validation),
            }
        return self._fixed

    def load(self, saved: dict[str, Any], path: str) -> None:
        """Continue from a checkpoint; raise CheckpointError where it is not one of this run."""
        for part in ("weights", "best"):
            require_match(saved.get("classes"), saved.get(part), self.trained, path)
        for name, value in self._identity().items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"{path} is of another run: its {name} is {saved.get(name)!r}, here it is {value!r}; "
                    "call fit with the arguments of the run that wrote it, or start anew with resume=False"
                )
        try:
            fields = {name: saved[name] for name in Progress.__dataclass_fields__}
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
            self.order.set_state(saved["order"])
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            self.progress = Progress(**fields)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); restore it from a copy, or start anew with resume=False"
            ) from error
        self.best = saved["best"]
        load_into(self.trained, saved["weights"])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([t.detach() for t in tensors], foreach=None)
