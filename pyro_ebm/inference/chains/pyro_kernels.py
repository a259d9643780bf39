"""Pyro's own NUTS and HMC kernels, run through ``pyro.infer.MCMC``, with what they know put on record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import check_seconds, limited, stopped_by, time_left, time_limit
from pyro_ebm.devices import one_thread
from pyro_ebm.entry import entry
from pyro_ebm.errors import interruption_told
from pyro_ebm.inference.chains.recording import (
    CountedPotential,
    RecordedChain,
    distinct_starts,
    largest_part,
    quiet_jit,
    run_chain,
    stacked,
    warmup_note,
)
from pyro_ebm.inference.chains.report import early_text, report_chains
from pyro_ebm.inference.chains.starting_points import StartingPoints
from pyro_ebm.inference.density.prepared import prepared
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.modules import frozen
from pyro_ebm.numerics import until_numbers_hold
from pyro_ebm.randomness import random_stream
from pyro_ebm.structure import (
    latent_sites,
    observed_sites,
    prototype_trace,
    unnormalized,
    untilted,
)

__all__ = ["pyro_hmc", "pyro_nuts"]


@entry(gradients=True)
@passes_keywords()
@checked
def pyro_nuts(
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 4,
    init: str | Mapping[str, Tensor] = "importance",
    guide: Callable[..., Any] | None = None,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    seed: int | None = None,
    keep_warmup: bool = False,
    jit_compile: bool = False,
    max_seconds: float | None = None,
    progress: bool = True,
    strict: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Draws:
    """The no-U-turn sampler of Pyro; chains run one after another in this process.

    A tilted model enters without its log Z, a constant. Ctrl-C returns the draws so far.

    Args:
        model: a Pyro model; discrete latent sites are summed out as Pyro does.
        *args: its arguments.
        num_samples: draws per chain.
        warmup_steps: adaptation steps per chain.
        num_chains: chains.
        init: ``"importance"``: each chain starts at a point resampled from an importance sampler (falls back
            to ``"uniform"`` where that cannot run), which lets chains agree on targets of several
            modes; ``"uniform"``: Pyro's default; or constrained values, site -> (num_chains, *shape).
        guide: proposal for ``init="importance"``; the prior when ``None``.
        target_accept_prob: of the step-size adaptation.
        max_tree_depth: at most ``2 ** max_tree_depth - 1`` leapfrog steps a draw.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        keep_warmup: keep warm-up draws in ``draws.warmup``.
        jit_compile: let Pyro trace the potential with ``torch.jit``.
        max_seconds: stop when so much time is spent, each chain after an equal share of it, of which the warm-up gets
            two thirds at most, with the draws so far and a warning; ``notes["stopped"]`` says so.
        progress: show a progress bar.
        strict: raise instead of warn when the draws cannot be trusted.
        model_kwargs: the model's keyword arguments, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        Draws with stats ``lp``, ``diverging``, ``acceptance_rate``, ``step_size``, ``n_steps``, ``tree_depth``.

    Raises:
        ValueError: impossible counts, an unknown ``init``, initial values of the wrong shape.
        InferenceError: with ``strict``, where an :class:`InferenceWarning` would be given.

    Reference:
        Hoffman and Gelman (2014), The No-U-Turn Sampler.
    """

    def kernel(potential: Callable[..., Any]) -> NUTS:
        return NUTS(
            potential_fn=potential, target_accept_prob=target_accept_prob, max_tree_depth=max_tree_depth
        )

    run = _Run("nuts", kernel, num_samples, warmup_steps, num_chains, seed, keep_warmup, progress, strict, max_seconds)
    return run(model, args, dict(model_kwargs or {}), init=init, guide=guide, jit_compile=jit_compile)


@entry(gradients=True)
@passes_keywords()
@checked
def pyro_hmc(
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 4,
    init: str | Mapping[str, Tensor] = "importance",
    guide: Callable[..., Any] | None = None,
    target_accept_prob: float = 0.9,
    trajectory_length: float = 2.0,
    seed: int | None = None,
    keep_warmup: bool = False,
    jit_compile: bool = False,
    max_seconds: float | None = None,
    progress: bool = True,
    strict: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Draws:
    """Hamiltonian Monte Carlo of Pyro, with trajectories of fixed length.

    The arguments are those of :func:`pyro_nuts`, with ``trajectory_length`` in place of ``max_tree_depth``: step size
    times number of steps, in units of the posterior's scale (after ``pi / 2`` the draws of a Gaussian are
    independent). Pyro rounds the number of steps down, so that a large adapted step means a shorter trajectory:
    hence the higher default of ``target_accept_prob``.

    Returns:
        Draws with stats ``lp``, ``diverging``, ``acceptance_rate``, ``step_size``, ``n_steps``.

    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """

    def kernel(potential: Callable[..., Any]) -> HMC:
        return HMC(
            potential_fn=potential, target_accept_prob=target_accept_prob, trajectory_length=trajectory_length
        )

    run = _Run("hmc", kernel, num_samples, warmup_steps, num_chains, seed, keep_warmup, progress, strict, max_seconds)
    return run(model, args, dict(model_kwargs or {}), init=init, guide=guide, jit_compile=jit_compile)


@dataclass(frozen=True)
class _Run:
    """One run of a stock kernel, chain after chain."""

    method: str
    kernel: Callable[[Callable[..., Any]], Any]
    num_samples: int
    warmup_steps: int
    num_chains: int
    seed: int | None
    keep_warmup: bool
    progress: bool
    strict: bool
    max_seconds: float | None

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("warmup_steps", 0), ("num_chains", 1)):
            whole_number(name, getattr(self, name), at_least=least)
        check_seconds(self.max_seconds)

    def __call__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        init: str | Mapping[str, Tensor],
        guide: Callable[..., Any] | None,
        jit_compile: bool,
    ) -> Draws:
        start = time.perf_counter()
        model = unnormalized(model)
        told = interruption_told("interrupted before the first step: there are no draws yet")
        with told, limited(self.max_seconds), random_stream(self.seed), frozen(model), quiet_jit():
            # Validates the user's model, once and without its tilt; Pyro's own runs do not.
            trace = prototype_trace(untilted(model), args, kwargs)
            model, own = prepared(model, args, kwargs, trace)
            with pyro.validation_enabled(False):
                _, potential, transforms, _ = until_numbers_hold(
                    lambda attempt: initialize_model(
                        model,
                        args,
                        kwargs,
                        transforms=own,
                        jit_compile=jit_compile,
                        skip_jit_warnings=True,
                        initial_params={},
                    )
                )
            if not transforms:
                raise ValueError("the model has no continuous latent sites: nothing for this sampler to move")
            counted = CountedPotential(potential)
            shapes = {name: site["value"].shape for name, site in latent_sites(trace).items()}
            starts = StartingPoints(model, args, kwargs, counted, transforms, shapes, self.num_chains)
            initial, rule = starts.find(init, guide)
            with one_thread():
                chains, interrupted = self._chains(counted, initial, transforms, observed_sites(trace))
        cut = not interrupted and min(chain.num_draws for chain in chains) < self.num_samples
        stopped = "interrupted" if interrupted else "max_seconds" if cut else "num_samples"
        notes = {"init": rule, "interrupted": interrupted, "stopped": stopped, **warmup_note(chains)}
        seconds = time.perf_counter() - start
        draws = self._collect(chains, transforms, seconds, observed_sites(trace), notes)
        draws = replace(draws, source=Source(model, args, kwargs))
        report_chains(draws, strict=self.strict, early=early_text(draws.notes, self.max_seconds))
        return draws

    def _chains(
        self,
        potential: CountedPotential,
        initial: dict[str, Tensor],
        transforms: Mapping[str, Any],
        observed: Mapping[str, Tensor],
    ) -> tuple[list[RecordedChain], bool]:
        chains: list[RecordedChain] = []
        total = self.num_chains * (self.num_samples + self.warmup_steps)
        with tqdm(total=total, desc=self.method, disable=not self.progress, mininterval=0.5) as bar:
            for index in range(self.num_chains):
                # All chains are cut to the shortest, so that no later one need go further.
                num_samples = min((each.num_draws for each in chains if each.num_draws), default=self.num_samples)
                chains.append(RecordedChain(potential, bar, observed=observed))
                mcmc = MCMC(
                    chains[-1].watch(self.kernel(potential)),
                    num_samples=num_samples,
                    warmup_steps=self.warmup_steps,
                    initial_params={name: value[index].clone() for name, value in initial.items()},
                    transforms=transforms,
                    hook_fn=chains[-1].hook,
                    disable_progbar=True,
                )
                try:
                    with time_limit(time_left() / (self.num_chains - index)):
                        run_chain(mcmc, chains[-1])
                except KeyboardInterrupt as stop:
                    stopped_by(stop)
                    return _usable(chains), True
        return largest_part(chains), False

    def _collect(
        self,
        chains: list[RecordedChain],
        transforms: Mapping[str, Any],
        seconds: float,
        observed: Mapping[str, Tensor],
        notes: Mapping[str, Any],
    ) -> Draws:
        warm = min(chain.warmup for chain in chains)
        length = min(chain.num_draws for chain in chains)
        values, stats = stacked(chains, transforms, "draws", length)
        if self.method == "nuts":
            stats["tree_depth"] = (stats["n_steps"] + 1).log2().ceil().long()
        warmup = None
        if self.keep_warmup and warm:
            warm_values, warm_stats = stacked(chains, transforms, "warmup", warm)
            warmup = Draws(values=warm_values, method=self.method, stats=warm_stats)
        sampling = sum(chain.ended - chain.started for chain in chains)
        return Draws(
            values=values,
            method=self.method,
            stats=stats,
            warmup=warmup,
            observed=observed,
            num_gradients=chains[0].count,
            seconds=seconds,
            sampling_seconds=sampling,
            notes={
                "num_samples": self.num_samples,
                "warmup_steps": self.warmup_steps,
                **distinct_starts(chains),
                **notes,
            },
        )


def _usable(chains: list[RecordedChain]) -> list[RecordedChain]:
    """After an interruption: the finished chains, or the first one as far as it came."""
    if len(chains) > 1:
        return chains[:-1]
    if len(chains[0].params) <= chains[0].warmup:
        raise KeyboardInterrupt("interrupted during the warm-up of the first chain: there are no draws yet")
    return chains
