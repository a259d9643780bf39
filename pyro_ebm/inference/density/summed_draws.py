"""Draws of discrete sites that a sampler has summed out, given its draws of the others and the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.inference.density.enumeration import enumerable_sites, summed_out
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.structure import Layout, latent_sites, observed_sites, plate_dims, prototype_trace

__all__ = ["draw_summed_out", "summed_out_draws", "summed_out_sites"]

_FEW = 512  # draws at once: all values of discrete sites are tried


def summed_out_sites(trace: poutine.Trace, known: Collection[str], data: Mapping[str, Tensor]) -> list[str]:
    """The discrete latent sites that are not among some draws and do not follow the prior given these: there are data.

    In a plate of other data than the draws were made with they do, each for a new datum.

    Args:
        trace: of the model with its data.
        known: the sites of the draws.
        data: that the draws were made with, where known.

    Raises:
        ValueError: one outside all plates, and other data; one without a finite list of values.
    """
    observed = observed_sites(trace)
    discrete = enumerable_sites(trace, known) if observed else []
    if not discrete:
        return []
    if data and not _same(observed, data):
        common = [name for name in discrete if not plate_dims(trace.nodes[name])]
        if common:
            raise ValueError(
                f"the discrete site(s) {common} were summed out when the draws were made, from other data than the "
                f"arguments hold: give the arguments of that run, or draws of these sites too"
            )
        return []
    if continuous := [name for name in latent_sites(trace) if name not in known and name not in discrete]:
        raise ValueError(
            f"the discrete site(s) {discrete} are not among the draws and depend on {continuous}, which are not "
            f"either: give draws of these"
        )
    return discrete


def _same(observed: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> bool:
    return all(
        name in data and data[name].shape == value.shape
        and torch.allclose(value.double(), data[name].to(value.device).double(), rtol=1e-5, equal_nan=True)
        for name, value in observed.items()
    )  # fmt: skip


def summed_out_draws(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Draws of the discrete sites that a sampler has summed out, given its draws of the others and the data.

    Args:
        model: any Pyro model.
        args: its arguments, its data among them.
        kwargs: its keyword arguments.
        given: site -> (num, *site_shape), the sampler's draws.
        data: that these were made with, where known.

    Returns:
        site -> (num, *site_shape); empty where nothing was summed out.

    Raises:
        ValueError: that names the sites, where they cannot be drawn.
    """
    sites = summed_out_sites(prototype_trace(model, args, kwargs), given, data)
    if not sites:
        return {}
    total = len(next(iter(given.values())))
    try:
        parts = [
            draw_summed_out(model, args, kwargs, {name: value[k : k + _FEW] for name, value in given.items()}, sites)
            for k in range(0, total, _FEW)
        ]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            f"the discrete site(s) {sites} were summed out when the draws were made, and cannot be drawn given these "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}): give draws of them"
        ) from error
    return {site: torch.cat([part[site] for part in parts]) for site in sites}


def draw_summed_out(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Tensor],
    sites: Sequence[str],
) -> dict[str, Tensor]:
    r"""Draw discrete sites from their posterior given all other latent sites: torch's global generator.

    One site after the other, in the model's order. The probabilities of a site's values, later ones summed over, are
    the derivatives of the log density with respect to its log probabilities; its elements in a plate are independent
    given the sites before it.

    Args:
        model: any Pyro model, with its data.
        args: its arguments.
        kwargs: its keyword arguments.
        given: site -> (num, *site_shape), for all latent sites but these; one at least.
        sites: discrete, in the model's order.

    Returns:
        site -> (num, *site_shape).
    """
    trace = prototype_trace(model, args, kwargs)
    layout = Layout.of(trace)
    known = {name: value for name, value in given.items() if name in layout.latent}
    for index, site in enumerate(sites):
        runs = summed_out(model, args, kwargs, vectorize="auto", layout=layout, sites=sites[index:])
        support = trace.nodes[site]["fn"].enumerate_support(expand=False)
        states = support.reshape(len(support), *trace.nodes[site]["fn"].event_shape)
        with evaluation_mode(model):
            probabilities = runs.marginal(known, site).clamp(min=0).reshape(-1, len(states))
        chosen = states[torch.multinomial(probabilities, 1)[:, 0]]
        known[site] = chosen.reshape(-1, *layout.shapes[site])
    return {site: known[site] for site in sites}
