"""The spread of points over chains and steps, which the mass matrix is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.inference.kernels.kernel import Tuning

__all__ = ["RunningCovariance", "RunningVariance", "standardized"]


class RunningVariance:
    """Variance over chains and steps, merged batch by batch (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Any = 0.0  # tensors from the first batch on

    def add(self, u: Tensor) -> None:
        n, mean = len(u), u.mean(0)
        total = self.count + n
        shift = mean - self.mean
        self.squares = self.squares + self._squares(u - mean) + self._square(shift) * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def _squares(self, deviations: Tensor) -> Tensor:
        """Summed over chains."""
        return deviations.square().sum(0)

    def _square(self, shift: Tensor) -> Tensor:
        return shift.square()

    def regularized(self) -> Tensor:
        """Shrunk as Stan does: a few draws must not make a scale zero."""
        n = self.count
        variance = self.squares / (n - 1)
        return variance * (n / (n + 5.0)) + 1e-3 * (5.0 / (n + 5.0))

    def tuned(self, tuning: Tuning) -> Tuning:
        """A tuning with the scales seen."""
        return tuning._replace(inverse_mass=self.regularized())


class RunningCovariance(RunningVariance):
    """The same for covariances within blocks of coordinates.

    Args:
        mask: (dim, dim), ones where two coordinates share a block.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self._mask = mask

    def _squares(self, deviations: Tensor) -> Tensor:
        points = deviations.movedim(0, -2)  # (*batch, chains, dim)
        return (points.mT @ points) * self._mask

    def _square(self, shift: Tensor) -> Tensor:
        return shift[..., :, None] * shift[..., None, :] * self._mask

    def regularized(self) -> Tensor:
        n = self.count
        covariance = self.squares / (n - 1)
        identity = torch.eye(len(self._mask), dtype=covariance.dtype, device=covariance.device)
        return covariance * (n / (n + 5.0)) + 1e-3 * (5.0 / (n + 5.0)) * identity

    def tuned(self, tuning: Tuning) -> Tuning:
        covariance = self.regularized()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        # Of more coordinates than draws rounding may leave none: scales alone, until the next window.
        factor = torch.where((failed != 0)[..., None, None], variance.sqrt().diag_embed(), factor)
        return tuning._replace(inverse_mass=variance, factor=factor)


def standardized(points: Tensor, tuning: Tuning) -> Tensor:
    """Points (chains, *batch, dim) in units of the scales, uncorrelated where the mass matrix is dense."""
    if tuning.factor is None:
        return points / tuning.inverse_mass.sqrt()
    return torch.linalg.solve_triangular(tuning.factor, points[..., None], upper=False)[..., 0]
