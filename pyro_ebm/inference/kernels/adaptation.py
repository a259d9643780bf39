"""Warm-up of batched kernels: step size, diagonal mass and trajectory length, learned by all chains together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from pyro_ebm.inference.kernels.hmc import ChEES, Stride, hamiltonian_step
from pyro_ebm.inference.kernels.kernel import Info, Kernel, State, Tuning, ValueAndGrad
from pyro_ebm.inference.kernels.scales import RunningCovariance, RunningVariance, standardized

__all__ = ["Adaptation", "Rescue", "find_step_size", "initial_tuning"]

_MAX_DOUBLINGS = 40
_STEP_SIZES = (1e-8, 1e8)  # beyond them nothing moves, or nothing is accepted: numbers would run over
_TIME_TO_SETTLE = 10  # steps; dual averaging begins with steps ten times too large
_PATIENCE, _STUCK = 20, 1e-3  # steps, and mean acceptance below which a chain is stuck
_OTHER_SCALES = 4.0  # ratio of variances from which a length learned before is no guide
_EARLY_STEPS = 64  # of a trajectory before the first scales are learned: longer ones cost most and teach least
_ENOUGH_CHAINS = 16  # for the spread of the starting points to say something about scales


class Adaptation:
    """Learns the tuning of a kernel during warm-up, one step at a time.

    Step sizes by dual averaging; scales from the variance over chains and steps (of many chains: over chains, step by
    step, so that their way from far starts does not count), in windows that double; the trajectory length of
    :class:`ChEES` by stochastic gradient ascent.

    Args:
        kernel: what is adapted.
        state: where the chains start.
        warmup_steps: number of updates to come.
        dense: (dim, dim), ones where two coordinates share a block of the mass matrix; ``None``: it is diagonal.
    """

    def __init__(self, kernel: Kernel, state: State, warmup_steps: int, *, dense: Tensor | None = None) -> None:
        self.kernel = kernel
        self.tuning = state.tuning
        self._num_steps = warmup_steps
        self._windows = _windows(warmup_steps)
        self._dense = dense
        self._within = len(state.u) >= _ENOUGH_CHAINS
        self._spread = self._new_spread()
        self._count = 0
        self._length = state.tuning.trajectory_length
        # While scales are those of the starts.
        self._early = min(self._windows[1], default=0) if kernel.adapt_mass_matrix and kernel.adapt_step_size else 0
        self._restart()
        self._trajectory = None
        if isinstance(kernel, ChEES) and kernel.adapt_trajectory:
            self._trajectory = _TrajectoryLength(kernel, state.tuning)

    def _new_spread(self) -> RunningVariance:
        if self._dense is None:
            return RunningVariance(within=self._within)
        return RunningCovariance(self._dense, within=self._within)

    def _restart(self) -> None:
        """Dual averaging anew: other scales need another step size."""
        # As in Pyro and Stan, tries ten times larger steps first: too small ones cost most.
        self._averaging = DualAveraging(prox_center=self.tuning.step_size.log() + math.log(10.0))

    def update(self, before: State, info: Info) -> Tuning:
        """The tuning of the next step, from the state before the last one and what that one reported."""
        self._count += 1
        step_size, length = self.tuning.step_size, self._length
        if self.kernel.adapt_step_size:
            acceptance = self.kernel.average_acceptance(info.acceptance_rate)
            self._averaging.step(self.kernel.target_accept_prob - acceptance)
            step_size = self._averaging.get_state()[0].exp().clamp(*_STEP_SIZES)
        # A trajectory that was cut short says nothing about the length it was cut from.
        if self._trajectory is not None and float(self.tuning.trajectory_length) >= float(length):
            self._length = length = self._trajectory.update(before, info)
        if self._count < self._early:
            length = torch.minimum(length, _EARLY_STEPS * step_size.median())
        self.tuning = self.tuning._replace(step_size=step_size, trajectory_length=length)
        if self.kernel.adapt_mass_matrix:
            self._learn_scales(before)
        return self.tuning

    def _learn_scales(self, state: State) -> None:
        inside, ends = self._windows
        if self._count - 1 in inside:
            self._spread.add(state.u)
        if self._count - 1 in ends and self._spread.count > 1:
            before, self.tuning = self.tuning, self._spread.tuned(self.tuning)
            if self._trajectory is not None:
                self._length = self._trajectory.rescale(before.inverse_mass, self.tuning.inverse_mass)
            self.tuning = self.tuning._replace(step_size=self._smoothed_step_size(), trajectory_length=self._length)
            self._spread = self._new_spread()
            if self._num_steps - self._count >= _TIME_TO_SETTLE:
                self._restart()

    def _smoothed_step_size(self) -> Tensor:
        if not self.kernel.adapt_step_size or self._averaging._t == 0:
            return self.tuning.step_size
        return self._averaging.get_state()[1].exp().clamp(*_STEP_SIZES)

    def finish(self) -> Tuning:
        """The tuning for the draws: averages over the end of the warm-up."""
        length = self._length if self._trajectory is None else self._trajectory.average()
        return self.tuning._replace(step_size=self._smoothed_step_size(), trajectory_length=length)


class Rescue:
    """Moves chains that accept nothing, far out where other chains' steps are too large, to where others are.

    Only during warm-up, and not at its end: each chain then forgets where it was put.

    Args:
        warmup_steps: number of updates to come.

    Attributes:
        count: how often a chain (of a datum) was moved.
        origin: the chain from whose start each one came, (chains, *batch, 1); ``None`` before any was moved.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self._every, self._last = max(_PATIENCE, warmup_steps // 10), warmup_steps - warmup_steps // 5
        self._steps = 0
        self._accepted: Any = 0.0  # a tensor from the first step on

    def update(self, state: State, info: Info, generator: torch.Generator) -> State:
        """The state of the next step."""
        self._steps += 1
        self._accepted = self._accepted + info.acceptance_rate
        if self._steps % self._every or self._steps > self._last:
            return state
        stuck = self._accepted < _STUCK * self._every
        self._accepted = 0.0
        stuck = stuck & ~stuck.all(0)  # where all are stuck there is nowhere to go
        if not bool(stuck.any()):
            return state
        self.count += int(stuck.sum())
        pick = _others(stuck, generator)
        if self.origin is None:
            numbers = torch.arange(len(stuck), device=stuck.device)
            self.origin = numbers.reshape(-1, *[1] * stuck.ndim).expand(*stuck.shape, 1)
        self.origin = pick(self.origin)
        return state._replace(u=pick(state.u), log_prob=pick(state.log_prob), grad=pick(state.grad))


def _others(stuck: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """What puts the values of others, drawn at random, in place of those of stuck chains (chains, *batch)."""
    columns = stuck.reshape(len(stuck), -1)
    index = torch.multinomial((~columns).double().T, len(stuck), replacement=True, generator=generator).T

    def pick(values: Tensor) -> Tensor:
        flat = values.reshape(*columns.shape, -1)
        chosen = flat[index, torch.arange(columns.shape[1], device=index.device)]
        return torch.where(columns[..., None], chosen, flat).reshape(values.shape)

    return pick


class _TrajectoryLength:
    """Gradient ascent on the ChEES criterion, on the logarithm of the length."""

    def __init__(self, kernel: ChEES, tuning: Tuning) -> None:
        self._log = tuning.trajectory_length.log().clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self._log], lr=kernel.learning_rate, betas=(0.0, 0.95), maximize=True)
        self._average = self._log.detach().clone()
        self._first = math.log(kernel.initial_trajectory_length())
        self._count = 0

    def update(self, before: State, info: Info) -> Tensor:
        gradient = _chees_gradient(before, info)
        if bool(gradient.isfinite()):
            self._log.grad = gradient
            self._optimizer.step()
        self._count += 1
        weight = self._count**-0.5  # forgets the way there
        self._average += weight * (self._log.detach() - self._average)
        return self._log.detach().exp()

    def rescale(self, before: Tensor, after: Tensor) -> Tensor:
        """Under other scales: a coordinate whose scale was too small needed as much longer trajectories.

        Of many data the median one speaks, and small changes are noise; the length never falls below where it began.
        """
        ratio = (after / before).amax(-1).median()
        if ratio > _OTHER_SCALES:
            with torch.no_grad():
                for log_length in (self._log, self._average):
                    log_length -= torch.minimum(0.5 * ratio.log(), (log_length - self._first).clamp(min=0.0))
        return self._log.detach().exp()

    def average(self) -> Tensor:
        return self._average.exp()


