"""One front door to the samplers."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributions import Distribution

from pyro_ebm.annotations import checked
from pyro_ebm.deadline import check_seconds
from pyro_ebm.entry import entry
from pyro_ebm.inference.annealing.smc import SMC
from pyro_ebm.inference.annealing.tempering import Annealing
from pyro_ebm.inference.auto import auto
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.chains.pyro_kernels import pyro_hmc, pyro_nuts
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import importance
from pyro_ebm.inference.kernels.hmc import ChEES
from pyro_ebm.inference.kernels.kernel import Kernel
from pyro_ebm.inference.kernels.langevin import MALA, ULA
from pyro_ebm.inference.until import Target, importance_until, run_until
from pyro_ebm.keywords import passes_keywords

__all__ = ["METHODS", "sample"]

_KERNELS: dict[str, type[Kernel]] = {"chees": ChEES, "mala": MALA, "ula": ULA}
_CHAINS = {"snis": 4, "nuts": 4, "hmc": 4, "smc": 8}  # the others: 64, a batch that costs little more than one
# Arguments of the methods' own functions that sample() itself gives.
_GIVEN = {"model", "model_kwargs", "target", "args", "kwargs", "guide", "num_samples", "num_chains", "seed"}
_GIVEN |= {"began", "disable_progbar"}
_OF_SAMPLE = {"method", "guide", "num_samples", "num_chains", "ess", "max_seconds", "seed", "progress"}
_ANNEALING = {field.name for field in dataclasses.fields(Annealing)} - {"guide"}
METHODS = ("auto", "snis", "nuts", "hmc", *_KERNELS, "smc")


def _options_of(given: Mapping[str, Any]) -> tuple[str, frozenset[str], frozenset[str]]:
    """What to call the method in errors, its options, and those of all methods."""
    method = given.get("method", "auto")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    return f'method="{method}"', frozenset(_known(method) | _OF_SAMPLE), frozenset().union(*map(_known, METHODS))


@entry(gradients=True)
@passes_keywords(_options_of)
@checked
def sample(
    model: Callable[..., Any],
    *args: Any,
    method: str = "auto",
    guide: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    num_chains: int | None = None,
    ess: float | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Draws:
    """Sample a model's latent sites by the named method.

    ========  ==============================================================================================
    method    what runs
    ========  ==============================================================================================
    auto      importance sampling, kept if k < 0.5 and the ESS asked for is reached; else SMC into ChEES
    snis      :func:`importance`, ``num_samples * num_chains`` weighted draws
    nuts      Pyro's NUTS, chains one after another
    hmc       Pyro's HMC, chains one after another
    chees     :class:`ChEES`, chains as one batch
    mala      :class:`MALA`, chains as one batch
    ula       :class:`ULA`, chains as one batch; biased
    smc       :class:`SMC`, ``num_chains`` islands of ``num_samples`` weighted particles
    ========  ==============================================================================================

    Args:
        model: a Pyro model, tilted or not; for batched chains and SMC a distribution or :class:`LogDensity` too.
        *args: its arguments. Arrays and tables (numpy, pandas) stay as they are where the model runs on them; where it
            does not, they become tensors, floating-point ones in torch's default dtype.
        method: one of the table.
        guide: proposal for importance sampling, and for the starting points of chains.
        num_samples: draws per chain, 1,000 by default; with ``ess`` and with ``"auto"`` the most that may be drawn.
        num_chains: 64 for batched chains, 8 islands of SMC, 4 elsewhere by default.
        ess: sample until every component of every site has this bulk ESS and the chains agree (R-hat; importance
            sampling: until the weights are worth so many draws), or a limit is spent;
            ``notes["stopped"]`` says which. Not for nuts, hmc and smc. For ``"auto"`` 1,000 by default.
        max_seconds: the limit of time, whatever the method; 60 by default with ``ess`` and with ``"auto"``. What was
            done by then is returned, with a warning; a warm-up may take two thirds of the time.
        seed: a number for the same draws twice; ``None`` uses the global generator. (What time stops is not
            the same twice.)
        model_kwargs: the model's keyword arguments, whatever their names.
        **options: the model's keyword arguments where no option has their name, and further options: the arguments of
            the method's own function or classes; ``progress`` everywhere.

    Returns:
        Draws; the same type whatever the method. ``notes`` holds what was done, and, for ``"auto"``, why.

    Raises:
        ValueError: unknown method, impossible counts, or ``ess`` with a method that cannot go on.
        InferenceError: ``max_seconds`` were spent before there was any draw.
        TypeError: a keyword that neither method nor model has, or that both have where ``model_kwargs`` is missing; a
            model of the wrong kind.
    """
    if isinstance(model, LogDensity | Distribution) and method not in (*_KERNELS, "smc"):
        raise TypeError(
            f'model must be a Pyro model for method="{method}", got {type(model).__name__}; sample it in a model, '
            f"pyro.sample(name, distribution), or use one of {(*_KERNELS, 'smc')}"
        )
    began = time.perf_counter()
    check_seconds(max_seconds)
    kwargs = dict(model_kwargs or {})
    target = _target(method, ess, max_seconds, num_samples)
    if method == "auto":
        return auto(model, guide, target, args, kwargs, num_chains=num_chains, seed=seed, began=began, **options)  # type: ignore[arg-type]
    if target is not None and method in ("nuts", "hmc", "smc"):
        raise ValueError(
            f'ess= needs a method that can go on: "auto", "snis", "chees", "mala" or "ula", got method={method!r}; '
            f"give num_samples="
        )
    limited = num_samples is not None
    num_samples = 1000 if num_samples is None else num_samples
    num_chains = _CHAINS.get(method, 64) if num_chains is None else num_chains
    if method == "snis":
        total = num_samples * num_chains
        options.pop("progress", None)
        if target is None:
            options |= {"num_samples": total, "max_seconds": max_seconds}
            return importance(model, guide, *args, seed=seed, model_kwargs=kwargs, **options)
        target = dataclasses.replace(target, max_draws=total if limited else None)
        return importance_until(model, guide, target, args, kwargs, seed=seed, began=began, **options)
    if method in ("nuts", "hmc"):
        sampler = pyro_nuts if method == "nuts" else pyro_hmc
        shared: dict[str, Any] = {"guide": guide, "num_samples": num_samples, "num_chains": num_chains}
        return sampler(model, *args, seed=seed, max_seconds=max_seconds, model_kwargs=kwargs, **shared, **options)
    if method == "smc":
        sizes = {"particles_per_island": num_samples, "num_islands": num_chains}
        return _smc(model, guide, options, seed=seed, max_seconds=max_seconds, **sizes).run(*args, **kwargs)
    settings: dict[str, Any] = {"num_samples": num_samples, "num_chains": num_chains, "guide": guide, "seed": seed}
    mcmc = _mcmc(method, model, options, max_seconds=None if target else max_seconds, **settings)
    draws = mcmc.run(*args, **kwargs) if target is None else run_until(mcmc, target, args, kwargs, began=began)
    if not draws.values:  # MCMC lets such a model pass, as Pyro does
        raise ValueError("the model has no latent sample sites: nothing to sample")
    return draws


def _target(method: str, ess: float | None, max_seconds: float | None, num_samples: int | None) -> Target | None:
    if ess is None and method != "auto":
        return None
    return Target(
        1000.0 if ess is None else ess,
        max_seconds=60.0 if max_seconds is None else max_seconds,
        max_draws=num_samples,
    )


def _mcmc(method: str, model: Callable[..., Any], options: dict[str, Any], **settings: Any) -> MCMC:
    """The kernel of the method with its options, and the runner with the others."""
    kernel = _KERNELS[method]
    fields = _kernel_options(kernel)
    of_kernel = {name: value for name, value in options.items() if name in fields}
    of_runner = {name: value for name, value in options.items() if name not in fields}
    return MCMC(kernel(model, **of_kernel), **settings, **of_runner)


def _smc(
    model: Callable[..., Any], guide: Callable[..., Any] | None, options: dict[str, Any], **settings: Any
) -> SMC:
    """SMC with its own options, and those of where particles start and how they move."""
    shared = {name: value for name, value in options.items() if name in _ANNEALING}
    own = {name: value for name, value in options.items() if name not in _ANNEALING}
    return SMC(model, annealing=Annealing(guide=guide, **shared), **settings, **own)


def _kernel_options(kernel: type[Kernel]) -> set[str]:
    return {field.name for field in dataclasses.fields(kernel)} - {"model", "potential_fn"}


def _known(method: str) -> set[str]:
    """The options of a method beyond those that all have."""
    if method in _KERNELS:
        return _kernel_options(_KERNELS[method]) | _arguments(MCMC) - {"kernel", "unknown"}
    if method == "snis":
        return {"strict", "vectorize"}  # importance() would pass others on to the model
    if method == "smc":
        return (_arguments(SMC) | _ANNEALING) - {"annealing", "particles_per_island", "num_islands"}
    functions: dict[str, Callable[..., Any]] = {"auto": auto, "nuts": pyro_nuts, "hmc": pyro_hmc}
    return _arguments(functions[method])


def _arguments(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - _GIVEN
