"""Draws and Pyro's own MCMC as ArviZ data: ``InferenceData`` on ArviZ 0.x, xarray's ``DataTree`` on 1.x."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import MCMC
from torch import Tensor

import pyro_ebm
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.inference.chains.mcmc import MCMC as BatchedMCMC
from pyro_ebm.inference.draws import Draws
from pyro_ebm.structure import observed_sites, prototype_trace

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

__all__ = ["load_arviz", "save_arviz", "to_arviz"]

_SAMPLE_DIMS = ("chain", "draw")
_Arrays = Mapping[str, "Tensor | np.ndarray"]


def to_arviz(
    draws: Draws | MCMC | BatchedMCMC,
    *,
    prior: _Arrays | None = None,
    posterior_predictive: _Arrays | None = None,
    observed_data: _Arrays | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    keep_warmup: bool = True,
) -> Any:
    """Convert draws to what ArviZ reads, whichever version of it is installed.

    Weighted draws are marked as such: attribute ``weighted`` of the posterior group is 1, and
    ``sample_stats`` holds their normalized ``log_weight``. ArviZ itself ignores weights: pass it
    ``Draws.resample`` where it should not. Factor sites (empty entries) are left out everywhere.
    Statistics of data that are sampled each on its own, (chain, draw, *data), share the names of their
    further dimensions: those of the sites where ``dims`` names them, else ``datum``. What of ArviZ reads
    divergences and energies wants one datum at a time: ``tree.sel(datum=3)``.

    Args:
        draws: of this library, or an ``MCMC``, Pyro's or ours, after its ``run``.
        prior: site -> (sample, *site_shape), for example from ``Predictive``. Sites that are not among
            the posterior's go to group ``prior_predictive``, as ArviZ wants it.
        posterior_predictive: site -> (sample, *site_shape).
        observed_data: site -> data; added to those of the draws or of the MCMC's model.
        dims: site or statistic -> names of its dimensions after (chain, draw); added to those of the draws.
        coords: dimension name -> labels; added to those of the draws.
        keep_warmup: whether to include ``draws.warmup`` when there is one.

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups posterior, sample_stats,
        observed_data, prior, prior_predictive, posterior_predictive, warmup_posterior and
        warmup_sample_stats, as far as known.

    Raises:
        TypeError: if ``draws`` is neither.
        ValueError: if the MCMC has not run, or dims or coords do not fit the shapes.
    """
    # Predictive(model, mcmc.get_samples()) keeps the order of the draws, chain after chain
    paired = None
    if isinstance(draws, BatchedMCMC):
        draws = draws.draws
    if not isinstance(draws, Draws):
        draws = _draws_of_mcmc(draws)
        paired = (draws.num_chains, draws.num_draws)
    groups: dict[str, Mapping[str, Any]] = {"posterior": draws.values, "sample_stats": _stats(draws)}
    if keep_warmup and draws.warmup is not None:
        groups["warmup_posterior"] = draws.warmup.values
        groups["warmup_sample_stats"] = _stats(draws.warmup)
    if posterior_predictive is not None:
        groups["posterior_predictive"] = {
            name: _with_chains(name, value, paired) for name, value in posterior_predictive.items()
        }
    chained = {name: _with_chains(name, value, None) for name, value in (prior or {}).items()}
    groups["prior"] = {name: value for name, value in chained.items() if name in draws.values}
    groups["prior_predictive"] = {name: value for name, value in chained.items() if name not in draws.values}
    groups["observed_data"] = {**draws.observed, **(observed_data or {})}
    named = {**draws.dims, **(dims or {})}
    return _container(
        groups,
        dims={**_data_dims(draws, named), **named},
        coords={**draws.coords, **(coords or {})},
        attrs={"posterior": _attributes(draws)},
    )


def save_arviz(tree: Any, path: str | Path) -> Path:
    """Write what :func:`to_arviz` returned to a NetCDF file; returns its path."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder {path.parent} does not exist; create it first")
    if arviz_is_1x():
        tree.to_netcdf(path, engine="h5netcdf")
    else:
        tree.to_netcdf(str(path))
    return path


def load_arviz(path: str | Path) -> Any:
    """Read a file of :func:`save_arviz` into memory, as ``InferenceData`` or ``DataTree``."""
    if not Path(path).is_file():
        raise ValueError(f"path: there is no file {path}")
    if arviz_is_1x():
        import xarray as xr

        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    tree = quiet_import("arviz").from_netcdf(str(path))
    tree.load()
    tree.close()
    return tree


