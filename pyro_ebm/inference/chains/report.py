"""What is wrong with the draws of Markov chains, in one warning that names cause and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.convergence import agreement, superchains_of
from pyro_ebm.errors import report
from pyro_ebm.inference.draws import Draws
from pyro_ebm.thresholds import MIN_STARTS, R_HAT_OF_DISAGREEMENT

__all__ = ["early_text", "listed", "report_chains"]

_STUCK = 1e-3


def report_chains(draws: Draws, *, strict: bool, early: str | None = None, max_divergences: float = 0.0) -> None:
    """Warn (raise with ``strict``) where chains diverged, never moved, disagree, or hold values that are not finite.

    Args:
        draws: of Markov chains.
        strict: raise instead of warn.
        early: what ended them before their number was reached, in words.
        max_divergences: share of diverged transitions that is let pass.
    """
    problems = []
    diverging = draws.stats.get("diverging", torch.zeros(()))  # a kernel of the user's may report nothing
    divergences = int(diverging.sum())
    if divergences > max_divergences * diverging.numel():
        problems.append(
            f"{divergences} of {diverging.numel()} transitions diverged: raise target_accept_prob "
            f"towards 0.95 or reparametrize the model"
        )
    starts = draws.notes.get("distinct_starts", MIN_STARTS)
    if starts < MIN_STARTS <= draws.num_chains:
        problems.append(
            f"all {draws.num_chains} chains started at {starts} point{'s' * (starts != 1)} (fewer than {MIN_STARTS}), "
            f"so that R-hat cannot show a mode that they missed: start them apart, as init='importance' does"
        )
    stuck = _stuck(draws)
    if stuck:
        problems.append(
            f"chain(s) {stuck} accepted nothing: the step size is too large for where they are, or the density "
            f"is not smooth there; give more warmup_steps, a smaller step_size, or other starting points"
        )
    broken = sorted(name for name, value in draws.values.items() if not bool(value.isfinite().all()))
    if broken:
        problems.append(f"draws of {broken} are not finite: the density is improper (an energy unbounded below?)")
    elif draws.num_chains > 1 and draws.num_draws >= 4:
        worst = agreement(draws.values, R_HAT_OF_DISAGREEMENT, superchains_of(draws))
        if worst.disagrees:
            problems.append(
                f"chains disagree ({worst.told()}): run longer, start them from a good "
                f'guide (init="importance", guide=...), or, where modes lie apart, use method="smc"'
            )
    kept = [f"{early}: kept {draws.num_chains} chain(s) of {draws.num_draws} draws"] if early else []
    told = "; ".join([*kept, *problems])
    # An early end alone is no reason to throw the draws away.
    report(f"{draws.method}: {told}" if told else None, strict=strict and bool(problems))


def early_text(notes: Mapping[str, Any], max_seconds: float | None) -> str | None:
    """What ended chains, or their warm-up, before they were done, in words; None where nothing did."""
    found = ["interrupted"] if notes.get("interrupted") else []
    if notes.get("stopped") == "max_seconds":
        limit = "the limit of time" if max_seconds is None else f"max_seconds={max_seconds:g}"
        found.append(f"stopped by {limit}")
    if (cut := notes.get("warmup_cut")) is not None:
        found.append(f"the limit of time ended the warm-up after {cut} of {notes.get('warmup_steps')} steps")
    return ", ".join(found) or None


def _stuck(draws: Draws) -> str:
    """Chains that never moved, and of which data, as text."""
    if draws.num_draws < 10 or "acceptance_rate" not in draws.stats:
        return ""
    rates = draws.stats["acceptance_rate"].mean(1)
    stuck = (rates < _STUCK).reshape(draws.num_chains, -1)
    data = f" of data {listed(stuck.any(0))}" if rates.ndim > 1 and bool(stuck.any()) else ""
    return listed(stuck.any(1)) + data


def listed(flags: Tensor) -> str:
    """The positions of the true ones, (n,), as text: the first ten, and how many there are."""
    found = flags.nonzero().flatten().tolist()
    return ", ".join(map(str, found[:10])) + (f", ... ({len(found)} in all)" if len(found) > 10 else "")
