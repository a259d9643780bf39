"""The sites of one run of a model: which there are, their shapes, plates and log probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import constraints

from pyro_ebm.checks import real_numbers
from pyro_ebm.errors import InputError
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.numerics import until_numbers_hold
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure.supports import leaf_of, transform_of

__all__ = [
    "check_posterior",
    "event_dim_of",
    "is_bookkeeping",
    "is_deterministic",
    "is_factor",
    "is_observed",
    "keep_dims",
    "latent_sites",
    "log_prob_of",
    "observed_sites",
    "padded_shape",
    "plate_depth",
    "plate_dims",
    "prototype_trace",
    "sample_sites",
    "scaled_log_prob",
    "subsampling_scale",
    "unconditioned",
    "unmasked",
]


class _Uncondition(UnconditionMessenger):
    """Pyro's, but deterministic sites keep their value: drawn anew inside a plate they would change shape."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def unconditioned(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites drawn from their distributions."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Uncondition():
            return model(*args, **kwargs)

    run.__wrapped__ = model  # type: ignore[attr-defined]  # where the modules behind it are looked for
    return run


def prototype_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seed: int = 0
) -> poutine.Trace:
    """One run of the model, to see its sites and shapes; leaves no trace in random state or modules.

    A draw of the prior at which numbers fail, as a matrix that has no factor, says nothing about the model: then others
    are tried. Another ``seed`` shows another draw.
    """
    return until_numbers_hold(lambda attempt: _one_run(model, args, kwargs, seed + attempt))


def _one_run(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int
) -> poutine.Trace:
    with forked_rng(seed), torch.no_grad(), poutine.block(), evaluation_mode(model), _Somewhere():
        try:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            _check_values(trace)
        except Exception as error:
            if isinstance(error, ValueError) and (holes := _arguments_with_nan(args, kwargs)):
                told = " ".join(str(error).split(":")[0].split())
                raise InputError(
                    f"NaN in {holes}, with which the model does not run ({told}): leave those data out, or fill them"
                ) from error
            given = [_in_short(value) for value in args] + [f"{name}={_in_short(kwargs[name])}" for name in kwargs]
            error.add_note(f"while running the model once with arguments ({', '.join(given)})")
            raise
    return trace


def _arguments_with_nan(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = {f"argument {i}": value for i, value in enumerate(args)} | {f"{name}=": x for name, x in kwargs.items()}
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return ", ".join(
        f"{name} ({int(x.isnan().sum())} of {x.numel()} numbers)" for name, x in tensors.items() if x.isnan().any()
    )


def _in_short(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{type(value).__name__}{shape}"


def _check_values(trace: poutine.Trace) -> None:
    for name, site in sample_sites(trace).items():
        if not hasattr(site["value"], "shape"):
            raise TypeError(
                f"the value of site {name!r} is a {type(site['value']).__name__}: give data as tensors or numpy "
                f"arrays, or let the model turn them into tensors (torch.as_tensor)"
            )
        if isinstance(site["value"], torch.Tensor) and not is_deterministic(site):
            real_numbers(f"the value of site {name!r}", site["value"])
            _check_mask(name, site)


def _check_mask(name: str, site: Mapping[str, Any]) -> None:
    """A mask by ``poutine.mask``: a larger one would count the site many times, one that fits nothing fails late."""
    mask, value, event_dim = site["mask"], site["value"], event_dim_of(site)
    if not isinstance(mask, torch.Tensor):
        return
    batch = torch.broadcast_shapes(site["fn"].batch_shape, value.shape[: value.ndim - event_dim])
    try:
        fits = torch.broadcast_shapes(mask.shape, batch).numel() == batch.numel()
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"a mask of shape {tuple(mask.shape)} lies over site {name!r}, whose batch shape is {tuple(batch)}: give "
            f"poutine.mask one that fits, around this site alone"
        )


class _Somewhere(Messenger):
    """Sites that cannot be drawn get a point of their support, or are named."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or not isinstance(msg["fn"], TorchDistribution):
            return
        fn = leaf_of(msg["fn"])
        if isinstance(fn, ImproperUniform):
            transform, shape = transform_of(msg["name"], fn), fn.shape()
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape)))
        elif type(fn).sample is TorchDistribution.sample and type(fn).rsample is TorchDistribution.rsample:
            raise InputError(
                f"site {msg['name']!r} ({type(fn).__name__}) is drawn by no method of its distribution, which can only "
                f"be observed: give it data (obs=), or another distribution"
            )


def sample_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """All sample sites of a trace, factors and deterministic sites among them, without subsampling."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def latent_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """The random, unobserved sample sites of a trace, without subsampling sites."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_bookkeeping(site)
    }


def observed_sites(trace: poutine.Trace) -> dict[str, torch.Tensor]:
    """Observed values by site, without deterministic sites, factors and subsampling."""
    return {
        name: site["value"].detach()
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not is_bookkeeping(site)
        and not is_deterministic(site)
    }


def plate_depth(trace: poutine.Trace) -> int:
    """Number of dimensions, from the right, that vectorized plates use (``max_plate_nesting``)."""
    frames = [f for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]]
    return max([-frame.dim for frame in frames if frame.vectorized], default=0)


def plate_dims(site: Mapping[str, Any]) -> dict[str, int]:
    """The vectorized plates a site lies in, with their dims."""
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def padded_shape(shape: torch.Size, event_dim: int, depth: int) -> torch.Size:
    """A site's shape with size-1 dims before it, so that a dim added in front lands left of ``depth`` plate dims."""
    return torch.Size([1] * (depth - (len(shape) - event_dim))) + shape


