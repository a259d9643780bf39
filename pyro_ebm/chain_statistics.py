"""What draws of chains are worth: ESS, R-hat and MCSE of many columns at once, equal to ArviZ's.

In numpy because sorting, the larger part of the work, takes a seventh of the time it takes in torch on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.annotations import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["chain_statistics", "ess_bulk", "ess_tail", "mcse_mean", "nested_r_hat", "r_hat", "split_r_hat"]

_TAIL = (0.05, 0.95)
_MIN_DRAWS = 4  # ArviZ's own limit
_BLOCK = 2**16  # draws looked at together: a dozen arrays of half a megabyte, which a cache holds
_SAME = 1e-15  # a range below it is a constant, to ArviZ
_CLASSICAL = 4  # chains, for which the limits of R-hat were made
_LEAST_HALF = 10  # effective draws in half a chain, from which on it says something of its own


def ess_bulk(x: Tensor | NDArray[Any]) -> Floats:
    """Effective sample size of the rank-normalized draws: the precision of means and medians.

    Args:
        x: (chain, draw, *shape).

    Returns:
        float64 array of ``shape``, in draws summed over chains; NaN for constant or non-finite columns.

    Raises:
        ValueError: if ``x`` has no axes of chains and draws.

    Reference:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization.
    """
    return chain_statistics(x, "ess_bulk")["ess_bulk"]


def ess_tail(x: Tensor | NDArray[Any]) -> Floats:
    """Effective sample size of the 5 % and 95 % quantiles (the smaller); arguments as :func:`ess_bulk`."""
    return chain_statistics(x, "ess_tail")["ess_tail"]


def r_hat(x: Tensor | NDArray[Any]) -> Floats:
    """Rank-normalized split R-hat: 1 when chains agree (``thresholds.MAX_R_HAT``: good); NaN for a single chain.

    Arguments, shape of the result and reference as in :func:`ess_bulk`.
    """
    return chain_statistics(x, "r_hat")["r_hat"]


def split_r_hat(x: Tensor | NDArray[Any]) -> Floats:
    """:func:`r_hat`; of a single chain that of its halves."""
    half = x.shape[1] // 2
    if len(x) != 1 or not half:
        return r_hat(x)
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    return r_hat(np.concatenate([array[:, :half], array[:, -half:]]))


@checked
def nested_r_hat(values: Tensor | NDArray[Any], superchains: int | Sequence[int]) -> Floats:
    r"""R-hat of groups of chains that start at one point each: 1 when it does not matter where chains start.

    .. math:: \sqrt{1 + B / W}

    with B the variance between the means of the groups, and W that within groups, between and within their chains; of
    rank-normalized halves of chains, and of their distances from the median (the larger of the two). Many short
    chains are judged by what a group knows, not by what each chain knows alone. Equal to ArviZ's ``rhat_nested``.

    Args:
        values: (chain, draw, *shape).
        superchains: how many groups, each of as many chains that follow each other (``MCMC(superchains=...)`` starts
            them so); or the group of each chain, (chain,).

    Returns:
        float64 array of ``shape``; NaN for a single chain, and for constant or non-finite columns.

    Raises:
        ValueError: groups of different sizes, or fewer than two.

    Reference:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman (2024), Nested R-hat: assessing the convergence of
        Markov chain Monte Carlo when running many short chains.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.ndim < 2:
        raise ValueError(f"values must have shape (chain, draw, *shape), got {array.shape}")
    order, groups = _groups(superchains, len(array))
    found = np.full(math.prod(array.shape[2:]), np.nan)
    if len(array) > 1 and array.shape[1] >= _MIN_DRAWS:
        columns = array[order].reshape(*array.shape[:2], -1)
        width = max(1, _BLOCK // math.prod(array.shape[:2]))
        for start in range(0, len(found), width):
            part = slice(start, start + width)
            _fill({"nested": found[part]}, columns[..., part], {"nested": functools.partial(_nested, groups=groups)})
    return found.reshape(array.shape[2:])


def _groups(superchains: int | Sequence[int], chains: int) -> tuple[NDArray[np.intp], int]:
    """The chains in an order in which each group is a run of them, and the number of groups."""
    whole = isinstance(superchains, int)
    ids = np.arange(chains) * superchains // max(chains, 1) if isinstance(superchains, int) else np.asarray(superchains)
    names, sizes = np.unique(ids, return_counts=True)
    if ids.shape != (chains,) or len(names) < 2 or (sizes != sizes[0]).any() or (whole and len(names) != superchains):
        what = superchains if whole else f"{len(names)} of {sizes.tolist()} chains"
        raise ValueError(
            f"superchains must be two groups of chains or more, all of one size, that hold the {chains} chains, "
            f"got {what}"
        )
    return ids.argsort(kind="stable"), len(names)


def mcse_mean(x: Tensor | NDArray[Any]) -> Floats:
    """Monte Carlo standard error of the mean, in units of ``x``; arguments as :func:`ess_bulk`."""
    return chain_statistics(x, "mcse_mean")["mcse_mean"]


def chain_statistics(x: Tensor | NDArray[Any], *names: str) -> dict[str, Floats]:
    """Several statistics of the same draws, which are sorted once for all of them.

    Args:
        x: (chain, draw, *shape).
        names: of ``"ess_bulk"``, ``"ess_tail"``, ``"r_hat"``, ``"mcse_mean"``, and of ``"r_hat_excess"`` and
            ``"r_hat_allowance"``, for which see ``convergence.py``.

    Returns:
        Each by its name, a float64 array of ``shape``; see the function of that name.

    Raises:
        ValueError: if ``x`` has no axes of chains and draws, or a name is none of these.
    """
    unknown = sorted(set(names) - set(_STATISTICS))
    if unknown:
        raise ValueError(f"names must be of {sorted(_STATISTICS)}, got {unknown}")
    array = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x)
    if array.ndim < 2:
        raise ValueError(f"x must have shape (chain, draw, *shape), got {array.shape}")
    chains, draws, *shape = array.shape
    columns = array.reshape(chains, draws, math.prod(shape))
    found = {name: np.full(columns.shape[-1], np.nan) for name in names}
    if chains and draws >= _MIN_DRAWS:
        known = [name for name in names if chains > 1 or not name.startswith("r_hat")]
        width = max(1, _BLOCK // (chains * draws))
        for start in range(0, columns.shape[-1], width):
            part = slice(start, start + width)
            _fill({name: found[name][part] for name in known}, columns[..., part], _STATISTICS)
    return {name: values.reshape(shape) for name, values in found.items()}


def _fill(
    found: dict[str, Floats], columns: NDArray[Any], statistics: Mapping[str, Callable[[_Block], Floats]]
) -> None:
    """Write the statistics of ``columns``, (chain, draw, column), where they are finite and not constant."""
    block = np.ascontiguousarray(columns.transpose(2, 0, 1), dtype=np.float64)
    with np.errstate(all="ignore"):
        good = np.isfinite(block).all((1, 2)) & (np.ptp(block, axis=(1, 2)) > 0)
        if not good.any():
            return
        kept = _Block(block if good.all() else block[good])
        for name, values in found.items():
            values[good] = statistics[name](kept)


class _Block:
    """Some columns with what several statistics need of them, (column, chain, draw), none of them constant."""

    def __init__(self, x: Floats) -> None:
        self.x = x
        self.split = _halves(x)

    @functools.cached_property
    def ordered(self) -> tuple[NDArray[np.intp], Floats]:
        """Where the split chains' draws lie when sorted, and their values in that order: (column, draw) both."""
        return _sort(self.split)

    @functools.cached_property
    def scores(self) -> Floats:
        """The split chains, each draw replaced by the normal quantile of its rank among all."""
        return _normal_scores(*self.ordered).reshape(self.split.shape)

    @functools.cached_property
    def folded_scores(self) -> Floats:
        """The same of the distances from the median, in which a difference of scales shows."""
        _, values = self.ordered
        middle, size = values.shape[1] // 2, values.shape[1]
        median = values[:, (size - 1) // 2 : middle + 1].mean(1)
        return _normal_scores(*_sort(np.abs(self.split - median[:, None, None]))).reshape(self.split.shape)

    @functools.cached_property
    def covariance(self) -> Floats:
        """Mean autocovariance of the scores of the split chains."""
        return _mean_autocovariance(self.scores)

    @functools.cached_property
    def of_halves(self) -> tuple[Floats, Floats]:
        """R-hat squared less one of scores and folded scores, and how much of it short chains explain: (2, column)."""
        chains = self.x.shape[1]
        found, expected = [], []
        for folded in (False, True):
            scores = self.folded_scores if folded else self.scores
            found.append(_scale_reduction(scores) ** 2 - 1)
            share = max(1 - _CLASSICAL / chains, 0.0)
            if not share:
                expected.append(np.zeros(len(scores)))
                continue
            covariance = _mean_autocovariance(scores) if folded else self.covariance
            of_draws = _autocorrelation_time(covariance / covariance[:, :1]) / scores.shape[-1]
            # About its own mean a short chain seems less correlated than it is, by twice its autocorrelation time.
            expected.append(share * np.clip(of_draws * (1 + 2 * of_draws), 0.0, 1 / _LEAST_HALF))
        return np.stack(found), np.nan_to_num(np.stack(expected))

    def below(self, prob: float) -> Floats:
        """Which of the split chains' draws do not exceed the quantile of all draws, as zeros and ones."""
        whole = self.split.size == self.x.size
        values = self.ordered[1] if whole else np.sort(self.x.reshape(len(self.x), -1), axis=1)
        return (self.split <= _quantile(values, prob)[:, None, None]).astype(np.float64)


def _bulk(block: _Block) -> Floats:
    return _ess(block.scores, block.covariance)


def _tail(block: _Block) -> Floats:
    return np.minimum(*(_ess(block.below(prob)) for prob in _TAIL))


def _r_hat(block: _Block) -> Floats:
    bulk, folded = _scale_reduction(block.scores), _scale_reduction(block.folded_scores)
    return np.where(folded > bulk, folded, bulk)  # a folded one of two values only is NaN, and does not count


def _excess(block: _Block) -> Floats:
    found, expected = block.of_halves
    return np.sqrt(1 + np.fmax.reduce(found - expected))


def _allowance(block: _Block) -> Floats:
    """That of the kind of scores, plain or folded, whose excess is the larger."""
    found, expected = block.of_halves
    which = np.nan_to_num(found - expected, nan=-np.inf).argmax(0)
    chosen: Floats = np.take_along_axis(expected, which[None], 0)[0]
    return chosen


def _nested(block: _Block, groups: int) -> Floats:
    bulk, folded = (_nested_reduction(scores, groups) for scores in (block.scores, block.folded_scores))
    return np.where(folded > bulk, folded, bulk)


def _mcse(block: _Block) -> Floats:
    return block.x.std((1, 2), ddof=1) / np.sqrt(_ess(block.split))


_STATISTICS: dict[str, Callable[[_Block], Floats]] = {
    "ess_bulk": _bulk,
    "ess_tail": _tail,
    "r_hat": _r_hat,
    "r_hat_excess": _excess,
    "r_hat_allowance": _allowance,
    "mcse_mean": _mcse,
}


def _halves(x: Floats) -> Floats:
    """First and second half of each chain as chains of their own; of an odd number the middle draw is left out."""
    half = x.shape[-1] // 2
    return np.concatenate([x[..., :half], x[..., -half:]], axis=1)


def _sort(x: Floats) -> tuple[NDArray[np.intp], Floats]:
    flat = x.reshape(len(x), -1)
    order = flat.argsort(axis=1)
    return order, np.take_along_axis(flat, order, axis=1)


def _normal_scores(order: NDArray[np.intp], values: Floats) -> Floats:
    """Normal quantiles of the average ranks (Blom's), back where the sorted values came from."""
    table = _blom(values.shape[1])
    scores = np.empty_like(values)
    scores[:] = table[::2]
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    if tied.any():
        scores[tied] = table[_doubled_ranks(values[tied])]
    out = np.empty_like(values)
    np.put_along_axis(out, order, scores, axis=1)
    return out


@functools.lru_cache(maxsize=4)
def _blom(size: int) -> Floats:
    """Normal quantiles at the ranks 1, 1.5, 2, ..., ``size``."""
    ranks = torch.arange(2, 2 * size + 1, dtype=torch.float64, device="cpu") / 2
    scores: Floats = torch.special.ndtri((ranks - 0.375) / (size - 0.75 + 1)).numpy()
    return scores


def _doubled_ranks(values: Floats) -> NDArray[np.intp]:
    """First plus last position, from zero, of the run of equal values each sorted value lies in."""
    index = np.arange(values.shape[1])
    edge = np.ones((len(values), 1), dtype=bool)
    steps = values[:, 1:] != values[:, :-1]
    first = np.maximum.accumulate(np.where(np.hstack([edge, steps]), index, 0), axis=1)
    ends = np.where(np.hstack([steps, edge]), index, len(index))
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return first + last


def _quantile(values: Floats, prob: float) -> Floats:
    """Linear interpolation between sorted values, (column, draw); exact between equal ones."""
    position = (values.shape[1] - 1) * prob
    index = int(position)
    share, low, high = position - index, values[:, index], values[:, min(index + 1, values.shape[1] - 1)]
    # from the nearer end, as numpy does: draws that equal the quantile must not lie above it by rounding
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def _scale_reduction(x: Floats) -> Floats:
    """R-hat of chains as they are, (column, chain, draw): variance between chains against within."""
    draws = x.shape[-1]
    between, within = draws * x.mean(2).var(1, ddof=1), x.var(2, ddof=1).mean(1)
    return np.sqrt((between / within + draws - 1) / draws)


def _nested_reduction(x: Floats, groups: int) -> Floats:
    """Nested R-hat of split chains, (column, half * chain, draw), whose chains come group by group."""
    columns, _, draws = x.shape
    means = x.mean(2).reshape(columns, 2, groups, -1).transpose(0, 2, 1, 3).reshape(columns, groups, -1)
    within = x.var(2, ddof=1).mean(1) if draws > 1 else np.zeros(columns)
    return np.sqrt(1 + means.mean(2).var(1, ddof=1) / (within + means.var(2, ddof=1).mean(1)))


def _ess(x: Floats, covariance: Floats | None = None) -> Floats:
    """Effective sample size of the mean of (column, chain, draw), by Geyer's initial monotone sequence."""
    _, chains, draws = x.shape
    covariance = _mean_autocovariance(x) if covariance is None else covariance
    within = covariance[:, :1] * draws / (draws - 1.0)
    total = within * (draws - 1.0) / draws + x.mean(2).var(1, ddof=1)[:, None]
    rho = 1.0 - (within - covariance) / total
    rho[:, 0] = 1.0
    time = _autocorrelation_time(rho)
    size = chains * draws / np.maximum(time, 1 / math.log10(chains * draws))
    return np.where(np.ptp(x, axis=(1, 2)) < _SAME, float(chains * draws), size)


def _mean_autocovariance(x: Floats) -> Floats:
    """At each lag, averaged over chains: (column, draw)."""
    from scipy.fft import irfft, next_fast_len, rfft

    draws = x.shape[-1]
    length = next_fast_len(2 * draws, real=True)
    spectrum = rfft(x - x.mean(-1, keepdims=True), length).view(np.float64)  # real and imaginary parts in turn
    power = np.einsum("ikf,ikf->if", spectrum, spectrum).reshape(len(x), -1, 2).sum(2) / x.shape[1]
    covariance: Floats = irfft(power, length)[:, :draws] / draws
    return covariance


def _autocorrelation_time(rho: Floats) -> Floats:
    """Of autocorrelations, (column, lag): pairs are summed up to the first that is not positive, and never rise."""
    draws = rho.shape[1]
    last = max(0, (draws - 3) // 2)
    pairs = rho[:, 0 : 2 * last + 1 : 2] + rho[:, 1 : 2 * last + 2 : 2]
    ended = ~(pairs > 0)
    stop = np.where(ended.any(1), ended.argmax(1), last)
    counted = np.arange(last + 1) < stop[:, None]
    falling = np.minimum.accumulate(np.where(counted, pairs, np.inf), axis=1)
    rows = np.arange(len(rho))
    even = rho[rows, 2 * stop]  # counts once, where it adds something
    rest = np.where((even > 0) | (pairs[rows, stop] >= 0), even, 0.0)
    time: Floats = -1.0 + 2.0 * np.where(counted, falling, 0.0).sum(1) + rest
    return np.where(np.isnan(rho[:, 1]), np.nan, time)
