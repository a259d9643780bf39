"""What training minimizes: a Pyro ELBO or any other loss, as gradients, as a number, and as saved state."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from pyro_ebm.training.capture import CapturedLoss, RecordedSteps
from pyro_ebm.training.identity import description

__all__ = ["Objective"]


class Objective:
    """A Pyro ELBO or a function as a loss to take gradients of.

    Args:
        objective: None for ``Trace_ELBO()``, a Pyro ELBO, or ``(model, guide, *batch) -> scalar``. It may have
            ``validation(model, guide, *batch) -> scalar``, a measure of fit in place of a loss that is none, and
            ``state_dict()`` with ``load_state_dict()``, what it carries from one step to the next. Where it has an
            argument ``epoch``, it is told the epoch, counted from 1; where ``in_nats`` is true of it, its loss is
            minus a log likelihood, as that of an ELBO is.
        model: the model.
        guide: the guide.
        name: of the argument, for messages.
    """

    def __init__(
        self, objective: Any, model: Callable[..., Any], guide: Callable[..., Any], name: str = "objective"
    ) -> None:
        for role, item in {"model": model, "guide": guide}.items():
            if not callable(item):
                raise TypeError(f"{role} must be callable, got {type(item).__name__}")
        captured = objective if isinstance(objective, CapturedLoss) else None
        objective = objective if captured is None else captured.objective
        objective = pyro.infer.Trace_ELBO() if objective is None else objective
        is_elbo = isinstance(objective, pyro.infer.ELBO)
        if isinstance(objective, type) or not (is_elbo or callable(objective)):
            got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
            raise TypeError(
                f"{name} must be a Pyro ELBO or a function (model, guide, *batch) -> loss, got {got}; "
                "pass an instance such as pyro.infer.Trace_ELBO()"
            )
        if type(objective).__name__.startswith("Jit"):
            raise TypeError(
                f"{name} is a {type(objective).__name__}, which compiles with torch.jit (deprecated) and takes no "
                f"parameters of modules; use {type(objective).__name__.removeprefix('Jit')}()"
            )
        self.given, self.name = objective, name
        self.args = (model, guide)
        self.description = description(objective)
        self._is_elbo = is_elbo
        self._loss = getattr(objective, "differentiable_loss", None) if is_elbo else objective
        self._measure = getattr(objective, "validation", None)
        self.in_nats = bool(getattr(objective, "in_nats", is_elbo))
        self._told = {name: _takes_epoch(each) for name, each in {"loss": self._loss, "measure": self._measure}.items()}
        self._stateful = all(hasattr(objective, part) for part in ("state_dict", "load_state_dict"))
        self._recorded = None if captured is None else self._recorder(captured)

    def _recorder(self, captured: CapturedLoss) -> RecordedSteps:
        """What plays steps back."""
        given = type(self.given).__name__
        if self._told["loss"] or self._stateful or (self._is_elbo and type(self.given) is not pyro.infer.Trace_ELBO):
            raise ValueError(
                f"{self.name}: CapturedLoss takes Trace_ELBO() or a function without an argument epoch and without "
                f"a state_dict(), got {given}; pass it as it is"
            )
        return RecordedSteps(captured, lambda *batch: self._tensor("loss", batch, 1), *self.args)

    def leave_uncaptured(self, problem: str) -> None:
        """Take no graph: where what a step depends on is no argument of the loss."""
        if self._recorded is not None:
            self._recorded.captured.refuse(problem)

    @property
    def is_measure(self) -> bool:
        """Whether a lower loss means a better fit: not where the objective brings another measure along."""
        return self._measure is None

    @property
    def changes(self) -> bool:
        """Whether losses of different epochs cannot be compared: the objective changes with the epoch."""
        return self._told["loss"] if self._measure is None else self._told["measure"]

    def value(self, *batch: Tensor, epoch: int = 1) -> float:
        """The loss summed over the batch, without gradients."""
        with torch.no_grad():
            return float(self.visit(*batch, epoch=epoch))

    def visit(self, *batch: Tensor, epoch: int = 1) -> Tensor | float:
        """The loss summed over the batch, with gradients if the caller has them on, but to no parameter."""
        if self._is_elbo:  # what is differentiable may be more than an ELBO can do without gradients
            loss: Tensor | float = _of_model(self.given.loss(*self.args, *batch))
            return loss
        return self._tensor("loss", batch, epoch)

    def validation(self, *batch: Tensor, epoch: int = 1) -> float:
        """The measure of fit summed over the batch, without gradients: the loss itself unless told otherwise."""
        if self._measure is None:
            return self.value(*batch, epoch=epoch)
        with torch.no_grad():
            return float(self._tensor("measure", batch, epoch))

    def gradients(self, parameters: list[nn.Parameter], *batch: Tensor, num: float, epoch: int = 1) -> Tensor:
        """Add the gradients of the loss over ``num`` to the parameters; return that loss."""
        if self._recorded is None:
            return self._eager(parameters, *batch, num=num, epoch=epoch)
        eager = functools.partial(self._eager, parameters, *batch, num=num, epoch=epoch)
        return self._recorded.gradients(parameters, batch, num, epoch, eager)

    def _eager(self, parameters: list[nn.Parameter], *batch: Tensor, num: float, epoch: int) -> Tensor:
        if self._loss is not None:
            loss = self._tensor("loss", batch, epoch) / num
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on any parameter that is to be trained; check train=, and that "
                    "model and guide use these modules without detach() or no_grad()"
                )
            loss.backward(inputs=parameters)
            return loss.detach()
        # RenyiELBO, TraceGraph_ELBO and their like insist on doing the backward pass themselves.
        model, guide = self.args
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        loss = _of_model(self.given.loss_and_grads(_with_parameter_site(model), guide, *batch))
        for p, old in zip(parameters, before, strict=True):
            if p.grad is not None:
                p.grad /= num
            p.grad = old if p.grad is None else p.grad if old is None else p.grad + old
        return torch.as_tensor(loss, dtype=parameters[0].dtype, device=parameters[0].device) / num

    def state(self) -> Any:
        """A copy of what the objective carries from step to step; None where it carries nothing."""
        return copy.deepcopy(self.given.state_dict()) if self._stateful else None

    def load_state(self, state: Any) -> None:
        """Put a copy made by :meth:`state` back."""
        if (state is not None) != self._stateful:
            had, has = ("has" if present else "has not" for present in (state is not None, self._stateful))
            raise ValueError(f"its {self.name} {had} a state of its own, the one given here {has}")
        if self._stateful:
            self.given.load_state_dict(copy.deepcopy(state))

    def _tensor(self, which: str, batch: tuple[Tensor, ...], epoch: int) -> Tensor:
        function: Any = self._loss if which == "loss" else self._measure
        loss = function(*self.args, *batch, **({"epoch": epoch} if self._told[which] else {}))
        # An ELBO in which nothing is learned or stochastic is a plain number.
        loss = torch.as_tensor(loss) if isinstance(loss, int | float) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{self.name} must return one number, the loss summed over the batch, got {got}; add .sum()"
            )
        return loss.reshape(())


def _of_model(loss: Any) -> Any:
    """The loss of the model, of which reweighted wake-sleep makes a pair with that of the guide."""
    return loss[0] if isinstance(loss, tuple) else loss


def _takes_epoch(function: Any) -> bool:
    """Whether a function has an argument ``epoch``."""
    if function is None or isinstance(getattr(function, "__self__", None), pyro.infer.ELBO):
        return False
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions written in C
        return False
    return "epoch" in parameters


def _with_parameter_site(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with a site of type "param": without one these ELBOs skip the backward pass."""

    def marked(*args: Any) -> Any:
        _parameter_site(torch.zeros(()), name="_fit")
        return model(*args)

    return marked


# Unlike pyro.param, it leaves the global parameter store alone.
_parameter_site = effectful(lambda value: value, type="param")
