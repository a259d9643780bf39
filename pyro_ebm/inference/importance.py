"""Importance sampling on Pyro's vectorized sampler: weighted draws, and log likelihoods with their errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.checks import whole_number
from pyro_ebm.display import describe_log_likelihood, log_likelihood_as_html
from pyro_ebm.errors import report
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng, random_stream
from pyro_ebm.structure import (
    DoesNotBroadcast,
    Failure,
    is_observed,
    keep_dims,
    latent_sites,
    observed_sites,
    padded_shape,
    plate_depth,
    prototype_trace,
)
from pyro_ebm.thresholds import pareto_k_limit
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["LogLikelihood", "importance", "log_likelihood", "posterior_draws"]

_CHUNK = 4096


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


@passes_keywords()
def importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *args: Any,
    num_samples: int = 10_000,
    seed: int | None = None,
    strict: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Draws:
    r"""Self-normalized importance sampling: draws of the guide, weighted by ``p(z, x) / q(z)``.

    A tilted model enters without its own log Z, so ``draws.log_z`` estimates
    ``log int exp(-E) p(z, x) dz``: for an unconditioned model log Z itself.

    Args:
        model: a Pyro model that broadcasts over an outer plate and has static structure.
        guide: proposes every latent site; ``None`` proposes from the model's own (untilted) prior.
        *args: arguments of model and guide.
        num_samples: draws.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        strict: raise instead of warn when the weights cannot be trusted.
        model_kwargs: keyword arguments of model and guide, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        One chain of ``num_samples`` draws with normalized ``log_weights``, ``log_z`` with its standard
        error, ``pareto_k`` and ``notes["ess"]``. Trust the weights up to k = 0.7 (less with few draws: 0.5 with 100).

    Raises:
        ValueError: no latent sites, a guide that lacks one, or a model that does not broadcast.
        InferenceError: with ``strict``, where an :class:`InferenceWarning` would be given.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto Smoothed Importance Sampling.
    """
    whole_number("num_samples", num_samples, at_least=2)
    start = time.perf_counter()
    sampler = _Importance(model, guide, args, dict(model_kwargs or {}))
    sampler.check_broadcast()
    with random_stream(seed), torch.no_grad():
        chunks = [sampler.draw(min(_CHUNK, num_samples - k)) for k in range(0, num_samples, _CHUNK)]
    log_weights = torch.cat([chunk[0] for chunk in chunks])
    values = {site: torch.cat([chunk[1][site] for chunk in chunks])[None] for site in chunks[0][1]}
    log_z = importance_estimate(log_weights)
    normalized, k, problem = _judge(log_weights)
    report(problem, strict=strict)
    seconds = time.perf_counter() - start
    return Draws(
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
            "num_samples": num_samples,
        },
    )


class _Importance:
    """One model and guide pair, ready to draw from."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model = model.unnormalized() if isinstance(model, TiltedModel) else model
        base = self.model.base_model if isinstance(self.model, TiltedModel) else self.model
        self.guide = poutine.block(base, hide_fn=is_observed) if guide is None else guide
        self.args, self.kwargs = args, kwargs
        # The tilt changes no shapes: without it, a bad energy is seen in the weights and not here.
        trace = prototype_trace(base, args, kwargs)
        proposal = trace if guide is None else prototype_trace(guide, args, kwargs)
        self.depth = plate_depth(trace)
        self.shapes = {name: site["value"].shape for name, site in latent_sites(trace).items()}
        self.event_dims = {name: len(site["fn"].event_shape) for name, site in latent_sites(trace).items()}
        self.observed = observed_sites(trace)
        plates = [site for site in trace.nodes.values() if "cond_indep_stack" in site]
        self.subsampled = any(_subsampling_scale(site) != 1 for site in plates)
        if not self.shapes:
            raise ValueError("the model has no latent sample sites: nothing to sample")
        proposed = latent_sites(proposal)
        missing = [site for site in self.shapes if site not in proposed]
        if missing:
            raise ValueError(
                f"guide does not propose the latent site(s) {missing} (it has {sorted(proposed)}); "
                f"every latent site of the model needs a proposal"
            )

    @torch.no_grad()
    def check_broadcast(self) -> None:
        """Two draws at once must have the log densities that each has alone: a sum over all axes goes unnoticed."""
        if self.subsampled:
            return  # another part of the data each time
        with forked_rng(0), evaluation_mode(self.model, self.guide), pyro.validation_enabled(False):
            _, values, together = self.draw(2)
            for row in range(2):
                law = poutine.condition(self.model, data={site: value[row] for site, value in values.items()})
                trace = poutine.trace(law).get_trace(*self.args, **self.kwargs)
                trace.compute_log_prob()
                alone = site_log_probs(trace, (-self.depth - 1,)).squeeze()
                if not torch.allclose(together[row], alone, rtol=1e-3, atol=1e-3, equal_nan=True):
                    reason = "it gives other log probabilities for two draws at once than for each alone"
                    raise DoesNotBroadcast([Failure("plate", None, reason)], self.depth)

    def traces(self, num_samples: int) -> tuple[Tensor, poutine.Trace, poutine.Trace]:
        # Infinite and NaN weights are reported once, with their cause, and not by each site.
        quiet = pyro.settings.context(
            validate_distributions_pyro=False, validate_distributions_torch=False, validate_poutine=False
        )
        with evaluation_mode(self.model, self.guide), quiet:
            return vectorized_importance_weights(
                self.model,
                self.guide,
                *self.args,
                num_samples=num_samples,
                max_plate_nesting=self.depth,
                normalized=False,
                **self.kwargs,
            )

    def draw(self, num_samples: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Log weights (num_samples,), values by site, and the model's log density (num_samples,)."""
        log_weights, model_trace, _ = self.traces(num_samples)
        values = {}
        for name, shape in self.shapes.items():
            value = model_trace.nodes[name]["value"]
            padded = padded_shape(shape, self.event_dims[name], self.depth)
            values[name] = value.expand(num_samples, *padded).reshape(num_samples, *shape)
        log_prob = site_log_probs(model_trace, (-self.depth - 1,))
        return log_weights.reshape(num_samples), values, log_prob.expand(num_samples)


def site_log_probs(trace: poutine.Trace, keep: tuple[int, ...], *, per_datum: bool = False) -> Tensor:
    """Sum of all sites' log probabilities, over all dims but those kept.

    With ``per_datum``, data in a subsampled plate count once, not for the data that are not there too.
    """
    logs = [
        keep_dims(site["log_prob"], keep) / (_subsampling_scale(site) if per_datum else 1.0)
        for site in trace.nodes.values()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]
    return sum(logs[1:], start=logs[0])


def _subsampling_scale(site: Mapping[str, Any]) -> float:
    return math.prod((frame.full_size or frame.size) / frame.size for frame in site["cond_indep_stack"])


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
    if k <= (limit := pareto_k_limit(len(log_weights))):
        return normalized, k, None
    return normalized, k, (
        f"importance weights are not reliable: Pareto k = {k:.2f} > {limit:.2g}, effective sample size "
        f"{float(importance_ess(normalized)):.1f} of {len(log_weights)}; the target is far from the proposal "
        f"(or its energy is unbounded below): draw more, give a better guide, or use MCMC"
    )


def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    *,
    num_samples: int = 1000,
    log_z: Estimate | None = None,
    seed: int | None = None,
    batch_size: int = 100,
) -> LogLikelihood:
    r"""Importance-weighted estimate of ``log p(x_i)`` for each datum.

    ``log 1/K sum_k p(x_i, z_k) / q(z_k | x_i)``, ``z_k ~ q``; for a tilted model minus its log Z,
    whose error is added in quadrature. Before log Z is taken off, below the truth in expectation, closing as K
    grows; too small a log Z (a tilt that draws of its base miss) makes it too high.

    Args:
        model: takes ``x``; all its sites lie in one plate at dim -1, along the data.
        guide: proposes the latent sites given ``x``.
        x: (n, *event).
        num_samples: draws per datum, K.
        log_z: log Z of the tilt and its error, where better known than from 100,000 draws of the base: what
            ``log_normalizer(..., method="ais")`` returns.
        seed: a number for the same answer twice.
        batch_size: data per pass, to bound memory.

    Returns:
        ``value``, ``se``, ``pareto_k``, ``ess``, ``log_z_se``, each (n,); ``.mean()`` over the data counts the error
        of log Z once.

    Raises:
        ValueError: a model that does not fit the description; ``log_z`` of one without a tilt, or not finite.

    Warns:
        InferenceWarning: a log Z that draws of the base cannot tell; give ``log_z=`` then.

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
    """
    whole_number("num_samples", num_samples, at_least=2)
    _check_log_z(model, log_z)
    with random_stream(seed), torch.no_grad(), evaluation_mode(model, guide):
        parts = [_data_draws(model, guide, rows, num_samples)[1] for rows in x.split(batch_size)]
        log_weights = torch.cat(parts, 1)
        value, se = importance_estimate(log_weights)
        log_z_se = torch.zeros_like(se)
        if isinstance(model, TiltedModel) and (log_z is not None or model.normalize is not False):
            # A stream of its own: the two errors are added as independent ones.
            found = log_z
            if found is None:
                found = _log_normalizer(model, x, batch_size, None if seed is None else seed + 1)
            shift, error = (torch.as_tensor(part).to(se) for part in found)
            value, log_z_se = value - shift, error.expand(len(x)).clone()
            se = (se**2 + log_z_se**2).sqrt()
    k = torch.tensor([psis(column)[1] for column in log_weights.T])
    return LogLikelihood(value, se, k, importance_ess(log_weights.T.log_softmax(-1)), log_z_se)


