"""Draws of a model's sites and their own density: without masks and scales, and nothing outside a support."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyro_ebm.structure.sites import is_factor, latent_sites, sample_sites, subsampling_scale, unmasked
from pyro_ebm.structure.supports import check_drawable, is_periodic

__all__ = [
    "check_simulates",
    "drawn_log_prob",
    "idle_masks",
    "latent_masks",
    "outside_support",
    "within_support",
]

_TOLERANCE = 1e-4  # relative: what a transform to unconstrained space and back may lose


def drawn_log_prob(site: Mapping[str, Any], idle: Tensor | None = None) -> Tensor:
    """Log density of a site's draws, (*batch,): what masks and scales make of it in the model is another matter.

    Args:
        site: of a trace of what draws: the prior, or a guide.
        idle: mask (*batch,) of the model at this site, where nothing depends on what it hides: that counts for nothing.
    """
    log_prob = unmasked(site["fn"]).log_prob(site["value"], *site["args"], **site["kwargs"])
    return log_prob if idle is None else torch.where(idle.to(log_prob.device), log_prob, 0.0)


def latent_masks(trace: poutine.Trace) -> dict[str, Tensor]:
    """Of the latent sites that a mask hides, wholly or in part, the mask (*batch,): True where they count."""
    found = {}
    for name, site in latent_sites(trace).items():
        masks = [mask for mask in (site["mask"], *_masks_inside(site["fn"])) if mask is not None and mask is not True]
        if masks:
            shape, value = site["fn"].batch_shape, site["value"]
            whole = torch.ones(shape, dtype=torch.bool, device=value.device)
            for mask in masks:
                whole = whole & _as_batch(torch.as_tensor(mask, device=value.device), shape)
            found[name] = whole
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def _masks_inside(fn: Any) -> list[Any]:
    inner = vars(fn).get("base_dist")
    own = [fn._mask] if isinstance(fn, MaskedDistribution) else []
    return own if inner is None else own + _masks_inside(inner)


def _as_batch(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask over batch shape; one that lies below ``to_event`` counts where all of an event does."""
    while mask.ndim > len(shape) and mask.shape[: len(shape)] == shape:
        mask = mask.all(-1)
    return mask


def check_simulates(trace: poutine.Trace, what: str, remedy: str, *, scales: bool = False) -> None:
    """Runs of a model must be draws of it, where it is simulated from.

    Args:
        trace: of one run.
        what: is asked for, to be named.
        remedy: in words.
        scales: whether a site that counts more or less than once matters too.

    Raises:
        ValueError: naming latent sites whose prior a mask takes out of the density, or scaled sites.
    """
    check_drawable(latent_sites(trace), what, remedy)
    flat = [name for name, mask in latent_masks(trace).items() if not bool(mask.any())]
    if flat:
        raise ValueError(
            f"the latent site(s) {flat} have a flat prior (their density is masked): there are no draws of it for "
            f"{what}, and those of the distribution under the mask are of another model; {remedy}"
        )
    scaled = [name for name, site in sample_sites(trace).items() if _own_scale(site)]
    if scales and scaled:
        raise ValueError(
            f"the site(s) {scaled} are scaled (poutine.scale): runs of the model do not follow its density, which "
            f"{what} needs; take the scale away"
        )


def _own_scale(site: Mapping[str, Any]) -> bool:
    scale = site["scale"] / subsampling_scale(site)
    one = abs(scale - 1.0) < 1e-6
    return not is_factor(site) and not (bool(one.all()) if isinstance(one, Tensor) else one)


def idle_masks(
    masks: Mapping[str, Tensor],
    event_dims: Mapping[str, int],
    values: Mapping[str, Tensor],
    total: Callable[[Mapping[str, Tensor]], Tensor],
) -> dict[str, Tensor]:
    """Those of the masks that hide what nothing depends on, as the padding of a sequence.

    Such draws have no say: they follow whatever draws them, and their density counts neither in the model nor there.
    What is hidden at a site of its own and others depend on (``dist.Normal(0, 1).mask(False)``) is a flat prior.

    Args:
        masks: of latent sites, :func:`latent_masks`.
        event_dims: site -> number of its event dims.
        values: site -> some draws (num, *site_shape), two at least.
        total: the log density of such draws.
    """
    if not masks:
        return {}
    before, found = total(values), {}
    for name, mask in masks.items():
        hidden = ~mask.reshape(mask.shape + (1,) * event_dims[name])
        moved = torch.where(hidden, values[name].roll(1, 0), values[name])
        after = total({**values, name: moved})
        if torch.allclose(before, after, rtol=1e-6, atol=0.0, equal_nan=True):
            found[name] = mask
    return found


def outside_support(fn: Distribution, value: Tensor) -> Tensor | None:
    """Where values lie outside the support of a distribution, (*batch,); None where there is no outside.

    What rounding puts beside a support is inside; NaN is neither.
    """
    if is_periodic(fn):  # its density repeats itself, its draws do not
        return _any_of_event(value.abs() > math.pi * (1.0 + _TOLERANCE), len(fn.event_shape))
    try:
        support: Any = fn.support
        if _is_everything(support):
            return None
        inside = support.check(value)
    except (NotImplementedError, ValueError):  # a support that is not known
        return None
    try:
        transform = biject_to(support)
        lost = (transform(transform.inv(value)) - value).abs()
    except (NotImplementedError, RuntimeError):  # a discrete one, or one without a transform
        return ~inside
    far, nan = lost > _TOLERANCE * (1.0 + value.abs()), value.isnan()
    far = far | lost.isnan()
    return ~inside & _any_of_event(far, support.event_dim) & ~_any_of_event(nan, support.event_dim)


def _any_of_event(found: Tensor, event_dim: int) -> Tensor:
    return found.flatten(-event_dim).any(-1) if event_dim else found


def _is_everything(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def within_support(site: Mapping[str, Any], log_prob: Tensor) -> Tensor:
    """Log probability (*batch,) of a site, minus infinity where its value lies outside its distribution's support."""
    outside = outside_support(site["fn"], site["value"])
    if outside is None:
        return log_prob
    return torch.where(outside, -torch.inf, log_prob)

