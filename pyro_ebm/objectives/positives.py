"""What a tilt is told to make likely, and the distribution it starts from: the two samples that objectives contrast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.energies import Energy
from pyro_ebm.structure import ModelStructure, event_dim_of, unconditioned, unmasked
from pyro_ebm.tilts.forward import forward_log_normalizer
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, is_exchangeable, site_log_normalizer
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = [
    "Positives",
    "base_draws",
    "base_log_prob",
    "draws_of",
    "energy_of",
    "log_z_of",
    "positives",
    "tilt_loss",
]


class Positives(NamedTuple):
    """Draws of the tilted site given a batch, and the site's distribution before the tilt.

    Args:
        site: name of the tilted site.
        values: (num, *event), without gradients; all batch dimensions of the site as one.
        base: the distribution of every element before the tilt. Its batch shape is that of the site in the model, so
            take draws and densities with :func:`draws_of` and :func:`base_log_prob`. None where the
            site has random parents: its distribution is then known by draws only, see :func:`base_draws`.
    """

    site: str
    values: Tensor
    base: Distribution | None


def positives(
    model: TiltedModel, guide: Callable[..., Any], batch: Sequence[Any], *, need_base: bool = True
) -> Positives:
    """Draw the tilted site of a model given a batch: from the guide, or, where it is observed, the data.

    The values carry no gradient to the guide: the energy at them is one part of what a guide is trained
    on, and alone it would only move the posterior to where the energy is low. Draws come from torch's global
    generator.

    Args:
        model: a tilted model with one tilted site.
        guide: draws the site if it is latent; else not called.
        batch: arguments of model and guide.
        need_base: refuse a site with random parents, whose distribution has no density at hand.

    Raises:
        TypeError: a model that is not tilted.
        ValueError: several tilted sites; a latent site that the guide does not draw; elements of the
            site that differ in distribution or in weight.
    """
    found, structure = _site(model, batch)
    site = found["name"]
    base, weight = unmasked(found["fn"]), found["scale"]
    if isinstance(weight, Tensor) and weight.numel() > 1:
        raise ValueError(
            f"the elements of site {site!r} have weights of their own (poutine.scale of shape {tuple(weight.shape)}), "
            "which contrastive objectives do not know; use TiltELBO or pyro.infer.Trace_ELBO()"
        )
    known = not structure.ancestors[site] and is_exchangeable(base)
    if not known and (need_base or not structure.is_pooled([site])):
        reason = "has random parents" if structure.ancestors[site] else "depends on inputs"
        others = "NoiseContrastive or FirstOrder, which need draws of it only, or "
        raise ValueError(
            f"this objective needs a site whose distribution is one for all data and has a density, but {site!r} "
            f"{reason}; use {others if structure.is_pooled([site]) else ''}an ELBO such as pyro.infer.Trace_ELBO()"
        )
    with torch.no_grad():
        value = found["value"] if found["is_observed"] else _proposed(guide, batch, site)
    event = value.shape[value.ndim - event_dim_of(found) :]
    shape = found["fn"].batch_shape
    values = value.detach().expand(*torch.broadcast_shapes(shape, value.shape[: value.ndim - len(event)]), *event)
    if isinstance(found["mask"], Tensor):
        values = values[found["mask"].expand(values.shape[: values.ndim - len(event)])]
    return Positives(site, values.reshape(-1, *event), base if known else None)


def _site(model: TiltedModel, batch: Sequence[Any]) -> tuple[dict[str, Any], ModelStructure]:
    """The tilted site as the base model reaches it, before it is drawn, and the model's structure."""
    if not isinstance(model, TiltedModel):
        raise TypeError(f"model must be what tilt() returns, got {type(model).__name__}")
    if len(model.energies) != 1:
        raise ValueError(
            f"model must have one tilted site, got {sorted(model.energies)}; use TiltELBO or an ELBO for several"
        )
    structure = model.structure(*batch)
    reached = _Reached(next(iter(model.energies)))
    with torch.no_grad(), reached, suppress(_Stop):
        model.base_model(*batch)
    return reached.found, structure


