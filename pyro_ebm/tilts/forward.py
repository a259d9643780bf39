"""``log Z`` of a tilt whose sites have random parents: by running the untilted model forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.modules import evaluation_mode, modules_of
from pyro_ebm.randomness import fingerprint, forked_rng
from pyro_ebm.structure import ModelStructure, event_dim_of, log_prob_of, padded_shape, unconditioned
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, reported_log_mean_exp, score_term

__all__ = ["check_broadcast", "forward_log_normalizer", "forward_log_weights"]


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
    parameters = [p for module in modules_of(model) for p in module.parameters()]
    parameters += [p for energy in energies.values() for p in energy.parameters()]
    seed = fingerprint(parameters + list(pyro.get_param_store().values()), settings.seed, *energies)
    return reported_log_mean_exp(forward_log_weights(model, args, kwargs, energies, structure, settings, seed=seed))


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
        settings: ``num_samples`` runs in one vectorized pass; only ``"importance"``.
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
    depth = structure.max_plate_nesting
    involved = set(sites).union(*(structure.ancestors[site] for site in sites))
    pooled = structure.is_pooled(sites)
    copies = math.prod(structure.sizes[name] for name in plates) if pooled else 1
    repeats = math.ceil(settings.num_samples / copies)
    with forked_rng(seed), poutine.block(), _free_plate("_normalizer_draws", repeats, depth) as plate:
        trace = _broadcast_trace(unconditioned(model), args, kwargs, depth)
    keep = (plate.dim, *sorted(plates.values()))
    log_weights = torch.zeros(())
    for name in sites:
        site = trace.nodes[name]
        energy = checked_energy(energies[name], site["value"], event_dim_of(site), f"site {name!r}")
        log_weights = log_weights - _sum_coupled(energy, keep)
    for name in involved:
        site = trace.nodes[name]
        log_weights = log_weights + _sum_coupled(score_term(site["fn"], site["value"]), keep)
    if pooled or not plates:
        return log_weights.flatten()[: settings.num_samples]
    return log_weights.reshape(repeats, *log_weights.shape[log_weights.ndim - depth :] if depth else ())


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


def _broadcast_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], depth: int
) -> poutine.Trace:
    try:
        return poutine.trace(model).get_trace(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(_no_broadcast(depth, str(error).splitlines()[0])) from error


def _no_broadcast(depth: int, reason: str) -> str:
    return (
        f"log Z needs many runs of the model at once, but the model does not broadcast over an extra batch "
        f"dimension at {-depth - 1}: {reason}; index from the right (value[..., 0]) and sum over dim=-1, "
        f"or use normalize=False"
    )


def check_broadcast(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: ModelStructure
) -> None:
    """Two runs at once must have the log probabilities that each has alone.

    Raises:
        ValueError: naming the first site for which they have not.
    """
    depth = structure.max_plate_nesting
    if structure.subsampled:  # other elements in each run: nothing to compare
        return
    quiet = (forked_rng(2), torch.no_grad(), poutine.block(), evaluation_mode(model))
    with ExitStack() as stack:
        for manager in (*quiet, pyro.validation_enabled(False)):
            stack.enter_context(manager)
        single = [poutine.trace(unconditioned(model)).get_trace(*args, **kwargs) for _ in range(2)]
        alone = {
            name: torch.stack([log_prob_of(trace.nodes[name]).sum() for trace in single])
            for name in structure.order
        }
        drawn = [name for name in structure.order if name not in structure.fixed]
        with _free_plate("_normalizer_draws", 2, depth) as plate:
            data = {name: _stacked(single, name, -plate.dim - 1) for name in drawn}
            conditioned = poutine.condition(unconditioned(model), data=data)
            trace = _broadcast_trace(conditioned, args, kwargs, depth)
        for name, expected in alone.items():
            log_prob = _sum_coupled(log_prob_of(trace.nodes[name]), (plate.dim,)).flatten()
            if not torch.allclose(log_prob.expand(2), expected, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(_no_broadcast(depth, f"site {name!r} gives other log probabilities"))


def _stacked(traces: list[poutine.Trace], name: str, depth: int) -> Tensor:
    """Values of a site in several runs, the runs left of ``depth`` batch dims."""
    sites = [trace.nodes[name] for trace in traces]
    padded = padded_shape(sites[0]["value"].shape, event_dim_of(sites[0]), depth)
    return torch.stack([site["value"].reshape(padded) for site in sites])


def _sum_coupled(values: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Sum over the plate dims whose elements are not independent; keeps their places with size 1."""
    dims = tuple(d for d in range(-values.ndim, 0) if d not in keep)
    return values.sum(dims, keepdim=True) if dims else values


@contextmanager
def _free_plate(name: str, size: int, depth: int) -> Iterator[pyro.plate]:
    """A plate at the first free dim left of the model's own; outer ones (chains, particles) may be there."""
    for dim in range(-depth - 1, -depth - 9, -1):
        plate = pyro.plate(name, size, dim=dim)
        try:
            plate.__enter__()
        except ValueError:  # this dim is taken
            continue
        try:
            yield plate
        finally:
            plate.__exit__(None, None, None)
        return
    raise ValueError("no free dimension for the normalizer's draws: at most seven outer plates are supported")
