"""Which sample sites of a model depend on which, and in which plates: decides where log Z comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance

from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure.batched import Layout
from pyro_ebm.structure.sites import (
    event_dim_of,
    is_bookkeeping,
    is_deterministic,
    latent_sites,
    log_prob_of,
    plate_depth,
    plate_dims,
    prototype_trace,
    unconditioned,
    unmasked,
)
from pyro_ebm.structure.supports import check_drawable

__all__ = ["ModelStructure", "model_structure"]

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
        layout: where the sites sit.
        way: how the unconditioned model is run for many draws, where that was found out.
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
    layout: Layout
    way: str | None = None

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


def model_structure(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelStructure:
    """Run the model once, unconditioned and out of sight of outer handlers, tracking what depends on what."""
    tracked, tracked_kwargs = track_provenance((args, dict(kwargs)), frozenset([_INPUTS]))
    with forked_rng(0), torch.no_grad(), poutine.block(), evaluation_mode(model):
        try:
            with TrackProvenance(include_deterministic=True):
                trace = poutine.trace(unconditioned(model)).get_trace(*tracked, **tracked_kwargs)
        except NotImplementedError:
            latent = latent_sites(prototype_trace(model, args, kwargs))
            check_drawable(latent, "log Z of a tilt", "tilt(..., normalize=False) needs none")
            raise
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not is_bookkeeping(s)]
        parents = {site["name"]: get_provenance(log_prob_of(site)) for site in sites}
    varying = _varying_sites(model, args, kwargs, sites)
    ancestors: dict[str, frozenset[str]] = {}
    orphans = [site for site in sites if not parents[site["name"]] - {site["name"]}]
    unseen = _unseen_parents(model, args, kwargs, orphans)
    for site in sites:
        direct = parents[site["name"]] - {site["name"]}
        if site["name"] in unseen:  # which they are, nobody knows
            direct = direct | frozenset(ancestors)
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
        fixed=frozenset(site["name"] for site in sites if is_deterministic(site)),
        varying=varying,
        max_plate_nesting=plate_depth(trace),
        layout=Layout.of(trace),
    )


def _unseen_parents(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], sites: list[Any]
) -> set[str]:
    """Sites without known parents whose distribution, or fixed value, differs in another run.

    Finds what provenance cannot see: values that were written into a buffer, or went through Python numbers.
    """
    with forked_rng(2), torch.no_grad(), poutine.block(), evaluation_mode(model), pyro.validation_enabled(False):
        other = poutine.trace(unconditioned(model)).get_trace(*args, **kwargs).nodes
        found = set()
        for site in sites:
            rerun, value = other.get(site["name"]), detach_provenance(site["value"])
            if rerun is None or rerun["value"].shape != value.shape:
                continue
            here, there = (
                (value, rerun["value"])
                if is_deterministic(site)
                else (detach_provenance(log_prob_of(site)), unmasked(rerun["fn"]).log_prob(value))
            )
            if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-4, atol=1e-5, equal_nan=True):
                found.add(site["name"])
    return found


def _varying_sites(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], sites: list[Any]
) -> dict[str, frozenset[str]]:
    """Plates along which a site's distribution differs though all values are the same along them.

    Finds what provenance cannot see: data that reach the model through a closure or an attribute.
    """
    data = {site["name"]: _constant_along_plates(site) for site in sites if not is_deterministic(site)}
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
    for dim in plate_dims(site).values():
        axis = value.ndim - event_dim_of(site) + dim
        value = value.narrow(axis, 0, 1).expand_as(value) if axis >= 0 else value
    return value


def _varying_plates(rerun: Mapping[str, Any] | None, site: Mapping[str, Any]) -> frozenset[str]:
    plates = plate_dims(site)
    if rerun is None:  # not run this time: nothing is known
        return frozenset(plates)
    deterministic = is_deterministic(site)
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
