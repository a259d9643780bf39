"""Where diagnostics stop being good enough: each limit once, with what it rests on."""

from __future__ import annotations

import math

__all__ = [
    "MAX_R_HAT",
    "MIN_STARTS",
    "R_HAT_OF_DISAGREEMENT",
    "above",
    "least_ess",
    "pareto_k_limit",
    "weights_problem",
]

# What a table calls good and sampling to a target waits for (Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021): some
# 50 effective draws in each half of a chain. Many short chains may have more, as convergence.py says.
MAX_R_HAT = 1.01

# What a run warns of: means of chains that differ by a variance of a tenth of that within a chain. Chains that agree
# stay below it from ten effective draws in each half on, where 1.01 would cry wolf after each short run of many chains.
R_HAT_OF_DISAGREEMENT = 1.05

# Chains that start at fewer points than this may have missed together what no comparison of them can show.
MIN_STARTS = 4


def above(value: float, limit: float) -> str:
    """A number above a limit, with as many digits as it takes to see that: "1.051 > 1.05"."""
    digits = next((digits for digits in range(2, 10) if float(f"{value:.{digits}f}") > limit), 10)
    return f"{value:.{digits}f} > {limit}"


_LARGEST_K = 0.7  # above it a practical number of draws does not help


def pareto_k_limit(num_draws: int) -> float:
    r"""The Pareto k up to which importance weights of so many draws can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S, \; 0.7)

    .5 for 100 draws, .67 for 1,000, .7 from 2,200 on; 0 for ten or fewer, where only equal weights will do.

    Args:
        num_draws: S, the draws that are weighted.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    return min(max(1.0 - 1.0 / math.log10(num_draws), 0.0), _LARGEST_K) if num_draws > 10 else 0.0


_FEWEST_EFFECTIVE, _LEAST_SHARE = 50.0, 0.05


def least_ess(num_draws: int) -> float:
    """The effective sample size below which importance weights cannot be trusted, whatever their tail looks like.

    50, or a twentieth of the draws where they are fewer than 1,000: the tail that k is fitted to, of a few dozen draws,
    is then most of what counts.

    Args:
        num_draws: that are weighted.
    """
    return min(_FEWEST_EFFECTIVE, _LEAST_SHARE * num_draws)


def weights_problem(k: float, ess: float, num_draws: int) -> str:
    """What is wrong with importance weights, in words; ``""`` where they can be trusted.

    Args:
        k: Pareto shape of their tail.
        ess: effective sample size, Kish's.
        num_draws: that are weighted.
    """
    if not k <= (limit := pareto_k_limit(num_draws)):
        return f"Pareto k = {k:.2f} > {limit:.2g}, effective sample size {ess:.1f} of {num_draws}"
    if not ess >= (least := least_ess(num_draws)):
        return f"effective sample size {ess:.1f} < {least:.3g} of {num_draws}, too few to tell (Pareto k = {k:.2f})"
    return ""
