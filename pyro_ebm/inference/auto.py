"""The method that chooses: importance sampling where it is good enough, else SMC into ChEES."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.deadline import OutOfTime, finishing, limited, time_left
from pyro_ebm.devices import synchronize
from pyro_ebm.errors import ImproperError, InferenceError, InferenceWarning, InputError, report, warn_user
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.annealing.smc import SMC
from pyro_ebm.inference.annealing.tempering import Annealing
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.chains.pyro_kernels import pyro_nuts
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.kernels.hmc import ChEES
from pyro_ebm.inference.resampling import effective
from pyro_ebm.inference.until import Target, importance_until, judged, reported, run_until
from pyro_ebm.randomness import fingerprint, random_seed
from pyro_ebm.structure import DoesNotBroadcast
from pyro_ebm.thresholds import MIN_STARTS

__all__ = ["auto"]

_MAX_K = 0.5
_WARMUP = 200
_PARTICLES, _ISLANDS = 512, 4
_MORE = 8  # times the particles, where they are the answer
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

    ``notes["auto"]`` lists what was tried and why it was kept or not. A model that neither an outer plate nor vmap
    serves goes to Pyro's NUTS, with a warning. Importance sampling may take a quarter of the time allowed, SMC about
    half of what is left, the warm-up of chains two thirds of the rest. A method that fails is noted, and the next one
    tried; what is wrong with the model, its guide or its data (:class:`InputError`) is raised at once. Where chains
    stay apart however long they run, as in several modes, SMC's weighted particles are returned.
    """
    call = _Call(model, guide, args, kwargs, target, random_seed(seed, None), began, progress, strict)
    with limited(target.max_seconds, began=began):
        weighted = None
        if independent is None:
            weighted, kept = call.try_importance(vectorize, num_chains)
            if kept and weighted is not None:
                return call.told(weighted)
        else:
            call.steps.append(f"snis: not tried (one set of weights cannot serve all of independent={independent!r})")
        try:
            return call.by_chains(weighted, num_chains, independent=independent, vectorize=vectorize, compile=compile)
        except OutOfTime as stop:
            if weighted is None:
                raise
            with finishing():
                return call.judged_weights(weighted, f"chains: no time left for draws ({stop or 'before the warm-up'})")


