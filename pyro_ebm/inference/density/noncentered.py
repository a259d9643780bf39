r"""Sample a model's noise instead of its sites: ``z = mu + sigma eps`` with ``eps ~ N(0, I)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.structure import BatchedModel, Layout, nothing, prototype_trace, untilted
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["centered", "noncentered"]

_CHUNK = 8192
_SUFFIX = "_decentered"  # Pyro's own name for it


@checked
def noncentered(model: Callable[..., Any]) -> Callable[..., Any]:
    r"""The same model with its latent sites as functions of standard noise.

    Each latent site ``v`` with a location and a scale becomes ``v = mu + sigma v_decentered`` with
    ``v_decentered`` from the standard one (N(0, 1) for a normal), and each one with only an inverse cdf becomes
    ``v = F^{-1}(Phi(v_decentered))``. ``v`` is distributed the same in both models; samplers then move the noise,
    whose prior has no narrow ridges however small ``sigma`` is. Of a tilt at ``v``, the samplers see
    ``N(noise; 0, I) exp(-E(v(noise)))``. Other sites (observed, discrete, without such a form) stay as they are.

    Args:
        model: any Pyro model, tilted or not: ``noncentered(tilt(model, e))`` is ``tilt(noncentered(model), e)``.

    Returns:
        A callable with the model's signature and latent sites ``v_decentered``; :func:`centered` turns draws of
        these into draws of the model's own sites.

    Raises:
        TypeError: a model that is not callable.

    Reference:
        Gorinova, Moore, Hoffman (2020), Automatic Reparameterisation of Probabilistic Programs; Xiao, Kreis,
        Kautz, Vahdat (2021), VAEBM, who sample the noise of a data-space tilt so.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy, noncentered, centered, importance, tilt
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(5.0, 0.1))
        >>> noise = noncentered(tilt(model, {"x": LinearEnergy(2.0)}))  # N(5.02, 0.01)
        >>> draws = importance(noise, num_samples=1000, seed=0)
        >>> list(draws.values), round(float(centered(noise, draws).mean("x")), 2)
        (['x_decentered'], 5.02)
    """
    if isinstance(model, TiltedModel):
        return TiltedModel(noncentered(model.base_model), model.energies, model.normalize)
    return model if isinstance(model, _Noncentered) else _Noncentered(model)


class _Noncentered:
    """What :func:`noncentered` returns; ``fn`` is where the library looks for the modules behind a model."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.fn = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return poutine.reparam(self.fn, config=_reparameterizer)(*args, **kwargs)


def _reparameterizer(site: Mapping[str, Any]) -> Reparam | None:
    # A new site passes here too, when its reparameterisation samples it.
    if site["is_observed"] or site["name"].endswith(_SUFFIX):
        return None
    fn = site["fn"]
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if fn.event_shape or getattr(fn.support, "is_discrete", False):
        return None
    if {"loc", "scale"} <= set(fn.arg_constraints) and fn.support is torch.distributions.constraints.real:
        return LocScaleReparam(0.0)
    return None if _median(fn) is None else _Quantile()


@torch.no_grad()
def _median(fn: Any) -> Tensor | None:
    """None for a distribution without an inverse cdf."""
    try:
        return fn.icdf(torch.tensor(0.5))
    except NotImplementedError:
        return None


class _Quantile(Reparam):
    """A scalar distribution as its inverse cdf at ``Phi(noise)``."""

    def apply(self, msg: Any) -> Any:
        fn, event_dim = self._unwrap(msg["fn"])
        standard = dist.Normal(torch.zeros_like(_median(fn)), 1.0).expand(fn.batch_shape)  # type: ignore[arg-type]
        noise = pyro.sample(msg["name"] + _SUFFIX, self._wrap(standard, event_dim))
        eps = torch.finfo(noise.dtype).eps
        value = fn.icdf(torch.special.ndtr(noise).clamp(eps, 1 - eps))
        return {"fn": dist.Delta(value, event_dim=event_dim).mask(False), "value": value, "is_observed": True}


@torch.no_grad()
@checked
def centered(model: Callable[..., Any], draws: Draws, *args: Any, **kwargs: Any) -> Draws:
    """Draws of a non-centered model's noise as draws of the model's own sites.

    Args:
        model: what :func:`noncentered` returned.
        draws: of its latent sites, by any sampler.
        *args: the arguments of the model that the draws were made with.
        **kwargs: likewise.

    Returns:
        The same draws, weights and statistics, with the values of the original model's latent sites.

    Raises:
        TypeError: a model that :func:`noncentered` did not make.
        ValueError: draws of another model.
    """
    base = untilted(model)
    if not isinstance(base, _Noncentered):
        raise TypeError(f"model must be what noncentered() returns, got {type(base).__name__}")
    runs = _runs(base, args, kwargs)
    missing = [name for name in runs.layout.latent if name not in draws.values]
    if missing:
        raise ValueError(
            f"draws lack the site(s) {missing} of the non-centered model (they have {sorted(draws.values)}); "
            f"sample the model that noncentered() returned"
        )
    total = draws.num_chains * draws.num_draws
    parts = []
    with evaluation_mode(base):
        for start in range(0, total, _CHUNK):
            rows = {name: draws.flat(name)[start : start + _CHUNK] for name in runs.layout.latent}
            parts.append(runs.run(rows, measure=nothing).values)
    shape = (draws.num_chains, draws.num_draws)
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = {name: value.reshape(*shape, *value.shape[1:]) for name, value in values.items()}
    own = TiltedModel(base.fn, model.energies, model.normalize) if isinstance(model, TiltedModel) else base.fn
    source = Source(own, args, kwargs)
    return dataclasses.replace(draws, values=values, dims={}, coords={}, source=source)


def _runs(base: _Noncentered, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BatchedModel:
    """The model, to be run given its noise: it returns the values of the original model's latent sites."""
    noise = Layout.of(prototype_trace(base, args, kwargs))
    original = Layout.of(prototype_trace(base.fn, args, kwargs))
    shapes, event_dims = {**noise.shapes, **original.shapes}, {**noise.event_dims, **original.event_dims}
    layout = dataclasses.replace(noise, shapes=shapes, event_dims=event_dims)
    return BatchedModel(base, args, kwargs, layout=layout, returned=original.latent)
