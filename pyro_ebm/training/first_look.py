"""What fit sees of a loss before it trains: what a minibatch counts for, and whether its rows are data of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure import leaf_of, model_structure
from pyro_ebm.training.minibatch import Parts, Survey, num_data_of, survey
from pyro_ebm.training.objective import Objective
from pyro_ebm.training.sources import Source, is_weighted

__all__ = ["first_look"]

_ROUNDING = 1e-4  # of a sum of log densities in single precision, relative

_NAMED = 4  # sites in a message


def first_look(
    losses: Sequence[Objective], source: Source, train_on: Source, judge_on: Source | None, *,
    batch_size: int, judged_size: int, found: list[nn.Module], seed: int,
) -> Survey:  # fmt: skip
    """See what the losses do with a minibatch; what makes its parameters when first called, as autoguides, does.

    Args:
        losses: one for each group that learns.
        source: all data, those held apart included.
        train_on: those to train on.
        judge_on: those to validate on.
        batch_size: data per minibatch.
        judged_size: of validation.
        found: the modules behind model and guide.
        seed: of the noise.

    Raises:
        ValueError: a loss that cannot be taken of minibatches as the training has them.

    Warns:
        TrainingWarning: what a minibatch cannot stand for.
    """
    num, batch, weighted = train_on.num_data(), train_on.first(batch_size), is_weighted(train_on)
    whole = judge_on is None and num == num_data_of(batch)
    rest = [] if num is None or not num % num_data_of(batch) else [train_on.first(num % num_data_of(batch))]
    judged = [] if judge_on is None else [judge_on.first(judged_size)]
    parts = Parts(batch, (*rest, *judged), lambda: source.first(source.num_data() or 1)).without_weights(weighted)
    surveys = []
    for loss in {id(loss): loss for loss in losses}.values():
        state = loss.state()
        surveys.append(survey(loss.visit, parts, found, num_data=num, whole=whole, weighted=weighted, seed=seed))
        loss.load_state(state)
    first = surveys[0]
    first.params = list(dict.fromkeys(name for each in surveys for name in each.params))
    _tell_unshared(first, num)
    if not whole and num_data_of(parts.batch) > 2:
        _tell_coupled(losses[0], parts.batch, first, found, seed)
    return first


def _tell_unshared(seen: Survey, num: int | None) -> None:
    if seen.unshared:
        warn_user(
            f"the sites {seen.unshared} belong to all data, but nobody knows how many data a stream has: they count "
            "in full with each of its minibatches; give the model's plate its size, pyro.plate(name, size, "
            "subsample_size=len(x))",
            TrainingWarning,
        )
    if seen.plate is not None and num is not None and seen.shares.full_size != num:
        warn_user(
            f"plate {seen.plate!r} of the model has {seen.shares.full_size} data, training has {num} (validation= "
            "holds some apart): what is learned is as sure as all of the plate's data would make it",
            TrainingWarning,
        )


def _tell_coupled(
    loss: Objective, batch: tuple[Tensor, ...], seen: Survey, found: Sequence[nn.Module], seed: int
) -> None:
    """Say where the density of a row depends on other rows: minibatches, which are drawn at random, part them."""
    try:
        with forked_rng(seed), torch.no_grad(), poutine.block(), evaluation_mode(*found):
            sites = _coupled(loss, batch, seen)
    except Exception:  # a loss that does not run the model as it is says nothing about rows
        return
    if sites:
        more = f" and {len(sites) - _NAMED} more" if len(sites) > _NAMED else ""
        warn_user(
            f"the density of the site(s) {sites[:_NAMED]}{more} in one row depends on other rows, but minibatches and "
            f"validation take rows at random and part them: what is learned is another model. Give all rows in one "
            f"batch, in their order: batch_size=len(x), validation=None; or make each datum a whole sequence",
            TrainingWarning,
        )


def _coupled(loss: Objective, batch: tuple[Tensor, ...], seen: Survey) -> list[str]:
    model, guide = loss.args
    numbered = seen.last_row
    if numbered:
        before = seen.inside - numbered
        ancestors = model_structure(model, batch, {}).ancestors
        found = [name for name in sorted(numbered) if ancestors.get(name, frozenset()) & before]
        if found:
            return found
    drawn = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(*batch))).get_trace(*batch)
    joint = [name for name, site in drawn.nodes.items() if name in seen.inside and _is_joint(site, len(batch[0]))]
    return joint or _ordered(model, batch, drawn, seen)


def _is_joint(site: dict[str, Any], num: int) -> bool:
    """Whether all rows have one density that is no product."""
    return site["type"] == "sample" and num in leaf_of(site["fn"]).event_shape


def _ordered(model: Any, batch: tuple[Tensor, ...], drawn: Any, seen: Survey) -> list[str]:
    """Observed or latent sites whose density is another one where all rows stand in reverse order."""
    before = torch.get_rng_state()
    same = poutine.trace(poutine.replay(model, drawn)).get_trace(*batch)
    if not torch.equal(before, torch.get_rng_state()):
        return []  # noise that is no site
    turned = drawn.copy()
    for name, site in drawn.nodes.items():
        if site["type"] == "sample" and name in seen.inside and not site["is_observed"]:
            axes = [axis for axis, size in enumerate(site["value"].shape) if size == len(batch[0])]
            if len(axes) != 1:
                return []
            turned.nodes[name]["value"] = site["value"].flip(axes)
    other = poutine.trace(poutine.replay(model, turned)).get_trace(*(part.flip(0) for part in batch))
    for trace in (same, other):
        trace.compute_log_prob()
    names = [n for n, site in same.nodes.items() if site["type"] == "sample" and n in seen.inside and n in other.nodes]
    totals = [(n, same.nodes[n]["log_prob"].double(), other.nodes[n]["log_prob"].double()) for n in names]
    moved = {n: (float(here.sum() - there.sum()), _ROUNDING * float(here.abs().sum())) for n, here, there in totals}
    if abs(sum(change for change, _ in moved.values())) <= sum(rounding for _, rounding in moved.values()):
        return []
    return [name for name, (change, rounding) in moved.items() if abs(change) > rounding]