@dataclass
class _Call:
    """One call of :func:`auto`, and the steps so far."""

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Target
    seed: int
    began: float
    progress: bool
    strict: bool
    steps: list[str] = field(default_factory=list)

    def told(self, draws: Draws) -> Draws:
        """The draws with the steps that led to them."""
        return replace(draws, notes={**draws.notes, "auto": self.steps})

    def try_importance(self, vectorize: str, num_chains: int | None) -> tuple[Draws | None, bool]:
        """Weighted draws, and whether they are good enough."""
        share = replace(self.target, max_seconds=self.target.max_seconds / 4, max_k=_MAX_K)
        if share.max_draws is not None:
            share = replace(share, max_draws=share.max_draws * (num_chains or _CHAINS))
        options: dict[str, Any] = {"seed": self.seed, "began": self.began, "vectorize": vectorize}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)  # judged here
            try:
                draws = importance_until(self.model, self.guide, share, self.args, self.kwargs, **options)
            except InputError:
                raise
            except Exception as error:  # whatever it is, another method may do
                self.steps.append(f"snis: not possible ({_in_short(error)})")
                return None, False
        k, ess, stopped = draws.pareto_k, draws.notes["ess"], draws.notes["stopped"]
        found = f"snis: Pareto k {k:.2f}, ESS {ess:.0f} of {draws.num_draws} draws"
        if stopped == "target" and k is not None and k < _MAX_K:
            self.steps.append(f"{found}: kept (k < {_MAX_K}, ESS >= {share.ess:g})")
            return draws, True
        if stopped == "interrupted":
            self.steps.append(f"{found}: interrupted")
            warn_user(f"snis: interrupted after {draws.num_draws} draws, of Pareto k {k:.2f} and an ESS of {ess:.0f}")
            return draws, True
        reason = f"k >= {_MAX_K}" if k is None or not k < _MAX_K else f"ESS < {share.ess:g}"
        self.steps.append(f"{found}: not kept ({reason})")
        return draws, False

    def by_chains(
        self, weighted: Draws | None, num_chains: int | None, *, independent: str | None, vectorize: str, compile: bool
    ) -> Draws:
        """What comes after weights that are not good enough."""
        options: dict[str, Any] = {"independent": independent, "vectorize": vectorize, "model_kwargs": self.kwargs}
        try:
            density = LogDensity.from_model(self.model, *self.args, **options)
        except DoesNotBroadcast as error:
            if independent is not None or vectorize != "auto":
                raise
            return self.one_by_one(f"batched chains: not possible ({error})", num_chains)
        except InputError:
            raise
        except ValueError as error:
            if weighted is None:
                raise
            return self.judged_weights(weighted, f"chains: not possible ({error})")
        return self.batched(density, num_chains, compile=compile, one_by_one=independent is None)

    def particles(self, density: LogDensity, draws: Draws, *, compile: bool) -> Draws:
        """SMC's, more where there is time, as chains that start at them stay where they are."""
        options: dict[str, Any] = {"seed": self.seed, "progress": self.progress, "compile": compile}
        seconds, found = time_left() / 2, draws
        more = _affordable(density, _MORE * draws.num_draws, min(seconds, 1e9))
        if more > draws.num_draws:
            try:
                found, doubts = _annealed(density, self.guide, more, seconds, **options)
                found = draws if doubts else found
            except Exception as error:  # the first ones are there
                self.steps.append(f"smc: more particles: failed ({_in_short(error)})")
        ess = float(effective(found.log_weights.flatten()))  # type: ignore[union-attr]  # SMC's are weighted
        self.steps.append(
            f"chains that stay apart do not know the shares of modes: smc's particles, {_ISLANDS} islands of "
            f"{found.num_draws}{_log_z_text(found)}, do"
        )
        return replace(found, notes={**found.notes, "ess": ess, "stopped": "apart", "target_ess": self.target.ess})

    def judged_weights(self, draws: Draws, reason: str) -> Draws:
        """Weighted draws where no other method gave any, with what is wrong with them."""
        self.steps.append(f"{reason}; the weighted draws are all there is")
        k, ess = draws.pareto_k, draws.notes["ess"]
        found = f"Pareto k {k:.2f}, ESS {ess:.0f} of {draws.num_draws} (asked for {self.target.ess:g})"
        report(f"auto: {reason}; importance sampling alone gave draws: {found}; a guide helps", strict=self.strict)
        return self.told(draws)

    def one_by_one(self, reason: str, num_chains: int | None) -> Draws:
        """Pyro's NUTS."""
        self.steps.append(f"{reason}; Pyro's NUTS instead")
        warn_user(
            f"auto: {reason}; Pyro's NUTS draws one chain after another instead, which is slow, in what is left of "
            f"max_seconds={self.target.max_seconds:g}"
        )
        draws = pyro_nuts(
            self.model, *self.args, guide=self.guide, seed=self.seed, progress=self.progress, strict=self.strict,
            model_kwargs=self.kwargs, num_samples=self.target.max_draws or 1000, num_chains=num_chains or 4,
        )  # fmt: skip
        ended = {} if draws.notes["stopped"] == "num_samples" else {"stopped": draws.notes["stopped"]}
        draws = replace(draws, notes={**draws.notes, **judged(draws.values, self.target), **ended})
        self.steps.append(_chains_text(draws))
        return reported(self.told(draws), self.target, strict=self.strict)

    def batched(self, density: LogDensity, num_chains: int | None, *, compile: bool, one_by_one: bool) -> Draws:
        """SMC, and chains that start at its particles."""
        targets = density.batch.numel()
        chains = max(min(_CHAINS, _POINTS // targets), _LEAST_CHAINS) if num_chains is None else num_chains
        smc = _smc(
            self.steps, density, self.guide, chains, time_left() / 2,
            seed=self.seed, progress=self.progress, compile=compile,
        )  # fmt: skip
        if smc.improper:
            warn_user(f"auto: {self.steps[-1]}; chains, which cannot tell, are tried")
        if smc.interrupted is not None:
            warn_user("smc: interrupted; its particles, weighted to the target in one step, are returned")
            return self.told(smc.interrupted)
        fallback = smc.draws if one_by_one else None  # R-hat of many data is that of the worst
        try:
            mcmc = MCMC(
                ChEES(density),
                num_samples=self.target.max_draws or 1000,
                warmup_steps=_WARMUP,
                initial_params=smc.points,
                num_chains=chains,
                guide=self.guide,
                seed=self.seed,
                compile=compile,
                progress=self.progress,
                strict=self.strict and fallback is None,
            )
            target = replace(self.target, give_up=fallback is not None)
            with warnings.catch_warnings(record=fallback is not None) as caught:
                if fallback is not None:
                    warnings.simplefilter("always", InferenceWarning)  # told below, unless the particles are better
                draws = run_until(mcmc, target, (), {}, began=self.began)
        except (InferenceError, ValueError, TypeError, Warning) as error:  # about the model, or asked for as errors
            error.add_note(f"auto: {'; '.join(self.steps)}")
            raise
        except Exception as error:  # whatever it is, Pyro's own kernel may do
            if not one_by_one or compile:
                raise
            return self.one_by_one(f"chees: failed ({_in_short(error)})", num_chains)
        self.steps.append(_chains_text(draws))
        if draws.notes["stopped"] == "apart" and fallback is not None:
            spent = draws.num_gradients or 0
            draws = self.particles(density, fallback, compile=compile)
            draws = replace(draws, num_gradients=(draws.num_gradients or 0) + spent)
        else:
            for each in caught or ():
                told = issubclass(each.category, InferenceWarning)
                report(str(each.message), strict=self.strict) if told else warn_user(str(each.message), each.category)
        return replace(
            self.told(draws),
            log_z=smc.log_z if draws.log_z is None else draws.log_z,
            num_gradients=(draws.num_gradients or 0) + smc.num_gradients,
            seconds=time.perf_counter() - self.began,
        )


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _chains_text(draws: Draws) -> str:
    found = draws.notes
    starts = "the particles" if found["init"] == "given" else f"{found['init']} starts"
    reasons = {"target": "as asked for", "max_seconds": "no time left", "num_samples": "no more draws allowed"}
    return (
        f"{draws.method}: {draws.num_chains} chains of {draws.num_draws} draws from {starts}; bulk ESS "
        f"{found['ess']:.0f}, R-hat {found['r_hat']:.3f}: {reasons.get(found['stopped'], found['stopped'])}"
    )


class _Smc(NamedTuple):
    """Starting points for the chains; None where SMC failed or was left out; its draws where it had no doubts."""

    points: Tensor | None = None
    log_z: Estimate | None = None
    num_gradients: int = 0
    interrupted: Draws | None = None
    improper: bool = False
    draws: Draws | None = None


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
    try:
        draws, doubts = _annealed(density, guide, particles, seconds, seed=seed, progress=progress, compile=compile)
    except InputError:
        raise
    except ImproperError as error:
        steps.append(f"smc: failed ({error})")
        return _Smc(improper=True)
    except Exception as error:  # chains start elsewhere then
        steps.append(f"smc: failed ({error if isinstance(error, InferenceError) else _in_short(error)})")
        return _Smc()
    if draws.notes["interrupted"]:
        steps.append("smc: interrupted")
        return _Smc(interrupted=draws)
    if draws.notes.get("jump_ess", 1.0) * particles * _ISLANDS < num_chains:
        steps.append(f"smc: no time left ({doubts[-1]})")
        return _Smc(num_gradients=draws.num_gradients or 0)
    ladder = len(draws.notes["acceptance_per_temperature"])
    found = f"smc: {_ISLANDS} islands of {particles} particles, {ladder} temperatures{_log_z_text(draws)}"
    steps.append("; but ".join([found, *doubts]))
    weights = draws.weights
    generator = torch.Generator(weights.device).manual_seed(fingerprint((), "starts", seed))
    if draws.notes["distinct_starts"] < MIN_STARTS:  # the doubts say so: chains start elsewhere
        return _Smc(None, draws.log_z, draws.num_gradients or 0)
    points = density.unconstrain(draws.resample(num_chains, generator=generator))
    if not bool(density(points).isfinite().all()):  # there and back, numbers near the edge of a support are rounded
        steps.append("smc: its particles lie at the edge of the support, where no chain can start")
        return _Smc(None, draws.log_z, draws.num_gradients or 0)
    return _Smc(points, draws.log_z, draws.num_gradients or 0, draws=None if doubts else draws)


def _annealed(
    density: LogDensity, guide: Callable[..., Any] | None, particles: int, seconds: float, *,
    seed: int, progress: bool, compile: bool,
) -> tuple[Draws, list[str]]:  # fmt: skip
    """SMC, and its doubts: told in the steps, judged by the chains that start there."""
    smc = SMC(
        density, particles_per_island=particles, num_islands=_ISLANDS, seed=seed, progress=progress,
        annealing=Annealing(guide=guide, compile=compile),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught, limited(seconds):
        warnings.simplefilter("always", InferenceWarning)
        draws = smc.run()
    return draws, [str(each.message).removeprefix("smc: ") for each in caught if each.category is InferenceWarning]


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
