"""Training steps from a recorded graph: the loss without Pyro's handlers around it, where the numbers are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, fx, nn

from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.modules import modules_of
from pyro_ebm.training.identity import settings_of_modules
from pyro_ebm.training.recording import NotRecordable, elbo_in_tensors, memory_of, python_state, recorded

__all__ = ["CapturedLoss", "RecordedSteps"]

_COMPARISONS = 2  # before a graph is used
_EVERY = 256  # steps between two later ones


class CapturedLoss:
    """A loss whose steps are made from a graph recorded once: ``fit(..., objective=CapturedLoss())``.

    Pyro runs a model through its handlers at each step, which costs as much as the tensor operations of a small
    model. The operations of one step, forward and backward, are the same at the next, so they are recorded and played
    back; random draws stay draws of the global generator, made anew at each step.

    What a run gives is the same bit for bit. The first epoch is made as ever, and so is the first step of each later
    one. A graph is used after it gave the very numbers (loss, gradients, buffers, state of the generator) of two steps
    made as ever, on two minibatches, and is compared again at the first step of each epoch and every 256 steps. So
    epochs of one or two steps, and the smaller last minibatch of an epoch, gain nothing. A step whose loss is not
    finite, or at which a distribution finds its arguments out of bounds, is made again as ever.

    A loss goes on uncaptured, with a :class:`TrainingWarning` and the reason in ``problem``, where it reads values in
    Python (``if``, ``.item()``), samples log Z, has data with weights, draws without reparametrization, changes tensors
    other than buffers, or counts its calls. Where a setting of a module changes between epochs (``beta``, ``train()``),
    it is recorded anew, which takes as long as some hundred steps.

    What no comparison can see: a model that follows something in Python (a clock, a file, an object behind another)
    that stood still at the steps compared and moves at others, until the next comparison; that then ends in a warning
    that says how many steps it concerns. What a model does besides (its own checks of data, prints, lists it fills) is
    done at the steps that are compared, and in the first epoch, which sees all data.

    Args:
        objective: None for ``Trace_ELBO()``, a ``Trace_ELBO``, or a function ``(model, guide, *batch) -> scalar``
            without an argument ``epoch`` and without a state of its own.

    Attributes:
        problem: why steps are made uncaptured; None where nothing stood in the way.
        steps: how many were played back so far.

    Example:
        >>> import torch
        >>> from pyro_ebm import VAE, CapturedLoss, fit
        >>> vae, loss = VAE((4,), latent_dim=1, hidden=(8,)), CapturedLoss()
        >>> result = fit(vae.model, vae.guide, torch.rand(64, 4), objective=loss, epochs=3, batch_size=8, seed=0,
        ...              validation=None, progress=False)
        >>> loss.problem, loss.steps
        (None, 12)
    """

    def __init__(self, objective: Any = None) -> None:
        self.objective = Trace_ELBO() if objective is None else objective
        self.problem: str | None = None
        self.steps = 0

    def refuse(self, problem: str) -> None:
        """Go on uncaptured, and say so once."""
        if self.problem is None:
            self.problem = problem
            warn_user(f"the loss is not captured: {problem}; its steps go on without a graph", TrainingWarning)


@dataclass
class _Step:
    """One kind of step: the same parameters, shapes and divisor."""

    parameters: list[nn.Parameter]  # held, so that no others come to their place in memory
    graph: fx.GraphModule | None = None
    compared: int = 0
    since: int = 0  # steps played back since the last comparison
    epoch: int = 0
    settings: Any = None
    clone: tuple[bool, ...] = ()


class RecordedSteps:
    """The gradients of a loss, from a graph where there is one.

    Args:
        captured: what the user asked for.
        loss: maps a minibatch to the loss; what is recorded of it.
        model: the model.
        guide: the guide.
    """

    def __init__(
        self, captured: CapturedLoss, loss: Callable[..., Tensor], model: Callable[..., Any], guide: Callable[..., Any]
    ) -> None:
        captured.problem, captured.steps = None, 0
        self.captured, self._args = captured, (model, guide)
        if type(captured.objective) is Trace_ELBO:
            self._loss = lambda *batch: elbo_in_tensors(captured.objective, model, guide, *batch)
        else:
            self._loss = loss
        self._modules = modules_of(model, guide)
        self._buffers = [buffer for module in self._modules for buffer in module.buffers()]
        self._kinds: dict[tuple[Any, ...], _Step] = {}
        self._first_epoch: int | None = None

    def gradients(
        self, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], num: float, epoch: int,
        eager: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Add the gradients of the loss over ``num`` to the parameters; return that loss.

        Args:
            parameters: that learn.
            batch: the minibatch.
            num: what the loss is divided by.
            epoch: of the step, which is the same for all of an epoch.
            eager: does the same uncaptured.
        """
        if self._first_epoch is None:
            self._first_epoch = epoch
        if self.captured.problem is not None or epoch == self._first_epoch:
            return eager()
        kind = (*map(id, parameters), num, *((t.shape, t.stride(), t.dtype, t.device) for t in batch))
        step = self._kinds.setdefault(kind, _Step(parameters))
        if step.epoch != epoch:
            return self._first_of_epoch(step, parameters, batch, num, epoch, eager)
        if step.graph is None or step.compared < _COMPARISONS or step.since >= _EVERY:
            return self._compared(step, parameters, batch, num, eager)
        return self._played(step, parameters, batch, eager)

    def _first_of_epoch(
        self, step: _Step, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], num: float, epoch: int,
        eager: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        settings = self._settings(parameters)
        if settings != step.settings:
            step.graph, step.compared = None, 0
        step.epoch, step.settings = epoch, settings
        return eager() if step.graph is None else self._compared(step, parameters, batch, num, eager)

    def _settings(self, parameters: Sequence[Tensor]) -> Any:
        """What may change between epochs and is no tensor."""
        modes = [sub.training for module in self._modules for sub in module.modules()]
        learning = [p.requires_grad for module in self._modules for p in module.parameters()]
        state = python_state(*self._args, self.captured.objective)[2:]
        return settings_of_modules(self._modules), modes, learning, state, len(parameters)

    def _played(
        self, step: _Step, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], eager: Callable[[], Tensor]
    ) -> Tensor:
        assert step.graph is not None
        before = _generators(parameters[0].device)
        with torch.no_grad():
            loss, valid, *gradients = step.graph(*batch)
            # What torch and Pyro say to numbers that fail, they say where they meet them.
            if not math.isfinite(loss.item()) or not (valid is None or bool(valid)):
                _set_generators(before)
                with torch.enable_grad():
                    return eager()
            for parameter, gradient, clone in zip(parameters, gradients, step.clone, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is not None:
                    parameter.grad.add_(gradient)
                else:
                    parameter.grad = _copy(gradient, parameter) if clone else gradient
        step.since += 1
        self.captured.steps += 1
        return loss  # type: ignore[no-any-return]

    def _compared(
        self, step: _Step, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], num: float,
        eager: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Make a step as ever, and see whether a graph gives the same."""
        device = parameters[0].device
        before = _generators(device), [buffer.clone() for buffer in self._buffers]
        state = python_state(*self._args, self.captured.objective)
        with _own_gradients(parameters):
            loss = eager()
            if python_state(*self._args, self.captured.objective) != state:
                self.captured.refuse("it changes something in Python with each call (a counter, a list, a held tensor)")
                return loss
            after = _generators(device), [buffer.clone() for buffer in self._buffers]
            wanted = [None if p.grad is None else p.grad.clone() for p in parameters]

            def again() -> None:
                self._set_back(*before)

            try:
                again()
                if step.graph is None:
                    step.graph = recorded(lambda *b: self._loss(*b).reshape(()) / num, parameters, batch, self._buffers)
                    again()
                    step.clone = _shared(step.graph, parameters, batch)
                    again()
                with torch.no_grad():
                    found, _, *gradients = step.graph(*batch)
                drawn = _generators(device)
                same = _same([found, *gradients, *drawn, *self._buffers], [loss, *wanted, *after[0], *after[1]])
                problem = None if same else "its graph gives other numbers"
            except Exception as error:  # torch raises all kinds where operations depend on values
                same, problem = False, _said(error)
            self._set_back(*after)
        if problem is not None:
            used = f" (the last {step.since} steps were made from it)" if step.since else ""
            self.captured.refuse(problem + used)
        step.compared, step.since = step.compared + 1, 0
        return loss

    @torch.no_grad()
    def _set_back(self, generators: list[Tensor], buffers: list[Tensor]) -> None:
        _set_generators(generators)
        for buffer, value in zip(self._buffers, buffers, strict=True):
            buffer.copy_(value)


def _said(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    return said if isinstance(error, NotRecordable) else f"{type(error).__name__}: {said}"


def _same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """The same bits; NaN is none, since such a step ends a training."""
    return len(ours) == len(theirs) and all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that a step may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@contextmanager
def _own_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of what is done within the block alone, which are then added to those from before."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, old in zip(parameters, before, strict=True):
            if old is not None:
                p.grad = old if p.grad is None else old.add_(p.grad)


@torch.no_grad()
def _shared(graph: fx.GraphModule, parameters: Sequence[nn.Parameter], batch: tuple[Tensor, ...]) -> tuple[bool, ...]:
    """Which gradients must be copied: their memory is that of something else, or is laid out in another way."""
    _, _, *gradients = graph(*batch)
    kept = {memory_of(t) for t in (*graph.parameters(), *graph.buffers(), *batch, *parameters)}
    kept |= {memory_of(value) for value in vars(graph).values() if isinstance(value, Tensor)}
    places = [None if g is None else memory_of(g) for g in gradients]
    return tuple(
        g is not None and (place in kept or places.count(place) > 1 or g.stride() != p.stride())
        for g, p, place in zip(gradients, parameters, places, strict=True)
    )


def _copy(gradient: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
