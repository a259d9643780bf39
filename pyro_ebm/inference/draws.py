"""What every sampler returns: values by site, per-draw statistics, optional weights, counts and seconds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers
from pyro_ebm.display import describe_draws, draws_as_html
from pyro_ebm.estimates import Estimate
from pyro_ebm.modules import name_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Draws", "Source"]

_MOST_CATEGORIES = 2**24  # of torch.multinomial


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """The model that draws were made from, with its arguments, all by reference: nothing is copied.

    Copies of draws share it; pickled draws come back without it (``None``), since a model need not be picklable
    and its data can be large. :meth:`Draws.with_model` gives it again.

    Args:
        model: the Pyro model, tilted or not.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Any) -> Source | None:
        """The same of anything that has a model, its arguments and keyword arguments; ``None`` of ``None``."""
        return None if target is None else cls(target.model, tuple(target.args), dict(target.kwargs))

    def __repr__(self) -> str:
        given = [type(arg).__name__ for arg in self.args] + [f"{name}=" for name in self.kwargs]
        return f"Source({name_of(self.model)}({', '.join(given)}))"

    def __copy__(self) -> Source:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Draws:
    """Draws of a model's latent sites, with what is needed to judge them.

    Draws of a Markov chain have ``log_weights is None``. Draws with ``log_weights`` are weighted
    points (importance sampling, a quadrature grid, particles): their order means nothing, and
    diagnostics of chains (R-hat, autocorrelation) do not apply to them. Four or more chains of weighted
    points are islands: nearly independent of each other, while the points of one island need not be.

    Args:
        values: site name -> tensor of shape (chain, draw, *site_shape), on the constrained scale; empty for a
            model without latent sites, whose ``stats`` then say how many draws there are.
        method: how they were made: ``"snis"``, ``"nuts"``, ``"hmc"``, ``"quadrature"``, ...
        stats: statistic -> tensor (chain, draw), or (chain, draw, *data) for data that are sampled each
            on its own; names as in ArviZ: ``lp``, ``diverging``, ``acceptance_rate``, ``energy``,
            ``step_size``, ``n_steps``, ``tree_depth``.
        log_weights: (chain, draw), normalized so that ``exp`` of them sums to one over all entries.
        log_z: log of the normalizing constant of the unnormalized target, with its standard error; one
            number, or one for each datum.
        pareto_k: shape of the generalized Pareto tail of the weights (PSIS); do not trust above 0.7, or less
            with few draws.
        observed: observed site -> data, factor sites left out.
        dims: site -> names of the dimensions of ``site_shape``.
        coords: dimension name -> labels.
        warmup: the draws of the warm-up phase when they were kept.
        num_gradients: gradient evaluations, warm-up included; ``None`` where not counted.
        seconds: wall-clock seconds, warm-up and compilation included.
        sampling_seconds: wall-clock seconds of the draws alone.
        notes: settings used and decisions taken, for the record.
        source: the model and its arguments, by reference: what log likelihoods and deterministic sites are
            computed with; ``None`` where there is none (a density given as a function, draws read from a pickle).
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
    source: Source | None = None

    def __post_init__(self) -> None:
        if not self.values and not self.stats:
            raise ValueError("values is empty: a Draws needs at least one site, or stats that say how many draws")
        leading = {name: tuple(value.shape[:2]) for name, value in (self.values or self.stats).items()}
        first = next(iter(leading.values()))
        if len(first) != 2 or any(shape != first for shape in leading.values()):
            raise ValueError(f"values must all begin with the same (chain, draw) shape, got {leading}")
        for name, stat in self.stats.items():
            if tuple(stat.shape[:2]) != first:
                raise ValueError(
                    f"stats[{name!r}] must have shape {first} (chain, draw), or more dimensions after these, "
                    f"got {tuple(stat.shape)}"
                )
        for name, value in self.values.items():
            real_numbers(f"values[{name!r}]", value)
        if self.log_weights is not None and tuple(self.log_weights.shape) != first:
            raise ValueError(f"log_weights must have shape {first}, got {tuple(self.log_weights.shape)}")

    def __repr__(self) -> str:
        return describe_draws(self)

    def _repr_html_(self) -> str:
        return draws_as_html(self)

    @property
    def num_chains(self) -> int:
        return self._any.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return self._any.shape[1]

    @property
    def _any(self) -> Tensor:
        """One of the tensors that begin with (chain, draw)."""
        return next(iter((self.values or self.stats).values()))

    @property
    def weights(self) -> Tensor:
        """Normalized weights, shape (chain * draw,); uniform for draws of a chain."""
        return self._weights().to(_floating_dtype(self._any))

    def _weights(self) -> Tensor:
        """In double precision, so that they sum to one however many there are."""
        if self.log_weights is None:
            total = self.num_chains * self.num_draws
            device = self._any.device
            return torch.full((total,), 1.0 / total, dtype=torch.float64, device=device)
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

    @checked
    def resample(self, num_samples: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Equally weighted draws, with replacement: what to decode, plot or feed to a classifier.

        Args:
            num_samples: how many.
            generator: source of randomness; the global torch generator when ``None``.

        Returns:
            site -> tensor (num_samples, *site_shape).
        """
        index = self._chosen(num_samples, generator)
        return {site: self.flat(site)[index] for site in self.values}

    def _chosen(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Positions of draws chosen by their weights, on the device of the values; drawn where the generator is."""
        weights = self._weights()
        where = weights.device if generator is None else generator.device
        weights = weights.to(where)
        if len(weights) < _MOST_CATEGORIES:
            index = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        else:
            places = torch.rand(num_samples, generator=generator, dtype=weights.dtype, device=where)
            sums = weights.cumsum(0)
            index = torch.searchsorted(sums, places * sums[-1], right=True).clamp(max=len(weights) - 1)
        return index.to(self._any.device)

    def _spread(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Positions as of :meth:`_chosen`, each so often as its weight asks for, in random order."""
        device = self._any.device
        where = device if generator is None else generator.device
        weights = self._weights().to(where)
        if bool(weights.isnan().any()):
            raise ValueError("log_weights are NaN, infinite or all -inf: draws cannot be chosen by them; sample again")
        shift = torch.rand((), generator=generator, dtype=torch.float64, device=where)
        places = (torch.arange(num_samples, device=where) + shift) / num_samples
        index = torch.searchsorted(weights.cumsum(0), places, right=True).clamp(max=len(weights) - 1)
        return index[torch.randperm(num_samples, generator=generator, device=where)].to(device)

    @checked
    def equally_weighted(
        self, num_samples: int | None = None, *, generator: torch.Generator | None = None
    ) -> Draws:
        """The draws without weights, one chain in random order: resampled where they are weighted.

        What reads no weights (ArviZ's summaries, ``az.loo``) reads these. Each point is there as often as its weight
        asks for, rounded up or down at random (systematic resampling: means err less than with
        :meth:`resample`, whose draws are independent of each other). Copies of one point are no more information
        than the point: ``notes["ess"]`` of the weighted draws says what they are worth.

        Args:
            num_samples: how many; as many as there are when ``None``. Draws without weights are returned as they are.
            generator: source of randomness; the global torch generator when ``None``.
        """
        if self.log_weights is None:
            return self
        num_samples = self.num_chains * self.num_draws if num_samples is None else num_samples
        index = self._spread(num_samples, generator)
        values = {site: value.flatten(0, 1)[index][None] for site, value in self.values.items()}
        stats = {name: stat.flatten(0, 1)[index][None] for name, stat in self.stats.items()}
        return dataclasses.replace(self, values=values, stats=stats, log_weights=None, pareto_k=None, warmup=None)

    def of_chains(self, chains: Sequence[int] | Tensor) -> Draws:
        """Some of the chains, with their statistics; weights are normalized anew.

        Args:
            chains: their positions.
        """
        index = torch.as_tensor(chains, device="cpu")
        if torch.equal(index, torch.arange(self.num_chains, device="cpu")):
            return self

        def chosen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index.to(value.device)] for name, value in tensors.items()}

        logs = None if self.log_weights is None else self.log_weights[index.to(self.log_weights.device)]
        return dataclasses.replace(
            self,
            values=chosen(self.values),
            stats=chosen(self.stats),
            log_weights=None if logs is None else logs - logs.flatten().logsumexp(0),
            warmup=None if self.warmup is None else self.warmup.of_chains(index),
            # where these chains started, and with which others, is known of all of them only
            notes={name: note for name, note in self.notes.items() if name not in ("superchains", "distinct_starts")},
        )

    def with_model(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Draws:
        """The same draws of a model that is given here: for draws that were made without one, or read from a file.

        Args:
            model: the Pyro model.
            *args: its arguments, as it was sampled with.
            **kwargs: its keyword arguments.
        """
        return dataclasses.replace(self, source=Source(model, args, kwargs))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a draw: ``chain``, ``draw``, one column a component, ``weight`` where the draws are weighted.

        A scalar site is a column of its own name; components of others are named ``z[0]``, ``w[1,2]``.

        Example:
            >>> Draws({"mu": torch.zeros(2, 3), "z": torch.ones(2, 3, 2)}, "nuts").to_dataframe().columns.tolist()
            ['chain', 'draw', 'mu', 'z[0]', 'z[1]']
        """
        import pandas as pd

        chain, draw = torch.meshgrid(torch.arange(self.num_chains), torch.arange(self.num_draws), indexing="ij")
        columns = {"chain": chain.flatten(), "draw": draw.flatten()}
        if self.log_weights is not None:
            columns["weight"] = self._weights()
        for site in self.values:
            rows = self.flat(site)[..., None]  # a component more, so that scalar sites have one
            for name, column in zip(self.component_names(site), rows.flatten(1).unbind(1), strict=True):
                columns[name] = column
        return pd.DataFrame({name: column.detach().cpu().numpy() for name, column in columns.items()})

    def component_names(self, site: str) -> list[str]:
        """``["mu"]`` of a scalar site, ``["w[0,0]", "w[0,1]", ...]`` of others, in the order of a flattened value."""
        shape = self.values[site].shape[2:]
        indices = itertools.product(*(range(size) for size in shape))
        return [f"{site}[{','.join(map(str, index))}]" for index in indices] if shape else [site]


def _floating_dtype(values: Tensor) -> torch.dtype:
    """Counts and classes have means too."""
    return values.dtype if values.is_floating_point() else torch.get_default_dtype()
