"""Annealed importance sampling forward and backward: a lower and an upper bound on log Z."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import STOPS, finishing, limited, stopped_by
from pyro_ebm.entry import entry
from pyro_ebm.errors import InferenceError, interruption_told, report
from pyro_ebm.estimates import BoundedEstimate, log_mean_exp
from pyro_ebm.inference.annealing.population import Pace, Population, anneal
from pyro_ebm.inference.annealing.smc import early_text
from pyro_ebm.inference.annealing.tempering import Annealing, Path, Points, path_to
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.kernels.kernel import Kernel, Step, Tuning
from pyro_ebm.inference.kernels.langevin import ULA
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.randomness import one_source, random_seed, streams

__all__ = ["Schedule", "annealed_importance", "bridge", "schedule_of"]

_SETTLING_MOVES = 10
_BISECTIONS = 80
_MAX_GAP = 1.0  # nats between the bounds


@entry(gradients=True)
@passes_keywords()
@checked
def annealed_importance(
    target: Any,
    *args: Any,
    chains_per_group: int = 64,
    num_groups: int = 16,
    num_temperatures: int = 64,
    prob: float = 0.99,
    draws: Draws | Mapping[str, Tensor] | None = None,
    annealing: Annealing = Annealing(),  # noqa: B008  (immutable)
    max_seconds: float | None = None,
    seed: int | None = None,
    progress: bool = True,
    strict: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> BoundedEstimate:
    r"""Bound log Z from both sides by chains that go from the base to the target, and back.

    Forward weights :math:`w = \prod_j (p_1 / p_0)^{\beta_j - \beta_{j-1}}` average to Z, backward ones, of chains that
    start at draws of the target, to 1/Z. By Jensen's inequality ``log mean w`` of a group of chains lies below
    log Z in expectation, ``-log mean w_back`` above; the bounds are their means over groups, minus or plus a
    quantile of Student's t times the standard error. In between, ``value`` is Bennett's acceptance ratio.

    A short run of :class:`SMC`, an island a group, chooses temperatures and step sizes, a group's by the particles of
    the others, which are fixed from then on, and gives the draws of the target. The upper bound is as good as these
    draws: a mode that the base never finds makes both bounds too low. Where the target forbids a part of the base, it
    stays loose.

    Args:
        target: a Pyro model, a distribution, or a :class:`LogDensity`.
        *args: arguments of the model.
        chains_per_group: chains in each direction.
        num_groups: groups of chains that share only temperatures and tuning.
        num_temperatures: steps between base and target.
        prob: probability that both bounds hold.
        draws: exact draws of the target to go back from, at least one for each chain, instead of the particles of SMC;
            a :class:`Draws` or values by site, (num, *site_shape).
        annealing: where chains start, how they move and how the model is run; see :class:`Annealing`. The kernel must
            leave its target invariant.
        max_seconds: when so much time is spent, return what the chains so far say, with a warning: a lower bound, and
            no upper one. ``None``: no limit.
        seed: a number for the same answer twice; ``None`` uses the global generator.
        progress: show a progress bar.
        strict: raise instead of warn when the bounds cannot be trusted.
        model_kwargs: the model's keyword arguments, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        ``.value``, ``.se``, ``.lower``, ``.upper`` for log Z of the unnormalized target, each 0-d, or (n,) with
        ``independent=``.

    Raises:
        ValueError: impossible counts, a kernel that leaves nothing invariant, too few draws.
        InferenceError: the target is zero at all chains of a group, or improper.

    Warns:
        InferenceWarning: bounds that contradict each other, or lie more than a nat apart.

    Reference:
        Neal (2001), Annealed importance sampling; Grosse, Ghahramani, Adams (2015), Sandwiching the marginal
        likelihood using bidirectional Monte Carlo; Bennett (1976).

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy, TiltedDistribution
        >>> from pyro_ebm.inference.annealing.ais import annealed_importance
        >>> tilted = TiltedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([2.0, 0.0]))
        >>> log_z = annealed_importance(tilted, chains_per_group=8, num_temperatures=16, seed=0, progress=False)
        >>> bool(log_z.lower < 2.0 < log_z.upper)
        True
    """
    kernel, size = annealing.kernel_of(target), chains_per_group
    _check(kernel, size, num_groups, num_temperatures, prob)
    one_source(seed, annealing.generator)
    path = path_to(kernel, args, dict(model_kwargs or {}), guide=annealing.guide, base=annealing.base)
    seed = random_seed(seed, annealing.generator)
    start, generator = streams(seed, annealing.generator, path.target.like.device)
    told = interruption_told("interrupted before the chains started: there is nothing to return yet")
    with told, limited(max_seconds), path.quiet():
        with tqdm(desc="ais", disable=not progress, unit=" temperatures") as bar:
            points = path.start(size, num_groups, seed=start, compile=annealing.compile)
            pilot = anneal(path, kernel, points, Pace(), generator=generator, bar=bar)
            below, stopped = pilot.log_z, pilot.stopped  # of each group
            try:
                if stopped is None:
                    walk = _Walk(path, kernel, schedule_of(pilot, num_temperatures), generator, bar)
                    given = None if draws is None else path.at(_given(path, draws, size, num_groups))
                    end = _settled(path, kernel, pilot, generator) if given is None else given
                    forward = walk.up(path.at(path.draw(size, num_groups, seed=start + 1)))
                    below = log_mean_exp(forward)
                    backward = -walk.down(end)
            except STOPS as stop:
                stopped = stopped_by(stop)
        with finishing():
            found = _estimate(forward, backward, prob) if stopped is None else _one_sided(below, prob)
            early = None if stopped is None else _early_text(stopped, pilot, size * num_groups)
            _report(found, early=early, strict=strict)
    return BoundedEstimate(*(part.to(points.u) for part in (found.value, found.se, found.lower, found.upper)))


def _early_text(stopped: str, pilot: Population, chains: int) -> str:
    if pilot.stopped is not None:
        return early_text(pilot, chains)
    why = "interrupted" if stopped == "interrupted" else "stopped by the limit of time"
    return f"{why} before all chains came back"


class Schedule(NamedTuple):
    """Inverse temperatures (num_temperatures + 1, groups, *batch) from 0 to 1, and the tuning of the kernel at each."""

    beta: Tensor
    step_size: Tensor
    inverse_mass: Tensor
    trajectory_length: Tensor

    def tuning(self, index: int) -> Tuning:
        return Tuning(self.step_size[index], self.inverse_mass[index], self.trajectory_length)


def schedule_of(pilot: Population, num_temperatures: int) -> Schedule:
    """The ladder of a pilot run in as many steps as wanted, all of the same distance, with the tuning of each group."""
    rungs = torch.stack([rung.beta for rung in pilot.ladder])
    beta = torch.cat([torch.zeros_like(rungs[:1]), rungs])
    # Below the first rung there is nothing but the tuning there.
    tunings = [pilot.ladder[0].tuning, *(rung.tuning for rung in pilot.ladder)]
    log_size = torch.stack([tuning.step_size for tuning in tunings]).log()
    log_mass = torch.stack([tuning.inverse_mass for tuning in tunings]).log()
    distance = _distances(pilot)
    share = torch.linspace(0, 1, num_temperatures + 1, dtype=beta.dtype, device=beta.device)
    place = share.reshape(-1, *[1] * (distance.ndim - 1)) * distance[-1]
    below = (distance[1:, None] <= place).sum(0).clamp(max=len(rungs) - 1)
    before, after = distance.gather(0, below), distance.gather(0, below + 1)
    # All groups take the same steps; an element that arrived long ago stands still.
    weight = ((place - before) / (after - before)).nan_to_num(nan=0.0, posinf=0.0)[:, None]
    below = below[:, None].expand(-1, *rungs.shape[1:])

    def between(values: Tensor) -> Tensor:
        extra = [1] * (values.ndim - below.ndim)
        index = below.reshape(*below.shape, *extra).expand(-1, *values.shape[1:])
        return torch.lerp(values.gather(0, index), values.gather(0, index + 1), weight.reshape(*weight.shape, *extra))

    steps = between(beta)
    steps[-1] = 1.0
    return Schedule(steps, between(log_size).exp(), between(log_mass).exp(), pilot.tuning.trajectory_length)


def _distances(pilot: Population) -> Tensor:
    """How far each rung is from the base, (rungs + 1, *batch): for log ratios of variance v, beta times root v."""
    parts, arrived = [], torch.zeros_like(pilot.ladder[0].ess, dtype=torch.bool)
    for rung in pilot.ladder:
        part = rung.ess.clamp(max=1 - 1e-6).log().neg().sqrt()
        parts.append(torch.where(arrived, 0.0, part))
        arrived = rung.beta[0] == 1
    return torch.cat([torch.zeros_like(parts[0])[None], torch.stack(parts).cumsum(0)])


class _Walk:
    """Chains that go along a fixed schedule with a kernel fixed at each temperature."""

    def __init__(
        self, path: Path, kernel: Kernel, schedule: Schedule, generator: torch.Generator, bar: tqdm
    ) -> None:
        self.path, self.kernel, self.schedule = path, kernel, schedule
        self._generator, self._bar = generator, bar

    def up(self, points: Points) -> Tensor:
        """Log weights (chains, groups, *batch) of chains that start at draws of the base."""
        return self._walk(points, range(1, len(self.schedule.beta)))

    def down(self, points: Points) -> Tensor:
        """Log weights of chains that start at draws of the target."""
        return self._walk(points, range(len(self.schedule.beta) - 2, -1, -1))

    def _walk(self, points: Points, indices: range) -> Tensor:
        beta = self.schedule.beta
        log_weights = torch.zeros_like(points.log_target, dtype=torch.float64)
        previous = indices[0] - indices.step
        for index in indices:
            change = beta[index] - beta[previous]
            log_weights += torch.where(change == 0, 0.0, change * points.log_ratio())
            previous = index
            if index != indices[-1]:  # the other end needs no move: its weight is done
                points = self._move(points, index)
            self._bar.update()
        return log_weights

    def _move(self, points: Points, index: int) -> Points:
        beta = self.schedule.beta[index]
        step: Step = self.kernel.bind(self.path.value_and_grad(beta), self._generator)
        # The same iteration number in both directions: jittered trajectories must be the same ones backward.
        state, _ = step(points.state(beta, self.schedule.tuning(index), index))
        return self.path.at(state.u)


def _settled(path: Path, kernel: Kernel, pilot: Population, generator: torch.Generator) -> Points:
    """The pilot's particles, moved on at the target."""
    step = kernel.bind(path.value_and_grad(pilot.beta), generator)
    state = pilot.points.state(pilot.beta, pilot.tuning, pilot.iteration)
    for _ in range(_SETTLING_MOVES):
        state, _ = step(state)
    return path.at(state.u)


