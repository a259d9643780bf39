"""What every sampler returns: values by site, per-draw statistics, optional weights, counts and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.estimates import Estimate

__all__ = ["Draws"]


@dataclass(frozen=True, eq=False, repr=False)
class Draws:
    """Draws of a model's latent sites, with what is needed to judge them.

    Draws of a Markov chain have ``log_weights is None``. Draws with ``log_weights`` are weighted
    points (importance sampling, a quadrature grid, particles): their order means nothing, and
    diagnostics of chains (R-hat, autocorrelation) do not apply to them. Four or more chains of weighted
    points are islands: nearly independent of each other, while the points of one island need not be.

    Args:
        values: site name -> tensor of shape (chain, draw, *site_shape), on the constrained scale.
        method: how they were made: ``"snis"``, ``"nuts"``, ``"hmc"``, ``"quadrature"``, ...
        stats: statistic -> tensor (chain, draw), or (chain, draw, *data) for data that are sampled each
            on its own; names as in ArviZ: ``lp``, ``diverging``, ``acceptance_rate``, ``energy``,
            ``step_size``, ``n_steps``, ``tree_depth``.
        log_weights: (chain, draw), normalized so that ``exp`` of them sums to one over all entries.
        log_z: log of the normalizing constant of the unnormalized target, with its standard error; one
            number, or one for each datum.
        pareto_k: shape of the generalized Pareto tail of the weights (PSIS); above 0.7 do not trust.
        observed: observed site -> data, factor sites left out.
        dims: site -> names of the dimensions of ``site_shape``.
        coords: dimension name -> labels.
        warmup: the draws of the warm-up phase when they were kept.
        num_gradients: gradient evaluations, warm-up included; ``None`` where not counted.
        seconds: wall-clock seconds, warm-up and compilation included.
        sampling_seconds: wall-clock seconds of the draws alone.
        notes: settings used and decisions taken, for the record.
    """

    values: Mapping[str, Tensor]
    method: str
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None
    log_z: Estimate | None = None
    pareto_k: float | None = None
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    coords: Mapping[str, Any] = field(default_factory=dict)
    warmup: Draws | None = None
    num_gradients: int | None = None
    seconds: float = math.nan
    sampling_seconds: float = math.nan
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values is empty: a Draws needs at least one site")
        leading = {name: tuple(value.shape[:2]) for name, value in self.values.items()}
        first = next(iter(leading.values()))
        if len(first) != 2 or any(shape != first for shape in leading.values()):
            raise ValueError(f"values must all begin with the same (chain, draw) shape, got {leading}")
        for name, stat in self.stats.items():
            if tuple(stat.shape[:2]) != first:
                raise ValueError(
                    f"stats[{name!r}] must have shape {first} (chain, draw), or more dimensions after these, "
                    f"got {tuple(stat.shape)}"
                )
        if self.log_weights is not None and tuple(self.log_weights.shape) != first:
            raise ValueError(f"log_weights must have shape {first}, got {tuple(self.log_weights.shape)}")

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}: {tuple(value.shape[2:])}" for name, value in self.values.items())
        weighted = ", weighted" if self.log_weights is not None else ""
        return f"Draws({self.method!r}, {self.num_chains} chains of {self.num_draws} draws{weighted}, {{{sites}}})"

    @property
    def num_chains(self) -> int:
        return next(iter(self.values.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return next(iter(self.values.values())).shape[1]

    @property
    def weights(self) -> Tensor:
        """Normalized weights, shape (chain * draw,); uniform for draws of a chain."""
        return self._weights().to(_floating_dtype(next(iter(self.values.values()))))

    def _weights(self) -> Tensor:
        """In double precision, so that they sum to one however many there are."""
        if self.log_weights is None:
            total = self.num_chains * self.num_draws
            return torch.full((total,), 1.0 / total, dtype=torch.float64)
        return self.log_weights.flatten().double().softmax(0)

    def flat(self, site: str) -> Tensor:
        """Values of one site with chains and draws merged, shape (chain * draw, *site_shape)."""
        if site not in self.values:
            raise ValueError(f"site {site!r} is not among the draws; sites: {sorted(self.values)}")
        return self.values[site].flatten(0, 1)

    def mean(self, site: str) -> Tensor:
        """(Weighted) posterior mean of one site, shape site_shape."""
        values = self.flat(site)
        return self._average(values).to(_floating_dtype(values))

    def std(self, site: str) -> Tensor:
        """(Weighted) posterior standard deviation of one site, shape site_shape."""
        values = self.flat(site)
        squared = (values.double() - self._average(values)) ** 2
        return self._average(squared).sqrt().to(_floating_dtype(values))

    def _average(self, values: Tensor) -> Tensor:
        values = values.double()
        return torch.tensordot(self._weights().to(values), values, dims=1)

    def resample(self, num_samples: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Equally weighted draws, with replacement: what to decode, plot or feed to a classifier.

        Args:
            num_samples: how many.
            generator: source of randomness; the global torch generator when ``None``.

        Returns:
            site -> tensor (num_samples, *site_shape).
        """
        index = torch.multinomial(self._weights(), num_samples, replacement=True, generator=generator)
        return {site: self.flat(site)[index] for site in self.values}


def _floating_dtype(values: Tensor) -> torch.dtype:
    """Counts and classes have means too."""
    return values.dtype if values.is_floating_point() else torch.get_default_dtype()
