"""A population of particles under way from base to target: temperatures, resampling, moves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import STOPS, OutOfTime, finishing, stopped_by
from pyro_ebm.errors import ImproperError, InferenceError
from pyro_ebm.estimates import log_mean_exp
from pyro_ebm.inference.annealing.tempering import Path, Points
from pyro_ebm.inference.kernels.adaptation import Adaptation, find_step_size, initial_tuning
from pyro_ebm.inference.kernels.collapse import Collapse
from pyro_ebm.inference.kernels.kernel import Info, Kernel, State, Tuning
from pyro_ebm.inference.resampling import effective, next_step, systematic

__all__ = ["Pace", "Population", "Rung", "anneal"]

_MOVED, _MOVED_AT_END = 0.4, 0.1  # correlation with where particles were before the moves
_STALLED = 20  # temperatures without getting anywhere
_MOST_EVALUATIONS = 100_000  # of each particle; an ordinary way takes 300
_RUNAWAY = (1000.0, 10.0)  # nats above the median log density, and for each coordinate, at which no equilibrium is
_GAIN = 1.0  # of the log step size for too high an acceptance


@dataclass(frozen=True)
class Pace:
    """How fast particles go from temperature to temperature; arguments as in ``SMC``."""

    target_ess: float = 0.8
    num_moves: int | None = None
    max_moves: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.target_ess < 1:
            raise ValueError(f"target_ess must lie between 0 and 1, got {self.target_ess}")
        for name in ("num_moves", "max_moves"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value)


class Rung(NamedTuple):
    """One temperature: where it was, what the weights were worth there, and how particles moved.

    Args:
        beta: inverse temperature (islands, *batch).
        tuning: of the kernel there.
        ess: share of the particles, of all islands, the weights were worth, (*batch).
        acceptance: averaged.
        moves: of each particle.
    """

    beta: Tensor
    tuning: Tuning
    ess: Tensor
    acceptance: float
    moves: int


@dataclass
class Population:
    """Particles under way.

    Args:
        points: where they are.
        beta: inverse temperature (islands, *batch), the same for all islands.
        log_z: log of the estimate of Z so far, (islands, *batch), in double precision.
        tuning: of the kernel.
        ladder: the temperatures so far.
        info: of the last move.
        iteration: of the kernel.
        ancestors: which draw of the base each particle descends from, (particles, islands, *batch).
        stopped: what ended the way early, ``"interrupted"``, ``"max_seconds"`` or ``"max_evaluations"``.
        left_at: the inverse temperature from which particles were then weighted to the target in one step.
        jump_ess: share of the particles that those weights were worth.
    """

    points: Points
    beta: Tensor
    log_z: Tensor
    tuning: Tuning
    ladder: list[Rung] = field(default_factory=list)
    info: Info | None = None
    iteration: int = 0
    ancestors: Tensor | None = None
    stopped: str | None = None
    left_at: float = 1.0
    jump_ess: float = 1.0


def anneal(
    path: Path,
    kernel: Kernel,
    points: Points,
    settings: Pace,
    *,
    generator: torch.Generator,
    bar: tqdm | None = None,
) -> Population:
    """Carry particles that follow the base to the target.

    Ctrl-C, a limit of time, or too many evaluations of the density end the way early: then the particles are weighted
    to the target in one step, which is as right, if worse, and resampled; ``stopped`` says so.

    Args:
        path: from the base to the target.
        kernel: how particles move.
        points: draws of the base, (particles, islands, *batch, dim).
        settings: when to resample and how much to move.
        generator: source of randomness.
        bar: shows the progress.

    Raises:
        InferenceError: the target is zero at all particles of an island, or is improper.
    """
    beta = points.log_base.new_zeros(points.log_base.shape[1:])
    tuning, names = initial_tuning(kernel, points.u), _numbered(len(points.u), beta)
    population = Population(points, beta, beta.double(), tuning, ancestors=names)
    mover = _Mover(path, kernel, settings, generator)
    try:
        while bool((population.beta < 1).any()):
            ess = _reweight(population, settings.target_ess, generator)
            _check_progress(population)
            mover.move(population, ess)
            if bar is not None and not bar.disable:
                rung = population.ladder[-1]
                bar.set_postfix(
                    {"beta": f"{float(rung.beta.min()):.3g}", "accept": f"{rung.acceptance:.2f}", "moves": rung.moves},
                    refresh=False,
                )
                bar.update()
    except STOPS as stop:
        with finishing():
            _jump(population, stopped_by(stop), generator)
    return population


def _numbered(num: int, beta: Tensor) -> Tensor:
    """Particles of islands, told apart: (num, islands, *batch)."""
    names = torch.arange(num * len(beta), device=beta.device)
    return names.reshape(num, len(beta), *[1] * (beta.ndim - 1)).expand(num, *beta.shape)


class _TooFar(OutOfTime):
    """So many evaluations that the target must be out of reach."""

    word = "max_evaluations"


def _jump(population: Population, stopped: str, generator: torch.Generator) -> None:
    """Weight the particles to the target in one step and resample them."""
    population.stopped, population.left_at = stopped, float(population.beta.min())
    if population.left_at < 1:
        ess = _reweight(population, 0.0, generator)
        population.jump_ess = float(ess.min())
        population.ladder.append(Rung(population.beta, population.tuning, ess, 0.0, 0))


def _reweight(population: Population, target_ess: float, generator: torch.Generator) -> Tensor:
    """Go to the next temperature and resample; returns the share of the particles the weights were worth."""
    log_ratio = _checked(population.points.log_ratio(), population.beta)
    # One step for all islands: each with a step of its own would choose it after its own luck, a bias in log Z.
    step = next_step(log_ratio.flatten(0, 1), 1 - population.beta[0], target_ess).expand_as(population.beta)
    log_weights = torch.where(step > 0, step * log_ratio, 0.0)
    # Not beta + step: one minus beta plus beta need not be one.
    beta = torch.where(step < 1 - population.beta, population.beta + step, torch.ones_like(step))
    log_z = population.log_z + log_mean_exp(log_weights.double())
    index = systematic(log_weights, generator)
    points, ancestors = population.points.take(index), population.ancestors
    if ancestors is not None:
        ancestors = ancestors.gather(0, index)
    # Together, whatever interrupts.
    population.beta, population.log_z, population.points, population.ancestors = beta, log_z, points, ancestors
    pooled = log_weights.flatten(0, 1)
    return effective(pooled) / len(pooled)


def _checked(log_ratio: Tensor, beta: Tensor) -> Tensor:
    """Log ratios of the elements under way; those that have arrived get zeros."""
    log_ratio = torch.where(beta < 1, log_ratio, 0.0)
    dead = (log_ratio == -torch.inf).all(0)
    if bool(dead.any()):
        raise InferenceError(
            f"the target is zero (or NaN) at all {len(log_ratio)} particles of {_named(dead)}: the base never meets "
            f"it; give a guide or base that does, draw more particles, or check the energy (is it +inf everywhere?)"
        )
    infinite = (log_ratio == torch.inf).sum()
    if int(infinite):
        raise ImproperError(
            f"the log density is +inf at {int(infinite)} particles: the energy is unbounded below; bound it, or check "
            f"the model"
        )
    return log_ratio


def _named(flags: Tensor) -> str:
    """``island(s) 0, 3``, with the data where there are any."""
    islands = flags.reshape(len(flags), -1).any(1).nonzero().flatten().tolist()
    data = flags.any(0).nonzero().flatten().tolist() if flags.ndim > 1 else []
    where = f" (data {', '.join(map(str, data[:10]))})" if data else ""
    return f"island(s) {', '.join(map(str, islands[:10]))}{where}"


def _check_progress(population: Population) -> None:
    ladder = population.ladder
    if len(ladder) < _STALLED:
        return
    before = ladder[-_STALLED].beta
    if bool(((population.beta < 1) & (population.beta < 1.01 * before)).any()):
        raise ImproperError(
            f"stuck at inverse temperature {float(population.beta.min()):.3g} after {len(ladder)}: the target seems "
            f"improper (an energy unbounded below?); bound the energy, or start from a guide nearer the target"
        )


def _check_proper(state: State, beta: Tensor) -> None:
    """Particles in equilibrium differ by few nats a coordinate; where exp(-E) grows without end some run away."""
    log_prob = torch.where(state.log_prob.isfinite(), state.log_prob, -torch.inf)
    gap = float((log_prob.amax(0) - log_prob.median(0).values).nan_to_num(nan=0.0).max())
    if gap > _RUNAWAY[0] + _RUNAWAY[1] * state.u.shape[-1]:
        raise ImproperError(
            f"particles run away at inverse temperature {float(beta.min()):.3g}, to log densities {gap:.3g} above "
            f"their median: the target seems improper, without a Z (an energy unbounded below?); bound the energy"
        )


class _Mover:
    """Moves particles at one temperature after the other, and learns how."""

    def __init__(self, path: Path, kernel: Kernel, settings: Pace, generator: torch.Generator) -> None:
        self.path, self.kernel, self.settings, self.generator = path, kernel, settings, generator
        self._lengths: Adaptation | None = None
        self._collapse = Collapse()
        self._evaluations = 0

    def move(self, population: Population, ess: Tensor) -> None:
        """Moves the particles until they have left their copies; adds a rung to the ladder."""
        function = self.path.value_and_grad(population.beta)
        state = population.points.state(population.beta, self._rescaled(population), population.iteration)
        first = not population.ladder
        if first and self.kernel.adapt_step_size and self.kernel.given_step_size is None:
            size, _ = find_step_size(self.kernel, state, function, self.generator)
            state = state._replace(tuning=state.tuning._replace(step_size=_of_others(size.log()).exp()))
        if self._lengths is None:
            self._lengths = Adaptation(replace(self.kernel, adapt_step_size=False, adapt_mass_matrix=False), state, 0)
        step = self.kernel.bind(function, self.generator)
        limit = _MOVED_AT_END if bool((population.beta == 1).all()) else _MOVED
        start, acceptance, moves = _standardized(state), 0.0, 0
        while moves < (self.settings.num_moves or self.settings.max_moves):
            before = state
            state, info = step(before)
            moves += 1
            acceptance += float(info.acceptance_rate.mean())
            _check_proper(state, population.beta)
            self._evaluations += info.n_steps
            if self._evaluations > _MOST_EVALUATIONS:
                raise _TooFar
            state = state._replace(tuning=self._retuned(before, info))
            self._collapse.update(state, "particles")
            if self.settings.num_moves is None and _likeness(start, _standardized(state)) < limit:
                break
        population.points = self.path.at(state.u)
        population.tuning, population.info, population.iteration = state.tuning, info, state.iteration
        population.ladder.append(Rung(population.beta, state.tuning, ess, acceptance / moves, moves))

    def _rescaled(self, population: Population) -> Tuning:
        """Scales of an island from the spread of the particles on all others."""
        # With its own the kernel depends on what it moves: a bias in log Z of the order of one over its particles.
        if not self.kernel.adapt_mass_matrix:
            return population.tuning
        variance = population.points.u.var(0)
        known = (variance > torch.finfo(variance.dtype).tiny) & variance.isfinite()
        variance = torch.where(known, variance, population.tuning.inverse_mass)
        return population.tuning._replace(inverse_mass=_of_others(variance.log()).exp())

    def _retuned(self, before: State, info: Info) -> Tuning:
        """Step sizes nearer to the acceptance wanted, by that of the other islands; the length as ChEES learns it."""
        size, length = before.tuning.step_size, before.tuning.trajectory_length
        if self._lengths is not None:
            length = self._lengths.update(before, info).trajectory_length
        if self.kernel.adapt_step_size:
            surplus = self.kernel.average_acceptance(info.acceptance_rate) - self.kernel.target_accept_prob
            # From the mean of all: what corrects an island's own size says nothing of that size, which would drift off.
            size = (size.log().mean(0) + _GAIN * _of_others(surplus)).exp()
        return before.tuning._replace(step_size=size, trajectory_length=length)


def _of_others(values: Tensor) -> Tensor:
    """Mean over all other islands, (islands, ...); a single island has none, and gets its own."""
    islands = len(values)
    return values if islands == 1 else (values.sum(0) - values) / (islands - 1)


def _standardized(state: State) -> Tensor:
    """Coordinates and log densities of the particles, mean 0 and variance 1 within each island."""
    x = torch.cat([state.u, state.log_prob[..., None]], -1)
    centered = x - x.mean(0)
    return centered / centered.square().mean(0).sqrt()


def _likeness(start: Tensor, now: Tensor) -> float:
    """Correlation between then and now in the worst coordinate, averaged over islands."""
    correlation = (start * now).mean(0).mean(0).abs()
    return float(torch.where(correlation.isnan(), 1.0, correlation).max())