def _given(path: Path, draws: Draws | Mapping[str, Tensor], size: int, groups: int) -> Tensor:
    """Draws as points (size, groups, *batch, dim): a group holds neighbors, which may depend on each other."""
    if isinstance(draws, Draws):
        if draws.log_weights is not None:
            raise ValueError(f"draws must weigh the same, got weighted ones ({draws.method!r}); use draws.resample()")
        draws = {site: draws.flat(site) for site in draws.values}
    point = path.target.like.new_zeros(1, *path.target.batch, path.target.dim)
    if lacking := sorted(set(path.target.constrain(point)) - set(draws)):
        raise ValueError(f"draws must have the target's sites, they lack {lacking}")
    u = path.target.unconstrain(draws).detach().to(path.target.like)
    if len(u) < size * groups:
        raise ValueError(f"draws must be at least as many as chains, {size * groups}, got {len(u)}")
    index = torch.linspace(0, len(u) - 1, size * groups, device=u.device).round().long()
    return u[index].reshape(groups, size, *u.shape[1:]).transpose(0, 1).contiguous()


def _estimate(forward: Tensor, backward: Tensor, prob: float) -> BoundedEstimate:
    """From log weights up and minus log weights down, (chains, groups, *batch)."""
    groups = forward.shape[1]
    below, above = log_mean_exp(forward), -log_mean_exp(-backward)
    factor = _quantile(groups, prob) / groups**0.5
    se = bridge(forward, backward).std(0) / groups**0.5
    return BoundedEstimate(
        bridge(forward.flatten(0, 1), backward.flatten(0, 1)),
        se,
        (below.mean(0) - factor * below.std(0)).nan_to_num(nan=-torch.inf),
        (above.mean(0) + factor * above.std(0)).nan_to_num(nan=torch.inf),
    )


