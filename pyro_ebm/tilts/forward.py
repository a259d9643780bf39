"""``log Z`` of a tilt whose sites have random parents: by running the untilted model forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.modules import modules_of
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import BatchedModel, ModelStructure, event_dim_of, unconditioned
from pyro_ebm.tilts.listeners import reported_log_mean_exp
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, score_term
from pyro_ebm.tilts.streams import enough, hides_nothing, log_z_seed, seen_at_draws

__all__ = ["forward_log_normalizer", "forward_log_weights", "forward_way"]


def forward_log_normalizer(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    energies: Mapping[str, Energy],
    structure: ModelStructure,
    settings: Normalizer,
) -> Tensor:
    """``log Z = log E_model[exp(-sum_s E_s(v_s))]`` by running the unconditioned model forward.

    Arguments, shape of the result and errors as in :func:`forward_log_weights`.
    """

    def log_weights(settings: Normalizer, seed: int) -> Tensor:
        return forward_log_weights(model, args, kwargs, energies, structure, settings, seed=seed)

    def of_the_tilt() -> list[Tensor]:
        owners = modules_of(model)
        modules = [*owners, *energies.values()]
        seen = [p for module in modules for p in module.parameters()] + list(pyro.get_param_store().values())
        if owners and hides_nothing(*modules):
            return seen
        return seen + seen_at_draws(modules, lambda num: log_weights(Normalizer(num_samples=num), seed=0))

    settings = replace(settings, num_samples=enough(settings.num_samples))
    seed = log_z_seed(of_the_tilt, settings.seed, *energies)
    return reported_log_mean_exp(log_weights(settings, seed))


def forward_log_weights(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    energies: Mapping[str, Energy],
    structure: ModelStructure,
    settings: Normalizer,
    *,
    seed: int | None,
) -> Tensor:
    """``-sum_s E_s(v_s)`` for runs of the unconditioned model.

    Args:
        model: the model without its tilt.
        args: its arguments; observed values among them fix shapes only.
        kwargs: likewise.
        energies: site -> energy, sites that depend on each other.
        structure: of the model.
        settings: ``num_samples`` runs; only ``"importance"``.
        seed: stream of the draws; ``None`` continues the global state without advancing it.

    Returns:
        (num_samples,) where all elements share one log Z: the tilted sites have no plate in common with all
        they depend on, or have the same distribution in each of its elements. Else (num_samples, *plates) with the
        sizes of the plates along which they are independent, and 1 for the other plates.

    Raises:
        ValueError: with ``"qmc"``; where a plate that couples the sites is subsampled.
    """
    sites = list(energies)
    _check_forward(sites, structure, settings)
    plates = structure.free_plates(sites)
    pooled = structure.is_pooled(sites)
    copies = math.prod(structure.sizes[name] for name in plates) if pooled else 1
    repeats = math.ceil(settings.num_samples / copies)
    runs = _runs(model, args, kwargs, structure, keep=tuple(sorted(plates.values())))
    measure = _exponents(energies, structure)
    runs.way = structure.way or runs.choose(measure=measure)
    with forked_rng(seed), poutine.block():
        log_weights = runs.run(num=repeats, measure=measure).total
    if pooled or not plates:
        return log_weights.flatten()[: settings.num_samples]
    kept = dict(zip(sorted(plates.values()), log_weights.shape[1:], strict=True))
    return log_weights.reshape(repeats, *(kept.get(dim, 1) for dim in range(-structure.max_plate_nesting, 0)))


def forward_way(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    energies: Mapping[str, Energy],
    structure: ModelStructure,
) -> str:
    """How the unconditioned model is run for many draws: ``"plate"``, ``"vmap"`` or ``"loop"``."""
    return _runs(model, args, kwargs, structure).choose(measure=_exponents(energies, structure))


def _runs(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    structure: ModelStructure,
    *,
    keep: tuple[int, ...] = (),
) -> BatchedModel:
    return BatchedModel(unconditioned(model), args, kwargs, layout=structure.layout, returned=(), keep=keep)


def _exponents(energies: Mapping[str, Energy], structure: ModelStructure) -> Callable[..., Tensor | None]:
    """What a site adds to ``-sum_s E_s(v_s)``; where it cannot be reparametrized, its part of the gradient too."""
    involved = set(energies).union(*(structure.ancestors[site] for site in energies))

    def measure(name: str, site: Mapping[str, Any]) -> Tensor | None:
        if name not in involved:
            return None
        score = score_term(site["fn"], site["value"])
        if name not in energies:
            return score
        return score - checked_energy(energies[name], site["value"], event_dim_of(site), f"site {name!r}")

    return measure


def _check_forward(sites: list[str], structure: ModelStructure, settings: Normalizer) -> None:
    if settings.method != "importance":
        raise ValueError(
            f"log Z of {sites} has to be estimated by running the model forward (they have random parents or "
            f"depend on each other), which only method='importance' can do, got {settings.method!r}"
        )
    free = structure.free_plates(sites)
    for site in set(sites).union(*(structure.ancestors[site] for site in sites)):
        coupled = structure.subsampled & set(structure.plates[site]) - set(free)
        if coupled:
            raise ValueError(
                f"log Z of {sites} couples all elements of plate(s) {sorted(coupled)}, "
                f"which this model subsamples; run it without subsampling, or use normalize=False"
            )
