"""The method that chooses: importance sampling where it is good enough, else SMC into ChEES."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.devices import synchronize
from pyro_ebm.errors import InferenceError, InferenceWarning
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.annealing.smc import SMC
from pyro_ebm.inference.annealing.tempering import Annealing
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.chains.pyro_kernels import pyro_nuts
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.kernels.hmc import ChEES
from pyro_ebm.inference.until import Target, importance_until, judged, reported, run_until
from pyro_ebm.randomness import fingerprint, random_seed
from pyro_ebm.structure import check_no_subsampling, prototype_trace, untilted
from pyro_ebm.thresholds import MIN_STARTS

__all__ = ["auto"]

_MAX_K = 0.5
_WARMUP = 200
_PARTICLES, _ISLANDS = 512, 4
_EVALUATIONS = 300  # of all particles, what an ordinary run of SMC costs
_CHAINS = 64
# With many independent targets fewer chains each: the work is theirs in all.
_POINTS = 1024
_LEAST_CHAINS, _LEAST_PARTICLES = 8, 64


def auto(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_chains: int | None,
    seed: int | None,
    began: float,
    progress: bool = True,
    strict: bool = False,
    independent: str | None = None,
    vectorize: str = "auto",
    compile: bool = False,
) -> Draws:
    """Importance sampling if its Pareto k is below 0.5 and it reaches the ESS; else SMC, whose particles start ChEES.

    ``notes["auto"]`` lists what was tried and why it was kept or not. A model with discrete latent sites, or
    one that neither an outer plate nor vmap serves, goes to Pyro's NUTS. Importance sampling may take a quarter of the
    time allowed, SMC about half of what is left; the warm-up of chains is not cut short, and NUTS not at all.
    """
    check_no_subsampling(prototype_trace(untilted(model), args, kwargs))
    steps: list[str] = []
    seed = random_seed(seed, None)
    if independent is None:
        share = replace(target, max_seconds=target.max_seconds / 4, max_k=_MAX_K)
        if target.max_draws is not None:
            share = replace(share, max_draws=target.max_draws * (num_chains or _CHAINS))
        options: dict[str, Any] = {"seed": seed, "began": began, "vectorize": vectorize}
        draws = _try_importance(steps, model, guide, share, args, kwargs, **options)
        if draws is not None:
            return _with_steps(draws, steps)
    else:
        steps.append(f"snis: not tried (one set of weights cannot serve all of independent={independent!r})")
    try:
        density = LogDensity.from_model(model, *args, independent=independent, vectorize=vectorize, model_kwargs=kwargs)
    except ValueError as error:
        if independent is not None or vectorize != "auto":
            raise
        steps.append(f"batched chains: not possible ({error}); Pyro's NUTS instead, whatever time it takes")
        draws = pyro_nuts(
            model, *args, guide=guide, seed=seed, progress=progress, strict=strict, model_kwargs=kwargs,
            num_samples=target.max_draws or 1000, num_chains=num_chains or 4,
        )  # fmt: skip
        draws = replace(draws, notes={**draws.notes, **judged(draws.values, target)})
        steps.append(_chains_text(draws))
        return reported(_with_steps(draws, steps), target, strict=strict)
    targets = density.batch.numel()
    chains = max(min(_CHAINS, _POINTS // targets), _LEAST_CHAINS) if num_chains is None else num_chains
    left = max(target.max_seconds - (time.perf_counter() - began), 0.0)
    smc = _smc(steps, density, guide, chains, left / 2, seed=seed, progress=progress, compile=compile)
    mcmc = MCMC(
        ChEES(density),
        num_samples=target.max_draws or 1000,
        warmup_steps=_WARMUP,
        initial_params=smc.points,
        num_chains=chains,
        guide=guide,
        seed=seed,
        compile=compile,
        progress=progress,
        strict=strict,
    )
    draws = run_until(mcmc, target, (), {}, began=began)
    steps.append(_chains_text(draws))
    return replace(
        _with_steps(draws, steps),
        log_z=smc.log_z,
        num_gradients=(draws.num_gradients or 0) + smc.num_gradients,
        seconds=time.perf_counter() - began,
    )


def _with_steps(draws: Draws, steps: list[str]) -> Draws:
    return replace(draws, notes={**draws.notes, "auto": steps})


def _chains_text(draws: Draws) -> str:
    found = draws.notes
    starts = "the particles" if found["init"] == "given" else f"{found['init']} starts"
    reasons = {"target": "as asked for", "max_seconds": "no time left", "num_samples": "no more draws allowed"}
    return (
        f"{draws.method}: {draws.num_chains} chains of {draws.num_draws} draws from {starts}; bulk ESS "
        f"{found['ess']:.0f}, R-hat {found['r_hat']:.3f}: {reasons.get(found['stopped'], found['stopped'])}"
    )


def _try_importance(
    steps: list[str],
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    target: Target,
    args: Any,
    kwargs: Any,
    **options: Any,
) -> Draws | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)  # judged here
        try:
            draws = importance_until(model, guide, target, args, kwargs, **options)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            steps.append(f"snis: not possible ({type(error).__name__}: {str(error).splitlines()[0]})")
            return None
    k, ess = draws.pareto_k, draws.notes["ess"]
    found = f"snis: Pareto k {k:.2f}, ESS {ess:.0f} of {draws.num_draws} draws"
    if draws.notes["stopped"] == "target" and k is not None and k < _MAX_K:
        steps.append(f"{found}: kept (k < {_MAX_K}, ESS >= {target.ess:g})")
        return draws
    reason = f"k >= {_MAX_K}" if k is None or not k < _MAX_K else f"ESS < {target.ess:g}"
    steps.append(f"{found}: not kept ({reason})")
    return None


class _Smc(NamedTuple):
    """Starting points for the chains; None where SMC failed or was left out."""

    points: Tensor | None = None
    log_z: Estimate | None = None
    num_gradients: int = 0


def _smc(
    steps: list[str], density: LogDensity, guide: Callable[..., Any] | None, num_chains: int, seconds: float, *,
    seed: int, progress: bool, compile: bool,
) -> _Smc:  # fmt: skip
    share = _PARTICLES * 8 // density.batch.numel()
    least = max(_LEAST_PARTICLES, -(-num_chains // _ISLANDS))
    particles = _affordable(density, max(min(_PARTICLES, share), least), seconds)
    if particles < least:
        steps.append(f"smc: not tried (about {seconds:.0f} s would not do for {_ISLANDS} islands of {least} particles)")
        return _Smc()
    smc = SMC(
        density, particles_per_island=particles, num_islands=_ISLANDS, seed=seed, progress=progress,
        annealing=Annealing(guide=guide, compile=compile),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InferenceWarning)  # told in the steps, judged by the chains that start there
        try:
            draws = smc.run()
        except InferenceError as error:
            steps.append(f"smc: failed ({error})")
            return _Smc()
    ladder = len(draws.notes["acceptance_per_temperature"])
    found = f"smc: {_ISLANDS} islands of {particles} particles, {ladder} temperatures{_log_z_text(draws)}"
    doubts = [str(each.message).removeprefix("smc: ") for each in caught if each.category is InferenceWarning]
    steps.append("; but ".join([found, *doubts]))
    weights = draws.weights
    generator = torch.Generator(weights.device).manual_seed(fingerprint((), "starts", seed))
    if draws.notes["distinct_starts"] < MIN_STARTS:  # the doubts say so: chains start elsewhere
        return _Smc(None, draws.log_z, draws.num_gradients or 0)
    points = density.unconstrain(draws.resample(num_chains, generator=generator))
    if not bool(density(points).isfinite().all()):  # there and back, numbers near the edge of a support are rounded
        steps.append("smc: its particles lie at the edge of the support, where no chain can start")
        return _Smc(None, draws.log_z, draws.num_gradients or 0)
    return _Smc(points, draws.log_z, draws.num_gradients or 0)


def _affordable(density: LogDensity, particles: int, seconds: float) -> int:
    """So many particles, or fewer where SMC would take longer than the seconds."""
    u = density.like.new_zeros(particles * _ISLANDS, *density.batch, density.dim)
    density.value_and_grad(u[:2])
    synchronize(u.device)
    fastest = math.inf
    for _ in range(3):  # whatever else the machine is busy with slows some of them
        started = time.perf_counter()
        density.value_and_grad(u)
        synchronize(u.device)
        fastest = min(fastest, time.perf_counter() - started)
    expected = _EVALUATIONS * fastest
    return particles if expected <= seconds else int(particles * seconds / expected)


def _log_z_text(draws: Draws) -> str:
    if draws.log_z is None or torch.as_tensor(draws.log_z.value).numel() != 1:
        return ""
    return f", log Z {float(draws.log_z.value):.3f} +- {float(draws.log_z.se):.3f}"
