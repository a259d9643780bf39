"""Ranks of true values among posterior draws, and the test that they are uniform."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Band", "Calibration", "uniform_band", "uniform_ecdf", "uniform_p_value"]

_MAX_POINTS = 100


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Ranks of true values among posterior draws; uniform on 0, ..., ``num_draws`` for an exact sampler.

    Args:
        ranks: quantity -> (simulation,), int64. Failed simulations are left out, in all quantities alike.
        num_draws: draws that each true value was ranked among; the highest rank.
        kept: (simulation,), how many of them were (almost) independent. Where fewer than ``num_draws``, the
            rank among those few is spread over 0, ..., ``num_draws`` at random.
        failures: number of a simulation -> why it has no ranks.
        warned: number of a simulation -> the sampler's own warning.
        interrupted: whether fewer simulations were run than asked for.
        seconds: wall-clock seconds.
    """

    ranks: Mapping[str, Tensor]
    num_draws: int
    kept: Tensor
    failures: Mapping[int, str] = field(default_factory=dict)
    warned: Mapping[int, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = math.nan

    def __post_init__(self) -> None:
        for name, ranks in self.ranks.items():
            if ranks.shape != self.kept.shape or ranks.ndim != 1 or not len(ranks):
                raise ValueError(
                    f"ranks[{name!r}] must have shape (simulation,) = {tuple(self.kept.shape)} with at least "
                    f"one simulation, got {tuple(ranks.shape)}"
                )
            _checked_ranks(f"ranks[{name!r}]", ranks, self.num_draws)
        if not self.ranks:
            raise ValueError("ranks is empty: there is no quantity that varies from draw to draw")

    def __repr__(self) -> str:
        return (
            f"Calibration({self.num_simulations} simulations, {len(self.ranks)} quantities, "
            f"{self.num_draws} draws, joint p = {self.p_value:.2g})"
        )

    @property
    def num_simulations(self) -> int:
        """Simulations that have ranks."""
        return len(self.kept)

    @functools.cached_property
    def p_values(self) -> dict[str, float]:
        """Quantity -> p-value of the ECDF test: smaller than 1 - c exactly if its ECDF leaves the band at c."""
        return {name: uniform_p_value(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """All quantities together: the smallest p-value times their number (Bonferroni)."""
        return min(1.0, len(self.ranks) * min(self.p_values.values()))

    def verdict(self, prob: float = 0.95) -> str:
        """``"ok"``, or the quantities whose ranks are not uniform at joint level ``prob``, and how."""
        found = self.summary(prob)["verdict"]
        return "; ".join(f"{name}: {text}" for name, text in found.items() if text != "ok") or "ok"

    def summary(self, prob: float = 0.95) -> pd.DataFrame:
        r"""One row a quantity, the index holds the names.

        * ``p_value``, and ``p_adjusted`` for the number of quantities (Bonferroni).
        * ``shift``: mean rank, in standard errors from 1/2; positive where draws are too low.
        * ``spread``: mean squared distance of ranks from the middle, in standard errors from its
          expectation; positive where draws are too narrow (overconfident), negative where too wide.
        * ``verdict``: ``"ok"`` where ``p_adjusted > 1 - prob``, else what is wrong.
        """
        import pandas as pd

        if not 0 < prob < 1:
            raise ValueError(f"prob must lie between 0 and 1, got {prob}")
        rows = {name: self._row(name, prob) for name in self.ranks}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")

    def _row(self, name: str, prob: float) -> dict[str, Any]:
        size = self.num_draws + 1
        centered = (self.ranks[name].double() + 0.5) / size - 0.5
        levels = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size - 0.5
        shift, spread = (_score(centered**power, levels**power) for power in (1, 2))
        adjusted = min(1.0, len(self.ranks) * self.p_values[name])
        verdict = "ok" if adjusted > 1 - prob else _describe(shift, spread)
        return {
            "p_value": self.p_values[name],
            "p_adjusted": adjusted,
            "shift": shift,
            "spread": spread,
            "verdict": verdict,
        }


def _checked_ranks(name: str, ranks: Tensor, num_draws: int) -> Tensor:
    whole = not ranks.is_floating_point() and not ranks.is_complex()
    if not whole or not len(ranks) or int(ranks.min()) < 0 or int(ranks.max()) > num_draws:
        raise ValueError(f"{name} must be integers from 0 to num_draws = {num_draws}, one at least")
    return ranks


def _score(found: Tensor, expected: Tensor) -> float:
    """Mean of ``found``, in standard errors from that of the equally likely values ``expected``."""
    sd = expected.std(correction=0)
    return float((found.mean() - expected.mean()) / sd) * math.sqrt(len(found)) if sd > 1e-12 else 0.0


def _describe(shift: float, spread: float) -> str:
    """Which way ranks leave the uniform distribution, where that is clear."""
    if max(abs(shift), abs(spread)) < 2.5:
        return "ranks not uniform"
    if abs(shift) >= abs(spread):
        return "draws too low" if shift > 0 else "draws too high"
    return "draws too narrow" if spread > 0 else "draws too wide"


class Band(NamedTuple):
    """Where the ECDF of uniform ranks lies as a whole with the probability asked for; each (point,)."""

    points: Tensor
    lower: Tensor
    upper: Tensor


def uniform_ecdf(ranks: Tensor, num_draws: int) -> Tensor:
    """Share of the ranks below each of the points of :func:`uniform_band`, (point,), float64."""
    return _counts(_checked_ranks("ranks", ranks, num_draws), num_draws).double() / len(ranks)


def uniform_band(num_ranks: int, num_draws: int, prob: float = 0.95) -> Band:
    r"""Simultaneous confidence band of the ECDF of independent ranks, uniform on ``0, ..., num_draws``.

    All counts whose two binomial tails both exceed one level, the highest at which an ECDF stays inside with
    probability at least ``prob``. That probability is computed exactly, point after point, not simulated.

    Args:
        num_ranks: ranks, N.
        num_draws: the highest rank, L; points are multiples of 1 / (L + 1), at most 100 of them.
        prob: of staying inside at all points.

    Reference:
        Sailynoja, Buerkner, Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison.
    """
    if not 0 < prob < 1:
        raise ValueError(f"prob must lie between 0 and 1, got {prob}")
    points, tails = _tails(num_ranks, num_draws)
    lower, upper = _inside(tails, _level(num_ranks, num_draws, prob))
    return Band(points, lower.double() / num_ranks, upper.double() / num_ranks)


def uniform_p_value(ranks: Tensor, num_draws: int) -> float:
    """Probability that uniform ranks have an ECDF at least as far out as these, in the measure of the band."""
    ranks = _checked_ranks("ranks", ranks, num_draws)
    points, tails = _tails(len(ranks), num_draws)
    level = float(tails.gather(1, _counts(ranks, num_draws)[:, None]).min())
    # a single point is as far out as this with probability `level` at least; the difference may round to less
    return min(1.0, max(level, 1.0 - _inside_probability(points, tails, level)))


def _cuts(num_draws: int) -> Tensor:
    """Ranks c such that the ECDF is looked at between c - 1 and c, (point,), int64."""
    count = min(num_draws, _MAX_POINTS)
    return torch.linspace(1, num_draws, count, dtype=torch.float64, device="cpu").round().long()


def _counts(ranks: Tensor, num_draws: int) -> Tensor:
    return torch.searchsorted(ranks.long().sort().values, _cuts(num_draws))


@functools.lru_cache(maxsize=16)
def _tails(num_ranks: int, num_draws: int) -> tuple[Tensor, Tensor]:
    """Points (point,), and for each count there the smaller binomial tail, (point, num_ranks + 1)."""
    points = _cuts(num_draws).double() / (num_draws + 1)
    counts = torch.arange(num_ranks + 1, dtype=torch.float64, device="cpu")
    chances = _binomial(counts, torch.tensor(float(num_ranks), device="cpu"), points[:, None])
    return points, torch.minimum(chances.cumsum(1), chances.flip(1).cumsum(1).flip(1))


def _binomial(successes: Tensor, trials: Tensor, chance: Tensor) -> Tensor:
    """Probability of so many successes; zero below 0. Successes never exceed the trials here."""
    found, failures = successes.double().clamp(min=0), (trials - successes).double()
    trials = trials.double()
    logs = (trials + 1).lgamma() - (found + 1).lgamma() - (failures + 1).lgamma()
    logs = logs + found * chance.log() + failures * (-chance).log1p()
    return torch.where(successes >= 0, logs.exp(), 0.0)


def _inside(tails: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest count at each point whose tails both exceed the level, (point,) each."""
    inside = (tails > level * (1 + 1e-9)).int()  # equal tails differ by rounding
    return inside.argmax(1), tails.shape[1] - 1 - inside.flip(1).argmax(1)


def _inside_probability(points: Tensor, tails: Tensor, level: float) -> float:
    """Probability that uniform ranks stay within the counts of :func:`_inside` at all points."""
    if bool((tails.amax(1) <= level * (1 + 1e-9)).any()):
        return 0.0
    lower, upper = _inside(tails, level)
    total = tails.shape[1] - 1
    before = torch.zeros(1, dtype=torch.int64, device="cpu")
    chances, reached = torch.ones(1, dtype=torch.float64, device="cpu"), 0.0
    for point, low, high in zip(points.tolist(), lower.tolist(), upper.tolist(), strict=True):
        now = torch.arange(low, high + 1, device="cpu")
        # of the ranks beyond the last point, those that lie before this one
        step = torch.tensor((point - reached) / (1 - reached), dtype=torch.float64, device="cpu")
        chances = chances @ _binomial(now - before[:, None], (total - before)[:, None], step)
        before, reached = now, point
    return float(chances.sum())


@functools.lru_cache(maxsize=64)
def _level(num_ranks: int, num_draws: int, prob: float) -> float:
    """The highest level of the tails at which the band still holds ``prob``, to six digits, by bisection."""
    points, tails = _tails(num_ranks, num_draws)
    low, high = math.log((1 - prob) / (2 * len(points))), 0.0  # no more than a union bound is ever needed
    while high - low > 1e-6:
        middle = (low + high) / 2
        enough = _inside_probability(points, tails, math.exp(middle)) >= prob
        low, high = (middle, high) if enough else (low, middle)
    return math.exp(low)
