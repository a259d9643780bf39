"""Importance sampling on Pyro's vectorized sampler: weighted draws, and log likelihoods with their errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import as_tensors
from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import limited
from pyro_ebm.display import describe_log_likelihood, log_likelihood_as_html
from pyro_ebm.entry import entry
from pyro_ebm.errors import interruption_told, report, warn_user
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.inference.importance_sampler import CHUNK, ImportanceSampler, drawn_in_time, early_text
from pyro_ebm.keywords import passes_keywords, sorted_keywords
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import random_stream
from pyro_ebm.structure import Layout, TiltedCall, tilted_call
from pyro_ebm.thresholds import least_ess, weights_problem
from pyro_ebm.training.inputs import row_batches

__all__ = ["LogLikelihood", "importance", "log_likelihood", "posterior_draws", "weighed"]

Data = Any  # a tensor, an array, a table; several in a tuple or a dict; a Dataset, a DataLoader
Call = tuple[tuple[Any, ...], dict[str, Any]]
_FEWEST_PER_DATUM = 10.0  # effective draws: a value that is uncertain by a third of a nat
_NO_GUIDE = (
    "log_likelihood(model, guide, x) proposes the latent sites of each datum from a guide, got {} for guide. Without "
    "one: to_arviz(sample(model, x)) holds the log likelihood of each datum at each draw (az.loo, az.compare); "
    "importance(model, None, x).log_z is that of all data together"
)


class LogLikelihood(NamedTuple):
    """Log likelihood of each datum with its errors.

    Args:
        value: (n,)
        se: (n,) standard error, that of log Z included.
        pareto_k: (n,) of the weights of each datum; do not trust its value above 0.7 (0.67 with 1,000 draws).
        ess: (n,) effective sample size of the same weights.
        log_z_se: (n,) the part of ``se`` that comes from log Z: one error that all data share. Zero without a tilt.
    """

    value: Tensor
    se: Tensor
    pareto_k: Tensor
    ess: Tensor
    log_z_se: Tensor

    def mean(self) -> Estimate:
        """Mean over the data, with its Monte Carlo error: it falls with n but for that of log Z."""
        own = (self.se**2 - self.log_z_se**2).clamp(min=0).sum().sqrt() / len(self.se)
        return Estimate(self.value.mean(), (own**2 + self.log_z_se.mean() ** 2).sqrt())

    def __repr__(self) -> str:
        return describe_log_likelihood(self)

    def _repr_html_(self) -> str:
        return log_likelihood_as_html(self)


@entry()
@passes_keywords()
@checked
def importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *args: Any,
    num_samples: int = 10_000,
    max_seconds: float | None = None,
    seed: int | None = None,
    strict: bool = False,
    vectorize: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Draws:
    r"""Self-normalized importance sampling: draws of the guide, weighted by ``p(z, x) / q(z)``.

    A tilted model enters without its own log Z, so ``draws.log_z`` estimates
    ``log int exp(-E) p(z, x) dz``: for an unconditioned model log Z itself.

    Args:
        model: a Pyro model that has the same sites in each run.
        guide: proposes every latent site; ``None`` proposes from the model's own (untilted) prior.
        *args: arguments of model and guide.
        num_samples: draws.
        max_seconds: when so much time is spent, return the draws so far, with a warning; ``None``: no limit.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        strict: raise instead of warn when the weights cannot be trusted.
        vectorize: how model and guide are run for many draws: ``"plate"`` (an outer plate), ``"vmap"``, ``"loop"``,
            or ``"auto"``, the first of them that gives what each draw gives alone. ``notes["vectorize"]`` says which.
        model_kwargs: keyword arguments of model and guide, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        One chain of ``num_samples`` draws (fewer after Ctrl-C or ``max_seconds``, with a warning) with normalized
        ``log_weights``, ``log_z`` with its standard error, ``pareto_k`` and ``notes["ess"]``. Trust the weights up to
        k = 0.7 (less with few draws: 0.5 with 100).

    Raises:
        DoesNotBroadcast: where the one way asked for does not serve the model.
        ValueError: no latent sites, or a guide that lacks one.
        InferenceError: with ``strict``, where an :class:`InferenceWarning` would be given.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto Smoothed Importance Sampling.
    """
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "vectorize": vectorize}
    with limited(max_seconds):
        draws, problem = weighed(model, guide, args, dict(model_kwargs or {}), **options)
    told = filter(None, [early_text(draws.notes, num_samples), problem])
    # An early end alone is no reason to throw the draws away.
    report("; ".join(told), strict=strict and problem is not None)
    return draws


def weighed(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int | None,
    vectorize: str = "auto",
) -> tuple[Draws, str | None]:
    """What :func:`importance` returns, and what it warns of: for those who go on where the weights will not do."""
    whole_number("num_samples", num_samples, at_least=2)
    start = time.perf_counter()
    told = interruption_told("interrupted before any draws were made and weighed: there are no draws yet")
    with told, random_stream(seed), torch.no_grad():
        sampler = ImportanceSampler(model, guide, args, kwargs, vectorize=vectorize)
        sampler.choose_ways()
        chunks, stopped = drawn_in_time(sampler, num_samples)
    log_weights = torch.cat([chunk[0] for chunk in chunks])
    values = {site: torch.cat([chunk[1][site] for chunk in chunks])[None] for site in chunks[0][1]}
    log_z = importance_estimate(log_weights)
    normalized, k, problem = _judge(log_weights)
    seconds = time.perf_counter() - start
    draws = Draws(
        values=values,
        method="snis",
        stats={"lp": torch.cat([chunk[2] for chunk in chunks])[None]},
        log_weights=normalized[None],
        log_z=Estimate(*(float(x) for x in log_z)),  # type: ignore[arg-type]
        pareto_k=k,
        observed=sampler.observed,
        source=Source(model, args, sampler.kwargs),
        num_gradients=0,
        seconds=seconds,
        sampling_seconds=seconds,
        notes={
            "ess": float(importance_ess(normalized)),
            "proposal": "prior" if guide is None else "guide",
            "num_samples": len(log_weights),
            "vectorize": sampler.way,
            "interrupted": stopped == "interrupted",
            **({} if stopped is None else {"stopped": stopped}),
        },
    )
    return draws, problem


def _judge(log_weights: Tensor) -> tuple[Tensor, float, str | None]:
    """Normalized log weights, their Pareto k, and what is wrong with them in words (or None)."""
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bool((log_weights == -math.inf).all()):
        return torch.full_like(log_weights, math.nan), math.inf, (
            f"all {len(log_weights)} importance weights are zero: no draw of the proposal has positive "
            f"density under the model; give a guide that reaches the target, or check the energy (is it +inf "
            f"everywhere?)"
        )
    if bool(bad.any()):
        usable = torch.where(log_weights.isnan(), -math.inf, log_weights).clamp(max=1e30)
        normalized = usable.double().log_softmax(-1).to(log_weights.dtype)
        return normalized, math.inf, (
            f"importance weights are not finite for {int(bad.sum())} of {len(log_weights)} draws: the energy "
            f"is unbounded below or returns NaN; bound the energy, or check the model"
        )
    normalized = log_weights.log_softmax(-1)
    _, k = psis(log_weights)
    problem = weights_problem(k, float(importance_ess(normalized)), len(log_weights))
    if not problem:
        return normalized, k, None
    return normalized, k, (
        f"importance weights are not reliable: {problem}; the target is far from the proposal (or its energy is "
        f"unbounded below): draw more, give a better guide, or use MCMC"
    )


@entry()
@checked
def log_likelihood(
    model: Callable[..., Any],
    guide: Any,
    x: Data = None,
    *,
    num_samples: int = 1000,
    log_z: Estimate | None = None,
    seed: int | None = None,
    batch_size: int = 100,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    r"""Importance-weighted estimate of ``log p(x_i)`` for each datum.

    ``log 1/K sum_k p(x_i, z_k) / q(z_k | x_i)``, ``z_k ~ q``; for a tilted model minus its log Z,
    whose error is added in quadrature. Before log Z is taken off, below the truth in expectation, closing as K
    grows; too small a log Z (a tilt that draws of its base miss) makes it too high.

    Args:
        model: takes ``x``; all its sites lie in one plate at dim -1, along the data.
        guide: proposes the latent sites given ``x``.
        x: (n, *event); several in a tuple, or by the first arguments of model and guide in a dict; a ``Dataset`` or a
            ``DataLoader``. Has to be given.
        num_samples: draws per datum, K.
        log_z: log Z of the tilt and its error, where better known than from 100,000 draws of the base: what
            ``log_normalizer(..., method="ais")`` returns. It is taken off whatever the tilt's ``normalize``.
        seed: a number for the same answer twice.
        batch_size: data per pass, to bound memory; a DataLoader has its own.
        model_kwargs: keyword arguments of model and guide, whatever their names, the same for all data.
        **kwargs: the same, where no option has their name.

    Returns:
        ``value``, ``se``, ``pareto_k``, ``ess``, ``log_z_se``, each (n,); ``.mean()`` over the data counts the error
        of log Z once.

    Raises:
        TypeError: no guide; the text says what there is for a model without one.
        ValueError: a model that does not fit the description; ``log_z`` of one without a tilt, or not finite.

    Warns:
        InferenceWarning: data whose draws are worth fewer than ten; a log Z that draws of the base cannot tell (give
            ``log_z=`` then).

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
    """
    whole_number("num_samples", num_samples, at_least=2)
    if x is None or not callable(guide):
        raise TypeError(_NO_GUIDE.format(type(guide).__name__))
    calls = _calls("log_likelihood()", model, guide, x, batch_size, kwargs, model_kwargs)
    call = tilted_call(model, *calls[0])
    _check_log_z(call, log_z)
    with random_stream(seed), torch.no_grad(), evaluation_mode(model, guide):
        log_weights = torch.cat([weights for _, weights in _data_draws(model, guide, calls, num_samples)], 1)
        value, se = importance_estimate(log_weights)
        log_z_se = torch.zeros_like(se)
        if call is not None:  # with normalize=False too: without log Z it is no likelihood
            # A stream of its own: the two errors are added as independent ones.
            found = log_z
            if found is None:
                found = _log_normalizer(model, calls, None if seed is None else seed + 1)
            shift, error = (torch.as_tensor(part).to(se) for part in found)
            value, log_z_se = value - shift, error.expand(len(se)).clone()
            se = (se**2 + log_z_se**2).sqrt()
    k = torch.tensor([psis(column)[1] for column in log_weights.T], device=se.device)
    ess = importance_ess(log_weights.T)
    few = ess < min(_FEWEST_PER_DATUM, least_ess(num_samples))
    if bool(few.any()):
        warn_user(
            f"log_likelihood: the draws of {int(few.sum())} of {len(few)} data are worth next to nothing (effective "
            f"sample size {float(ess.min()):.1f} of {num_samples} for datum {int(ess.argmin())}): their values are too "
            f"low by an unknown amount; draw more (num_samples), or train the guide on"
        )
    return LogLikelihood(value, se, k, ess, log_z_se)


def _check_log_z(call: TiltedCall | None, log_z: Estimate | None) -> None:
    if log_z is None:
        return
    if call is None:
        raise ValueError("log_z is given, but the model is not tilted: it is normalized; leave log_z out")
    if isinstance(call.tilted.normalize, Tensor):
        raise ValueError("log_z is given twice: by tilt(..., normalize=number) and by log_z=; leave one out")
    if not all(bool(torch.as_tensor(part).isfinite().all()) for part in log_z):
        raise ValueError(f"log_z must be finite with a finite standard error, got {tuple(map(float, log_z))}")


def _calls(
    owner: str, model: Any, guide: Any, data: Data, batch_size: int,
    kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any] | None,
) -> list[Call]:  # fmt: skip
    """What model and guide are called with, for some data after the other."""
    batches = list(row_batches("x", data, batch_size, model, guide))
    options = frozenset({"num_samples", "log_z", "seed", "batch_size"})
    _, bound = sorted_keywords(owner, model, len(batches[0]), options, kwargs, model_kwargs)
    num = sum(len(batch[0]) for batch in batches)
    for name, value in bound.items():
        if num > 1 and len(getattr(value, "shape", ())) and value.shape[0] == num:
            raise ValueError(
                f"{name} has a row for each of the {num} data: give it with them, in a tuple or a dict by the model's "
                f"arguments; what is the same for all data can be bound to the model with functools.partial"
            )
    return [(batch, as_tensors(bound)) for batch in batches]


def _log_normalizer(model: Callable[..., Any], calls: Sequence[Call], seed: int | None) -> Estimate:
    """Log Z of the tilt: the number the user gave, one for all data, or one per datum."""

    def log_z(call: Call, num_samples: int) -> Estimate:
        inner = tilted_call(model, *call)
        assert inner is not None
        return inner.tilted.log_normalizer(
            *inner.args, num_samples=num_samples, seed=seed, model_kwargs=inner.kwargs
        )

    call = tilted_call(model, *calls[0])
    assert call is not None
    if isinstance(call.tilted.normalize, Tensor):
        return Estimate(call.tilted.normalize, torch.zeros(()))
    if call.tilted.structure(*call.args, **call.kwargs).is_pooled(list(call.tilted.energies)):
        return log_z(calls[0], 100_000)
    parts = [log_z(each, 10_000) for each in calls]  # draws times data: bounded as the weights are
    expanded = [[t.expand(len(rows[0])) for t in found] for (rows, _), found in zip(calls, parts, strict=True)]
    return Estimate(*(torch.cat(column) for column in zip(*expanded, strict=True)))


@entry()
@checked
def posterior_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Data,
    *,
    num_samples: int,
    seed: int | None = None,
    batch_size: int = 100,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Weighted posterior draws of each datum on its own, from the guide.

    Args:
        model: takes ``x``; all its sites lie in one plate at dim -1, along the data.
        guide: proposes the latent sites given ``x``.
        x: (n, *event), or several, as in :func:`log_likelihood`.
        num_samples: draws per datum.
        seed: a number for the same draws twice.
        batch_size: data per pass, to bound memory; a DataLoader has its own.
        model_kwargs: keyword arguments of model and guide, whatever their names, the same for all data.
        **kwargs: the same, where no option has their name.

    Returns:
        site -> values (n, num_samples, *site_event), and log weights (n, num_samples) normalized per datum.
    """
    calls = _calls("posterior_draws()", model, guide, x, batch_size, kwargs, model_kwargs)
    with random_stream(seed), torch.no_grad():
        parts = list(_data_draws(model, guide, calls, num_samples))
    log_weights = torch.cat([weights for _, weights in parts], 1).T.log_softmax(-1)
    values = {site: torch.cat([v[site] for v, _ in parts], 1).transpose(0, 1) for site in parts[0][0]}
    return {site: value.contiguous() for site, value in values.items()}, log_weights.contiguous()


