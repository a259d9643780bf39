"""Which sample sites of a model depend on which, and in which plates: decides where log Z comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample

from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng

__all__ = [
    "ModelStructure",
    "event_dim_of",
    "latent_sites",
    "log_prob_of",
    "model_structure",
    "observed_sites",
    "padded_shape",
    "plate_depth",
    "prototype_trace",
    "unconditioned",
    "unmasked",
]

_INPUTS = "<inputs>"


@dataclass(frozen=True)
class ModelStructure:
    """What one run of the unconditioned model shows.

    Args:
        order: sample sites in the order they ran, subsampling and factors left out.
        ancestors: site -> all random sites it depends on.
        plates: site -> {plate name: dim}.
        sizes: plate name -> number of elements in this run.
        subsampled: names of plates that see only part of their elements.
        uses_inputs: sites whose distribution depends on the model's arguments.
        fixed: deterministic sites, whose value is a function of others.
        varying: site -> plates along which its conditional distribution differs from element to element.
        max_plate_nesting: number of dimensions, from the right, that plates use.
    """

    order: tuple[str, ...]
    ancestors: Mapping[str, frozenset[str]]
    plates: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]
    subsampled: frozenset[str]
    uses_inputs: frozenset[str]
    fixed: frozenset[str]
    varying: Mapping[str, frozenset[str]]
    max_plate_nesting: int

    def free_plates(self, sites: list[str]) -> dict[str, int]:
        """Plates, with their dims, along which the sites and all they depend on are independent copies."""
        involved = set(sites).union(*(self.ancestors[site] for site in sites))
        shared = set.intersection(*(set(self.plates[site]) for site in involved))
        return {name: self.plates[sites[0]][name] for name in sorted(shared)}

    def is_pooled(self, sites: list[str]) -> bool:
        """Whether the independent copies of the sites, along their free plates, all have one distribution."""
        involved = set(sites).union(*(self.ancestors[site] for site in sites))
        plates = set(self.free_plates(sites))
        return not involved & self.uses_inputs and not any(self.varying[site] & plates for site in involved)


class _Uncondition(UnconditionMessenger):
    """Pyro's, but deterministic sites keep their value: drawn anew inside a plate they would change shape."""

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_deterministic(msg):
            super()._pyro_sample(msg)


