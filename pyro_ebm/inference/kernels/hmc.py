"""Hamiltonian Monte Carlo on many chains at once: trajectories of fixed length, and ChEES, which learns it."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.foreign import named_elsewhere
from pyro_ebm.inference.kernels.kernel import (
    MAX_ENERGY_ERROR,
    Info,
    Kernel,
    State,
    Step,
    Tuning,
    ValueAndGrad,
    normals,
    transition,
    uniforms,
)

__all__ = ["HMC", "ChEES", "Stride", "hamiltonian_step", "leapfrog"]


class Stride:
    """How far a leapfrog step goes in each coordinate; computed anew only when the tuning changes.

    Args:
        kernel: whose steps they are.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tuning: Tuning | None = None

    def update(self, tuning: Tuning) -> Stride:
        if tuning is not self._tuning:
            self._tuning = tuning
            self.length = self._kernel.leapfrog_length(tuning.step_size)  # (*batch,)
            if tuning.factor is None:
                self.full = self.length[..., None] * tuning.inverse_mass.sqrt()  # (*batch, dim)
            else:
                self.full = self.length[..., None, None] * tuning.factor  # (*batch, dim, dim)
            self.half = 0.5 * self.full
            self.dense = tuning.factor is not None
            # The elements of an independent plate move together. Their median step size decides: one datum whose
            # chains cannot move, and whose step size shrinks to nothing, has no say.
            self.num_steps = float(tuning.trajectory_length) / float(self.length.median())
        return self


