"""Where batched chains start: resampled importance draws, draws of a prior or guide, uniform or given points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.errors import InputError
from pyro_ebm.inference.chains.arguments import as_params, check_names
from pyro_ebm.inference.chains.report import listed
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.density.strategy import points_by_strategy
from pyro_ebm.inference.resampling import apart, tempered
from pyro_ebm.randomness import forked_rng

__all__ = ["CHAIN_INITS", "LEAST_WORTH", "chain_starts", "given_starts"]

CHAIN_INITS = ("importance", "prior", "guide", "uniform")
LEAST_WORTH = 32  # draws that the weights of starting points are worth: tempered, where the posterior is narrow
_POOL = 2000
_LEAST_POOL = 128
_CHUNK = 4096
_TRIES = 20


@torch.no_grad()
def chain_starts(
    density: LogDensity,
    num_chains: int,
    *,
    init: str | Mapping[str, Tensor] | Callable[..., Any] = "importance",
    guide: Callable[..., Any] | None = None,
    seed: int = 0,
) -> tuple[Tensor, str]:
    """One starting point a chain.

    Args:
        density: the target.
        num_chains: how many points.
        init: ``"importance"``: draws of the guide (the prior without one), resampled by their weights; where few
            draws hold the weight it is tempered, so that starts lie apart and reach each mode that the draws reach;
            ``"prior"`` or ``"guide"``: draws of it; ``"uniform"``: between -2 and 2 in unconstrained space;
            one of ``pyro.infer.autoguide.init_to_*``; or values by site, (num_chains, *site_shape). A density
            without a model starts uniformly.
        guide: for ``"importance"`` and ``"guide"``.
        seed: of the random stream.

    Returns:
        Points (num_chains, *batch, dim), and the name of the rule that gave them.

    Raises:
        ValueError: unknown rule, values of the wrong shape, or a density that is zero or not finite at the
            points of some chains.
    """
    if isinstance(init, Mapping):
        points = _from_values(density, as_params(init, "init"), num_chains)
        return given_starts(density, num_chains, points, guide=guide), "given"
    if callable(init):
        with forked_rng(seed):
            points = _redrawn(density, num_chains, lambda n: points_by_strategy(density, n, init))
        _check_finite(density, points, "given", guide)
        return points, getattr(init, "__name__", "init_strategy")
    if init not in CHAIN_INITS:
        raise ValueError(f"init must be one of {CHAIN_INITS} or a mapping of values by site, got {init!r}")
    if init == "guide" and guide is None:
        raise ValueError('init="guide" needs a guide: pass guide=, or use init="importance"')
    with forked_rng(seed):
        points, rule = _by_rule(density, num_chains, init, guide)
    _check_finite(density, points, rule, guide)
    return points, rule


@torch.no_grad()
def given_starts(
    density: LogDensity, num_chains: int, u: Tensor, *, guide: Callable[..., Any] | None = None
) -> Tensor:
    """The points, after a look at their shape and at the density there."""
    expected = (num_chains, *density.batch, density.dim)
    if tuple(u.shape) != expected:
        raise ValueError(f"initial_params must be points of shape {expected}, one row a chain, got {tuple(u.shape)}")
    u = u.detach().to(density.like)
    _check_finite(density, u, "given", guide)
    return u


def _by_rule(
    density: LogDensity, num_chains: int, init: str, guide: Callable[..., Any] | None
) -> tuple[Tensor, str]:
    if density.target is None or init == "uniform":
        return _redrawn(density, num_chains, lambda n: _uniform(density, n)), "uniform"
    if init == "importance":
        try:
            points = _resampled(density, num_chains, guide)
        except NotImplementedError:  # a prior that cannot be drawn from, as an improper one
            return _redrawn(density, num_chains, lambda n: _uniform(density, n)), "uniform"
        if points is not None:
            return points, "importance"
    proposal = density.proposal(guide if init in ("guide", "importance") else None)
    points = _redrawn(density, num_chains, proposal.draw)
    if init == "importance" and not bool(density(points).isfinite().all()):  # as of a prior with its mass at the edge
        elsewhere = _redrawn(density, num_chains, lambda n: _uniform(density, n))
        if bool(density(elsewhere).isfinite().all()):
            return elsewhere, "uniform"
    return points, "prior" if init == "importance" else init


def _from_values(density: LogDensity, values: Mapping[str, Tensor], num_chains: int) -> Tensor:
    if density.target is not None:
        check_names("init", values.keys() - density.target.layout.shapes, density.shapes)  # others may be there
    for name, value in values.items():
        if value.ndim == 0 or len(value) != num_chains:
            raise ValueError(f"init[{name!r}] must have {num_chains} rows, one a chain, got shape {tuple(value.shape)}")
    return density.unconstrain(values)


def _resampled(density: LogDensity, num_chains: int, guide: Callable[..., Any] | None) -> Tensor | None:
    """Importance draws; None where none has positive density."""
    proposal = density.proposal(guide)
    copies = density.batch.numel()
    slow = proposal.target is not None and proposal.target.drawn_by == "loop"
    pool = max(0 if slow else _POOL // copies, _LEAST_POOL, num_chains)
    chunk = max(_CHUNK // copies, 1)
    points = torch.cat([proposal.draw(min(chunk, pool - start)) for start in range(0, pool, chunk)])
    log_weights = torch.cat([density(part) - proposal(part) for part in points.split(chunk)])
    log_weights = torch.where(log_weights.isfinite(), log_weights, -torch.inf).reshape(pool, copies)
    if not bool(log_weights.isfinite().any(0).all()):
        return None
    log_weights = tempered(log_weights, min(LEAST_WORTH, pool // 4))
    points = points.reshape(pool, copies, -1)
    index = apart(points, log_weights, num_chains)
    columns = torch.arange(copies, device=index.device)
    return points[index, columns].reshape(num_chains, *density.batch, density.dim)


def _uniform(density: LogDensity, num: int) -> Tensor:
    shape = (num, *density.batch, density.dim)
    return (4 * torch.rand(shape, dtype=density.like.dtype) - 2).to(density.like.device)


def _redrawn(density: LogDensity, num_chains: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Draws; those at which the density is zero or not finite are drawn anew, some times."""
    points = draw(num_chains)
    for _ in range(_TRIES):
        bad = ~density(points).isfinite()
        if not bool(bad.any()):
            break
        points = torch.where(bad[..., None], draw(num_chains), points)
    return points


def _check_finite(density: LogDensity, points: Tensor, rule: str, guide: Callable[..., Any] | None) -> None:
    bad = ~density(points).isfinite()
    if not bool(bad.any()):
        return
    chains = listed(bad.reshape(len(bad), -1).any(1))
    where = f" (data {listed(bad.any(0))})" if bad.ndim > 1 else ""
    working = _working_rules(density, len(points), rule, guide)
    remedy = (
        f"start elsewhere: {' or '.join(working)} works here"
        if working
        else "no other way to start works either: check the model, its data and its energy"
    )
    how = "as given" if rule == "given" else f"found by init={rule!r}"
    raise InputError(
        f"the density is zero or not finite at the starting points of chain(s) {chains}{where}, {how}; {remedy}"
    )


def _working_rules(density: LogDensity, num: int, failed: str, guide: Callable[..., Any] | None) -> list[str]:
    rules = ["uniform"] if density.target is None else ["importance", "prior", "uniform"]
    working = []
    for rule in rules:
        if rule == failed:
            continue
        with forked_rng(0):
            points, found = _by_rule(density, num, rule, guide)
        if found == rule and bool(density(points).isfinite().all()):
            working.append(f'init="{rule}"')
    return working