def unconditioned(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites drawn from their distributions."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Uncondition():
            return model(*args, **kwargs)

    return run


def latent_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """The random, unobserved sample sites of a trace, without subsampling sites."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not _is_bookkeeping(site)
    }


def observed_sites(trace: poutine.Trace) -> dict[str, torch.Tensor]:
    """Observed values by site, without deterministic sites, factors and subsampling."""
    return {
        name: site["value"].detach()
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not _is_bookkeeping(site)
        and not _is_deterministic(site)
    }


def prototype_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> poutine.Trace:
    """One run of the model, to see its sites and shapes; leaves no trace in random state or modules."""
    with forked_rng(0), torch.no_grad(), poutine.block(), evaluation_mode(model):
        return poutine.trace(model).get_trace(*args, **kwargs)


def plate_depth(trace: poutine.Trace) -> int:
    """Number of dimensions, from the right, that vectorized plates use (``max_plate_nesting``)."""
    frames = [f for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]]
    return max([-frame.dim for frame in frames if frame.vectorized], default=0)


def padded_shape(shape: torch.Size, event_dim: int, depth: int) -> torch.Size:
    """A site's shape with size-1 dims before it, so that a dim added in front lands left of ``depth`` plate dims."""
    return torch.Size([1] * (depth - (len(shape) - event_dim))) + shape


def _is_bookkeeping(site: Mapping[str, Any]) -> bool:
    if site_is_subsample(site) or type(site["fn"]).__name__ == "Unit":
        return True
    return bool(site["infer"].get("is_auxiliary", False))


def _is_deterministic(site: Mapping[str, Any]) -> bool:
    return bool((site["infer"] or {}).get("_deterministic", False))


def log_prob_of(site: Mapping[str, Any]) -> torch.Tensor:
    """Log probability of a site's value before any mask, (*batch,)."""
    return unmasked(site["fn"]).log_prob(site["value"])


def unmasked(distribution: Any) -> Any:
    """The distribution without its masks, which hide log probabilities and change no draw."""
    while isinstance(distribution, MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def _plate_dims(site: Mapping[str, Any]) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def event_dim_of(site: Mapping[str, Any]) -> int:
    """Number of rightmost dims of a site's value that are one event."""
    event_dim = len(site["fn"].event_shape)
    if _is_deterministic(site):  # by default it calls every dim an event dim, those of its plates too
        outer = max([-dim for dim in _plate_dims(site).values()], default=0)
        event_dim = max(min(event_dim, site["value"].ndim - outer), 0)
    return event_dim


def model_structure(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelStructure:
    """Run the model once, unconditioned and out of sight of outer handlers, tracking what depends on what."""
    tracked, tracked_kwargs = track_provenance((args, dict(kwargs)), frozenset([_INPUTS]))
    with forked_rng(0), torch.no_grad(), poutine.block(), evaluation_mode(model):
        with TrackProvenance(include_deterministic=True):
            trace = poutine.trace(unconditioned(model)).get_trace(*tracked, **tracked_kwargs)
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not _is_bookkeeping(s)]
        parents = {site["name"]: get_provenance(log_prob_of(site)) for site in sites}
    varying = _varying_sites(model, args, kwargs, sites)
    ancestors: dict[str, frozenset[str]] = {}
    for site in sites:
        direct = parents[site["name"]] - {site["name"]}
        ancestors[site["name"]] = direct.union(*(ancestors.get(name, frozenset()) for name in direct))
    frames = {site["name"]: [f for f in site["cond_indep_stack"] if f.vectorized] for site in sites}
    return ModelStructure(
        order=tuple(site["name"] for site in sites),
        ancestors={name: found & set(ancestors) for name, found in ancestors.items()},
        plates={name: {frame.name: frame.dim for frame in stack} for name, stack in frames.items()},
        sizes={frame.name: int(frame.size) for stack in frames.values() for frame in stack},
        subsampled=frozenset(
            frame.name
            for stack in frames.values()
            for frame in stack
            if frame.full_size is not None and frame.full_size != frame.size
        ),
        uses_inputs=frozenset(name for name, found in ancestors.items() if _INPUTS in found),
        fixed=frozenset(site["name"] for site in sites if _is_deterministic(site)),
        varying=varying,
        max_plate_nesting=plate_depth(trace),
    )


def _varying_sites(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], sites: list[Any]
) -> dict[str, frozenset[str]]:
    """Plates along which a site's distribution differs though all values are the same along them.

    Finds what provenance cannot see: data that reach the model through a closure or an attribute.
    """
    data = {site["name"]: _constant_along_plates(site) for site in sites if not _is_deterministic(site)}
    with (
        forked_rng(1),
        torch.no_grad(),
        poutine.block(),
        evaluation_mode(model),
        pyro.validation_enabled(False),
    ):
        conditioned = poutine.condition(unconditioned(model), data=data)
        trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
        return {site["name"]: _varying_plates(trace.nodes.get(site["name"]), site) for site in sites}


def _constant_along_plates(site: Mapping[str, Any]) -> torch.Tensor:
    value = detach_provenance(site["value"])
    for dim in _plate_dims(site).values():
        axis = value.ndim - event_dim_of(site) + dim
        value = value.narrow(axis, 0, 1).expand_as(value) if axis >= 0 else value
    return value


def _varying_plates(rerun: Mapping[str, Any] | None, site: Mapping[str, Any]) -> frozenset[str]:
    plates = _plate_dims(site)
    if rerun is None:  # not run this time: nothing is known
        return frozenset(plates)
    deterministic = _is_deterministic(site)
    number = rerun["value"] if deterministic else log_prob_of(rerun)
    event_dim = event_dim_of(site) if deterministic else 0
    varying = set()
    for name, dim in plates.items():
        axis = number.ndim - event_dim + dim
        if axis < 0:
            continue
        first = number.narrow(axis, 0, 1).expand_as(number)
        if not torch.allclose(number, first, rtol=1e-4, atol=1e-5, equal_nan=True):
            varying.add(name)
    return frozenset(varying)
