"""A mixture of Gaussians in two dimensions, biased and balanced: a toy where every quantity is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.randomness import random_stream

__all__ = ["GaussianMixture2D"]

_REACH, _SPACING = 7.0, 0.08  # of the grid, in standard deviations


@checked
class GaussianMixture2D:
    r"""Three Gaussians in the plane: biased data are plentiful, and a tilt is to restore the balance.

    .. math:: p_{biased}(x) = \sum_c b_c N(x; \mu_c, s^2 I), \quad p_{balanced}(x) = \sum_c w_c N(x; \mu_c, s^2 I)

    The tilt that does it is :attr:`energy`, ``log p_biased - log p_balanced``, with log Z = 0. What is asked of any
    other tilt of the biased distribution is answered on a grid, in double precision.

    Args:
        weights: (components,) balanced weights w.
        biased_weights: (components,) biased weights b.
        locs: (components, 2) means.
        scale: standard deviation of every component.

    Attributes:
        balanced: the balanced distribution, event_shape (2,).
        biased: the biased distribution.
        energy: the exact tilt from biased to balanced.

    Raises:
        ValueError: weights that are no proportions, or shapes that do not agree.

    Example:
        >>> from pyro_ebm import GaussianMixture2D
        >>> toy = GaussianMixture2D()
        >>> [round(weight, 3) for weight in toy.class_weights().tolist()]
        [0.7, 0.2, 0.1]
        >>> [round(weight, 3) for weight in toy.class_weights(toy.energy).tolist()]
        [0.3, 0.4, 0.3]
    """

    def __init__(
        self,
        *,
        weights: Sequence[float] = (0.3, 0.4, 0.3),
        biased_weights: Sequence[float] = (0.7, 0.2, 0.1),
        locs: Sequence[Sequence[float]] = ((-2.0, -1.0), (0.0, 2.0), (2.0, -1.0)),
        scale: float = 0.7,
    ) -> None:
        self.locs = torch.as_tensor(locs)
        if self.locs.ndim != 2 or self.locs.shape[1] != 2:
            raise ValueError(f"locs must have shape (components, 2), got {tuple(self.locs.shape)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.scale = float(scale)
        self.weights = _proportions("weights", weights, len(self.locs))
        self.biased_weights = _proportions("biased_weights", biased_weights, len(self.locs))
        self.balanced, self.biased = (self._law(w) for w in (self.weights, self.biased_weights))
        self.energy: Energy = _LogRatio(self)
        self._points, self._log_base = self._grid()

    def model(self, x: Tensor | None = None) -> Tensor:
        """The biased distribution as a Pyro model with the site ``"x"``: to train a tilt of it on data, or to sample.

        Args:
            x: (n, 2) data, in the plate ``"data"``; one draw without plate where ``None``.
        """
        if x is None:
            return pyro.sample("x", self.biased)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("x", self.biased, obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        """Nothing is latent where ``x`` is given."""

    def sample(self, num_samples: int, *, biased: bool, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draws (num_samples, 2) and the component (num_samples,) each came from.

        Args:
            num_samples: how many.
            biased: from the biased or from the balanced distribution.
            seed: a number for the same draws twice; ``None`` uses the global generator.
        """
        with random_stream(seed):
            weights = self.biased_weights if biased else self.weights
            labels = torch.multinomial(weights, num_samples, replacement=True)
            return self.locs[labels] + self.scale * torch.randn(num_samples, 2), labels

    def responsibilities(self, x: Tensor, *, biased: bool = False) -> Tensor:
        """Probability of each component given x, the best label there can be: (*batch, 2) to (*batch, components)."""
        weights = self.biased_weights if biased else self.weights
        return (weights.log().to(x) + self._log_components(x)).softmax(-1)

    def expectation(self, function: Callable[[Tensor], Tensor], energy: Energy | None = None) -> Tensor:
        """Mean of a function (n, 2) -> (n, *shape) under the biased distribution tilted by an energy."""
        with torch.no_grad():
            values = function(self._points)
        return torch.tensordot(self._tilted(energy).softmax(0).to(values), values, dims=1)

    def log_z(self, energy: Energy | Callable[[Tensor], Tensor]) -> Tensor:
        """``log E_biased[exp(-E(x))]``."""
        return self._tilted(energy).logsumexp(0)

    def log_prob(self, x: Tensor, energy: Energy | Callable[[Tensor], Tensor]) -> Tensor:
        """Normalized log density of the biased distribution tilted by an energy, (*batch, 2) to (*batch,)."""
        return self.biased.log_prob(x) - as_energy(energy)(x) - self.log_z(energy).to(x)

    def kl(self, energy: Energy | Callable[[Tensor], Tensor]) -> Tensor:
        """KL divergence of the tilted from the biased distribution, in nats: the price of the tilt."""
        log_prob = self._tilted(energy).log_softmax(0)
        return _sum(log_prob.exp(), log_prob - self._log_base)

    def kl_from_balanced(self, energy: Energy | Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """KL divergence of the balanced distribution from the tilted one; maximum likelihood lowers it."""
        log_prob = self._tilted(self.energy).log_softmax(0)
        return _sum(log_prob.exp(), log_prob - self._tilted(energy).log_softmax(0))

    def density_error(self, energy: Energy | Callable[[Tensor], Tensor] | None = None) -> float:
        """Total variation distance of the tilted from the balanced distribution, between 0 and 1."""
        balanced, tilted = (self._tilted(e).softmax(0) for e in (self.energy, energy))
        return 0.5 * float((balanced - tilted).abs().sum())

    def class_weights(self, energy: Energy | None = None) -> Tensor:
        """Shares of the classes under the tilted distribution, (components,).

        A point belongs to its classes as :meth:`responsibilities` say: of the biased distribution without an energy,
        of the balanced one with it. Exact tilting gives exactly the balanced weights.
        """
        return self.expectation(lambda x: self.responsibilities(x, biased=energy is None), energy)

    def _law(self, weights: Tensor) -> Distribution:
        return _Mixture(self.locs, torch.tensor(self.scale), weights)

    def _log_components(self, x: Tensor) -> Tensor:
        return _log_components(x, self.locs, self.scale)

    def _log_ratio(self, x: Tensor) -> Tensor:
        logs = self._log_components(x)
        biased, balanced = ((w.log().to(x) + logs).logsumexp(-1) for w in (self.biased_weights, self.weights))
        return biased - balanced

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Points (n, 2) that hold all but 1e-11 of the mass, and the log of the biased mass of each."""
        low, high = self.locs.double().amin(0) - _REACH * self.scale, self.locs.double().amax(0) + _REACH * self.scale
        counts = ((high - low) / (_SPACING * self.scale)).ceil().long() + 1
        unit = [torch.linspace(0, 1, int(count), dtype=torch.float64) for count in counts]
        axes = [start + (end - start) * part for start, end, part in zip(low, high, unit, strict=True)]
        points = torch.cartesian_prod(*axes)
        logs = (self.biased_weights.double().log() + self._log_components(points)).logsumexp(-1)
        return points, logs.log_softmax(0)

    def _tilted(self, energy: Energy | Callable[[Tensor], Tensor] | None) -> Tensor:
        """Log mass of each point of the grid, not normalized."""
        if energy is None:
            return self._log_base
        with torch.no_grad():
            energy = as_energy(energy)
            points = self._points if isinstance(energy, _LogRatio) else self._points.to(self.locs)
            found = real_numbers("what the energy returns", energy(points))
            if bool((found.isnan() | (found == -math.inf)).any()):
                raise ValueError(
                    f"the energy is NaN or minus infinity at {int((~(found > -math.inf)).sum())} of {len(found)} "
                    f"points of the grid: there is no such tilt; check its weights"
                )
            return self._log_base - found.double()


class _Mixture(TorchDistribution):
    """A mixture of spherical Gaussians; unlike torch's it says where it lives, which gradient samplers ask."""

    arg_constraints = {  # noqa: RUF012  (torch's own attribute)
        "locs": constraints.independent(constraints.real, 2),
        "scale": constraints.positive,
        "weights": constraints.simplex,
    }
    support = constraints.real_vector

    def __init__(self, locs: Tensor, scale: Tensor, weights: Tensor) -> None:
        self.locs, self.scale, self.weights = locs, scale, weights
        super().__init__(torch.Size(), locs.shape[1:], validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch's own signature)
        shape = torch.Size(sample_shape)
        locs = self.locs[torch.multinomial(self.weights, max(shape.numel(), 1), replacement=True)]
        return (locs + self.scale * torch.randn_like(locs))[: shape.numel()].reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        logs = _log_components(value, self.locs, float(self.scale))
        return (self.weights.log().to(value) + logs).logsumexp(-1)


def _log_components(x: Tensor, locs: Tensor, scale: float) -> Tensor:
    return dist.Normal(locs.to(x), scale).to_event(1).log_prob(x[..., None, :])


class _LogRatio(Energy):
    """``log p_biased(x) - log p_balanced(x)``."""

    def __init__(self, toy: GaussianMixture2D) -> None:
        super().__init__()
        self.toy = toy

    def forward(self, value: Tensor) -> Tensor:
        return self.toy._log_ratio(value)


def _sum(mass: Tensor, values: Tensor) -> Tensor:
    return torch.where(mass > 0, mass * values, 0.0).sum()


def _proportions(name: str, values: Sequence[float], count: int) -> Tensor:
    weights = torch.as_tensor(values)
    if weights.shape != (count,) or not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-5:
        raise ValueError(f"{name} must be {count} positive numbers that sum to one, got {weights.tolist()}")
    return weights