def _one_sided(log_z: Tensor, prob: float) -> BoundedEstimate:
    """From the log of an unbiased estimate of Z of each group, (groups, *batch): what is below log Z, and no more."""
    groups = len(log_z)
    error = log_z.std(0) / groups**0.5
    lower = log_z.mean(0) - _quantile(groups, prob) * error
    return BoundedEstimate(log_mean_exp(log_z), error, lower, torch.full_like(lower, torch.inf))


def _quantile(groups: int, prob: float) -> float:
    """Of Student's t, for bounds that hold both with a probability."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + prob / 2, groups - 1))


def bridge(forward: Tensor, backward: Tensor) -> Tensor:
    r"""Bennett's acceptance ratio: the z at which both directions agree.

    .. math:: \sum_i \sigma(f_i - z) = \sum_j \sigma(z - b_j)

    Args:
        forward: log weights up, (chains, *batch).
        backward: minus log weights down, (chains, *batch).
    """
    both = torch.cat([forward, backward])
    finite = both.isfinite()
    low = torch.where(finite, both, torch.inf).amin(0) - 50.0
    high = torch.where(finite, both, -torch.inf).amax(0) + 50.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        too_low = (forward - middle).sigmoid().sum(0) > (middle - backward).sigmoid().sum(0)
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return 0.5 * (low + high)


def _check(kernel: Kernel, chains_per_group: int, num_groups: int, num_temperatures: int, prob: float) -> None:
    if isinstance(kernel, ULA):
        raise ValueError("kernel must leave its target invariant, which ULA does not: use MALA")
    whole_number("num_groups", num_groups, at_least=2)
    whole_number("chains_per_group", chains_per_group, at_least=2)
    whole_number("num_temperatures", num_temperatures)
    if not 0 < prob < 1:
        raise ValueError(f"prob must lie between 0 and 1, got {prob}")


def _report(found: BoundedEstimate, *, early: str | None, strict: bool) -> None:
    """Warn (raise with ``strict``) of bounds that contradict each other or say little, or of an early end."""
    gap = found.upper - found.lower
    if not bool(found.value.isfinite().all()):
        raise InferenceError("log Z is not finite: the target is zero at all chains, or improper; check its energy")
    if early is not None:
        problem = f"{early}: there is no upper bound"
    elif bool((gap < 0).any()):
        problem = (
            "the lower bound lies above the upper one: the draws of the target that chains went back from do not "
            "follow it; give draws=, more chains_per_group, or a guide that knows all modes"
        )
    elif not bool((gap < _MAX_GAP).all()):
        problem = f"the bounds lie {float(gap.max()):.2f} nats apart: more num_temperatures, then more chains_per_group"
    else:
        return
    report(f"ais: {problem}", strict=strict)