class _Stop(Exception):
    """Ends a model run early: the site was reached."""


class _Reached(Messenger):
    """Keeps one site as it is before it is drawn, inside all its plates, and stops the model there."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            self.found = dict(msg)
            raise _Stop


def _proposed(guide: Callable[..., Any], batch: Sequence[Any], site: str) -> Tensor:
    nodes = poutine.trace(guide).get_trace(*batch).nodes
    if site not in nodes:
        raise ValueError(f"the guide does not draw the tilted site {site!r}; it draws {_drawn(nodes)}")
    return nodes[site]["value"]


def _drawn(nodes: Any) -> list[str]:
    return sorted(name for name, node in nodes.items() if node["type"] == "sample")


@torch.no_grad()
def base_draws(model: TiltedModel, batch: Sequence[Any], found: Positives, num: int) -> Tensor:
    """Independent draws of the tilted site before the tilt, (num, *event), from torch's global generator.

    Where the site has random parents the base model is run, without its observations, as often as it takes.

    Args:
        model: the tilted model.
        batch: its arguments; observed values among them fix shapes only.
        found: what :func:`positives` returned for them.
        num: how many.
    """
    if found.base is not None:
        return draws_of(found.base, num)
    event_dim = found.values.ndim - 1
    drawn: list[Tensor] = []
    while sum(map(len, drawn)) < num:
        value = poutine.trace(unconditioned(model.base_model)).get_trace(*batch).nodes[found.site]["value"]
        drawn.append(value.reshape(-1, *value.shape[value.ndim - event_dim :]))
    return torch.cat(drawn)[:num]


@torch.no_grad()
def draws_of(base: Distribution, num: int) -> Tensor:
    """Draws (num, *event) of a distribution that is the same for all its batch elements."""
    repeats = math.ceil(num / max(math.prod(base.batch_shape), 1))
    return base.sample(torch.Size([repeats])).reshape(-1, *base.event_shape)[:num]


def base_log_prob(base: Distribution, values: Tensor) -> Tensor:
    """Log density (num,) of values (num, *event) under a distribution that is the same for all its batch elements."""
    copies, num = math.prod(base.batch_shape), len(values)  # some distributions give a tuple for a shape
    missing = -num % copies
    padded = torch.cat([values, values[:1].expand(missing, *base.event_shape)]) if missing else values
    return base.log_prob(padded.reshape(-1, *base.batch_shape, *base.event_shape)).reshape(-1)[:num]


def energy_of(energy: Energy, values: Tensor, site: str) -> Tensor:
    """Energies (num,) of values (num, *event) of a site, or a ValueError when they have another shape."""
    return checked_energy(energy, values, values.ndim - 1, f"site {site!r}")


def log_z_of(model: TiltedModel, batch: Sequence[Any], found: Positives) -> Tensor:
    """Log Z of the tilt, 0-d, estimated as the model does, or by default where it leaves log Z out.

    Args:
        model: the tilted model.
        batch: its arguments.
        found: what :func:`positives` returned for them.
    """
    energy = model.energies[found.site]
    settings = model.normalize if isinstance(model.normalize, Normalizer) else Normalizer()
    if found.base is not None:
        return site_log_normalizer(found.base, energy, settings, name=f"site {found.site!r}")
    structure = model.structure(*batch)
    return forward_log_normalizer(model.base_model, tuple(batch), {}, {found.site: energy}, structure, settings)


def tilt_loss(model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
    r"""The tilt's part of the negative ELBO (of the negative log likelihood, for an observed site).

    ``sum_i E(v_i) + n log Z``: a measure of fit for the validation of objectives that are none.

    Args:
        model: a tilted model with one tilted site.
        guide: draws the site if it is latent.
        *batch: arguments of model and guide.

    Returns:
        0-d, summed over the batch.
    """
    found = positives(model, guide, batch, need_base=False)
    energy = model.energies[found.site]
    return energy_of(energy, found.values, found.site).sum() + len(found.values) * log_z_of(model, batch, found)
