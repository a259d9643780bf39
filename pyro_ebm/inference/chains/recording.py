"""What is put on record of a chain that Pyro runs, step by step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import HMC
from pyro.ops.integrator import potential_grad
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.deadline import Limit, OutOfTime, check_time, time_left, time_limit
from pyro_ebm.inference.density.gradients import broken_gradient
from pyro_ebm.inference.resampling import number_of_distinct
from pyro_ebm.numerics import failed_numerically, until_numbers_hold

__all__ = [
    "CountedPotential",
    "RecordedChain",
    "distinct_starts",
    "largest_part",
    "quiet_jit",
    "run_chain",
    "stacked",
    "warmup_note",
]

_LEAST_DRAWS = 4  # with fewer there is no R-hat
_SHARE_OF_WARMUP = 2 / 3  # of the time of a chain, where there is a limit
_STATS = ("lp", "acceptance_rate", "step_size", "n_steps", "diverging")


@contextmanager
def quiet_jit() -> Iterator[None]:
    """Pyro compiles through torch.jit, whose deprecation its users can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        yield


class CountedPotential:
    """A potential that counts how often it is evaluated, and looks at the clock; each evaluation is one gradient."""

    def __init__(self, potential: Callable[..., Tensor]) -> None:
        self.potential = potential
        self.count = 0

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        check_time()
        self.count += 1
        try:
            return self.potential(params)
        except Exception as error:
            if not failed_numerically(error):
                raise
            return sum(value.sum() for value in params.values()) * torch.nan  # type: ignore[return-value]


@dataclass
class RecordedChain:
    """What the hook sees of one chain, step by step.

    Args:
        potential: what the kernel evaluates; ``None``: that of the kernel, once it is set up.
        bar: shows the progress.
        then: a hook of the user's, called after each step.
        observed: values by site, named where they leave the kernel without a gradient.
    """

    potential: CountedPotential | None
    bar: tqdm
    then: Callable[[Any, Mapping[str, Tensor], str, int], Any] | None = None
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    params: list[dict[str, Tensor]] = field(default_factory=list)
    stats: list[dict[str, float]] = field(default_factory=list)
    warmup: int = 0
    warmup_steps: int = 0
    warmup_cut: bool = False
    out_of_time: bool = False
    divergences: int = 0
    started: float = 0.0
    ended: float = 0.0
    start: dict[str, Tensor] | None = None
    limit: Limit | None = None
    _mean_accept: float = 0.0
    _count: int = 0
    _given: Any = None

    def watch(self, kernel: Any) -> Any:
        """Leave what the set-up of a kernel costs out of the steps of its first draw."""
        setup, self._given = kernel.setup, getattr(kernel, "potential_fn", None)

        def counted_setup(*args: Any, **kwargs: Any) -> None:
            until_numbers_hold(lambda attempt: setup(*args, **kwargs))
            if self.potential is None and isinstance(kernel, HMC):
                self.potential = kernel.potential_fn = CountedPotential(kernel.potential_fn)
            if isinstance(kernel, HMC) and kernel.initial_params:
                self._check_start(kernel)
            self._count = self.count
            start = getattr(kernel, "initial_params", None) or {}
            self.start = {name: value.detach().clone() for name, value in start.items()}

        kernel.setup = counted_setup
        return kernel

    def _check_start(self, kernel: HMC) -> None:
        """Without a gradient no step is ever taken, at however small a step size."""
        start = {name: value.detach().clone() for name, value in kernel.initial_params.items()}
        potential = getattr(kernel.potential_fn, "potential", kernel.potential_fn)  # not counted
        grads, energy = potential_grad(potential, start)
        broken = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        if broken and bool(energy.isfinite()):
            raise ValueError(broken_gradient("the starting point", broken, self.observed))

    def release(self, kernel: Any) -> None:
        """Undo :meth:`watch`: Pyro takes a potential that a run has left behind for one of the user's."""
        kernel.__dict__.pop("setup", None)
        if isinstance(kernel, HMC):
            kernel.potential_fn = self._given

    @property
    def count(self) -> int:
        """Gradients so far."""
        return 0 if self.potential is None else self.potential.count

    def hook(self, kernel: Any, params: Mapping[str, Tensor], stage: str, index: int) -> None:
        if stage.startswith("Warmup"):
            self.warmup += 1
            if self.warmup == self.warmup_steps and self.limit is not None:
                self.limit.lift()
        elif index == 0:
            self._mean_accept, self.started = 0.0, time.perf_counter()
        if isinstance(kernel, HMC):
            self._record(kernel, index)
        self.params.append({name: value.detach().clone() for name, value in params.items()})
        self.ended = time.perf_counter()
        self.bar.update()
        if self.then is not None:
            self.then(kernel, params, stage, index)
        check_time()

    def _record(self, kernel: HMC, index: int) -> None:
        """The statistics of a step of Pyro's HMC or NUTS."""
        mean = float(kernel._mean_accept_prob)  # running mean of the phase; Pyro keeps no per-draw value
        accept = mean + index * (mean - self._mean_accept)
        self.stats.append(
            {
                "lp": -float(kernel._potential_energy_last),
                "acceptance_rate": min(max(accept, 0.0), 1.0),
                "step_size": float(kernel.step_size),
                "n_steps": self.count - self._count,
                "diverging": float(len(kernel._divergences) > self.divergences),
            }
        )
        self._mean_accept, self._count, self.divergences = mean, self.count, len(kernel._divergences)
        if index % 20 == 0:
            self.bar.set_postfix(accept=f"{mean:.2f}", divergences=self.divergences, refresh=False)

    def part(self, stage: str, length: int) -> slice:
        """Where so many first ``"draws"``, or last steps of the ``"warmup"``, are among its steps."""
        start = self.warmup if stage == "draws" else self.warmup - length
        return slice(start, start + length)

    @property
    def num_draws(self) -> int:
        return len(self.params) - self.warmup


