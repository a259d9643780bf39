"""Draws and Pyro's own MCMC as ArviZ data: ``InferenceData`` on ArviZ 0.x, xarray's ``DataTree`` on 1.x."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pyro_ebm
from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.diagnostics.arviz_groups import (
    SAMPLE_DIMS,
    Pairing,
    auto_dims,
    fewer_chains,
    renamed,
    split_prior,
    without_known,
)
from pyro_ebm.entry import entry
from pyro_ebm.inference.as_draws import as_draws
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.pointwise import ModelSites, model_sites, pointwise
from pyro_ebm.inference.resampled import Resampled, resampled, warn_of_weights

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

__all__ = ["to_arviz"]

Arrays = Mapping[str, "Tensor | np.ndarray"]


@entry(of_model=False)
@checked
def to_arviz(
    draws: Any,
    *,
    prior: Arrays | None = None,
    posterior_predictive: Arrays | None = None,
    observed_data: Arrays | None = None,
    log_likelihood: bool | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    chains: int | None = None,
    keep_warmup: bool = True,
    keep_weights: bool = False,
) -> Any:
    """Convert draws to what ArviZ reads, whichever version of it is installed.

    Draws know the model they come from (:meth:`Draws.with_model` gives one to those that do not). It is run at the
    draws for the log likelihood of each datum, so that ``az.loo``, ``az.compare`` and ``plot_loo_pit`` work, and for
    ``pyro.deterministic`` sites, which join the posterior. Data that a mask takes out count 0 in the log likelihood.
    Dimensions along plates are called after them. Factor sites are left out everywhere.

    ArviZ ignores weights. Weighted draws (importance sampling, also what ``sample(model)`` chooses on easy models; a
    quadrature grid; particles) are therefore resampled by them (:meth:`Draws.equally_weighted`), the same way each
    time: as many as the weights are worth, 100 at least, 4,000 of a grid, dealt into four chains. Attribute
    ``resampled`` of the posterior group says so. They are independent but for copies, and R-hat says nothing of them;
    where particles come in islands, :func:`compare` knows their errors. With ``keep_weights=True`` the points stay as
    they are: attribute ``weighted`` is 1, and ``sample_stats`` holds their normalized ``log_weight``.

    Without a log likelihood ``az.loo`` raises a TypeError that does not say why: attribute ``log_likelihood`` of the
    posterior group does (a discrete site that was summed out is not among the draws, a tilted observed site, ...).

    Statistics of data that are sampled each on its own, (chain, draw, *data), share the names of their further
    dimensions: those of the sites where ``dims`` names them, else ``datum``. What of ArviZ reads divergences and
    energies wants one datum at a time: ``tree.sel(datum=3)``.

    Args:
        draws: of this library; an ``MCMC`` after its ``run``, Pyro's or ours; Pyro's ``StreamingMCMC`` that keeps
            samples; or site -> (sample, *site_shape), as ``get_samples()`` returns.
        prior: site -> (sample, *site_shape), for example from ``Predictive`` or :func:`predictive`. Sites that are not
            among the posterior's go to group ``prior_predictive``, as ArviZ wants it.
        posterior_predictive: likewise. As many samples as there are draws belong to them, in their order, as
            ``Predictive(model, mcmc.get_samples())`` and :func:`predictive` return them; of weighted draws too:
            ``predictive(model, draws=draws)`` resamples as this function does. Sites that are the posterior's own,
            unchanged, are left out.
        observed_data: site -> data; added to those of the draws or of the MCMC's model.
        log_likelihood: ``None``: have it where it exists, no weights are kept and it takes seconds at most; ``True``:
            have it, or raise; ``False``: do not.
        dims: site or statistic -> names of its dimensions after (chain, draw); before those of the draws and plates.
        coords: dimension name -> labels; added to those of the draws.
        chains: keep so many chains, evenly spread: rank and trace plots of 64 cannot be read. All when ``None``.
        keep_warmup: whether to include ``draws.warmup`` when there is one.
        keep_weights: whether weighted draws stay as they are, for readers that know of ``log_weight``.

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups posterior, sample_stats, log_likelihood,
        observed_data, prior, prior_predictive, posterior_predictive, warmup_posterior and warmup_sample_stats, as far
        as known.

    Raises:
        TypeError: if ``draws`` is none of these.
        ValueError: if the MCMC has not run, dims or coords do not fit the shapes, or ``log_likelihood=True`` cannot
            be fulfilled.

    Warns:
        UserWarning: of sites called ``chain`` or ``draw``, which get another name, and of a model that fails at the
            draws.
        InferenceWarning: where draws are resampled by weights that are worth fewer than 100 of them, or whose Pareto k
            is above what their number allows.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ebm import Draws, to_arviz
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> draws = Draws({"mu": torch.randn(4, 100)}, "nuts").with_model(model, torch.tensor([0.3, -0.2, 1.1]))
        >>> tree = to_arviz(draws)  # what sample() returns knows its model: az.loo(to_arviz(sample(model, y)))
        >>> tree["log_likelihood"]["y"].dims
        ('chain', 'draw', 'data')
    """
    draws = as_draws(draws)
    given = draws
    chosen = Resampled(draws) if keep_weights else resampled(draws)
    if not keep_weights:
        warn_of_weights(draws)
    draws = chosen.draws
    kept = fewer_chains(draws, chains)
    sites = ModelSites() if draws.source is None else model_sites(draws.source)
    shapes = {**sites.shapes, **{name: value.shape[2:] for name, value in draws.values.items()}}
    pairing = Pairing(draws, kept, shapes, rows=chosen.rows, num_weighted=given.num_chains * given.num_draws)
    draws = draws.of_chains(kept)
    found = pointwise(draws, sites, log_likelihood=log_likelihood)
    posterior = {**draws.values, **{name: found.deterministic[name] for name in sorted(found.deterministic)}}
    groups: dict[str, Mapping[str, Any]] = {"posterior": posterior, "sample_stats": _stats(draws)}
    if keep_warmup and draws.warmup is not None:
        groups["warmup_posterior"] = draws.warmup.values
        groups["warmup_sample_stats"] = _stats(draws.warmup)
    predicted = pairing("posterior_predictive", posterior_predictive, paired=True)
    groups["posterior_predictive"] = without_known(predicted, posterior)
    groups |= split_prior(pairing("prior", prior), posterior)
    groups["log_likelihood"] = found.log_likelihood
    groups["observed_data"] = {**draws.observed, **(observed_data or {})}
    named = {**draws.dims, **(dims or {})}
    return _container(
        groups,
        dims={**_data_dims(draws, named), **named},
        plates=auto_dims(sites),
        coords={**draws.coords, **(coords or {})},
        attrs={"posterior": _attributes(draws, found.left_out, chosen.told, given.pareto_k)},
    )


def _container(
    groups: Mapping[str, Mapping[str, Any]],
    *,
    dims: Mapping[str, Sequence[str]],
    plates: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Mapping[str, Any]],
) -> Any:
    arrays = {
        group: {name: _numpy(value) for name, value in sites.items() if 0 not in value.shape}
        for group, sites in groups.items()
    }
    known = sorted({name for sites in arrays.values() for name in sites})
    unknown = sorted(set(dims) - set(known) - {name for sites in groups.values() for name in sites})
    if unknown:
        raise ValueError(f"dims names sites that do not exist: {unknown}; sites: {known}")
    names = renamed(arrays)
    data = {
        group: _Group(group, sites, names=names, dims=dims, plates=plates, coords=coords).dataset(attrs.get(group, {}))
        for group, sites in arrays.items()
        if sites
    }
    if arviz_is_1x():
        import xarray as xr

        return xr.DataTree.from_dict(data)
    return quiet_import("arviz").InferenceData(**data)


@dataclass(frozen=True)
class _Group:
    """One group under way to a data set.

    Args:
        name: of the group.
        arrays: site -> array.
        names: site -> name of its variable, where it differs.
        dims: site -> names of its dimensions, from the user or the draws.
        plates: site -> names of the plates along its dimensions, used where ``dims`` says nothing.
        coords: dimension -> labels.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    names: Mapping[str, str]
    dims: Mapping[str, Sequence[str]]
    plates: Mapping[str, Sequence[str | None]]
    coords: Mapping[str, Any]

    def dataset(self, attrs: Mapping[str, Any]) -> xr.Dataset:
        import xarray as xr

        sampled = SAMPLE_DIMS if self.name != "observed_data" else ()
        variables: dict[str, Any] = {}
        labels: dict[str, np.ndarray] = {}
        for site, array in self.arrays.items():
            shape = array.shape[len(sampled) :]
            own = self._given(site, shape) or self._from_plates(site, shape, labels)
            for dim, size in zip((*sampled, *own), array.shape, strict=True):
                found = _labels(dim, size, self.coords, where=f"{self.name}: site {site!r}")
                if len(labels.setdefault(dim, found)) != size:
                    raise ValueError(
                        f"{self.name}: dimension {dim!r} of site {site!r} has {size} elements, that of another site "
                        f"{len(labels[dim])}; give the two different names in dims="
                    )
            variables[self.names.get(site, site)] = ((*sampled, *own), array)
        common: dict[str, Any] = {
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "creation_library": "pyro_ebm",
            "creation_library_version": pyro_ebm.__version__,
        }
        if sampled:
            common["sample_dims"] = list(sampled)  # what ArviZ 1.x looks for
        return xr.Dataset(variables, coords=labels, attrs={**common, **attrs})

    def _given(self, site: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
        """What the user calls the site's dimensions; a log likelihood has no event dims, and takes the first names."""
        if site not in self.dims:
            return None
        names = self.dims[site]
        if self.name == "log_likelihood" and not isinstance(names, str):
            names = list(names)[: len(shape)]
        if isinstance(names, str) or len(names) != len(shape):
            raise ValueError(
                f"{self.name}: dims[{site!r}] must name the {len(shape)} dimensions of the site's shape {shape}, got "
                f"{names!r}"
            )
        taken = {*SAMPLE_DIMS, *self.arrays}
        forbidden = sorted({*names} & taken) + [n for n in names if list(names).count(n) > 1]
        if forbidden:
            raise ValueError(
                f"{self.name}: dims[{site!r}] = {names!r}: {forbidden[0]!r} is used twice, or is the name of a site, "
                f"or is one of {SAMPLE_DIMS}; choose another name"
            )
        return tuple(names)

    def _from_plates(
        self, site: str, shape: tuple[int, ...], labels: Mapping[str, np.ndarray]
    ) -> tuple[str, ...]:
        """The plates' names, where one plate is one size in this group; ``site_dim_0`` elsewhere."""
        plates = self.plates.get(site, ())
        if self.name == "log_likelihood":
            plates = plates[: len(shape)]
        if len(plates) != len(shape):
            plates = [None] * len(shape)
        default = self.names.get(site, site)
        return tuple(
            f"{default}_dim_{axis}" if plate is None or len(labels.get(plate, range(size))) != size else plate
            for axis, (plate, size) in enumerate(zip(plates, shape, strict=True))
        )


def _labels(dim: str, size: int, coords: Mapping[str, Any], *, where: str) -> np.ndarray:
    import numpy as np

    if dim not in coords:
        return np.arange(size)
    labels = _numpy(coords[dim]) if isinstance(coords[dim], Tensor) else np.asarray(coords[dim])
    if labels.shape != (size,):
        raise ValueError(f"coords[{dim!r}] must hold {size} labels ({where}), got shape {labels.shape}")
    return labels


def _stats(draws: Draws) -> dict[str, Tensor]:
    weights = {} if draws.log_weights is None else {"log_weight": draws.log_weights}
    return {**draws.stats, **weights}


def _data_dims(draws: Draws, dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Dimensions that all statistics by datum share; none where they are not of one shape."""
    by_datum = {name: tuple(stat.shape[2:]) for name, stat in draws.stats.items() if stat.ndim > 2}
    shapes = set(by_datum.values())
    if len(shapes) != 1:
        return {}
    (shape,) = shapes
    fits = [site for site, value in draws.values.items() if site in dims and value.shape[2 : 2 + len(shape)] == shape]
    found = {tuple(dims[site])[: len(shape)] for site in fits if not isinstance(dims[site], str)}
    default = ("datum",) if len(shape) == 1 else tuple(f"datum_{i}" for i in range(len(shape)))
    names = found.pop() if len(found) == 1 else default
    return dict.fromkeys(by_datum, names) if len(names) == len(shape) else {}


def _attributes(draws: Draws, left_out: str, told: str, pareto_k: float | None) -> dict[str, Any]:
    """Numbers and strings only: NetCDF knows neither bool nor None."""
    attrs: dict[str, Any] = {
        "inference_library": draws.notes.get("inference_library", "pyro_ebm"),
        "pyro_ebm_version": pyro_ebm.__version__,
        "method": draws.method,
        "weighted": int(draws.log_weights is not None),
        "seconds": float(draws.seconds),
        "sampling_seconds": float(draws.sampling_seconds),
        "notes": json.dumps(dict(draws.notes), default=str),
    }
    if told:
        attrs["resampled"] = told
    if left_out:
        attrs["log_likelihood"] = f"left out: {left_out}"
    if draws.num_gradients is not None:
        attrs["num_gradients"] = int(draws.num_gradients)
    if pareto_k is not None:
        attrs["pareto_k"] = float(pareto_k)
    if draws.log_z is not None:
        # one number, or one for each datum: an attribute in NetCDF has one dimension at most
        attrs["log_z"], attrs["log_z_se"] = (_numpy(torch.as_tensor(x).flatten()).squeeze()[()] for x in draws.log_z)
    return attrs


def _numpy(value: Any) -> np.ndarray:
    import numpy as np

    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
