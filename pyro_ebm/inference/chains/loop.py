"""Many chains under way: warm-up, draws in pieces, and what is kept of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.chain_statistics import r_hat
from pyro_ebm.deadline import STOPS, OutOfTime, stopped_by, time_left, time_limit
from pyro_ebm.devices import synchronize
from pyro_ebm.inference.chains.descent import descended
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.inference.density.gradients import check_gradients
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.inference.kernels.adaptation import Adaptation, Rescue, find_step_size, initial_tuning
from pyro_ebm.inference.kernels.collapse import Collapse
from pyro_ebm.inference.kernels.kernel import Info, Kernel, State
from pyro_ebm.inference.resampling import number_of_distinct
from pyro_ebm.modules import frozen

__all__ = ["Chains", "Record"]

_BLOCK = 64  # draws are moved to constrained space this many at a time, so that memory follows what is kept
_R_HAT_EVERY = 3.0  # seconds
_SHOWN_CHAINS, _SHOWN_DIMS = 16, 8
_SHARE_OF_WARMUP = 2 / 3  # of the time that is left, where there is a limit


@dataclass
class Record:
    """What was kept of some steps, draw by draw."""

    u: list[Tensor] = field(default_factory=list)
    log_prob: list[Tensor] = field(default_factory=list)
    infos: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # acceptance, diverging, energy
    settings: list[tuple[int, Tensor]] = field(default_factory=list)  # steps, step size

    def add(self, state: State, info: Info) -> None:
        self.u.append(state.u)
        self.log_prob.append(state.log_prob)
        self.infos.append((info.acceptance_rate, info.diverging, info.energy))
        self.settings.append((info.n_steps, state.tuning.step_size))

    def __len__(self) -> int:
        return len(self.settings)

    def values(self, density: LogDensity) -> dict[str, Tensor]:
        """Constrained values by site, (chain, draw, *site_shape)."""
        blocks = [
            density.constrain(torch.stack(self.u[start : min(start + _BLOCK, len(self))], 1))
            for start in range(0, len(self), _BLOCK)
        ]
        return {site: torch.cat([block[site] for block in blocks], 1) for site in blocks[0]}

    def stats(self) -> dict[str, Tensor]:
        """Statistics (chain, draw), or (chain, draw, n) for n independent targets."""
        kept = len(self)  # an interrupt may have come in the middle of add()
        log_prob = torch.stack(self.log_prob[:kept], 1)
        acceptance, diverging, energy = (torch.stack(column, 1) for column in zip(*self.infos[:kept], strict=True))
        # The same for all chains: views of one row.
        steps = torch.tensor([steps for steps, _ in self.settings], device=log_prob.device)
        sizes = torch.stack([size for _, size in self.settings])
        return {
            "lp": log_prob,
            "acceptance_rate": acceptance,
            "diverging": diverging,
            "energy": energy,
            "step_size": sizes.expand(log_prob.shape),
            "n_steps": steps.expand(log_prob.shape[:2]),
        }


class Chains:
    """Chains of one kernel on one density, which can be run on as long as one likes.

    Args:
        kernel: how they move.
        density: their target.
        u: where they start, (chains, *batch, dim).
        generator: source of all randomness.
        graph: ``"captured"``, ``"compiled"`` or ``"eager"``.
        bar: shows the progress.
        on_step: called after each step of the warm-up and after each draw, with the stage and its number.
        saved: sites whose draws are kept; all when ``None``.
        rescue: move chains that accept nothing to the places of others during warm-up.
    """

    def __init__(
        self,
        kernel: Kernel,
        density: LogDensity,
        u: Tensor,
        *,
        generator: torch.Generator,
        graph: str = "captured",
        bar: tqdm | None = None,
        on_step: Callable[[Chains, str, int], None] | None = None,
        saved: Sequence[str] | None = None,
        rescue: bool = True,
    ) -> None:
        self.kernel, self.density, self.generator = kernel, density, generator
        self.warmup, self.record = Record(), Record()
        self.num_gradients = 0
        self.sampling_seconds = 0.0
        self.stopped: str | None = None
        self.warmup_cut: int | None = None
        self.rescued = 0
        self._starts, self._rescue = u, rescue
        self._on_step, self._saved = on_step, saved
        self._dense = kernel.blocks(density).mask(u)
        self._bar = bar or tqdm(disable=True)
        self._divergences = 0.0
        self._looked, self._r_hat = time.perf_counter(), math.nan
        with self._quiet():
            function: Callable[[Tensor], tuple[Tensor, ...]] = density.value_and_grad
            self.graph, self.graph_problem = "eager", None
            if graph != "eager":
                function = recorded = captured(function, u, compile=graph == "compiled")
                self.graph, self.graph_problem = recorded.kind, recorded.problem
            self._value_and_grad = function
            log_prob, grad = function(u)
            check_gradients(density, log_prob, grad)
            self.state = State(u, log_prob, grad, initial_tuning(kernel, u))
            self.num_gradients += len(u)
            self._step = kernel.bind(function, generator)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradients but the sampler's own, and no dropout."""
        target = self.density.target
        with torch.no_grad(), frozen(*([] if target is None else [target.model])):
            yield

    def warm_up(self, num_steps: int, *, keep: bool = False) -> None:
        """Adapt the kernel for so many steps; within a limit of time, in two thirds of what is left of it."""
        try:
            with self._quiet(), time_limit(_SHARE_OF_WARMUP * time_left()):
                self._adapt(num_steps, keep=keep)
        except OutOfTime:
            self.warmup_cut = self.state.iteration

    def _adapt(self, num_steps: int, *, keep: bool) -> None:
        if num_steps and self.kernel.adapt_mass_matrix:
            self.state, gradients = descended(self.density, self.state, self._value_and_grad, self.generator)
            self.num_gradients += gradients
        if self.kernel.adapt_step_size and self.kernel.given_step_size is None:
            step_size, tries = find_step_size(self.kernel, self.state, self._value_and_grad, self.generator)
            self.num_gradients += tries * len(self.state.u)
            self.state = self.state._replace(tuning=self.state.tuning._replace(step_size=step_size))
        if not num_steps:
            return
        adaptation = Adaptation(self.kernel, self.state, num_steps, dense=self._dense)
        rescue, collapse = Rescue(num_steps), Collapse()
        try:
            for index in range(num_steps):
                before = self.state
                self.state, info = self._rewound(self._step(before))
                self.state = self.state._replace(tuning=adaptation.update(before, info))
                if self._rescue:
                    self.state = rescue.update(self.state, info, self.generator)
                collapse.update(self.state, self.kernel.name)
                self._count(info, "warm-up")
                if keep:
                    self.warmup.add(self.state, info)
                self._told("Warmup", index)
        finally:  # also where time ends it: with what was learned so far
            self.state = self.state._replace(tuning=adaptation.finish())
            self.rescued = rescue.count
            if rescue.origin is not None:  # chains that were moved began, in effect, where the others did
                self._starts = self._starts.gather(0, rescue.origin.expand_as(self._starts))
            self._divergences = 0.0

    def extend(self, num_draws: int, *, thin: int = 1) -> None:
        """Make so many more draws per chain; stops early, and says so, when interrupted or out of time."""
        start = time.perf_counter()
        try:
            with self._quiet():
                for _ in range(num_draws):
                    for _ in range(thin):
                        self.state, info = self._rewound(self._step(self.state))
                        self._count(info, "draws")
                    self.record.add(self.state, info)
                    self._told("Sample", len(self.record) - 1)
        except STOPS as stop:
            self.stopped = stopped_by(stop)
        synchronize(self.state.u.device)
        self.sampling_seconds += time.perf_counter() - start

    def _rewound(self, moved: tuple[State, Info]) -> tuple[State, Info]:
        """Angles are brought back to one turn: on the line they would wander off, and seem to spread."""
        state, info = moved
        target = self.density.target
        if target is None or target.periodic is None:
            return moved
        return state._replace(u=target.rewound(state.u)), info

    def _told(self, stage: str, index: int) -> None:
        if self._on_step is not None:
            self._on_step(self, stage, index)

    def _count(self, info: Info, phase: str) -> None:
        self.num_gradients += info.n_steps * len(info.proposal)
        if self._bar.disable:
            return
        self._divergences += float(info.diverging.sum())
        now = time.perf_counter()
        if phase == "draws" and now - self._looked > _R_HAT_EVERY:
            self._r_hat = self._running_r_hat()
            # Never more than a tenth of the time for looking.
            self._looked = time.perf_counter() + 9 * (time.perf_counter() - now)
        if self._bar.update():
            self._bar.set_description(f"{self.kernel.name}, {phase}", refresh=False)
            self._bar.set_postfix(self._shown(info), refresh=False)

    def _shown(self, info: Info) -> dict[str, str]:
        rate = self._bar.format_dict["rate"] or 0.0
        shown = {
            "draws/s": f"{rate * len(info.proposal):,.0f}",
            "accept": f"{float(info.acceptance_rate.mean()):.2f}",
            "divergences": f"{self._divergences:.0f}",
        }
        return shown if math.isnan(self._r_hat) else {**shown, "r_hat": f"{self._r_hat:.3f}"}

    def _running_r_hat(self) -> float:
        """Of some chains and coordinates: a look, not the final word."""
        if len(self.record) < 8 or len(self.state.u) < 2:
            return math.nan
        every = max(1, len(self.record) // 200)
        draws = torch.stack(self.record.u[::every], 1)[:_SHOWN_CHAINS].flatten(2)[..., :_SHOWN_DIMS]
        found = torch.as_tensor(r_hat(draws), device="cpu")
        return float(found[~found.isnan()].max()) if not bool(found.isnan().all()) else math.nan

    def found(self) -> dict[str, Any]:
        """What the kernel's users may read: step size and mass matrix of the moment, as in Pyro."""
        tuning = self.state.tuning
        size = tuning.step_size
        blocks = self.kernel.blocks(self.density)
        return {
            "step_size": size.clone() if size.ndim else float(size),
            "inverse_mass_matrix": blocks.by_site(tuning.inverse_mass, tuning.factor),
        }

    def _kept(self, record: Record) -> dict[str, Tensor]:
        values = record.values(self.density)
        return {site: value for site, value in values.items() if self._saved is None or site in self._saved}

    @torch.no_grad()
    def draws(self, *, seconds: float, notes: Mapping[str, Any]) -> Draws:
        """Everything kept so far."""
        target = self.density.target
        tuning = self.state.tuning
        warm = None
        if len(self.warmup):
            warm = Draws(self._kept(self.warmup), self.kernel.name, self.warmup.stats())
        return Draws(
            values=self._kept(self.record),
            method=self.kernel.name,
            stats=self.record.stats(),
            warmup=warm,
            observed={} if target is None else target.observed,
            source=Source.of(target),
            num_gradients=self.num_gradients,
            seconds=seconds,
            sampling_seconds=self.sampling_seconds,
            notes={
                "vectorize": self.density.way,
                "graph": self.graph,
                **({} if target is None else {"vectorize": target.vectorize}),
                **({} if self.graph_problem is None else {"graph_problem": self.graph_problem}),
                "step_size": tuning.step_size.tolist(),
                "trajectory_length": float(tuning.trajectory_length),
                "interrupted": self.stopped == "interrupted",
                **({} if self.warmup_cut is None else {"warmup_cut": self.warmup_cut}),
                "rescued": self.rescued,
                "distinct_starts": number_of_distinct(self._starts, len(self.density.batch)),
                **notes,
            },
        )