def _data_draws(
    model: Callable[..., Any], guide: Callable[..., Any], calls: Sequence[Call], num_samples: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """For some data after the other: draws (num_samples, n, *site_event) by site, log weights (num_samples, n)."""
    first = None
    for args, kwargs in calls:
        num = len(args[0])
        sampler = ImportanceSampler(model, guide, args, kwargs, per_datum=True)
        _check_one_plate(sampler.layout, sampler.sites)
        sampler.choose_ways(like=first)
        first = first or sampler
        values: dict[str, list[Tensor]] = {site: [] for site in sampler.sites}
        weights = []
        chunk = max(CHUNK * 4 // num, 1)
        for start in range(0, num_samples, chunk):
            size = min(chunk, num_samples - start)
            log_weights, drawn, _ = sampler.draw(size)
            weights.append(log_weights.expand(size, num))
            for site in values:
                values[site].append(drawn[site])
        yield {site: torch.cat(chunks) for site, chunks in values.items()}, torch.cat(weights)


def _check_one_plate(layout: Layout, sites: list[str]) -> None:
    if layout.depth != 1:
        raise ValueError(
            f"the data must lie in one plate at dim -1, one row of x each, but the model has {layout.depth} "
            f"nested plates"
        )
    outside = [site for site in sites if len(layout.shapes[site]) == layout.event_dims[site]]
    if outside:
        raise ValueError(
            f"the latent site(s) {outside} lie outside the plate of the data and are shared by all data: one "
            f"datum has no posterior of its own; condition the model on them"
        )
