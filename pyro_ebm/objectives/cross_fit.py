"""What a tilt gains on data it has not seen: fitted without each part of the data in turn, measured on that part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.energies import Energy
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import fingerprint
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, site_log_weights

__all__ = ["CrossFit", "HeldOut", "cross_fit", "parts_of"]

_LOG_Z_DRAWS = 8192
_LOOKS = 40


class CrossFit(NamedTuple):
    """What fits without each part of the data tell.

    Args:
        gain: per datum, with its standard error over the data and that of log Z.
        epochs: how many epochs did best on data not seen, where fewer were better than all by more than the error;
            None where all were.
    """

    gain: Estimate
    epochs: int | None


class HeldOut:
    """The gain of a tilt, datum by datum, from posterior draws of its site that stay the same.

    Args:
        base: distribution of the site before the tilt.
        energy: of the tilt.
        values: (n, num_particles, *event).
        log_weights: (n, num_particles), normalized per datum: the log likelihood gained; None: the ELBO.
        seed: of the draws for log Z, the same throughout.
    """

    def __init__(
        self, base: Distribution, energy: Energy, values: Tensor, log_weights: Tensor | None, seed: int
    ) -> None:
        self.base, self.energy, self.values, self.log_weights = base, energy, values, log_weights
        self.seed = fingerprint((), "cross-fit", seed)

    @torch.no_grad()
    def gains(self, rows: Tensor) -> tuple[Tensor, float]:
        """Gains (num_rows,) of some data, and the standard error of the log Z that all share."""
        with evaluation_mode(self.energy):
            values = self.values[rows]
            minus = -checked_energy(self.energy, values, values.ndim - 2, "the tilted site")
            settings = Normalizer(num_samples=_LOG_Z_DRAWS)
            weights = site_log_weights(self.base, self.energy, settings, name="the tilted site", seed=self.seed)
        log_z = importance_estimate(weights)
        gained = minus.mean(-1) if self.log_weights is None else (self.log_weights[rows] + minus).logsumexp(-1)
        return gained - log_z.value.mean(), float(log_z.se.mean())


def parts_of(num: int, folds: int, seed: int) -> list[Tensor]:
    """The numbers below ``num``, in random order and ``folds`` parts; none where there are too few of them."""
    folds = min(folds, num // 2)
    if folds < 2:
        return []
    generator = torch.Generator().manual_seed(fingerprint((), "folds", seed))
    return list(torch.randperm(num, generator=generator, device="cpu").tensor_split(folds))


def cross_fit(
    parts: list[Tensor], held_out: HeldOut, train: Callable[[Tensor, int, Callable[[int], None]], bool], epochs: int
) -> CrossFit | None:
    """Fit without each part, and measure on it as training goes on.

    Args:
        parts: the rows of each part.
        held_out: measures.
        train: trains on rows, as the part of that number is left out, and calls the function after each epoch with
            its number; returns whether all went well.
        epochs: the most there are.

    Returns:
        None where a fit did not come to a regular end.
    """
    wanted = {max(round(epochs ** (look / _LOOKS)), 1) for look in range(_LOOKS + 1)}  # close together at first
    num = sum(map(len, parts))
    curves: list[dict[int, Tensor]] = []
    errors = []
    for index, part in enumerate(parts):
        curve: dict[int, Tensor] = {}
        last = [0]

        def look(epoch: int, curve: dict[int, Tensor] = curve, last: list[int] = last, part: Tensor = part) -> None:
            last[0] = epoch
            if epoch in wanted:
                curve[epoch] = held_out.gains(part)[0]

        rest = torch.cat([other for other in parts if other is not part]).sort().values
        if not train(rest, index, look):
            return None
        curve[last[0]], error = held_out.gains(part)
        curves.append(curve)
        errors.append(error)
    return _chosen(curves, num, math.sqrt(sum(error**2 for error in errors)) / len(errors))


def _chosen(curves: list[dict[int, Tensor]], num: int, log_z_error: float) -> CrossFit:
    looks = sorted({epoch for curve in curves for epoch in curve})
    gains = torch.stack([torch.cat([_at(curve, look) for curve in curves]) for look in looks]).double()
    best = int(gains.mean(1).argmax())
    ahead = gains[best] - gains[-1]
    earlier = float(ahead.mean()) > float(ahead.std()) / math.sqrt(num)
    kept = gains[best if earlier else -1]
    error = math.sqrt(float(kept.var()) / num + log_z_error**2)
    gain = Estimate(kept.mean().float().cpu(), torch.tensor(error, device="cpu"))
    return CrossFit(gain, looks[best] if earlier else None)


def _at(curve: dict[int, Tensor], look: int) -> Tensor:
    """The gains after an epoch, or before it the last ones; a fit that had ended goes on as it ended."""
    return curve[max((epoch for epoch in curve if epoch <= look), default=min(curve))]
