"""A single chain moved by hand, step by step, as Pyro's kernels can be: ``setup``, then ``sample``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import init_to_uniform
from torch import Tensor

from pyro_ebm.inference.density.capture import captured
from pyro_ebm.inference.density.gradients import check_gradients
from pyro_ebm.inference.density.potential import potential_density
from pyro_ebm.inference.density.strategy import points_by_strategy
from pyro_ebm.inference.kernels.adaptation import Adaptation, find_step_size, initial_tuning
from pyro_ebm.inference.kernels.kernel import State
from pyro_ebm.randomness import random_seed

if TYPE_CHECKING:
    from pyro_ebm.inference.kernels.kernel import Kernel

__all__ = ["OneChain"]

_TRIES = 100


class OneChain:
    """The state of one chain under a kernel, with its warm-up.

    Args:
        kernel: what moves it.
        warmup_steps: how many of the first steps adapt the kernel.
        args: arguments of the model.
        kwargs: its keyword arguments.
        start: unconstrained values by site; by the kernel's ``init_strategy`` when ``None``.

    Attributes:
        density: the target.
        start: where the chain began, site -> unconstrained value.
    """

    def __init__(
        self,
        kernel: Kernel,
        warmup_steps: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        start: Mapping[str, Tensor] | None,
    ) -> None:
        self.kernel, self.warmup_steps = kernel, warmup_steps
        if kernel.potential_fn is not None:
            if start is None:
                raise ValueError("set kernel.initial_params = {name: value} before setup(): a potential has no shapes")
            self.density = potential_density(kernel.potential_fn, start, kernel.given_transforms)
        else:
            self.density = kernel.density(*args, **kwargs)
        self._generator = torch.Generator().manual_seed(random_seed(None, None))
        with torch.no_grad():
            u = self._first(start)
            self._function = captured(self.density.value_and_grad, u)
            self._step = kernel.bind(self._function, self._generator)
            log_prob, grad = self._function(u)
            check_gradients(self.density, log_prob, grad)
            self._state = State(u, log_prob, grad, initial_tuning(kernel, u))
            if kernel.adapt_step_size and kernel.given_step_size is None and warmup_steps:
                size, _ = find_step_size(kernel, self._state, self._function, self._generator)
                self._state = self._state._replace(tuning=self._state.tuning._replace(step_size=size))
        dense = kernel.blocks(self.density).mask(u)
        self._adaptation = Adaptation(kernel, self._state, warmup_steps, dense=dense) if warmup_steps else None
        self.start = self._values()
        self._last: Mapping[str, Tensor] | None = self.start
        self.accepted, self.count, self.divergences = 0.0, 0, list[int]()

    def _first(self, start: Mapping[str, Tensor] | None) -> Tensor:
        if start is not None:
            return self._point(start)
        for _ in range(_TRIES):
            u = points_by_strategy(self.density, 1, self.kernel.init_strategy or init_to_uniform)
            if bool(self.density(u).isfinite().all()):
                return u
        raise ValueError(f"no point of {_TRIES} found by init_strategy has a finite density: set kernel.initial_params")

    def _point(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.density.pack({name: value[None] for name, value in values.items()}).detach().to(self.density.like)

    def _values(self) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.density.split(self._state.u).items()}

    def forget(self) -> None:
        """Compute the density anew at the next step."""
        self._last = None

    @torch.no_grad()
    def step(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step from the values given to the next."""
        if values is not self._last:
            u = self._point(values)
            log_prob, grad = self._function(u)
            self._state = self._state._replace(u=u, log_prob=log_prob, grad=grad)
        before = self._state
        self._state, info = self._step(before)
        self.count += 1
        if self._adaptation is not None and self.count <= self.warmup_steps:
            tuning = self._adaptation.update(before, info)
            done = self.count == self.warmup_steps
            self._state = self._state._replace(tuning=self._adaptation.finish() if done else tuning)
        else:
            self.accepted += float(info.acceptance_rate.mean())
            if bool(info.diverging.any()):
                self.divergences.append(self.count - self.warmup_steps - 1)
        self._last = moved = self._values()
        return moved

    def found(self) -> dict[str, Any]:
        """Step size and mass matrix of the moment."""
        tuning, blocks = self._state.tuning, self.kernel.blocks(self.density)
        return {
            "step_size": float(tuning.step_size),
            "inverse_mass_matrix": blocks.by_site(tuning.inverse_mass, tuning.factor),
        }
