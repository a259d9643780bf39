"""The spread of points over chains and steps, which the mass matrix is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.inference.kernels.kernel import Tuning

__all__ = ["RunningCovariance", "RunningVariance", "standardized"]


_MANY = 100  # points from which a variance is its own best estimate, whatever the unit


class RunningVariance:
    """Variance over chains and steps, merged batch by batch (Chan, Golub, LeVeque 1979).

    Args:
        within: leave out what the mean over chains moves from step to step: many chains on their way are not wide.
    """

    def __init__(self, *, within: bool = False) -> None:
        self._within, self._batches = within, 0
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Any = 0.0  # tensors from the first batch on

    def add(self, u: Tensor) -> None:
        n, mean = len(u), u.mean(0)
        total = self.count + n
        shift = mean - self.mean
        self.squares = self.squares + self._squares(u - mean)
        if not self._within:
            self.squares = self.squares + self._square(shift) * (self.count * n / total)
        self._batches += 1
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def _squares(self, deviations: Tensor) -> Tensor:
        """Summed over chains."""
        return deviations.square().sum(0)

    def _square(self, shift: Tensor) -> Tensor:
        return shift.square()

    @property
    def _degrees(self) -> int:
        return self.count - (self._batches if self._within else 1)

    def regularized(self) -> Tensor:
        """Shrunk as Stan does: a few points must not make a scale zero; many say it in whatever unit."""
        n = self.count
        variance = self.squares / self._degrees * (n / (n + 5.0))
        known = (variance > torch.finfo(variance.dtype).tiny) & (n >= _MANY)
        return torch.where(known, variance, variance + 1e-3 * (5.0 / (n + 5.0)))

    def tuned(self, tuning: Tuning) -> Tuning:
        """A tuning with the scales seen."""
        return tuning._replace(inverse_mass=self.regularized())


class RunningCovariance(RunningVariance):
    """The same for covariances within blocks of coordinates.

    Args:
        mask: (dim, dim), ones where two coordinates share a block.
        within: as there.
    """

    def __init__(self, mask: Tensor, *, within: bool = False) -> None:
        super().__init__(within=within)
        self._mask = mask

    def _squares(self, deviations: Tensor) -> Tensor:
        points = deviations.movedim(0, -2)  # (*batch, chains, dim)
        return (points.mT @ points) * self._mask

    def _square(self, shift: Tensor) -> Tensor:
        return shift[..., :, None] * shift[..., None, :] * self._mask

    def regularized(self) -> Tensor:
        n = self.count
        covariance = self.squares / self._degrees
        # The ridge is 1e-3 of a unit for few points, of a variance for many.
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        known = (variance > torch.finfo(variance.dtype).tiny) & (n >= _MANY)
        ridge = torch.where(known, variance, torch.ones_like(variance))
        return covariance * (n / (n + 5.0)) + (1e-3 * (5.0 / (n + 5.0)) * ridge).diag_embed()

    def tuned(self, tuning: Tuning) -> Tuning:
        covariance = self.regularized()
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        unit = variance.sqrt()[..., None]  # correlations have a factor where covariances of unlike units have none
        factor, failed = torch.linalg.cholesky_ex(covariance / unit / unit.mT)
        factor = unit * factor
        # Of more coordinates than draws rounding may leave none: scales alone, until the next window.
        factor = torch.where((failed != 0)[..., None, None], variance.sqrt().diag_embed(), factor)
        return tuning._replace(inverse_mass=variance, factor=factor)


def standardized(points: Tensor, tuning: Tuning) -> Tensor:
    """Points (chains, *batch, dim) in units of the scales, uncorrelated where the mass matrix is dense."""
    if tuning.factor is None:
        return points / tuning.inverse_mass.sqrt()
    return torch.linalg.solve_triangular(tuning.factor, points[..., None], upper=False)[..., 0]