def _container(
    groups: Mapping[str, Mapping[str, Any]],
    *,
    dims: Mapping[str, Sequence[str]],
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
    data = {
        group: _dataset(group, sites, dims=dims, coords=coords, attrs=attrs.get(group, {}))
        for group, sites in arrays.items()
        if sites
    }
    if arviz_is_1x():
        import xarray as xr

        return xr.DataTree.from_dict(data)
    return quiet_import("arviz").InferenceData(**data)


def _dataset(
    group: str,
    arrays: Mapping[str, np.ndarray],
    *,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    import xarray as xr

    sampled = _SAMPLE_DIMS if group != "observed_data" else ()
    variables: dict[str, Any] = {}
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        names = (*sampled, *_dim_names(name, array.shape[len(sampled) :], dims, taken=arrays))
        for dim, size in zip(names, array.shape, strict=True):
            labels[dim] = _labels(dim, size, coords, where=f"{group}: site {name!r}")
        # "/" separates groups in NetCDF and in a DataTree, so it cannot be part of a variable's name
        variables[name.replace("/", ".")] = (names, array)
    common: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "pyro_ebm",
        "creation_library_version": pyro_ebm.__version__,
    }
    if sampled:
        common["sample_dims"] = list(sampled)  # what ArviZ 1.x looks for
    return xr.Dataset(variables, coords=labels, attrs={**common, **attrs})


def _dim_names(
    name: str, shape: tuple[int, ...], dims: Mapping[str, Sequence[str]], *, taken: Iterable[str]
) -> tuple[str, ...]:
    if name not in dims:
        return tuple(f"{name.replace('/', '.')}_dim_{i}" for i in range(len(shape)))
    names = dims[name]
    if isinstance(names, str) or len(names) != len(shape):
        raise ValueError(
            f"dims[{name!r}] must name the {len(shape)} dimensions of the site's shape {shape}, got {names!r}"
        )
    forbidden = sorted({*names} & {*_SAMPLE_DIMS, *taken}) + [n for n in names if list(names).count(n) > 1]
    if forbidden:
        raise ValueError(
            f"dims[{name!r}] = {names!r}: {forbidden[0]!r} is used twice, or is the name of a site, or is "
            f"one of {_SAMPLE_DIMS}; choose another name"
        )
    return tuple(names)


def _labels(dim: str, size: int, coords: Mapping[str, Any], *, where: str) -> np.ndarray:
    import numpy as np

    if dim not in coords:
        return np.arange(size)
    labels = _numpy(coords[dim]) if isinstance(coords[dim], Tensor) else np.asarray(coords[dim])
    if labels.shape != (size,):
        raise ValueError(f"coords[{dim!r}] must hold {size} labels ({where}), got shape {labels.shape}")
    return labels


def _with_chains(name: str, value: Tensor | np.ndarray, posterior: tuple[int, int] | None) -> Any:
    """(sample, *shape) -> (chain, draw, *shape): as the posterior's where that fits, else one chain."""
    if value.ndim < 1:
        raise ValueError(f"{name!r} must have shape (sample, *site_shape), got {tuple(value.shape)}")
    num = value.shape[0]
    chains, draws = posterior if posterior is not None and math.prod(posterior) == num else (1, num)
    return value.reshape((chains, draws, *value.shape[1:]))


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


def _attributes(draws: Draws) -> dict[str, Any]:
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
    if draws.num_gradients is not None:
        attrs["num_gradients"] = int(draws.num_gradients)
    if draws.pareto_k is not None:
        attrs["pareto_k"] = float(draws.pareto_k)
    if draws.log_z is not None:
        # one number, or one for each datum: an attribute in NetCDF has one dimension at most
        attrs["log_z"], attrs["log_z_se"] = (_numpy(torch.as_tensor(x).flatten()).squeeze()[()] for x in draws.log_z)
    return attrs


def _draws_of_mcmc(mcmc: MCMC) -> Draws:
    """What a stock MCMC object remembers of its run."""
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"draws must be a Draws or an MCMC (Pyro's or ours), got {type(mcmc).__name__}")
    if mcmc._samples is None:
        raise ValueError("draws: this MCMC has no samples; call its run(...) first")
    values = {name: value.detach() for name, value in mcmc._samples.items()}
    if not values:
        raise ValueError("draws: this MCMC has no latent sites")
    shape = next(iter(values.values())).shape[:2]
    stats: dict[str, Tensor] = {}
    # not mcmc.diagnostics(): it also computes ESS and R-hat of every site, and fails on short runs
    found: list[dict[str, Any]] = [entry or {} for entry in mcmc._diagnostics]
    if all("divergences" in entry for entry in found):
        stats["diverging"] = torch.zeros(shape, dtype=torch.bool)
        for chain, entry in enumerate(found):
            stats["diverging"][chain, entry["divergences"]] = True
    if all("acceptance rate" in entry for entry in found):
        rates = torch.tensor([float(entry["acceptance rate"]) for entry in found])
        stats["acceptance_rate"] = rates[:, None].expand(shape)
    kernel: Any = mcmc.kernel
    observed: dict[str, Tensor] = {}
    if getattr(kernel, "model", None) is not None:
        observed = observed_sites(prototype_trace(kernel.model, mcmc._args or (), mcmc._kwargs or {}))
    notes = {
        "inference_library": "pyro",
        "kernel": type(kernel).__name__,
        "warmup_steps": mcmc.warmup_steps,
        "acceptance_rate": "share of accepted moves over the whole chain, the same for each of its draws",
    }
    return Draws(values, type(kernel).__name__.lower(), stats=stats, observed=observed, notes=notes)


def _numpy(value: Any) -> np.ndarray:
    import numpy as np

    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