def is_bookkeeping(site: Mapping[str, Any]) -> bool:
    """Whether a sample site is no random variable: subsampling, a factor, an auxiliary one."""
    if site_is_subsample(site) or is_factor(site):
        return True
    return bool(site["infer"].get("is_auxiliary", False))


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.factor``."""
    return type(site["fn"]).__name__ == "Unit"


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.deterministic``, or what a reparameterization made of a random one."""
    if (site["infer"] or {}).get("_deterministic", False):
        return True
    fn = site["fn"]  # reparameterizations put a point mass that counts for nothing at the value they compute
    counts = not isinstance(fn, MaskedDistribution) or fn._mask is not False
    return not counts and bool(site["is_observed"]) and isinstance(unmasked(fn), Delta)


def is_observed(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace holds data (or is a factor)."""
    return site["type"] == "sample" and site["is_observed"]


def log_prob_of(site: Mapping[str, Any]) -> torch.Tensor:
    """Log probability of a site's value before any mask, (*batch,)."""
    return unmasked(site["fn"]).log_prob(site["value"])


def scaled_log_prob(site: Mapping[str, Any]) -> torch.Tensor:
    """Log probability of a site's value as it counts in the model, scaled and masked, (*batch,)."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"])


def unmasked(distribution: Any) -> Any:
    """The distribution without its masks, which hide log probabilities: its draws are the same."""
    while isinstance(distribution, MaskedDistribution):
        distribution = distribution.base_dist
    inner = vars(distribution).get("base_dist")  # below to_event, too
    if inner is None or (plain := unmasked(inner)) is inner:
        return distribution
    other = copy.copy(distribution)
    other.base_dist = plain
    return other


def subsampling_scale(site: Mapping[str, Any]) -> float:
    """How many data each one in the site's subsampled plates stands for; 1 without subsampling."""
    return math.prod((frame.full_size or frame.size) / frame.size for frame in site["cond_indep_stack"] if frame.size)


def event_dim_of(site: Mapping[str, Any]) -> int:
    """Number of rightmost dims of a site's value that are one event."""
    event_dim = len(site["fn"].event_shape)
    if is_deterministic(site):  # by default it calls every dim an event dim, those of its plates too
        outer = max([-dim for dim in plate_dims(site).values()], default=0)
        event_dim = max(min(event_dim, site["value"].ndim - outer), 0)
    return event_dim


def keep_dims(values: torch.Tensor, keep: tuple[int, ...]) -> torch.Tensor:
    """Sum over all dims but those in ``keep`` (negative, ascending); absent ones appear with size 1."""
    if not keep:
        return values.sum()
    values = values.reshape([1] * max(-min(keep) - values.ndim, 0) + list(values.shape))
    dims = [d for d in range(-values.ndim, 0) if d not in keep]
    return values.sum(dims) if dims else values


def check_posterior(trace: poutine.Trace) -> None:
    """A run must be that of a model with a posterior: on all its data, each of which some latent value explains.

    A plate that sees part of the data has another density in each run. No value explains NaN, nor a number outside a
    support that is always the same.

    Raises:
        InputError: naming the plate or the site.
    """
    _check_no_subsampling(trace)
    _check_data(trace)


def _check_no_subsampling(trace: poutine.Trace) -> None:
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and int(frame.full_size) != int(frame.size):
                raise InputError(
                    f"plate {frame.name!r} is subsampled ({frame.size} of {frame.full_size}): the density would "
                    f"change from call to call; run the model on all its data"
                )


def unvalidated(fn: Any) -> Any:
    """A distribution that checks no values, as all made from now on are: one of a module's may be older.

    What checks values looks at them, which neither ``torch.vmap`` nor a captured graph can do.
    """
    inner = vars(fn).get("base_dist")
    if not getattr(fn, "_validate_args", False) and inner is None:
        return fn
    other = copy.copy(fn)
    other._validate_args = False
    if inner is not None:
        other.base_dist = unvalidated(inner)
    return other


_HALF_LINES = (type(constraints.positive), type(constraints.nonnegative))


def _check_data(trace: poutine.Trace) -> None:
    for name, site in sample_sites(trace).items():
        if not site["is_observed"] or is_factor(site) or not isinstance(site["value"], torch.Tensor):
            continue
        missing = site["value"].isnan()
        if bool(missing.any()) and bool(scaled_log_prob({**site, "fn": unvalidated(site["fn"])}).isnan().any()):
            raise InputError(
                f"the data of site {name!r} hold NaN in {int(missing.sum())} of {missing.numel()} numbers: leave them "
                f"out, or mask them and put any number that the site allows in their place"
            )
        _check_inside(name, site)


def _check_inside(name: str, site: Mapping[str, Any]) -> None:
    """Only of half lines that depend on no parameter, and of the ends of a beta distribution's interval.

    Gray images as data of a Bernoulli are meant.
    """
    fn = site["fn"]
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if site["mask"] is not None:
        return
    if isinstance(fn, torch.distributions.Beta):
        support, outside = "0 < y < 1", (site["value"] <= 0) | (site["value"] >= 1)
    elif isinstance(found := getattr(type(fn), "support", None), _HALF_LINES):
        support, outside = str(found), ~found.check(site["value"])
    else:
        return
    if bool(outside.any()):
        raise InputError(
            f"{int(outside.sum())} of {outside.numel()} data of site {name!r} lie outside the support of "
            f"{type(fn).__name__}, {support}: it gives them no density; leave them out, or choose another distribution"
        )