def _check_log_z(model: Callable[..., Any], log_z: Estimate | None) -> None:
    if log_z is None:
        return
    if not isinstance(model, TiltedModel):
        raise ValueError("log_z is given, but the model is not tilted: it is normalized; leave log_z out")
    if isinstance(model.normalize, Tensor):
        raise ValueError("log_z is given twice: by tilt(..., normalize=number) and by log_z=; leave one out")
    if not all(bool(torch.as_tensor(part).isfinite().all()) for part in log_z):
        raise ValueError(f"log_z must be finite with a finite standard error, got {tuple(map(float, log_z))}")


def _log_normalizer(model: TiltedModel, x: Tensor, batch_size: int, seed: int | None) -> Estimate:
    """Log Z of the tilt: the number the user gave, one for all data, or one per datum."""
    if isinstance(model.normalize, Tensor):
        return Estimate(model.normalize, torch.zeros(()))
    if model.structure(x).is_pooled(list(model.energies)):
        return model.log_normalizer(x, num_samples=100_000, seed=seed)
    rows = x.split(batch_size)  # draws times data: bounded as the weights are
    parts = [model.log_normalizer(part, num_samples=10_000, seed=seed) for part in rows]
    expanded = [[t.expand(len(part)) for t in found] for part, found in zip(rows, parts, strict=True)]
    return Estimate(*(torch.cat(column) for column in zip(*expanded, strict=True)))


