"""What a model says at given draws: the log likelihood of each datum, and its deterministic sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.errors import warn_user
from pyro_ebm.inference.density.summed_draws import summed_out_draws
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.inference.resampled import weigh_the_same
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import (
    BatchedModel,
    event_dim_of,
    is_deterministic,
    is_factor,
    is_observed,
    latent_sites,
    plate_dims,
    prototype_trace,
    sample_sites,
    subsampling_scale,
    tilt_of,
    untilted,
)

__all__ = ["ModelSites", "Pointwise", "model_sites", "pointwise", "pointwise_log_prob"]

_CHUNK, _NUMBERS_AT_ONCE = 4096, 4_000_000
_MOST_NUMBERS = 100_000_000  # draws times observed numbers: seconds of work


@dataclass(frozen=True)
class ModelSites:
    """The sites of a model without its tilt, as one run shows them.

    Args:
        latent: names of the random sites.
        observed: site with data -> shape of its log probabilities.
        deterministic: names of ``pyro.deterministic`` sites, and of sites that a reparametrization computes.
        shapes: site -> shape of its value.
        plates: site -> name of the plate along each dimension of its value; None where there is none.
        subsampled: sites that see part of their data only, another one in each run.
    """

    latent: tuple[str, ...] = ()
    observed: Mapping[str, torch.Size] = field(default_factory=dict)
    deterministic: tuple[str, ...] = ()
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    plates: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    subsampled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pointwise:
    """Per draw, what follows from it.

    Args:
        log_likelihood: observed site -> (chain, draw, *batch_shape), empty where it was left out.
        deterministic: site -> (chain, draw, *site_shape).
        left_out: why there is no log likelihood; ``""`` where there is one.
    """

    log_likelihood: Mapping[str, Tensor] = field(default_factory=dict)
    deterministic: Mapping[str, Tensor] = field(default_factory=dict)
    left_out: str = ""


def pointwise_log_prob(site: Mapping[str, Any]) -> Tensor:
    """Log probability of each element of a site, unscaled; 0 for those that a mask takes out, whatever they hold."""
    log_prob = site["fn"].log_prob(site["value"])
    mask = site["mask"]
    if mask is None or mask is True:
        return log_prob
    mask = torch.as_tensor(mask, device=log_prob.device)
    return torch.where(mask, log_prob, torch.zeros_like(log_prob))


def model_sites(source: Source) -> ModelSites:
    """The sites of the model behind some draws."""
    trace = prototype_trace(untilted(source.model), source.args, source.kwargs)
    sites = {name: site for name, site in sample_sites(trace).items() if not is_factor(site)}
    derived = tuple(name for name, site in sites.items() if is_deterministic(site))
    data = {name: site for name, site in sites.items() if is_observed(site) and name not in derived}
    return ModelSites(
        latent=tuple(latent_sites(trace)),
        observed={name: _batch_shape(site) for name, site in data.items()},
        deterministic=derived,
        shapes={name: site["value"].shape for name, site in sites.items()},
        plates={name: _plates_of(site) for name, site in sites.items()},
        subsampled=frozenset(name for name, site in sites.items() if subsampling_scale(site) != 1),
    )


def _batch_shape(site: Mapping[str, Any]) -> torch.Size:
    """Shape of the log probability; without a plate a distribution of one number can have a vector for a value."""
    shape, fn = site["value"].shape, site["fn"]
    return torch.broadcast_shapes(fn.batch_shape, shape[: len(shape) - len(fn.event_shape)])


def _plates_of(site: Mapping[str, Any]) -> tuple[str | None, ...]:
    shape, event_dim = site["value"].shape, event_dim_of(site)
    sizes = {frame.name: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    names: list[str | None] = [None] * len(shape)
    for name, dim in plate_dims(site).items():
        axis = len(shape) - event_dim + dim
        if 0 <= axis < len(shape) and shape[axis] == sizes[name]:
            names[axis] = name
    return tuple(names)


def pointwise(draws: Draws, sites: ModelSites, *, log_likelihood: bool | None) -> Pointwise:
    """Run the model at all draws.

    Args:
        draws: with their ``source``.
        sites: of that source.
        log_likelihood: ``True``: must be there; ``False``: is not wanted; ``None``: where it can be had and read as it
            is (no weights, at most a hundred million numbers).

    Raises:
        ValueError: with ``True``, where the log likelihood of single data does not exist or cannot be computed.
    """
    problem = _problem(draws, sites) or ("" if log_likelihood else _reason_to_wait(draws, sites))
    if log_likelihood and problem:
        raise ValueError(f"log_likelihood=True: {problem}")
    left_out = "not asked for" if log_likelihood is False else problem
    wanted = () if draws.source is None else tuple(set(sites.deterministic) - sites.subsampled)
    observed = {} if left_out else sites.observed
    if not wanted and not observed:
        return Pointwise(left_out=left_out)
    try:
        logs, values = _run(draws, observed, wanted)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if log_likelihood:
            raise
        told = str(error).splitlines()[0] if str(error) else ""
        left_out = left_out or f"the model could not be run at the draws: {type(error).__name__}: {told}"
        warn_user(
            f"{left_out}; log likelihood and deterministic sites are left out. Give the model and the arguments that "
            f"the draws were made with: draws.with_model(model, ...)",
            UserWarning,
        )
        return Pointwise(left_out=left_out)
    return Pointwise(logs, values, left_out)


def _problem(draws: Draws, sites: ModelSites) -> str:
    """Why the log likelihood of single data does not exist."""
    if draws.source is None:
        return "the draws do not know their model; give it by draws.with_model(model, ...)"
    missing = [site for site in sites.latent if site not in draws.values]
    if missing:
        return f"the latent site(s) {missing} of the model are not among the draws"
    if not sites.observed:
        return "the model has no observed site"
    tilt = tilt_of(draws.source.model)
    tilted = sorted(set(tilt.energies if tilt else ()) & set(sites.observed))
    if tilted:
        return f"the observed site(s) {tilted} are tilted, and log Z of such a tilt belongs to all data at once"
    partial = sorted(sites.subsampled & set(sites.observed))
    if partial:
        return f"the site(s) {partial} are subsampled: other data in each run; run the model on all its data"
    return ""


def _reason_to_wait(draws: Draws, sites: ModelSites) -> str:
    """Why it is computed only when asked for."""
    if not weigh_the_same(draws):
        return (
            "the draws are weighted, and what reads log likelihoods ignores weights; leave keep_weights=False, or ask "
            "by log_likelihood=True"
        )
    numbers = draws.num_chains * draws.num_draws * sum(sites.shapes[name].numel() for name in sites.observed)
    if numbers > _MOST_NUMBERS:
        return f"{numbers:,} numbers would be looked at (draws times data); ask by log_likelihood=True, or chains=4"
    return ""


def _drawn_anew(draws: Draws, source: Source, rows: Mapping[str, Tensor], missing: list[str]) -> dict[str, Tensor]:
    """Discrete sites that were summed out, from their posterior given each draw."""
    with forked_rng(0):
        found = summed_out_draws(untilted(source.model), source.args, source.kwargs, rows, draws.observed)
    if absent := [name for name in missing if name not in found]:
        raise ValueError(f"the latent site(s) {absent} of the model are not among the draws")
    return found


@torch.no_grad()
def _run(
    draws: Draws, observed: Mapping[str, torch.Size], wanted: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source, lead = draws.source, (draws.num_chains, draws.num_draws)
    assert source is not None
    depth = max((len(shape) for shape in observed.values()), default=0)

    def measure(name: str, site: Mapping[str, Any]) -> Tensor | None:
        return pointwise_log_prob(site) if name in observed else None

    keep = tuple(range(-depth, 0))
    model = BatchedModel(untilted(source.model), source.args, source.kwargs, keep=keep, returned=wanted)
    rows = {name: draws.flat(name) for name in model.layout.shapes if name in draws.values}
    if missing := [name for name in model.layout.latent if name not in rows]:
        rows |= _drawn_anew(draws, source, rows, missing)
    total = sum(shape.numel() for shape in model.layout.shapes.values())
    chunk = max(1, min(_CHUNK, _NUMBERS_AT_ONCE // max(total, 1)))
    with forked_rng(0):  # nothing is drawn, but a model may draw what it does not use
        parts = [
            model.run({name: value[start : start + chunk] for name, value in rows.items()}, measure=measure)
            for start in range(0, lead[0] * lead[1], chunk)
        ]
    logs = {name: torch.cat([part.measured[name] for part in parts]) for name in observed}
    values = {name: torch.cat([part.values[name] for part in parts]) for name in wanted}
    return (
        {name: value.reshape(*lead, *observed[name]) for name, value in logs.items()},
        {name: value.reshape(*lead, *value.shape[1:]) for name, value in values.items()},
    )
