"""A Pyro model seen as a function of one flat vector of unconstrained numbers per chain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_ebm.modules import evaluation_mode
from pyro_ebm.structure import latent_sites, observed_sites, padded_shape, plate_depth, prototype_trace
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["VECTORIZE", "ModelTarget", "is_observed", "keep_dims"]

VECTORIZE = ("plate", "vmap")


@dataclass(frozen=True)
class Site:
    """How one latent site sits in the unconstrained vector."""

    name: str
    shape: torch.Size  # of its value, without chains
    unconstrained_shape: torch.Size
    event_dim: int
    transform: Transform
    data_axis: int | None  # axis of `shape` that holds the independent plate

    @property
    def size(self) -> int:
        copies = 1 if self.data_axis is None else self.shape[self.data_axis]
        return self.unconstrained_shape.numel() // copies


class ModelTarget:
    """A Pyro model seen as a function of one flat vector per chain.

    Args:
        model: the model; a tilted one enters without its log Z.
        args: its arguments.
        kwargs: its keyword arguments.
        independent: name of the plate whose elements are densities of their own.
        vectorize: ``"plate"``: chains are an outer plate; ``"vmap"``: the model runs as for one chain.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        independent: str | None = None,
        vectorize: str = "plate",
    ) -> None:
        if vectorize not in VECTORIZE:
            raise ValueError(f"vectorize must be one of {VECTORIZE}, got {vectorize!r}")
        self.model = model.unnormalized() if isinstance(model, TiltedModel) else model
        self.args, self.kwargs, self.vectorize = args, kwargs, vectorize
        # The tilt changes no shapes: without it, a bad energy is seen in the density and not here.
        self.base = self.model.base_model if isinstance(self.model, TiltedModel) else self.model
        trace = prototype_trace(self.base, args, kwargs)
        self.depth = plate_depth(trace)
        self.data_dim, self.batch = _independent_plate(trace, independent)
        self.sites = [_describe(name, site, self.data_dim) for name, site in latent_sites(trace).items()]
        if not self.sites:
            raise ValueError("the model has no latent sample sites: nothing to sample")
        _check_no_subsampling(trace)
        self.like = trace.nodes[self.sites[0].name]["value"]
        self.observed = observed_sites(trace)

    @property
    def dim(self) -> int:
        """Length of one point."""
        return sum(site.size for site in self.sites)

    @property
    def kept_dims(self) -> tuple[int, ...]:
        """Dims of a vectorized log probability that are not summed over: chains, then independent data."""
        chain_dim = -self.depth - 1
        return (chain_dim,) if self.data_dim is None else (chain_dim, self.data_dim)

    def proposal(self, guide: Callable[..., Any] | None) -> ModelTarget:
        """The same points under another distribution: the guide's, or, without one, the untilted prior's."""
        if guide is not None:
            proposed = latent_sites(prototype_trace(guide, self.args, self.kwargs))
            missing = [site.name for site in self.sites if site.name not in proposed]
            if missing:
                raise ValueError(
                    f"guide does not propose the latent site(s) {missing} (it has {sorted(proposed)}); "
                    f"every latent site of the model needs a proposal"
                )
        other = copy.copy(self)
        other.model = poutine.block(self.base, hide_fn=is_observed) if guide is None else guide
        return other

    @torch.no_grad()
    def draw(self, num_draws: int) -> Tensor:
        """Points (num_draws, *batch, dim) from this proposal, by torch's global generator."""
        with evaluation_mode(self.model), pyro.validation_enabled(False):
            if self.vectorize == "vmap":
                return self.unconstrain(self._values_by_vmap(num_draws))
            with pyro.plate("_chains", num_draws, dim=-self.depth - 1):
                values = self._values()
        for site in self.sites:
            padded = padded_shape(site.shape, site.event_dim, self.depth)
            values[site.name] = values[site.name].expand(num_draws, *padded).reshape(num_draws, *site.shape)
        return self.unconstrain(values)

    def _values_by_vmap(self, num_draws: int) -> dict[str, Tensor]:
        try:
            return self._vmap(lambda _: self._values(), torch.empty(num_draws))
        except RuntimeError:  # gamma and beta numbers cannot be drawn under vmap
            runs = [self._values() for _ in range(num_draws)]
            return {site.name: torch.stack([run[site.name] for run in runs]) for site in self.sites}

    def _values(self) -> dict[str, Tensor]:
        nodes = poutine.trace(self.model).get_trace(*self.args, **self.kwargs).nodes
        return {site.name: nodes[site.name]["value"] for site in self.sites}

    def log_prob(self, u: Tensor) -> Tensor:
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        values, log_jacobian = self._unpack(u.reshape(-1, *u.shape[len(lead) :]))
        logs = self._site_log_probs(values, lead.numel())
        total = torch.stack(list(logs.values())).sum(0) + log_jacobian
        return total.reshape(lead + self.batch)

    def _site_log_probs(self, values: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
        """Log probability of every site, (chains, *batch)."""
        with evaluation_mode(self.model), pyro.validation_enabled(False):
            if self.vectorize == "vmap":
                return self._vmap(self._one_chain, dict(values))
            padded = {site.name: self._pad(site, values[site.name]) for site in self.sites}
            with pyro.plate("_chains", chains, dim=-self.depth - 1):
                logs = self._log_probs(self._trace(padded), self.kept_dims)
        return {name: each.expand(chains, *self.batch) for name, each in logs.items()}

    @staticmethod
    def _vmap(function: Callable[..., Any], argument: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # where torch has to loop
            return torch.vmap(function, randomness="different")(argument)

    def _one_chain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        logs = self._log_probs(self._trace(values), self.kept_dims[1:])
        return {name: each.expand(self.batch) for name, each in logs.items()}

    def _alone(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log probability of every site, (*batch,), the model being run as the user does: for one chain."""
        with evaluation_mode(self.model), pyro.validation_enabled(False):
            trace = self._trace(values)
        for site in self.sites:
            _check_support(site, trace.nodes[site.name]["fn"], values[site.name])
        logs = self._log_probs(trace, self.kept_dims[1:])
        return {name: each.expand(self.batch) for name, each in logs.items()}

    def _trace(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        tracer = poutine.trace(poutine.condition(self.model, data=dict(values)))
        try:
            trace = tracer.get_trace(*self.args, **self.kwargs)
        except Exception as error:
            error.add_note(_reached(tracer.msngr.trace))
            raise
        trace.compute_log_prob()
        return trace

    @staticmethod
    def _log_probs(trace: poutine.Trace, kept: tuple[int, ...]) -> dict[str, Tensor]:
        return {
            name: keep_dims(site["log_prob"], kept)
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }

    def _pad(self, site: Site, value: Tensor) -> Tensor:
        """Insert size-1 dims so that the chain dim lands left of all plates."""
        return value.reshape(value.shape[0], *padded_shape(site.shape, site.event_dim, self.depth))

    def _unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_jacobian = {}, u.new_zeros(u.shape[:-1])
        for site, part in zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True):
            flat = _to_site(part, site)
            values[site.name] = site.transform(flat)
            jacobian = site.transform.log_abs_det_jacobian(flat, values[site.name])
            axis = None if site.data_axis is None else site.data_axis + 1
            dims = [d for d in range(1, jacobian.ndim) if d != axis]
            log_jacobian = log_jacobian + (jacobian.sum(dims) if dims else jacobian)
        return values, log_jacobian

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        values, _ = self._unpack(u.reshape(-1, *u.shape[len(lead) :]))
        return {name: value.reshape(lead + value.shape[1:]) for name, value in values.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        missing = [site.name for site in self.sites if site.name not in values]
        if missing:
            raise ValueError(f"values lacks the site(s) {missing}; sites: {[site.name for site in self.sites]}")
        flat = {}
        for site in self.sites:
            value = values[site.name]
            _check_shape(f"values[{site.name!r}]", value, site.shape)
            flat[site.name] = site.transform.inv(value)
        return self.pack(flat)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained values by site, {site: (*chains, *unconstrained_shape)}, as points."""
        parts = []
        for site in self.sites:
            flat = values[site.name]
            lead = flat.shape[: flat.ndim - len(site.unconstrained_shape)]
            if site.data_axis is not None:
                flat = flat.movedim(len(lead) + site.data_axis, len(lead))
            parts.append(flat.reshape(*lead, *self.batch, -1))
        return torch.cat(parts, -1)

    @property
    def _remedy(self) -> str:
        if self.vectorize == "vmap":
            return "vectorize=\"vmap\" cannot serve this model either; use method=\"nuts\", whose chains run one by one"
        return (
            'index from the right (value[..., 0]), sum over dim=-1 and let batch dimensions through (a value comes as '
            '(chains, 1 for each plate that it is outside of, ...)), or leave the model as it is and run it under '
            'torch.vmap: vectorize="vmap"'
        )

    def check_broadcast(self) -> None:
        """Two chains at once must give what each gives alone; names the first site that does not."""
        generator = torch.Generator().manual_seed(0)
        u = 0.5 * torch.randn((2, *self.batch, self.dim), generator=generator, dtype=self.like.dtype)
        u = u.to(self.like.device)
        with torch.no_grad():
            values, _ = self._unpack(u)
            alone = [self._alone({name: value[index] for name, value in values.items()}) for index in range(2)]
            try:
                together = self._site_log_probs(values, 2)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"the model does not broadcast over chains (an extra batch dimension at {-self.depth - 1}): "
                    f"{str(error).splitlines()[0]}{', '.join(getattr(error, '__notes__', ()))}; {self._remedy}"
                ) from error
        for name, both in together.items():
            separate = torch.stack([single[name] for single in alone])
            if not torch.allclose(both, separate, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"the model does not broadcast over chains: site {name!r} gives other log probabilities for "
                    f"two chains at once than for each alone; {self._remedy}"
                )
        if self.batch.numel() > 1:
            self._check_independent(u, alone[0])

    @torch.no_grad()
    def _check_independent(self, u: Tensor, before: Mapping[str, Tensor]) -> None:
        """Moving the first element of the plate must leave the log probabilities of the others alone."""
        moved = torch.cat([u[1, :1], u[0, 1:]])
        for name, after in self._site_log_probs(self._unpack(moved[None])[0], 1).items():
            if not torch.allclose(after[0, 1:], before[name][1:], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"independent= names a plate whose elements depend on each other through site {name!r}; "
                    f"leave independent=None"
                )


def _describe(name: str, site: Mapping[str, Any], data_dim: int | None) -> Site:
    fn, shape = site["fn"], site["value"].shape
    if not fn.support.is_discrete:
        transform = biject_to(fn.support)
        axis = None
        if data_dim is not None:
            axis = len(shape) - len(fn.event_shape) + data_dim
        return Site(
            name, shape, torch.Size(transform.inverse_shape(shape)), len(fn.event_shape), transform, axis
        )
    raise ValueError(
        f"site {name!r} is discrete ({type(fn).__name__}): a log density over continuous space has no place for "
        f'it; use method="nuts" or "hmc", whose kernels sum discrete sites out, or marginalize it in the model'
    )


def _reached(trace: poutine.Trace) -> str:
    """How far a run came, as text."""
    sites = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]
    return f" (after site {sites[-1]!r})" if sites else " (before the first site)"


def _check_support(site: Site, fn: Any, value: Tensor) -> None:
    """The support found here must be the one the transform was made for."""
    u = site.transform.inv(value)
    here = biject_to(fn.support)(u)
    if here.shape != value.shape or not torch.allclose(here, value, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"the support of site {site.name!r} ({type(fn).__name__}) depends on other latent sites, which no fixed "
            f"transform to unconstrained space can follow; sample it on a fixed support and transform it in the "
            f"model, for example b * pyro.sample({site.name!r}, dist.Uniform(0, 1))"
        )


def _to_site(part: Tensor, site: Site) -> Tensor:
    """(chains, [n,] size) -> (chains, *unconstrained_shape)."""
    if site.data_axis is None:
        return part.reshape(part.shape[0], *site.unconstrained_shape)
    rest = [s for axis, s in enumerate(site.unconstrained_shape) if axis != site.data_axis]
    return part.reshape(*part.shape[:2], *rest).movedim(1, 1 + site.data_axis)


def is_observed(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace holds data (or is a factor)."""
    return site["type"] == "sample" and site["is_observed"]


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if tuple(value.shape[value.ndim - len(shape) :]) != tuple(shape):
        raise ValueError(
            f"{name} must have shape (*chains{''.join(f', {n}' for n in shape)}), got {tuple(value.shape)}"
        )


def keep_dims(values: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Sum over all dims but those in ``keep`` (negative, ascending); absent ones appear with size 1."""
    if not keep:
        return values.sum()
    values = values.reshape([1] * max(-min(keep) - values.ndim, 0) + list(values.shape))
    dims = [d for d in range(-values.ndim, 0) if d not in keep]
    return values.sum(dims) if dims else values


def _independent_plate(trace: poutine.Trace, name: str | None) -> tuple[int | None, torch.Size]:
    if name is None:
        return None, torch.Size()
    frames = {
        site: {frame.name: frame for frame in node["cond_indep_stack"] if frame.vectorized}
        for site, node in latent_sites(trace).items()
    }
    known = sorted({plate for stack in frames.values() for plate in stack})
    if name not in known:
        raise ValueError(f"independent={name!r} is not a plate of the model's latent sites; plates: {known}")
    outside = [site for site, stack in frames.items() if name not in stack]
    if outside:
        raise ValueError(
            f"independent={name!r} needs every latent site inside that plate, but {outside} lie outside; "
            f"condition on them, or leave independent=None"
        )
    frame = next(iter(frames.values()))[name]
    return frame.dim, torch.Size([int(frame.size)])


def _check_no_subsampling(trace: poutine.Trace) -> None:
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and int(frame.full_size) != int(frame.size):
                raise ValueError(
                    f"plate {frame.name!r} is subsampled ({frame.size} of {frame.full_size}): the density would "
                    f"change from call to call; run the model on all its data"
                )