def posterior_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    *,
    num_samples: int,
    seed: int | None = None,
    batch_size: int = 100,
) -> tuple[dict[str, Tensor], Tensor]:
    """Weighted posterior draws of each datum on its own, from the guide.

    Args:
        model: takes ``x``; all its sites lie in one plate at dim -1, along the data.
        guide: proposes the latent sites given ``x``.
        x: (n, *event).
        num_samples: draws per datum.
        seed: a number for the same draws twice.
        batch_size: data per pass, to bound memory.

    Returns:
        site -> values (n, num_samples, *site_event), and log weights (n, num_samples) normalized per datum.
    """
    with random_stream(seed), torch.no_grad():
        parts = [_data_draws(model, guide, rows, num_samples) for rows in x.split(batch_size)]
    log_weights = torch.cat([weights for _, weights in parts], 1).T.log_softmax(-1)
    values = {site: torch.cat([v[site] for v, _ in parts], 1).transpose(0, 1) for site in parts[0][0]}
    return {site: value.contiguous() for site, value in values.items()}, log_weights.contiguous()


def _data_draws(
    model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, num_samples: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws (num_samples, n, *site_event) by site, and their log importance weights (num_samples, n)."""
    sampler = _Importance(model, guide, (x,), {})
    if sampler.depth != 1:
        raise ValueError(
            f"the data must lie in one plate at dim -1, one row of x each, but the model has {sampler.depth} "
            f"nested plates"
        )
    outside = [site for site, shape in sampler.shapes.items() if len(shape) == sampler.event_dims[site]]
    if outside:
        raise ValueError(
            f"the latent site(s) {outside} lie outside the plate of the data and are shared by all data: one "
            f"datum has no posterior of its own; condition the model on them"
        )
    values: dict[str, list[Tensor]] = {site: [] for site in sampler.shapes}
    weights = []
    chunk = max(_CHUNK * 4 // len(x), 1)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        _, model_trace, guide_trace = sampler.traces(size)
        parts = site_log_probs(model_trace, (-2, -1), per_datum=True)
        parts = parts - site_log_probs(guide_trace, (-2, -1), per_datum=True)
        weights.append(parts.expand(size, len(x)))
        for site in values:
            values[site].append(model_trace.nodes[site]["value"])
    return {site: torch.cat(chunks) for site, chunks in values.items()}, torch.cat(weights)
