"""A Pyro model seen as a function of one flat vector of unconstrained numbers per chain."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform

from pyro_ebm.inference.density.enumeration import enumerable_sites, summed_out
from pyro_ebm.inference.density.guides import by_way_of_others, check_proposes, check_supports
from pyro_ebm.inference.density.site import check_known, check_support, describe, to_site
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.numerics import until_numbers_hold
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import (
    BatchedModel,
    Layout,
    Wrapped,
    candidate_ways,
    check_drawable,
    check_posterior,
    drawn_log_prob,
    filled,
    idle_masks,
    is_observed,
    latent_masks,
    latent_sites,
    observed_sites,
    prototype_trace,
    unnormalized,
    untilted,
)
from pyro_ebm.structure.batched import Measure

__all__ = ["VECTORIZE", "ModelTarget"]

_FEW = 8  # points at which it is tried what depends on masked values
_WAYS = ("plate", "vmap")  # those through which a gradient can be recorded
VECTORIZE = ("auto", *_WAYS)


class ModelTarget:
    """A Pyro model seen as a function of one flat vector per chain.

    Args:
        model: the model; a tilted one enters without its log Z.
        args: its arguments.
        kwargs: its keyword arguments.
        independent: name of the plate whose elements are densities of their own.
        vectorize: ``"plate"``: chains are an outer plate; ``"vmap"``: the model runs as for one chain; ``"auto"``:
            the first of them that serves the model. Discrete sites are summed out, under ``vmap``.
        transforms: site -> transform to unconstrained space, instead of the one that its support has.
        max_plate_nesting: dimensions, from the right, that are left to plates; what they use when ``None``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        independent: str | None = None,
        vectorize: str = "auto",
        transforms: Mapping[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
    ) -> None:
        candidate_ways(vectorize, _WAYS)
        self.model = unnormalized(model)
        self.args, self.kwargs, self.asked = args, kwargs, vectorize
        # The tilt changes no shapes: without it, a bad energy is seen in the density and not here.
        self.base = untilted(self.model)
        trace = prototype_trace(self.base, args, kwargs)
        self.layout = _with_room(Layout.of(trace), max_plate_nesting)
        self.data_dim, self.batch = _independent_plate(trace, independent)
        self.discrete = enumerable_sites(trace)
        if self.discrete and independent is not None:
            raise ValueError(f"discrete sites {self.discrete} are summed over all data: leave independent=None")
        sites = {name: site for name, site in latent_sites(trace).items() if name not in self.discrete}
        self._prior_sites = sites
        self.sites = [describe(name, site, self.data_dim, transforms or {}) for name, site in sites.items()]
        if not self.sites:
            raise ValueError("the model has no continuous latent sample sites: nothing to sample")
        check_posterior(trace)
        self.like = _common([trace.nodes[site.name]["value"] for site in self.sites])
        self.observed = observed_sites(trace)
        self._masks = latent_masks(trace)
        self.filled: list[str] = []
        self._density = self._batched(self.model, self.layout)
        self._measure: Measure | None = None
        self._draws: BatchedModel | None = None
        self._by_way_of: list[str] = []

    def _batched(self, model: Callable[..., Any], layout: Layout, *, prior: bool = False) -> BatchedModel:
        """The model for log probabilities, at points given at all its latent sites."""
        if self.discrete:
            given = (model, self.args, self.kwargs)
            return summed_out(*given, vectorize=self.asked, layout=layout, sites=self.discrete, prior=prior)
        keep = () if self.data_dim is None else (self.data_dim,)
        return BatchedModel(
            model, self.args, self.kwargs, vectorize=self.asked, ways=_WAYS, layout=layout, returned=(), keep=keep
        )

    @property
    def vectorize(self) -> str:
        """The way the model is run for many chains: ``"plate"`` or ``"vmap"``; ``"auto"`` before it was found."""
        return self._density.way or self.asked

    @property
    def dim(self) -> int:
        """Length of one point."""
        return sum(site.size for site in self.sites)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Site -> shape of its part of a point: unconstrained, of one element of the independent plate."""
        return {
            site.name: site.unconstrained_shape if site.data_axis is None else torch.Size([site.size])
            for site in self.sites
        }

    def proposal(self, guide: Callable[..., Any] | None) -> ModelTarget:
        """The same points under another distribution: the guide's, or, without one, the untilted prior's."""
        other = copy.copy(self)
        other._measure = functools.partial(_drawn, idle=self._idle())
        if guide is None:
            remedy = 'give guide=, or start elsewhere: method="chees" starts uniformly'
            check_drawable(self._prior_sites, "this method", remedy)
            other.model = poutine.block(self.base, hide_fn=is_observed)
            other._density = self._batched(self.base if self.discrete else other.model, self.layout, prior=True)
            other._density.way = self._density.way  # part of what was checked
            layout = self.layout
        else:
            proposed = prototype_trace(guide, self.args, self.kwargs)
            check_proposes([site.name for site in self.sites], proposed)
            other._by_way_of = by_way_of_others([site.name for site in self.sites], proposed)
            if not other._by_way_of:
                check_supports({site.name: site.support for site in self.sites}, proposed)
            other.model, layout = guide, Layout.of(proposed)
            other._masks = {}
            other._density = self._batched(guide, layout)
            other.choose_way()
        # Draws need no gradients: what cannot be drawn under vmap (gamma numbers) is drawn in a loop.
        ways = (*candidate_ways(self.asked, _WAYS), "loop")
        names = [site.name for site in self.sites]
        other._draws = BatchedModel(other.model, self.args, self.kwargs, ways=ways, layout=layout, returned=names)
        return other

    def check_has_density(self) -> None:
        """A proposal must have a density that can be computed at any point.

        Raises:
            ValueError: naming the sites of a guide whose values come from other draws (an autoguide's).
        """
        if self._by_way_of:
            raise ValueError(
                f"the guide computes the site(s) {self._by_way_of} from other draws, as Pyro's autoguides do: its "
                f"density at a given point is not known, which a path from it needs; leave guide=None, write the guide "
                f'by hand, or start chains from it (method="chees", init="guide")'
            )

    def _fill(self) -> None:
        """Give entries that are masked, and that nothing depends on, their prior: without it they would drift away."""
        self.filled = sorted(self._idle())
        if self.filled:
            way = self._density.way
            self.model, self.base = filled(self.model, self.filled), filled(self.base, self.filled)
            self._density = self._batched(self.model, self.layout)
            self._density.way = way
            self._masks = {name: mask for name, mask in self._masks.items() if name not in self.filled}

    def _check_flat(self, u: Tensor) -> None:
        """Of entries without a prior the rest of the model must depend on each."""
        flat = [site.name for site in self.sites if site.flat or site.name in self._masks]
        if not flat:
            return
        with torch.enable_grad(), forked_rng(0):
            u = u.detach().requires_grad_()
            total = torch.stack([each.sum() for each in self._site_log_probs(self._unpack(u)[0]).values()]).sum()
            grad = torch.autograd.grad(total, u)[0] if total.requires_grad else torch.zeros_like(u)
        unknown = (grad == 0).flatten(0, -2).all(0)
        for site, part in zip(self.sites, unknown.split([site.size for site in self.sites]), strict=True):
            if site.name in flat:
                check_known(site, part)

    def _idle(self) -> dict[str, Tensor]:
        """Masks on latent sites that hide what nothing depends on."""
        if not self._masks:
            return {}
        with torch.no_grad(), forked_rng(0), evaluation_mode(self.model):
            values, _ = self._unpack(torch.randn(_FEW, *self.batch, self.dim).to(self.like))
            masks = {name: mask for name, mask in self._masks.items() if name in values}
            return idle_masks(masks, self.layout.event_dims, values, lambda given: self._density.run(given).total)

    @functools.cached_property
    def periodic(self) -> Tensor | None:
        """Which coordinates of a point are angles, (dim,); None where none is."""
        flags = [flag for site in self.sites for flag in [site.periodic] * site.size]
        found = torch.tensor(flags, device=self.like.device)
        return found if bool(found.any()) else None

    def rewound(self, u: Tensor) -> Tensor:
        """The same points with angles between -pi and pi."""
        return u if self.periodic is None else torch.where(self.periodic, Wrapped()(u), u)

    @property
    def drawn_by(self) -> str:
        """The way in which draws of a proposal are made; ``"loop"`` is slow."""
        assert self._draws is not None
        with evaluation_mode(self.model):
            return self._draws.way or self._draws.choose()

    @torch.no_grad()
    def draw(self, num_draws: int) -> Tensor:
        """Points (num_draws, *batch, dim) from this distribution, a proposal: torch's global generator."""
        assert self._draws is not None  # LogDensity.draw says so of others
        with evaluation_mode(self.model):
            return self.unconstrain(self._draws.run(num=num_draws).values)

    def log_prob(self, u: Tensor) -> Tensor:
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        values, log_jacobian = self._unpack(u.reshape(-1, *u.shape[len(lead) :]))
        logs = self._site_log_probs(values)
        total = torch.stack(list(logs.values())).sum(0) + log_jacobian
        return total.reshape(lead + self.batch)

    def _site_log_probs(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log probability of every site, (chains, *batch)."""
        with evaluation_mode(self.model):
            logs = self._density.run(values, measure=self._measure).measured
        return {name: each.expand(len(each), *self.batch) for name, each in logs.items()}

    def _unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_jacobian = {}, u.new_zeros(u.shape[:-1])
        for site, part in zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True):
            flat = to_site(part, site)
            values[site.name] = site.transform(flat).to(site.dtype)
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

    def choose_way(self) -> None:
        """Find the way to run the model for many chains.

        Raises:
            DoesNotBroadcast: where there is none, or not the one asked for.
            ValueError: a support that depends on other sites; independent data that are not.
        """
        generator = torch.Generator().manual_seed(0)

        @torch.no_grad()
        def points(attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
            u = 0.5 * torch.randn((2, *self.batch, self.dim), generator=generator, dtype=self.like.dtype, device="cpu")
            values, _ = self._unpack(u.to(self.like.device))
            for row in (1, 0):
                self._check_supports({name: value[row] for name, value in values.items()})
            return u.to(self.like.device), values

        u, values = until_numbers_hold(points)
        with torch.no_grad():
            self._density.choose(values)
        self._fill()
        self._check_flat(u)
        if self.batch.numel() > 1:
            self._check_independent(u)

    def _check_supports(self, values: Mapping[str, Tensor]) -> None:
        """Elsewhere, the sites must have the supports that their transforms were made for."""
        if self._measure is not None:  # of a guide: compared before
            return
        with evaluation_mode(self.model), pyro.validation_enabled(False), forked_rng(0):  # discrete sites are drawn
            conditioned = poutine.condition(self.model, data=dict(values))
            trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
        for site in self.sites:
            check_support(site, trace.nodes[site.name]["fn"], values[site.name])

    @torch.no_grad()
    def _check_independent(self, u: Tensor) -> None:
        """Moving the first element of the plate must leave the log probabilities of the others alone."""
        moved = torch.stack([u[0], torch.cat([u[1, :1], u[0, 1:]])])
        for name, (before, after) in self._site_log_probs(self._unpack(moved)[0]).items():
            if not torch.allclose(after[1:], before[1:], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"independent= names a plate whose elements depend on each other through site {name!r}; "
                    f"leave independent=None"
                )


def _with_room(layout: Layout, max_plate_nesting: int | None) -> Layout:
    return dataclasses.replace(layout, depth=max(layout.depth, max_plate_nesting or 0))


def _common(values: list[Tensor]) -> Tensor:
    """An empty tensor of the dtype that holds all values."""
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return values[0].new_empty(0, dtype=dtype)


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if tuple(value.shape[value.ndim - len(shape) :]) != tuple(shape):
        raise ValueError(
            f"{name} must have shape (*chains{''.join(f', {n}' for n in shape)}), got {tuple(value.shape)}"
        )


def _drawn(name: str, site: Mapping[str, Any], *, idle: Mapping[str, Tensor]) -> Tensor:
    """Log density of the draws at a site of a proposal."""
    return drawn_log_prob(site, idle.get(name))


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
