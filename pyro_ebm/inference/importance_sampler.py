"""Weighted draws of a model and guide pair: the model's joint density over that of the draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.deadline import STOPS, check_time, stopped_by, time_left
from pyro_ebm.inference.density.guides import check_proposes
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import (
    BatchedModel,
    Layout,
    check_drawable,
    check_posterior,
    drawn_log_prob,
    idle_masks,
    is_observed,
    latent_masks,
    latent_sites,
    nothing,
    observed_sites,
    prototype_trace,
    scaled_log_prob,
    slowest,
    subsampling_scale,
    unnormalized,
    untilted,
    within_support,
)

__all__ = ["CHUNK", "ImportanceSampler", "drawn_in_time", "early_text"]

CHUNK = 4096  # draws at once
_FEW = 8  # draws on which the ways to run model and guide are tried
_LOOPS = (4, 64)  # the first chunk, and the largest, where draws are made one after another: a chunk cut off is lost
_TIMED, _SHARE = 16, 0.5  # draws to tell how long they take; share of the time left that a chunk may take


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
            check_posterior(trace)
        self.layout, self.observed = Layout.of(trace), observed_sites(trace)
        self.sites = list(latent_sites(trace))
        if not self.sites and not per_datum:  # log_likelihood of a model without any is exact
            raise ValueError("the model has no latent sample sites: nothing to sample")
        if guide is None:
            check_drawable(latent_sites(trace), "importance sampling", 'give guide=, or use method="chees" or "nuts"')
        proposed = self.layout
        if guide is not None:
            guide_trace = prototype_trace(guide, args, kwargs)
            check_proposes(self.sites, guide_trace)
            proposed = Layout.of(guide_trace)
        self._masks, self._idle = latent_masks(trace), dict[str, Tensor]()
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
        if like is None:
            self.proposal.choose(measure=self._drawn)
        else:
            self.proposal.way, self.joint.way = like.proposal.way, like.joint.way
            if not self._masks:
                return
        with forked_rng(0), torch.no_grad(), poutine.block(), evaluation_mode(self.model, self.guide):
            few = self.proposal.run(num=_FEW, measure=nothing).values
        if like is None:
            self.joint.choose(few, measure=self._counted)
        self._idle = idle_masks(self._masks, self.layout.event_dims, few, self._log_joint)

    @torch.no_grad()
    def _log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        with forked_rng(0), poutine.block(), evaluation_mode(self.model):
            return self.joint.run(values).total

    def _drawn(self, name: str, site: Mapping[str, Any]) -> Tensor:
        """Log density of the proposal's draws at one of its sites, (*batch,)."""
        return drawn_log_prob(site, self._idle.get(name))

    def _counted(self, name: str, site: Mapping[str, Any]) -> Tensor:
        """What a site of the model adds to the log density, (*batch,); per datum each counts once."""
        log_prob = scaled_log_prob(site)
        if self.per_datum:
            log_prob = log_prob / subsampling_scale(site)
        # Draws of the prior lie in their supports.
        return log_prob if self.of_prior or name not in self.sites else within_support(site, log_prob)

    def draw(self, num_samples: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Log weights (num_samples,), values by site, and the model's log density (num_samples,).

        Per datum, weights and log density are (num_samples, n).
        """
        with evaluation_mode(self.model, self.guide):
            if not self.sites:
                joint = self.joint.run(None, 1, measure=self._counted).total.expand(num_samples, -1)
                return joint, {}, joint
            proposed = self.proposal.run(num=num_samples, measure=self._drawn)
            joint = self.joint.run(proposed.values, measure=self._counted).total
        # Where numbers of either failed there is no density, and no draw.
        failed = (joint == -torch.inf) | (proposed.total == -torch.inf)
        log_weights = torch.where(failed, -torch.inf, joint - proposed.total)
        return log_weights, proposed.values, joint


_Chunk = tuple[Tensor, dict[str, Tensor], Tensor]


def drawn_in_time(sampler: ImportanceSampler, num_samples: int) -> tuple[list[_Chunk], str | None]:
    """Draws in pieces, and what ended them early; a piece is at most as large as time allows.

    Raises:
        KeyboardInterrupt: before there were two draws.
        OutOfTime: likewise.
    """
    chunks: list[_Chunk] = []
    size, most = _LOOPS if sampler.way == "loop" else (CHUNK, CHUNK)
    done, pace = 0, 0.0 if sampler.way == "loop" or time_left() == math.inf else _pace(sampler)
    try:
        while done < num_samples:
            fitting = time_left() / pace if pace > 0 else math.inf
            size = int(min(size, num_samples - done, max(_SHARE * fitting, _LOOPS[0])))
            began = time.perf_counter()
            chunks.append(sampler.draw(size))
            pace = (time.perf_counter() - began) / size
            done, size = done + size, min(2 * size, most)
            if done < num_samples:
                check_time()
    except STOPS as stop:
        if done < 2:
            raise
        return chunks, stopped_by(stop)
    return chunks, None


def _pace(sampler: ImportanceSampler) -> float:
    """Seconds a draw takes, from few that are thrown away: a seed gives the same draws with and without a limit."""
    began = time.perf_counter()
    with forked_rng(0):
        sampler.draw(_TIMED)
    return (time.perf_counter() - began) / _TIMED


def early_text(notes: Mapping[str, Any], num_samples: int) -> str | None:
    """What ended the draws before all were made, in words; None where nothing did."""
    if "stopped" not in notes:
        return None
    why = "interrupted" if notes["interrupted"] else "stopped by the limit of time"
    return f"snis: {why} after {notes['num_samples']} of {num_samples} draws"