def distinct_starts(chains: Sequence[RecordedChain]) -> dict[str, int]:
    """A note: from how many different points the chains started; none where a kernel does not tell."""
    starts = [chain.start for chain in chains]
    if not all(starts):
        return {}
    rows = [torch.cat([value.flatten() for value in start.values()]) for start in starts if start]
    return {"distinct_starts": number_of_distinct(torch.stack(rows))}


def run_chain(mcmc: Any, chain: RecordedChain, *args: Any, **kwargs: Any) -> None:
    """Run one chain by ``pyro.infer.MCMC``; where there is a limit of time, the warm-up gets two thirds of it.

    A warm-up that takes longer ends there, and the draws begin with what was learned. Time that ends them is no error:
    ``chain.out_of_time`` says so.
    """
    sampler, chain.warmup_steps = mcmc.sampler, mcmc.sampler.warmup_steps
    with time_limit(_SHARE_OF_WARMUP * time_left() if chain.warmup_steps else None) as chain.limit:
        try:
            mcmc.run(*args, **kwargs)
            return
        except OutOfTime:
            pass
    chain.warmup_cut = 0 < chain.warmup < chain.warmup_steps and isinstance(sampler.kernel, HMC)
    chain.out_of_time = not chain.warmup_cut
    if chain.warmup_cut:
        _draw_on(sampler.kernel, chain, sampler.num_samples)


def largest_part(chains: list[RecordedChain]) -> list[RecordedChain]:
    """The chains that time left with enough draws for an R-hat; with any, where none has.

    Raises:
        OutOfTime: where none has draws.
    """
    for least in (_LEAST_DRAWS, 1):
        if found := [chain for chain in chains if chain.num_draws >= least]:
            return found
    if not any(chain.out_of_time for chain in chains):
        return chains
    raise OutOfTime(f"on {max(chain.warmup for chain in chains)} steps of warm-up")


def warmup_note(chains: Sequence[RecordedChain]) -> dict[str, int]:
    """A note of the shortest warm-up that time ended; none where all came to their end."""
    cut = [chain.warmup for chain in chains if chain.warmup_cut]
    return {"warmup_cut": min(cut)} if cut else {}


def _draw_on(kernel: HMC, chain: RecordedChain, num_samples: int) -> None:
    """Draws of a kernel of Pyro's whose warm-up is not at its end, as Pyro makes them after it."""
    kernel._warmup_steps = kernel._t
    kernel._adapter._end_adaptation()
    params = chain.params[-1]
    kernel.clear_cache()
    try:
        with pyro.validation_enabled(False):
            for index in range(num_samples):
                params = kernel.sample(params)
                chain.hook(kernel, params, "Sample", index)
    except OutOfTime:
        chain.out_of_time = True


def stacked(
    chains: Sequence[RecordedChain], transforms: Mapping[str, Any], stage: str, length: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Constrained values and stats, each (chain, draw, ...): of so many first draws, or last steps of the warm-up."""
    params = [chain.params[chain.part(stage, length)] for chain in chains]
    values = {}
    for name in chains[0].params[0]:
        value = torch.stack([torch.stack([step[name] for step in steps]) for steps in params])
        values[name] = transforms[name].inv(value).detach() if name in transforms else value
    if not chains[0].stats:
        return values, {}
    device = next(iter(values.values())).device if values else None
    stats = {
        name: torch.tensor(
            [[step[name] for step in chain.stats[chain.part(stage, length)]] for chain in chains], device=device
        )
        for name in _STATS
    }
    stats["diverging"] = stats["diverging"].bool()
    return values, stats