def leapfrog(
    value_and_grad: ValueAndGrad, state: State, velocity: Tensor, stride: Stride, num_steps: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Follow Hamiltonian dynamics for ``num_steps`` steps.

    Args:
        value_and_grad: log density and gradient.
        state: where the trajectory begins.
        velocity: (chains, *batch, dim), standard normal, in units of the coordinates' scales.
        stride: of the state's tuning.
        num_steps: gradient evaluations per chain.

    Returns:
        Points, log densities and gradients at the end, and the velocity there.
    """
    u, grad = state.u, state.grad
    drift, kick = (_times, _times_transposed) if stride.dense else (torch.addcmul, torch.addcmul)
    velocity = kick(velocity, stride.half, grad)
    for index in range(num_steps):
        u = drift(u, stride.full, velocity)
        log_prob, grad = value_and_grad(u)
        velocity = kick(velocity, stride.full if index < num_steps - 1 else stride.half, grad)
    return (u, log_prob, grad), velocity


def _times(start: Tensor, factor: Tensor, vector: Tensor) -> Tensor:
    """``start + factor @ vector``, of many chains."""
    return start + (factor @ vector[..., None])[..., 0] if factor.ndim > 2 else torch.addmm(start, vector, factor.mT)


def _times_transposed(start: Tensor, factor: Tensor, vector: Tensor) -> Tensor:
    return _times(start, factor.mT, vector)


def hamiltonian_step(
    value_and_grad: ValueAndGrad,
    state: State,
    generator: torch.Generator,
    *,
    stride: Stride,
    num_steps: int,
    adjusted: bool = True,
) -> tuple[State, Info]:
    """Draw velocities, follow the dynamics, accept or reject; if not ``adjusted`` take all but falls off a cliff."""
    velocity = normals(state.u, generator)
    energy = 0.5 * velocity.square().sum(-1) - state.log_prob
    end, arrival = leapfrog(value_and_grad, state, velocity, stride, num_steps)
    log_ratio = energy + end[1] - 0.5 * arrival.square().sum(-1)
    acceptance = torch.where(log_ratio.isfinite(), log_ratio.clamp(max=0.0).exp(), 0.0)
    # Of many coordinates each has a part in the ratio: a bound on the whole would stop the dynamics of images.
    bound = -MAX_ENERGY_ERROR * state.u.shape[-1]
    accepted = uniforms(acceptance, generator) < acceptance if adjusted else log_ratio > bound
    after, diverging = transition(state, end, log_ratio, accepted)
    return after, Info(acceptance, diverging, energy, num_steps, end[0], arrival, num_steps * stride.length)


@checked
@named_elsewhere
@dataclass(eq=False, repr=False)
class HMC(Kernel):
    r"""Hamiltonian Monte Carlo with trajectories of a fixed length, one number of steps for all chains.

    As in Pyro, ``num_steps`` says how long a trajectory is: ``step_size * num_steps``, with a step size of 1 when
    none is given. While the step size adapts, the length stays and the number of steps follows; without
    ``adapt_step_size`` the number stays as it is.

    Args of :class:`Kernel`, and:
        trajectory_length: step size times number of steps, in units of the target's scale; after ``pi / 2``, the
            default, the draws of a Gaussian are independent. Goes before ``num_steps``.
        num_steps: the number of steps of the step size given.
        max_steps: at most so many.

    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """

    _: KW_ONLY
    trajectory_length: float | None = None
    num_steps: int | None = None
    max_steps: int = 1000

    name: ClassVar[str] = "batched_hmc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectory_length is not None and not self.trajectory_length > 0:
            raise ValueError(f"trajectory_length must be positive, got {self.trajectory_length}")

    def whole_steps(self, num_steps: float, iteration: int) -> int:
        """Leapfrog steps of one trajectory, from trajectory length by step size."""
        # To the nearest: two steps of 1.5 instead of 1.05 would go half a period of a Gaussian, to the mirror image.
        return round(num_steps)

    def initial_trajectory_length(self) -> float:
        if self.trajectory_length is not None:
            return self.trajectory_length
        if self.num_steps is not None:
            return (1.0 if self.given_step_size is None else self.given_step_size) * self.num_steps
        return math.pi / 2

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps, where it does not follow from the length."""
        return None if self.adapt_step_size or self.trajectory_length is not None else self.num_steps

    def bind(self, value_and_grad: ValueAndGrad, generator: torch.Generator) -> Step:
        stride = Stride(self)

        def step(state: State) -> tuple[State, Info]:
            stride.update(state.tuning)
            steps = self.whole_steps(stride.num_steps, state.iteration)
            num_steps = max(1, min(self.max_steps, steps)) if self.fixed_steps is None else self.fixed_steps
            return hamiltonian_step(value_and_grad, state, generator, stride=stride, num_steps=num_steps)

        return step


@checked
@named_elsewhere
@dataclass(eq=False, repr=False)
class ChEES(HMC):
    r"""Jittered Hamiltonian Monte Carlo whose trajectory length is learned by many chains together.

    The length maximizes the change in the estimator of the expected square,
    :math:`\tfrac14 E[(|u' - \bar u|^2 - |u - \bar u|^2)^2]` in units of the target's scale; each step goes a
    quasi-random share of it. The step size brings the harmonic mean over chains of the
    acceptance probability to ``target_accept_prob``. Meant for tens to thousands of chains: with fewer than
    four the criterion says little.

    Args of :class:`Kernel`, and:
        trajectory_length: to start from.
        max_steps: at most so many leapfrog steps.
        adapt_trajectory: learn the length during warm-up.
        learning_rate: of the logarithm of the length.

    Reference:
        Hoffman, Radul, Sountsov (2021), An Adaptive-MCMC Scheme for Setting Trajectory Lengths in
        Hamiltonian Monte Carlo.
    """

    _: KW_ONLY
    target_accept_prob: float = 0.651
    trajectory_length: float | None = 1.0
    adapt_trajectory: bool = True
    learning_rate: float = 0.025

    name: ClassVar[str] = "chees"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None:
            raise ValueError("num_steps: ChEES learns the length of its trajectories; use HMC for a fixed number")

    def whole_steps(self, num_steps: float, iteration: int) -> int:
        return math.ceil(_van_der_corput(iteration + 1) * num_steps - 1e-6)

    def average_acceptance(self, acceptance_rate: Tensor) -> Tensor:
        # One chain that always rejects must not shrink the steps of all to nothing: a chain weighs as much as a
        # hundred others at most, and one that left the support says nothing about the step size.
        possible = acceptance_rate > 0
        reciprocals = torch.where(possible, acceptance_rate.clamp(min=0.01).reciprocal(), 0.0)
        return possible.sum(0) / reciprocals.sum(0).clamp(min=1.0)


def _van_der_corput(index: int) -> float:
    """The quasi-random sequence 1/2, 1/4, 3/4, 1/8, ...: the bits of ``index`` mirrored at the point."""
    bits = bin(index)[:1:-1]
    return int(bits, 2) / 2 ** len(bits)
