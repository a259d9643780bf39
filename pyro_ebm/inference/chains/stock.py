"""Kernels of Pyro's, or of a user's, run by our ``MCMC`` as they are: chains one after another in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.deadline import stopped_by, time_left, time_limit
from pyro_ebm.devices import one_thread
from pyro_ebm.inference.chains.arguments import check_names, check_saved
from pyro_ebm.inference.chains.recording import (
    RecordedChain,
    distinct_starts,
    largest_part,
    quiet_jit,
    run_chain,
    stacked,
    warmup_note,
)
from pyro_ebm.inference.density.gradients import no_start
from pyro_ebm.inference.density.prepared import prepared
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.randomness import random_stream
from pyro_ebm.structure import latent_sites, observed_sites, prototype_trace, untilted

__all__ = ["StockChains"]

Hook = Callable[[Any, Mapping[str, Tensor], str, int], Any]


@dataclass
class StockChains:
    """Runs a kernel of Pyro's with ``pyro.infer.MCMC``, one chain after another.

    Args:
        kernel: any ``pyro.infer.mcmc.MCMCKernel``.
        num_samples: draws per chain.
        warmup_steps: adaptation steps per chain.
        num_chains: chains.
        initial_params: as Pyro takes them; where there is one chain, without a first dimension.
        hook_fn: called after each step, as in Pyro.
        transforms: site -> transform to unconstrained space; the kernel's when ``None``.
        save_params: sites to keep.
        disable_validation: as in Pyro.
        seed: of a stream of its own; ``None``: the global one.
        keep_warmup: keep the warm-up in the draws.
        progress: show a bar.

    Attributes:
        diagnostics: what the kernel says of each chain that came to its end.
        stopped: what ended them early, ``"interrupted"`` or ``"max_seconds"``.
    """

    kernel: MCMCKernel
    num_samples: int
    warmup_steps: int
    num_chains: int
    initial_params: Mapping[str, Tensor] | Tensor | None = None
    hook_fn: Hook | None = None
    transforms: Mapping[str, Any] | None = None
    save_params: Sequence[str] | None = None
    disable_validation: bool | None = True
    seed: int | None = None
    keep_warmup: bool = False
    progress: bool = True
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.initial_params, Tensor):
            raise ValueError("initial_params must be {name: value} for a kernel of Pyro's, got a tensor")
        for name, value in (self.initial_params or {}).items():
            if self.num_chains > 1 and (not value.ndim or len(value) != self.num_chains):
                raise ValueError(
                    f"initial_params[{name!r}] must have {self.num_chains} rows, one a chain, got {tuple(value.shape)}"
                )

    def _prototype(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace | None:
        """One run of the model, which says what is wrong with the data, too; None for a potential."""
        model = getattr(self.kernel, "model", None)
        return None if model is None else prototype_trace(untilted(model), args, kwargs)

    def _check_names(self, trace: Trace) -> None:
        """Where Pyro would raise a KeyError, or take no notice."""
        sites = latent_sites(trace)
        for option, values in (("initial_params", self.initial_params), ("transforms", self.transforms)):
            check_names(option, values, sites)  # type: ignore[arg-type]

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Draws:
        """Draw; after Ctrl-C, or where time ends it, what is there."""
        began = time.perf_counter()
        trace = self._prototype(args, kwargs)
        if trace is not None:
            self._check_names(trace)
        name = type(self.kernel).__name__.lower()
        total = self.num_chains * (self.num_samples + self.warmup_steps)
        with (
            random_stream(self.seed),
            one_thread(),
            quiet_jit(),
            tqdm(total=total, desc=name, disable=not self.progress, mininterval=0.5) as bar,
        ):
            observed = {} if trace is None else observed_sites(trace)
            with self._prepared(trace, args, kwargs):
                chains = self._chains(bar, observed, args, kwargs)
        draws = self._collect(chains, name, time.perf_counter() - began)
        if trace is None:
            return draws
        return replace(draws, observed=observed, source=Source(self.kernel.model, args, kwargs))

    @contextmanager
    def _prepared(self, trace: Trace | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """The kernel with its model made fit for it; its own model again afterwards."""
        kernel: Any = self.kernel
        if trace is None:
            yield
            return
        model = kernel.model
        kernel.model, transforms = prepared(model, args, kwargs, trace)
        if transforms is not None and getattr(kernel, "transforms", None) is None:
            kernel.transforms = transforms
        try:
            yield
        finally:
            kernel.model = model

    def _chains(
        self, bar: tqdm, observed: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[RecordedChain]:
        chains: list[RecordedChain] = []
        for index in range(self.num_chains):
            chain = RecordedChain(None, bar, then=self._hook(index), observed=observed)
            chain.watch(self.kernel)
            try:
                mcmc = pyro.infer.MCMC(
                    self.kernel,
                    self.num_samples,
                    self.warmup_steps,
                    initial_params=self._start(index),
                    hook_fn=chain.hook,
                    disable_progbar=True,
                    disable_validation=self.disable_validation,
                    transforms=self.transforms,
                )
                with time_limit(time_left() / (self.num_chains - index)):
                    run_chain(mcmc, chain, *args, **kwargs)
            except KeyboardInterrupt as stop:
                self.stopped = stopped_by(stop)
                return self._usable(chains, chain)
            except ValueError as error:
                if "cannot find valid initial params" in str(error):  # all that Pyro says
                    raise ValueError(no_start(observed)) from error
                raise
            finally:
                chain.release(self.kernel)
            if self.transforms is None:
                self.transforms = mcmc.transforms or getattr(self.kernel, "transforms", None) or {}
            chains.append(chain)
            if chain.num_draws:
                self.diagnostics.append(mcmc._diagnostics[0] or self.kernel.diagnostics())
            if chain.out_of_time or chain.warmup_cut:  # Pyro cleans up where a chain comes to its end
                self.kernel.cleanup()
            if chain.out_of_time:
                self.stopped = "max_seconds"
        return largest_part(chains)

    def _usable(self, finished: list[RecordedChain], last: RecordedChain) -> list[RecordedChain]:
        if finished:
            return finished
        if last.num_draws < 1:
            raise KeyboardInterrupt("interrupted during the warm-up of the first chain: there are no draws yet")
        if self.transforms is None:
            self.transforms = getattr(self.kernel, "transforms", None) or {}
        return [last]

    def _hook(self, index: int) -> Hook | None:
        hook = self.hook_fn
        if hook is None or self.num_chains == 1:
            return hook
        return lambda kernel, params, stage, step: hook(kernel, params, f"{stage} [{index}]", step)

    def _start(self, index: int) -> dict[str, Tensor] | None:
        if not isinstance(self.initial_params, Mapping):
            return None
        single = self.num_chains == 1
        return {name: value.clone() if single else value[index].clone() for name, value in self.initial_params.items()}

    def _collect(self, chains: list[RecordedChain], name: str, seconds: float) -> Draws:
        warm = min(chain.warmup for chain in chains)
        length = min(chain.num_draws for chain in chains)
        check_saved(self.save_params, chains[0].params[0])
        values, stats = self._part(chains, "draws", length)
        warmup = None
        if self.keep_warmup and warm:
            early, early_stats = self._part(chains, "warmup", warm)
            warmup = Draws(early, name, early_stats)
        return Draws(
            values=values,
            method=name,
            stats=stats,
            warmup=warmup,
            num_gradients=sum(chain.count for chain in chains) or None,
            seconds=seconds,
            sampling_seconds=sum(chain.ended - chain.started for chain in chains),
            notes={
                "num_samples": self.num_samples,
                "warmup_steps": self.warmup_steps,
                "vectorize": "sequential",
                "interrupted": self.stopped == "interrupted",
                **({} if self.stopped is None else {"stopped": self.stopped}),
                **warmup_note(chains),
                **distinct_starts(chains),
            },
        )

    def _part(
        self, chains: list[RecordedChain], stage: str, length: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, stats = stacked(chains, self.transforms or {}, stage, length)
        kept = values if self.save_params is None else {name: values[name] for name in self.save_params}
        return kept, stats
