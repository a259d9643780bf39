"""Sample until the draws are worth so many: bulk ESS as a target instead of a number of draws."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from pyro_ebm.chain_statistics import chain_statistics
from pyro_ebm.checks import whole_number
from pyro_ebm.convergence import Agreement, agreement, component_name, worst_agreement
from pyro_ebm.deadline import check_seconds, finishing, limited, time_limit
from pyro_ebm.errors import report
from pyro_ebm.estimates import weighted_ess
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import weighed
from pyro_ebm.thresholds import MAX_R_HAT, pareto_k_limit

__all__ = ["Target", "importance_until", "judged", "reported", "run_until"]

_FIRST = 50  # draws per chain before the first look
_FIRST_IMPORTANCE = 4000
_MAX_IMPORTANCE = 2_000_000
_NUMBERS_AT_ONCE = 20_000_000
_APART = 1.2  # an R-hat of chains that may never meet
_SLOWEST_FALL = 0.3  # of R-hat squared minus one as a power of the draws: 1 where chains mix, 0 where they are stuck


@dataclass(frozen=True)
class Target:
    """What is asked for, and what may be spent on it.

    Args:
        ess: the bulk ESS that every component of every site must reach.
        max_r_hat: the R-hat that none may exceed, as ``convergence.py`` reads it for short chains.
        max_seconds: of wall-clock time in all.
        max_draws: per chain.
        max_k: the Pareto k above which importance sampling is given up, where the draws' own limit is not lower.
        give_up: end chains that stay apart however long they run (``"apart"``), as there is something better.
    """

    ess: float
    max_r_hat: float = MAX_R_HAT
    max_seconds: float = 60.0
    max_draws: int | None = None
    max_k: float = math.inf
    give_up: bool = False

    def __post_init__(self) -> None:
        if not self.ess > 0:
            raise ValueError(f"ess must be positive, got {self.ess}")
        check_seconds(self.max_seconds)
        if self.max_draws is not None:
            whole_number("num_samples", self.max_draws)


def run_until(mcmc: MCMC, target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, began: float) -> Draws:
    """Run batched chains until the target is met or a limit spent; ``notes["stopped"]`` says which.

    Args:
        mcmc: the runner; its ``num_samples`` does not matter.
        target: what to reach.
        args: the model's arguments.
        kwargs: its keyword arguments.
        began: ``time.perf_counter()`` when the time allowed began to run.

    Warns:
        InferenceWarning: when a limit was spent before the target was met.
    """

    def drive(chains: Chains) -> dict[str, Any]:
        return _extend_until(chains, target, mcmc.thin, began, mcmc.superchains)

    with limited(target.max_seconds, began=began):
        draws = mcmc.run_with(drive, args, kwargs)
    return reported(draws, target, strict=mcmc.strict)


def _extend_until(
    chains: Chains, target: Target, thin: int, began: float, superchains: int | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    looks: list[tuple[int, float]] = []
    look = 0.0
    more = _FIRST
    while True:
        if target.max_draws is not None:
            more = min(more, target.max_draws - len(chains.record))
        with time_limit(target.max_seconds - 4 * look, began=began):
            chains.extend(more, thin=thin)
        done, looked = len(chains.record), time.perf_counter()
        if not done:
            return {}
        try:
            with finishing():
                values = chains.record.values(chains.density)
                found = {"num_samples": done, **judged(values, target, superchains)}
        except KeyboardInterrupt:  # while looking: the draws are there
            chains.stopped = "interrupted"
        now = time.perf_counter()
        look = now - looked
        # The next look has more to look at, and so has the report at the end.
        left = target.max_seconds - (now - began) - 4 * look
        if chains.stopped == "interrupted":
            return {"ess": math.nan, "r_hat": math.nan, **found, "stopped": "interrupted"}
        if found["stopped"] == "target":
            return found
        looks.append((done, found["r_hat"]))
        if target.give_up and _stay_apart(looks):
            return {**found, "stopped": "apart"}
        if left <= 0 or chains.stopped == "max_seconds":
            return {**found, "stopped": "max_seconds"}
        if target.max_draws is not None and done >= target.max_draws:
            return found
        pace = max(chains.sampling_seconds / done, 1e-9)
        more = max(1, math.ceil(min(done * _growth(found, target), left / pace)))


def _stay_apart(looks: list[tuple[int, float]]) -> bool:
    """Whether chains disagree and the last two rounds of draws brought them no nearer."""
    if len(looks) < 3 or not looks[-1][1] > _APART:
        return False
    points = [(math.log(done), math.log(max(r_hat * r_hat - 1, 1e-9))) for done, r_hat in looks[-3:]]
    return all(a[1] - b[1] < _SLOWEST_FALL * (b[0] - a[0]) for a, b in itertools.pairwise(points))


def _growth(found: Mapping[str, Any], target: Target) -> float:
    """How many more draws, as a share of those there are: what seems to be missing, at most as many again."""
    short = [target.ess / found["ess"], (found["r_hat"] - 1) / (found["r_hat_limit"] - 1)]  # both fall as 1 / draws
    missing = max((factor for factor in short if not math.isnan(factor)), default=2.0)
    return min(max(1.2 * missing - 1, 0.25), 1.0)


def judged(values: Mapping[str, Tensor], target: Target, superchains: int | None = None) -> dict[str, Any]:
    """The smallest bulk ESS and the worst R-hat over all components that are not constant, and where they are.

    ``stopped`` is ``"target"`` where they meet it, ``"num_samples"`` where they do not (yet). One chain has no
    R-hat, and meets it by its ESS; values that are not finite never meet it.
    """
    ess, least, worst = math.nan, "", Agreement(math.nan, target.max_r_hat, "")
    if all(bool(value.isfinite().all()) for value in values.values()):
        names = ("ess_bulk", "r_hat_excess", "r_hat_allowance")
        found = [chain_statistics(value, *names) for value in values.values()]
        sizes, excess, allowance = (np.concatenate([each[name].ravel() for each in found]) for name in names)
        of = [component_name(site, x.shape[2:], i) for site, x in values.items() for i in range(x.shape[2:].numel())]
        if not np.isnan(sizes).all():
            ess, least = float(np.nanmin(sizes)), of[int(np.nanargmin(sizes))]
        if superchains is not None:
            worst = agreement(values, target.max_r_hat, superchains)
        elif of:
            worst, index = worst_agreement(excess, allowance, target.max_r_hat, len(next(iter(values.values()))))
            worst = worst._replace(where=of[index])
    single = all(len(value) == 1 for value in values.values())
    met = ess >= target.ess and (single or worst.holds)
    return {
        "stopped": "target" if met else "num_samples",
        "ess": ess,
        "r_hat": worst.r_hat,
        "r_hat_limit": worst.limit,
        "least_ess_at": least,
        "worst_r_hat_at": worst.where,
        "target_ess": target.ess,
    }


def reported(draws: Draws, target: Target, *, strict: bool) -> Draws:
    """The draws, after a warning (an error with ``strict``) where a limit was spent first."""
    stopped = draws.notes["stopped"]
    if stopped not in ("max_seconds", "num_samples"):
        return draws
    limit = f"max_seconds={target.max_seconds:g}" if stopped == "max_seconds" else f"num_samples={draws.num_draws}"
    message = (
        f"{draws.method}: stopped by {limit} with {'' if draws.log_weights is not None else 'bulk '}"
        f"ESS {draws.notes['ess']:.0f}{_at(draws, 'least_ess_at')} (asked for {target.ess:g})"
    )
    if "r_hat" in draws.notes:
        most = draws.notes.get("r_hat_limit", target.max_r_hat)
        message += f" and R-hat {draws.notes['r_hat']:.3f}{_at(draws, 'worst_r_hat_at')} (at most {most:.4g})"
    message += '; allow more, or try another method ("smc" where there are several modes)'
    report(message, strict=strict)
    return draws


def _least_worth(draws: Draws) -> tuple[float, str]:
    """The smallest number of draws that weighted ones are worth for the mean of a component, and which that is."""
    least, where, weights = draws.notes["ess"], "", draws.weights
    for site, names in ((site, draws.component_names(site)) for site in draws.values):
        columns = draws.flat(site).reshape(len(weights), -1)
        step = max(_NUMBERS_AT_ONCE // len(weights), 1)
        for start in range(0, columns.shape[1], step):
            worth = weighted_ess(weights, columns[:, start : start + step].to(weights))
            if float(worth.min()) < least:
                least, where = float(worth.min()), names[start + int(worth.argmin())]
    return least, where


def _at(draws: Draws, note: str) -> str:
    where = draws.notes.get(note)
    return f" at {where}" if where else ""


def importance_until(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    seed: int | None,
    began: float,
    strict: bool = False,
    vectorize: str = "auto",
) -> Draws:
    """Importance sampling with as many draws as it takes; ``notes["stopped"]`` says what ended it.

    The effective sample size asked for is that of each component's mean: the smallest counts, ``notes["ess"]``.

    A Pareto k above ``target.max_k``, or above what so many draws allow, ends it too (``"pareto_k"``): more draws would
    not help, and the ESS of such weights says nothing.

    Warns:
        InferenceWarning: when a limit was spent before the target was met, or the weights cannot be trusted.
    """
    limit = _MAX_IMPORTANCE if target.max_draws is None else max(target.max_draws, 2)
    num = int(min(max(4 * target.ess, 2000), _FIRST_IMPORTANCE, limit))
    while True:
        started = time.perf_counter()
        with limited(target.max_seconds, began=began):
            draws, problem = weighed(model, guide, args, kwargs, num_samples=num, seed=seed, vectorize=vectorize)
        ess, where = _least_worth(draws)
        now = time.perf_counter()
        # Each round draws anew: so many fit into the time left.
        fitting = int(num * max(target.max_seconds - (now - began), 0.0) / max(now - started, 1e-9))
        if "stopped" in draws.notes:
            stopped = draws.notes["stopped"]
        elif draws.pareto_k is None or not draws.pareto_k <= min(target.max_k, pareto_k_limit(num)):
            stopped = "pareto_k"
        elif ess >= target.ess:
            stopped = "target"
        elif num >= limit:
            stopped = "num_samples"
        elif fitting <= num:
            stopped = "max_seconds"
        else:
            num = min(math.ceil(1.2 * num * target.ess / ess), limit, fitting)
            continue
        if stopped == "interrupted":
            problem = "; ".join(filter(None, [f"snis: interrupted after {draws.num_draws} draws", problem]))
        report(problem, strict=strict and stopped != "interrupted")
        notes = {**draws.notes, "ess": ess, "least_ess_at": where, "stopped": stopped, "target_ess": target.ess}
        return reported(replace(draws, seconds=now - began, notes=notes), target, strict=strict)
