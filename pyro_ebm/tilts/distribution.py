"""The tilt of a distribution as a distribution, usable inside ``pyro.sample``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.annotations import checked
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.errors import warn_user
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.tilts.normalizer import (
    METHODS,
    Normalizer,
    checked_energy,
    log_z_key,
    sampled_log_normalizer,
    site_log_normalizer,
)

__all__ = ["TiltedDistribution"]

_MAX_POOL = 2**17
_OVERSAMPLING = 16


@checked
class TiltedDistribution(TorchDistribution):
    r"""``p_theta(v) = exp(-E_theta(v)) p(v) / Z_theta`` as a Pyro distribution.

    Inside a model this is the *local* tilt: it renormalizes the site's own conditional, for each value
    of the parents. ``log_prob`` is normalized with an estimated log Z that depends on the weights
    alone (the same weights give the same number; within ``fit`` each step has new draws) and carries its
    gradient. ``sample`` draws by
    sampling-importance-resampling from the base: exact as the pool (16 candidates per draw, at
    least ``num_samples``) grows; it is not reparametrized.

    Args:
        base: (*batch, *event) distribution.
        energy: maps (..., *event) to (...).
        normalizer: how log Z is estimated; a :class:`Normalizer`, ``"importance"`` or ``"qmc"``.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy, TiltedDistribution
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> shifted = TiltedDistribution(base, LinearEnergy([1.0, 0.0]))
        >>> shifted.sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own attribute)

    def __init__(
        self,
        base: TorchDistribution,
        energy: Energy | Callable[[Tensor], Tensor],
        *,
        normalizer: Normalizer | str = "importance",
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.energy = as_energy(energy)
        if isinstance(normalizer, str) and normalizer not in METHODS:
            raise ValueError(f"normalizer must be one of {METHODS} or a Normalizer, got {normalizer!r}")
        self.normalizer = Normalizer(normalizer) if isinstance(normalizer, str) else normalizer
        self._cached_log_z: tuple[object, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> TiltedDistribution:
        base = self.base.expand(torch.Size(batch_shape))
        expanded = TiltedDistribution(base, self.energy, normalizer=self.normalizer, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """``log p(v) - E(v)``, for values (*sample, *batch, *event)."""
        event_dim = len(self.event_shape)
        return self.base.log_prob(value) - checked_energy(self.energy, value, event_dim, "TiltedDistribution")

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(v) - E(v) - log Z``.

        Raises:
            ValueError: if log Z is not finite.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.unnormalized_log_prob(value) - self._log_z()

    def _log_z(self) -> Tensor:
        key = log_z_key(self.base, self.energy, "TiltedDistribution")
        if key is not None and self._cached_log_z is not None and self._cached_log_z[0] == key:
            return self._cached_log_z[1]
        log_z = site_log_normalizer(self.base, self.energy, self.normalizer, name="TiltedDistribution")
        if not bool(log_z.isfinite().all()):
            raise ValueError(
                f"log Z of this TiltedDistribution is not finite ({log_z.detach().flatten()[:5].tolist()}): "
                f"its energy is unbounded below or returns NaN; bound it, or use unnormalized_log_prob"
            )
        if key is not None and not log_z.requires_grad:  # a graph may be used only once
            self._cached_log_z = (key, log_z)
        return log_z

    def log_normalizer(self, *, num_samples: int = 16384, seed: int | None = None) -> Estimate:
        """A fresh estimate of log Z and its standard error; see :func:`pyro_ebm.log_normalizer`."""
        return sampled_log_normalizer(
            self.base, self.energy, method=self.normalizer.method, num_samples=num_samples, seed=seed
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch's own signature)
        """Draw from the tilted distribution, shape (*sample, *batch, *event).

        Warns:
            InferenceWarning: when few distinct candidates carry the weight.
        """
        shape = torch.Size(sample_shape)
        chunk = max(_MAX_POOL // (_OVERSAMPLING * max(self.batch_shape.numel(), 1)), 1)
        sizes = [min(chunk, shape.numel() - start) for start in range(0, shape.numel(), chunk)]
        if not sizes:
            return self.base.sample(shape)
        parts = [self._resample(size) for size in sizes]
        return torch.cat(parts).reshape(shape + self.batch_shape + self.event_shape)

    def _resample(self, num: int) -> Tensor:
        """(num, *batch, *event) draws from one pool of candidates."""
        pool = self.base.sample((max(_OVERSAMPLING * num, self.normalizer.num_samples),))
        event_dim = len(self.event_shape)
        log_weights = -checked_energy(self.energy, pool, event_dim, "TiltedDistribution")
        if not bool(log_weights.amax(0).isfinite().all()):  # NaN is the largest of all
            raise ValueError(
                "sampling a TiltedDistribution: exp(-E) of the base's draws is NaN, infinite or zero throughout; the "
                "energy returns NaN, is unbounded below, or is +inf wherever the base puts its draws"
            )
        self._check_pool(log_weights, num)
        weights = torch.softmax(log_weights.reshape(pool.shape[0], -1).T, -1)
        index = torch.multinomial(weights, num, replacement=True).T
        candidates = pool.reshape(pool.shape[0], index.shape[1], -1)
        return candidates[index, torch.arange(index.shape[1], device=index.device)].reshape(num, *pool.shape[1:])

    def _check_pool(self, log_weights: Tensor, num: int) -> None:
        relative = importance_estimate(log_weights).se * math.sqrt(log_weights.shape[0])
        ess = (log_weights.shape[0] / (1 + relative**2)).min()
        if not bool(ess > 10):
            warn_user(
                f"sampling a TiltedDistribution: of {log_weights.shape[0]} candidates from the base only "
                f"{float(ess):.1f} effective ones carry the weight, so {num} draws are mostly copies; the "
                f"tilt is far from its base: sample it by MCMC, or weaken the energy"
            )