def _chees_gradient(before: State, info: Info) -> Tensor:
    """Of the criterion with respect to the log length, over chains, weighted by acceptance, summed over data.

    The weights are not normalized: with few chains their ratio would favor short trajectories.
    """
    rate = info.acceptance_rate[..., None]
    # A diverged trajectory may have ended anywhere, NaN included; its weight is zero.
    end = torch.where(rate > 0, info.proposal, before.u)
    start = standardized(before.u - before.u.mean(0), before.tuning)
    end = standardized(end - torch.lerp(before.u, end, rate).mean(0), before.tuning)
    change = end.square().sum(-1) - start.square().sum(-1)
    along = torch.where(info.acceptance_rate > 0, (end * info.velocity).sum(-1), 0.0)
    return (info.acceptance_rate * info.time * change * along).sum() / len(before.u)


def _windows(warmup_steps: int) -> tuple[range, set[int]]:
    """Steps that count for the scales, and the steps after which scales are set anew.

    Windows double in length as in Stan. Many chains learn scales from few steps, so the first is short.
    """
    first, last = warmup_steps // 10, warmup_steps - warmup_steps // 5
    ends, size = [], max(10, warmup_steps // 20)
    start = first
    while start < last:
        end = start + size if start + 3 * size <= last else last
        ends.append(end - 1)
        start, size = end, 2 * size
    return range(first, last), set(ends)


def initial_tuning(kernel: Kernel, u: Tensor) -> Tuning:
    """Scales from the spread of many starting points, a step size to begin the search with."""
    inverse_mass = torch.ones_like(u[0])
    if kernel.adapt_mass_matrix and len(u) >= _ENOUGH_CHAINS:
        spread = RunningVariance()
        spread.add(u)
        # Smaller ones may be of points that happen to be near each other.
        inverse_mass = torch.where(spread.regularized() > 1e-3, spread.regularized(), inverse_mass)
    first = kernel.initial_step_size(u.shape[-1]) if kernel.given_step_size is None else kernel.given_step_size
    step_size = u.new_full(u.shape[1:-1], first)
    return Tuning(step_size, inverse_mass, u.new_tensor(kernel.initial_trajectory_length()))


def find_step_size(
    kernel: Kernel, state: State, value_and_grad: ValueAndGrad, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Double or halve step sizes until a single step is accepted about as often as wanted.

    Returns:
        Step sizes (*batch,), and the number of steps it took.
    """
    step_size = state.tuning.step_size
    stride, direction = Stride(kernel), torch.zeros_like(step_size)
    searching = torch.ones_like(step_size, dtype=torch.bool)
    for count in range(_MAX_DOUBLINGS):
        tuned = state._replace(tuning=state.tuning._replace(step_size=step_size))
        _, info = hamiltonian_step(
            value_and_grad, tuned, generator, stride=stride.update(tuned.tuning), num_steps=1
        )
        wanted = torch.where(info.acceptance_rate.mean(0) > kernel.target_accept_prob, 1.0, -1.0)
        direction = torch.where(direction == 0, wanted, direction)
        searching = searching & (wanted == direction)
        if not bool(searching.any()):
            return step_size, count + 1
        step_size = torch.where(searching, step_size * torch.pow(2.0, direction), step_size)
    return step_size, _MAX_DOUBLINGS
