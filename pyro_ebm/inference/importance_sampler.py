"""Weighted draws of a model and guide pair: by Pyro's vectorized sampler, or with the same weights where it fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_ebm.inference.density.model_target import check_proposes
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import (
    BatchedModel,
    Layout,
    check_no_subsampling,
    is_observed,
    keep_dims,
    latent_sites,
    nothing,
    observed_sites,
    padded_shape,
    prototype_trace,
    sample_sites,
    scaled_log_prob,
    slowest,
    subsampling_scale,
    unnormalized,
    untilted,
)

__all__ = ["ImportanceSampler", "site_log_probs"]

_FEW = 8  # draws on which the ways to run model and guide are tried


class ImportanceSampler:
    """One model and guide pair, ready to draw from.

    Args:
        model: the target; a tilted one enters without its log Z.
        guide: proposes every latent site; None proposes from the untilted prior.
        args: arguments of both.
        kwargs: likewise.
        vectorize: as in :func:`importance`.
        per_datum: one weight for each datum in the plate at dim -1, those in a subsampled plate counting once.

    Raises:
        ValueError: no latent sites, or a guide that lacks one.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        vectorize: str = "auto",
        per_datum: bool = False,
    ) -> None:
        self.model = unnormalized(model)
        base = untilted(self.model)
        self.guide = poutine.block(base, hide_fn=is_observed) if guide is None else guide
        self.args, self.kwargs, self.of_prior, self.per_datum = args, kwargs, guide is None, per_datum
        # The tilt changes no shapes: without it, a bad energy is seen in the weights and not here.
        trace = prototype_trace(base, args, kwargs)
        if not per_datum:
            check_no_subsampling(trace)
        self.layout, self.observed = Layout.of(trace), observed_sites(trace)
        self.sites = list(latent_sites(trace))
        if not self.sites:
            raise ValueError("the model has no latent sample sites: nothing to sample")
        proposed = self.layout
        if guide is not None:
            guide_trace = prototype_trace(guide, args, kwargs)
            check_proposes(self.sites, guide_trace)
            proposed = Layout.of(guide_trace)
        keep = (-1,) if per_datum else ()
        options: dict[str, Any] = {"vectorize": vectorize, "keep": keep}
        self.proposal = BatchedModel(self.guide, args, kwargs, layout=proposed, returned=self.sites, **options)
        self.joint = BatchedModel(self.model, args, kwargs, layout=self.layout, returned=(), **options)

    @property
    def way(self) -> str:
        """How the draws are made and weighed: ``"plate"``, ``"vmap"`` or ``"loop"``."""
        return slowest(self.proposal.way or "loop", self.joint.way or "loop")

    def choose_ways(self, like: ImportanceSampler | None = None) -> None:
        """Find how model and guide are run for many draws, or take it from a sampler of the same pair.

        Raises:
            DoesNotBroadcast: where the one way asked for serves not both.
        """
        if like is not None:
            self.proposal.way, self.joint.way = like.proposal.way, like.joint.way
            return
        self.proposal.choose()
        with forked_rng(0), torch.no_grad(), poutine.block(), evaluation_mode(self.model, self.guide):
            few = self.proposal.run(num=_FEW, measure=nothing).values
        self.joint.choose(few)

    def draw(self, num_samples: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Log weights (num_samples,), values by site, and the model's log density (num_samples,).

        Per datum, weights and log density are (num_samples, n).
        """
        if self.way == "plate":
            return self._draw_by_pyro(num_samples)
        measure = _per_datum_log_prob if self.per_datum else None
        with evaluation_mode(self.model, self.guide):
            proposed = self.proposal.run(num=num_samples, measure=measure)
            joint = self.joint.run(proposed.values, measure=measure).total
        return joint - proposed.total, proposed.values, joint

    def _draw_by_pyro(self, num_samples: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        depth, shapes = self.layout.depth, self.layout.shapes
        # Infinite and NaN weights are reported once, with their cause, and not by each site.
        with evaluation_mode(self.model, self.guide), pyro.validation_enabled(False):
            # Bound, since an argument of theirs may be called num_samples.
            model, guide = (functools.partial(each, *self.args, **self.kwargs) for each in (self.model, self.guide))
            log_weights, model_trace, guide_trace = vectorized_importance_weights(
                model, guide, num_samples=num_samples, max_plate_nesting=depth, normalized=False
            )
        values = {}
        for name in self.sites:
            padded = padded_shape(shapes[name], self.layout.event_dims[name], depth)
            values[name] = model_trace.nodes[name]["value"].expand(num_samples, *padded)
            values[name] = values[name].reshape(num_samples, *shapes[name])
        keep = (-depth - 1, -1) if self.per_datum else (-depth - 1,)
        log_prob = site_log_probs(model_trace, keep, per_datum=self.per_datum)
        if self.per_datum:
            log_weights = log_prob - site_log_probs(guide_trace, keep, per_datum=True)
            return log_weights, values, log_prob
        return log_weights.reshape(num_samples), values, log_prob.expand(num_samples)


def site_log_probs(trace: poutine.Trace, keep: tuple[int, ...], *, per_datum: bool = False) -> Tensor:
    """Sum of all sites' log probabilities, over all dims but those kept.

    With ``per_datum``, data in a subsampled plate count once, not for the data that are not there too.
    """
    logs = [
        keep_dims(site["log_prob"], keep) / (subsampling_scale(site) if per_datum else 1.0)
        for site in sample_sites(trace).values()
    ]
    return sum(logs[1:], start=logs[0])


def _per_datum_log_prob(name: str, site: Mapping[str, Any]) -> Tensor:
    return scaled_log_prob(site) / subsampling_scale(site)
