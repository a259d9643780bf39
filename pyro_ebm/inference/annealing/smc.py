"""Sequential Monte Carlo: a population of particles carried from a distribution one can draw from to the target."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.convergence import agreement
from pyro_ebm.deadline import check_seconds, finishing, limited
from pyro_ebm.entry import entry
from pyro_ebm.errors import interruption_told, report
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.inference.annealing.population import Pace, Population, anneal
from pyro_ebm.inference.annealing.tempering import Annealing, Path, path_to
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.inference.kernels.kernel import Kernel
from pyro_ebm.inference.kernels.langevin import ULA
from pyro_ebm.inference.resampling import number_of_distinct
from pyro_ebm.keywords import model_inputs
from pyro_ebm.randomness import one_source, random_seed, streams
from pyro_ebm.thresholds import MIN_STARTS, R_HAT_OF_DISAGREEMENT

__all__ = ["SMC", "early_text"]

_MIN_ACCEPTANCE, _MAX_SE = 0.05, 0.5
_WHY = {
    "interrupted": "interrupted",
    "max_seconds": "stopped by the limit of time",
    "max_evaluations": "given up (100,000 evaluations of the density, and the target still far: is it proper?)",
}
_ENOUGH = 100  # particles, for R-hat to say something


@checked
class SMC:
    r"""Sequential Monte Carlo from the prior (or a guide) to the target, on islands that share no particles.

    Particles start at draws of the base and go through :math:`p_\beta \propto p_0^{1 - \beta} p_1^\beta`. Each
    inverse temperature is the largest at which the weights, of all islands, are worth ``target_ess`` of the
    particles; these are then resampled and moved by a Markov kernel until they have left their copies. Modes found by
    the base are kept with their weights, and the weights estimate log Z. Its standard error is what islands differ
    by, known with ``num_islands - 1`` degrees of freedom; they have the temperatures in common and tune each other's
    kernels. The estimate has a bias of the order of one over all particles.

    Args:
        target: a Pyro model, a distribution, or a :class:`LogDensity`.
        particles_per_island: so many.
        num_islands: populations of particles; a single one is tuned on itself.
        target_ess: share of the particles that weights must be worth, between 0 and 1.
        num_moves: moves at each temperature; as many as it takes, at most ``max_moves``, when ``None``.
        max_moves: at each temperature.
        max_seconds: when so much time is spent, weight the particles to the target in one step, from where they are,
            and say so. ``None``: no limit.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        annealing: where particles start, how they move and how the model is run; see :class:`Annealing`.
        progress: show a progress bar.
        strict: raise instead of warn when the draws cannot be trusted.

    Raises:
        TypeError: a kernel that is not one of ours.
        ValueError: impossible counts, a kernel of another target, a base of the wrong shape.

    Reference:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers; Zhou, Johansen, Aston (2016),
        Toward automatic model comparison (adaptive temperatures).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy, tilt
        >>> from pyro_ebm.inference.annealing.smc import SMC
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> tilted = tilt(model, {"z": LinearEnergy([2.0, 0.0])})  # N((2, 0), I), log Z = 2
        >>> draws = SMC(tilted, particles_per_island=256, num_islands=4, seed=0, progress=False).run()
        >>> draws.values["z"].shape, round(float(draws.log_z.value))
        (torch.Size([4, 256, 2]), 2)
    """

    def __init__(
        self,
        target: Any,
        *,
        particles_per_island: int = 1024,
        num_islands: int = 8,
        target_ess: float = 0.8,
        num_moves: int | None = None,
        max_moves: int = 10,
        max_seconds: float | None = None,
        annealing: Annealing = Annealing(),  # noqa: B008  (immutable)
        seed: int | None = None,
        progress: bool = True,
        strict: bool = False,
    ) -> None:
        whole_number("particles_per_island", particles_per_island, at_least=2)
        one_source(seed, annealing.generator)
        check_seconds(max_seconds)
        if not callable(target) and not isinstance(target, Distribution):
            raise TypeError(f"target must be a Pyro model, a distribution or a LogDensity, got {type(target).__name__}")
        self.kernel, self.annealing = annealing.kernel_of(target), annealing
        self.pace = Pace(target_ess, num_moves, max_moves)
        self.particles_per_island, self.num_islands = particles_per_island, num_islands
        self.seed, self.progress, self.strict, self.max_seconds = seed, progress, strict, max_seconds

    @entry(gradients=True)
    def run(self, *args: Any, **kwargs: Any) -> Draws:
        """Carry the particles from the base to the target.

        Args:
            *args: arguments of the model.
            **kwargs: its keyword arguments.

        Returns:
            Values (island, particle, *site_shape); ``log_weights``: of an island its estimate of Z, shared by its
            particles (all equal with ``independent=``); ``log_z`` of the unnormalized target as
            :func:`importance` reports it, ``se`` NaN for a single island, and infinite where an early end left weights
            worth less than 100 draws; stats ``lp`` and ``acceptance_rate`` of
            the last move. ``notes``: ``temperatures`` (a list of inverse temperatures; one for each datum),
            ``acceptance_per_temperature``, ``ess_per_temperature`` (share of the particles),
            ``moves_per_temperature``, ``distinct_starts`` (draws of the base that the particles descend from).

        Raises:
            InferenceError: the target is zero at all particles of an island, infinite at some, or improper; or
                ``max_seconds`` were spent before there were particles.
            KeyboardInterrupt: before there are particles; after Ctrl-C later on they are weighted to the target in one
                step, with a warning.

        Warns:
            InferenceWarning: when islands disagree or particles hardly moved.
        """
        began = time.perf_counter()
        how = self.annealing
        args, kwargs = model_inputs(self.kernel.model, args, kwargs)
        path = path_to(self.kernel, args, kwargs, guide=how.guide, base=how.base)
        seed = random_seed(self.seed, how.generator)
        base_seed, generator = streams(seed, how.generator, path.target.like.device)
        told = interruption_told("interrupted before there were particles: there are no draws yet")
        bar = tqdm(desc="smc", disable=not self.progress, unit=" temperatures")
        with told, limited(self.max_seconds), path.quiet(), bar:
            points = path.start(self.particles_per_island, self.num_islands, seed=base_seed, compile=how.compile)
            population = anneal(path, self.kernel, points, self.pace, generator=generator, bar=bar)
            with finishing():
                draws = _as_draws(path, population)
        seconds = time.perf_counter() - began
        draws = replace(draws, seconds=seconds, sampling_seconds=seconds)
        _report(draws, population, self.kernel, strict=self.strict)
        return draws


def _as_draws(path: Path, population: Population) -> Draws:
    target, points = path.target.target, population.points
    log_z, batch = population.log_z, path.target.batch
    num, islands = points.log_target.shape[:2]
    # Data share the weights of a draw, but each has a log Z of its own: then all draws weigh the same.
    of_island = log_z.log_softmax(0) if not batch else log_z.new_full((islands,), -math.log(islands))
    value, se = importance_estimate(log_z) if islands > 1 else (log_z[0], torch.full_like(log_z[0], torch.nan))
    if population.jump_ess * num * islands < _ENOUGH:  # what islands agree on then is what all of them miss
        se = torch.full_like(se, torch.inf)
    estimate = Estimate(value.to(points.u), se.to(points.u)) if batch else Estimate(float(value), float(se))  # type: ignore[arg-type]
    return Draws(
        values=path.target.constrain(points.u.transpose(0, 1).contiguous()),
        method="smc",
        stats={
            "lp": points.log_target.transpose(0, 1).contiguous(),
            "acceptance_rate": _last_acceptance(population).transpose(0, 1).contiguous(),
        },
        log_weights=(of_island - math.log(num))[:, None].expand(islands, num).to(points.u.dtype).contiguous(),
        log_z=estimate,
        observed={} if target is None else target.observed,
        source=Source.of(target),
        num_gradients=path.num_gradients,
        notes=_notes(path, population),
    )


def _last_acceptance(population: Population) -> Tensor:
    """(particles, islands, *batch); zeros where nothing moved before the end."""
    info, last = population.info, population.points.log_target
    return torch.zeros_like(last) if info is None else info.acceptance_rate


def _notes(path: Path, population: Population) -> dict[str, Any]:
    ladder = population.ladder
    betas = torch.stack([rung.beta[0].reshape(-1) for rung in ladder], 1)
    ladders = [[0.0, *row[: int((row < 1).sum()) + 1].tolist()] for row in betas]
    return {
        "graph": path.graph,
        **({} if path.target.target is None else {"vectorize": path.target.target.vectorize}),
        **({} if path.graph_problem is None else {"graph_problem": path.graph_problem}),
        "temperatures": ladders if path.target.batch else ladders[0],
        "acceptance_per_temperature": [rung.acceptance for rung in ladder],
        "ess_per_temperature": [float(rung.ess.mean()) for rung in ladder],
        "moves_per_temperature": [rung.moves for rung in ladder],
        "log_z_of_islands": population.log_z.tolist(),
        "distinct_starts": _ancestors(population),
        "interrupted": population.stopped == "interrupted",
        **({} if population.stopped is None else {"stopped": population.stopped, "jump_ess": population.jump_ess}),
    }


def _ancestors(population: Population) -> int:
    """How many draws of the base the particles descend from, of the datum where fewest do."""
    names = population.ancestors
    assert names is not None
    return number_of_distinct(names.flatten(0, 1)[..., None], names.ndim - 2)


def _report(draws: Draws, population: Population, kernel: Kernel, *, strict: bool) -> None:
    """Warn (raise with ``strict``) where particles hardly moved or islands disagree."""
    problems = []
    if isinstance(kernel, ULA):
        problems.append("ULA keeps none of the distributions on the way: draws and log Z are biased; use MALA")
    if population.stopped is not None:
        problems.append(early_text(population, draws.num_chains * draws.num_draws))
    elif population.ladder[-1].acceptance < _MIN_ACCEPTANCE:
        problems.append(
            f"particles hardly moved at the target (acceptance {population.ladder[-1].acceptance:.3f}): they are "
            f"copies; give more num_moves, or a smaller step_size with adapt_step_size=False"
        )
    if draws.notes["distinct_starts"] < MIN_STARTS:
        problems.append(
            f"all particles descend from {draws.notes['distinct_starts']} draw(s) of the base (< {MIN_STARTS}), which "
            f"may have missed a mode: more particles_per_island, a guide, or target_ess nearer to 1"
        )
    if draws.num_chains > 1 and draws.num_draws >= _ENOUGH:
        worst = agreement(draws.values, R_HAT_OF_DISAGREEMENT, in_time=False)
        if worst.disagrees:
            problems.append(
                f"islands disagree ({worst.told()}): more particles_per_island, a guide "
                f"that knows all modes, or more temperatures (target_ess nearer to 1)"
            )
        error = float(torch.as_tensor(draws.log_z.se).max())  # type: ignore[union-attr]
        if not error < _MAX_SE:
            problems.append(f"log Z is uncertain by {error:.2f} (> {_MAX_SE}): more particles_per_island")
    report(f"smc: {'; '.join(problems)}" if problems else None, strict=strict)


def early_text(population: Population, particles: int) -> str:
    """How a way that was ended early came to its end, in words."""
    why = _WHY[str(population.stopped)]
    return (
        f"{why} at inverse temperature {population.left_at:.3g}: the particles were weighted to the target in one "
        f"step, by weights worth {population.jump_ess * particles:.1f} of {particles}"
    )
