"""What the batched Markov kernels share: state, what a step reports, and their target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.density.model_target import VECTORIZE

__all__ = ["Info", "Kernel", "State", "Step", "Tuning", "ValueAndGrad", "uniforms"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, ...]]
_MAX_ENERGY_ERROR = 1000.0  # as Stan: a trajectory this far off no longer follows the dynamics


class Tuning(NamedTuple):
    """What adaptation sets and a step reads.

    Args:
        step_size: (*batch,).
        inverse_mass: (*batch, dim), diagonal: the scale of each coordinate, squared.
        trajectory_length: 0-d, in units of the coordinates' scales.
    """

    step_size: Tensor
    inverse_mass: Tensor
    trajectory_length: Tensor


class State(NamedTuple):
    """What the next step needs.

    Args:
        u: (chains, *batch, dim) points in unconstrained space.
        log_prob: (chains, *batch).
        grad: (chains, *batch, dim).
        tuning: of the kernel.
        iteration: steps taken.
    """

    u: Tensor
    log_prob: Tensor
    grad: Tensor
    tuning: Tuning
    iteration: int = 0


class Info(NamedTuple):
    """What diagnostics and adaptation need of a step.

    Args:
        acceptance_rate: (chains, *batch), the probability of acceptance.
        diverging: (chains, *batch), the energy error was above 1,000 or not finite.
        energy: (chains, *batch), of the state at the start of the step, momentum included.
        n_steps: gradient evaluations per chain.
        proposal: (chains, *batch, dim).
        velocity: (chains, *batch, dim) at the proposal, in units of the coordinates' scales.
        time: (*batch,), length of the trajectory.
    """

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: int
    proposal: Tensor
    velocity: Tensor
    time: Tensor


Step = Callable[[State], tuple[State, Info]]


@dataclass(frozen=True)
class Kernel(ABC):
    """A Markov kernel that moves many chains at once.

    Args:
        target: a Pyro model, a distribution, or a :class:`LogDensity`.
        step_size: to start from; a search finds one when ``None``.
        adapt_step_size: adapt it during warm-up, over all chains, one for each element of an independent plate.
        adapt_mass_matrix: scale coordinates by their standard deviation over all chains.
        target_accept_prob: what the step size is adapted to.
        independent: name of a plate of the model whose elements are targets of their own, each with its
            own acceptance and step size.
        vectorize: how the model is run on many chains; see :meth:`LogDensity.from_model`.
    """

    target: Any
    _: KW_ONLY
    step_size: float | None = None
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    target_accept_prob: float = 0.8
    independent: str | None = None
    vectorize: str = "plate"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not callable(self.target) and not isinstance(self.target, Distribution):
            raise TypeError(
                f"target must be a Pyro model, a distribution or a LogDensity, got {type(self.target).__name__}"
            )
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie between 0 and 1, got {self.target_accept_prob}")
        if self.vectorize not in VECTORIZE:
            raise ValueError(f"vectorize must be one of {VECTORIZE}, got {self.vectorize!r}")

    def density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The target for these arguments of the model."""
        if isinstance(self.target, LogDensity | Distribution):
            if args or kwargs:
                raise ValueError(
                    f"the target of this kernel is a {type(self.target).__name__}, which takes no arguments; give "
                    f"the model itself to the kernel, or leave the arguments out"
                )
            if self.independent is not None:
                raise ValueError("independent= belongs to a model: use LogDensity.from_model(model, independent=...)")
            return self.target if isinstance(self.target, LogDensity) else LogDensity.from_distribution(self.target)
        return LogDensity.from_model(
            self.target, *args, independent=self.independent, vectorize=self.vectorize, model_kwargs=kwargs
        )

    def initial_step_size(self, dim: int) -> float:
        """Where the search for a step size begins, for coordinates of unit scale."""
        return float(dim) ** -0.25

    def leapfrog_length(self, step_size: Tensor) -> Tensor:
        """The leapfrog step that belongs to a step size."""
        return step_size

    def initial_trajectory_length(self) -> float:
        """Where the adaptation of the trajectory length begins."""
        return 1.0

    def average_acceptance(self, acceptance_rate: Tensor) -> Tensor:
        """The statistic over chains that ``target_accept_prob`` is about, (chains, *batch) to (*batch,)."""
        return acceptance_rate.mean(0)

    @abstractmethod
    def bind(self, value_and_grad: ValueAndGrad, generator: torch.Generator) -> Step:
        """The kernel on a density: ``step(state) -> (state, info)``, without side effects but on the generator.

        Args:
            value_and_grad: maps (chains, *batch, dim) to log densities (chains, *batch) and gradients.
            generator: source of all randomness.
        """


def uniforms(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers of the shape of ``like``."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def normals(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def transition(
    state: State, end: tuple[Tensor, Tensor, Tensor], log_ratio: Tensor, accepted: Tensor
) -> tuple[State, Tensor]:
    """The state after a proposal that some chains take, and which chains diverged.

    Args:
        state: before.
        end: proposed points, their log densities and gradients.
        log_ratio: log of the Metropolis ratio, (chains, *batch); NaN where the proposal is out of bounds.
        accepted: which chains take it.
    """
    possible = log_ratio.isfinite()  # an infinite density, once entered, is never left
    diverging = ~(possible & (log_ratio > -_MAX_ENERGY_ERROR))
    accepted = accepted & possible
    u, log_prob, grad = end
    moved = accepted[..., None]
    after = State(
        torch.where(moved, u, state.u),
        torch.where(accepted, log_prob, state.log_prob),
        torch.where(moved, grad, state.grad),
        state.tuning,
        state.iteration + 1,
    )
    return after, diverging
