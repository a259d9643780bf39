"""The runner of batched kernels, with the argument names of ``pyro.infer.MCMC``."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import Array
from pyro_ebm.deadline import OutOfTime, check_seconds, finishing, limited
from pyro_ebm.entry import entry
from pyro_ebm.errors import interruption_told
from pyro_ebm.inference.chains.arguments import (
    as_params,
    check_kernel,
    check_names,
    check_saved,
    check_superchains,
    number_of_chains,
    packed,
    refuse_foreign,
    refuse_of_batch,
    warn_of_ignored,
)
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.report import early_text, report_chains
from pyro_ebm.inference.chains.siteless import run_without_sites, without_sites
from pyro_ebm.inference.chains.starts import chain_starts, given_starts
from pyro_ebm.inference.chains.stock import Hook, StockChains
from pyro_ebm.inference.chains.tables import diagnostics_of, headline, table
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.density.potential import potential_density
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.kernels.kernel import Kernel
from pyro_ebm.keywords import model_inputs
from pyro_ebm.randomness import one_source, random_seed
from pyro_ebm.structure import DoesNotBroadcast

__all__ = ["MCMC"]

_WARMUP = 500
_CHAINS = 64
_SHARE_OF_DIVERGENCES = 1e-3  # of the many transitions of many chains


@checked
class MCMC:
    """Run a kernel: ours move many chains at once, as one tensor; Pyro's run as they are, one chain after another.

    Changing the imports of a ``pyro.infer`` program is enough: ``from pyro_ebm import MCMC, HMC``, or
    ``from pyro_ebm import ChEES as NUTS``. **By default there are 64 chains**, so that ``num_samples=500`` returns
    32,000 draws: a hundred chains cost little more than one, and warm-up learns from all of them. Say
    ``num_chains=1`` for as many as in Pyro, or take some: ``mcmc.get_samples(500)``.

    During warm-up, chains that accept nothing where they started are moved to where others are;
    ``notes["rescued"]`` of the draws counts them. A model that cannot be run for many chains at once is for
    ``MCMC(pyro.infer.NUTS(model), ...)``, which returns the same kind of draws.

    Args:
        kernel: one of :class:`ChEES`, :class:`HMC`, :class:`MALA`, :class:`ULA`; or any kernel of Pyro's.
        num_samples: draws per chain that are kept.
        warmup_steps: adaptation steps; when ``None`` as many as ``num_samples``, at most 500 for batched kernels.
        initial_params: as in Pyro, values in unconstrained space, {site: (num_chains, *shape)}, for a single chain
            {site: shape}; or points (num_chains, dim). Goes before ``init``.
        num_chains: chains; when ``None`` as many as ``initial_params`` has, else 64, and 1 for a kernel of Pyro's.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after each step of the ``"Warmup"`` and each draw,
            the ``"Sample"``; ``params`` are unconstrained values, {site: (num_chains, *shape)}, for a single chain
            {site: shape}.
        mp_context: ignored, with a warning: there are no processes.
        disable_progbar: as in Pyro; the opposite of ``progress``.
        disable_validation: as in Pyro for its kernels; ours never validate.
        transforms: site -> transform to unconstrained space, before those of the kernel and of the supports.
        save_params: sites whose draws are kept; all when ``None``.
        vectorize: ``"auto"``, ``"plate"`` or ``"vmap"``, instead of the kernel's; see :meth:`LogDensity.from_model`.
        init: ``"importance"`` (resampled draws of the guide, or of the prior), ``"prior"``, ``"guide"``,
            ``"uniform"``, one of ``pyro.infer.autoguide.init_to_*``, or values by site as the model has them,
            (num_chains, *site_shape). When ``None``, the kernel's ``init_strategy``, else ``"importance"``.
        guide: for the starting points.
        superchains: so many starting points, each for ``num_chains / superchains`` chains that follow each other;
            nested R-hat (:func:`nested_r_hat`) then judges the run: it asks less of each chain and shows whether it
            matters where they start. ``initial_params`` and ``init`` may have one row a superchain.
        thin: keep every ``thin``-th draw.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        generator: a source of randomness instead of a seed.
        max_seconds: stop when so much time is spent, with the draws so far and a warning; a warm-up may take two thirds
            of it. ``None``: no limit.
        keep_warmup: keep the warm-up in ``draws.warmup``.
        compile: hand the captured graph to ``torch.compile``: seconds first, then faster.
        capture: ``False`` runs the model at each step.
        progress: show a progress bar.
        strict: raise instead of warn when the draws cannot be trusted.

    Attributes:
        transforms: after a run, site -> transform to unconstrained space, as in Pyro.

    Raises:
        TypeError: a kernel that is none; an unknown argument.
        ValueError: impossible counts, bad starting points, a model that does not broadcast over chains.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ebm import ChEES, MCMC
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> mcmc = MCMC(ChEES(model), num_samples=50, warmup_steps=50, num_chains=32, seed=0, progress=False)
        >>> mcmc.run().values["z"].shape
        torch.Size([32, 50, 2])
    """

    def __init__(
        self,
        kernel: Kernel | MCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Array] | Array | None = None,
        num_chains: int | None = None,
        hook_fn: Hook | None = None,
        mp_context: str | None = None,
        disable_progbar: bool | None = None,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
        *,
        vectorize: str | None = None,
        init: str | Mapping[str, Tensor] | Callable[..., Any] | None = None,
        guide: Callable[..., Any] | None = None,
        superchains: int | None = None,
        thin: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        max_seconds: float | None = None,
        keep_warmup: bool = False,
        compile: bool = False,
        capture: bool = True,
        progress: bool = True,
        strict: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_foreign(unknown, type(self))
        starts: Mapping[str, Tensor] | Tensor | None = as_params(initial_params)
        batched = check_kernel(kernel, starts)
        if warmup_steps is None:
            warmup_steps = min(num_samples, _WARMUP) if batched else num_samples
        one_source(seed, generator)
        check_seconds(max_seconds)
        warn_of_ignored(mp_context=mp_context, disable_validation=disable_validation, stock=not batched)
        if not batched:
            own = {"vectorize": vectorize, "init": init, "guide": guide, "generator": generator, "thin": thin - 1}
            refuse_of_batch(kernel, {**own, "superchains": superchains, "compile": compile, "capture": not capture})
        self.kernel, self.num_samples, self.warmup_steps = kernel, num_samples, warmup_steps
        self.initial_params, self.init, self.guide = starts, init, guide
        self.hook_fn, self.transforms = hook_fn, transforms
        self.save_params = None if save_params is None else list(save_params)
        self.disable_validation, self.vectorize = disable_validation, vectorize
        self.superchains = superchains
        self.thin, self.seed, self.generator = thin, seed, generator
        self.keep_warmup, self.strict, self.max_seconds = keep_warmup, strict, max_seconds
        self.progress = progress if disable_progbar is None else not disable_progbar
        self.graph = "compiled" if compile else "captured" if capture else "eager"
        self._asked_chains, self._asked_transforms = num_chains, transforms
        self.num_chains = num_chains or (_CHAINS if batched else 1)
        self._stock: StockChains | None = None
        self._draws: Draws | None = None

    def __repr__(self) -> str:
        state = "not run" if self._draws is None else "ran"
        chains = f"{self.num_chains} chain{'s' * (self.num_chains != 1)}"
        return f"MCMC({type(self.kernel).__name__}, {chains} x {self.num_samples} samples, {state})"

    @entry(gradients=True)
    def run(self, *args: Any, **kwargs: Any) -> Draws:
        """Warm up and draw.

        Args:
            *args: arguments of the model; arrays and tables as in :func:`sample`.
            **kwargs: its keyword arguments.

        Returns:
            Draws with stats ``lp``, ``acceptance_rate``, ``diverging``, ``energy``, ``step_size``, ``n_steps``.
            After Ctrl-C, or when ``max_seconds`` are spent, the draws so far.

        Raises:
            InferenceError: ``max_seconds`` were spent before the first draw.

        Warns:
            InferenceWarning: when the draws cannot be trusted, or time ended them.
        """
        told = interruption_told("interrupted before the first step: there are no draws yet")
        with told, limited(self.max_seconds):
            args, kwargs = model_inputs(self.kernel.model, args, kwargs)
            if isinstance(self.kernel, MCMCKernel):
                return self._run_stock(args, kwargs)
            if (fixed := without_sites(self.kernel.model, args, kwargs)) is not None:
                return self._run_without_sites(self.kernel, fixed)
            return self.run_with(self._fixed_number, args, kwargs)

    def _fixed_number(self, chains: Chains) -> dict[str, Any]:
        chains.extend(self.num_samples, thin=self.thin)
        return {} if chains.stopped is None else {"stopped": chains.stopped}

    def _run_stock(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Draws:
        self._draws = None
        self._stock = StockChains(
            self.kernel,
            self.num_samples,
            self.warmup_steps,
            self.num_chains,
            self.initial_params,
            self.hook_fn,
            self._asked_transforms,
            self.save_params,
            self.disable_validation,
            self.seed,
            self.keep_warmup,
            self.progress,
        )
        self._draws = self._stock.run(args, kwargs)
        self.transforms = self._stock.transforms
        report_chains(self._draws, strict=self.strict, early=early_text(self._draws.notes, self.max_seconds))
        return self._draws

    def run_with(
        self, drive: Callable[[Chains], Mapping[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Draws:
        """Warm up, and let ``drive`` extend the chains; what it returns goes into the notes of the draws."""
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"{type(self.kernel).__name__} of Pyro's cannot be extended: give num_samples=")
        began = time.perf_counter()
        self._draws = None
        if self.kernel.potential_fn is not None and not self.initial_params:
            return self._run_without_sites(self.kernel, self.kernel.target)
        density = self._density(self.kernel, args, kwargs)
        if density.by_name:
            check_names("transforms", self._asked_transforms, density.shapes)
        check_saved(self.save_params, density.constrain(density.like.new_zeros(1, *density.batch, density.dim)))
        if self._asked_chains is None:
            self.num_chains = number_of_chains(density, self.initial_params, _CHAINS)
        check_superchains(self.superchains, self.num_chains)
        generator = self.generator or torch.Generator().manual_seed(random_seed(self.seed, None))
        # A seed of their own for the starts: from the same stream, the first velocities would equal prior draws.
        u, rule = self._starts(density, random_seed(None, generator))
        if self.superchains is not None:
            u = u.repeat_interleave(self.num_chains // len(u), 0)
        if generator.device != u.device:
            generator = torch.Generator(u.device).manual_seed(random_seed(None, generator))
        total = self.warmup_steps + self.num_samples * self.thin
        notes = {"init": rule, "num_samples": self.num_samples, "warmup_steps": self.warmup_steps, "thin": self.thin}
        if self.superchains is not None:
            notes["superchains"] = self.superchains
        self._remember_start(self.kernel, density, u)
        with tqdm(total=total, desc=self.kernel.name, disable=not self.progress, mininterval=0.5) as bar:
            chains = Chains(
                self.kernel,
                density,
                u,
                generator=generator,
                graph=self.graph,
                bar=bar,
                on_step=None if self.hook_fn is None else self._on_step,
                saved=self.save_params,
                rescue=self.superchains is None,
            )
            try:
                chains.warm_up(self.warmup_steps, keep=self.keep_warmup)
                notes.update(drive(chains))
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted during the warm-up: there are no draws yet") from None
        if not len(chains.record):
            if chains.stopped == "max_seconds":
                raise OutOfTime(f"on {chains.state.iteration} steps of warm-up")
            raise KeyboardInterrupt("interrupted before the first draw: there are no draws yet")
        self.kernel.remember(**chains.found())
        with finishing():
            self._draws = chains.draws(seconds=time.perf_counter() - began, notes=notes)
            # With a target to reach, the end by time is told with what was reached.
            told = {**self._draws.notes, **({"stopped": ""} if "target_ess" in notes else {})}
            early = early_text(told, self.max_seconds)
            report_chains(self._draws, strict=self.strict, early=early, max_divergences=_SHARE_OF_DIVERGENCES)
        return self._draws

    def _run_without_sites(self, kernel: Kernel, potential: Callable[..., Any]) -> Draws:
        self.num_chains, self.transforms = self._asked_chains or 1, {}
        self._draws = run_without_sites(
            potential,
            lambda stage, index: None if self.hook_fn is None else self.hook_fn(kernel, {}, stage, index),
            method=kernel.name,
            num_chains=self.num_chains,
            num_samples=self.num_samples,
            warmup_steps=self.warmup_steps,
        )
        return self._draws

    def _density(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogDensity:
        transforms = self._asked_transforms or kernel.given_transforms
        if kernel.potential_fn is not None:
            example: Mapping[str, Tensor] = self.initial_params  # type: ignore[assignment]  # checked above
            if (self._asked_chains or 1) > 1:
                example = {name: value[0] for name, value in example.items()}
            return potential_density(kernel.potential_fn, example, transforms)
        vectorize = self.vectorize or kernel.vectorize
        if transforms is not kernel.given_transforms or vectorize != kernel.vectorize:
            kernel = dataclasses.replace(kernel, transforms=transforms, vectorize=vectorize)
        try:
            return kernel.density(*args, **kwargs)
        except DoesNotBroadcast as error:
            error.add_note(
                "MCMC moves many chains at once. To leave the model as it is, run Pyro's own kernel, whose chains come "
                "one after another: MCMC(pyro.infer.NUTS(model), num_samples, num_chains=4)"
            )
            raise

    def _remember_start(self, kernel: Kernel, density: LogDensity, u: Tensor) -> None:
        target = density.target
        if target is not None:
            self.transforms = {site.name: site.transform.inv for site in target.sites}
        else:
            self.transforms = dict(self._asked_transforms or kernel.given_transforms or {})
        kernel.remember(transforms=self.transforms, initial_params=self._single(density.split(u)))

    def _on_step(self, chains: Chains, stage: str, index: int) -> None:
        assert self.hook_fn is not None
        chains.kernel.remember(**chains.found())
        self.hook_fn(self.kernel, self._single(chains.density.split(chains.state.u)), stage, index)

    def _single(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in Pyro, the values of a single chain have no dimension for chains."""
        return {name: value[0] for name, value in values.items()} if self.num_chains == 1 else values

    def _starts(self, density: LogDensity, seed: int) -> tuple[Tensor, str]:
        given, starts = self.initial_params, self.superchains or self.num_chains
        if given is not None:
            u = given if isinstance(given, Tensor) else packed(density, given, starts)
            return given_starts(density, starts, u, guide=self.guide), "given"
        init = self.init
        if init is None:
            init = getattr(self.kernel, "init_strategy", None) or "importance"
        return chain_starts(density, starts, init=init, guide=self.guide, seed=seed)

    @property
    def draws(self) -> Draws:
        """What the last run returned."""
        if self._draws is None:
            raise RuntimeError("no draws yet: call run() first")
        return self._draws

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The last run's draws, as ``pyro.infer.MCMC`` returns them.

        Args:
            num_samples: so many, drawn with replacement; all when ``None``.
            group_by_chain: keep the chain dimension.

        Returns:
            Site -> (num_chains * num_samples, *site_shape), or (num_chains, num_samples, *site_shape).
        """
        draws = self.draws
        if num_samples is None:
            return {site: v if group_by_chain else v.flatten(0, 1) for site, v in draws.values.items()}
        generator = torch.Generator().manual_seed(random_seed(self.seed, self.generator))
        lead = draws.num_draws if group_by_chain else draws.num_chains * draws.num_draws
        index = torch.randint(lead, (num_samples,), generator=generator, device="cpu")
        if group_by_chain:
            return {site: value[:, index] for site, value in draws.values.items()}
        return {site: draws.flat(site)[index] for site in draws.values}

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Bulk ESS and R-hat (ArviZ's) of each site, divergences and acceptance of each chain, as in Pyro."""
        found = diagnostics_of(self.draws)
        chains = [] if self._stock is None else self._stock.diagnostics
        for name in chains[0] if chains else ():
            found[name] = {f"chain {index}": each[name] for index, each in enumerate(chains)}
        return found

    def summary(self, prob: float = 0.9) -> None:
        """Print how many draws there are; Pyro's table: mean, sd, median, interval, n_eff, R-hat; the divergences.

        Args:
            prob: probability of the interval.
        """
        draws = self.draws
        lines = [headline(draws), table(draws, prob), ""]
        if "diverging" in draws.stats:
            lines.append(f"Number of divergences: {int(draws.stats['diverging'].sum())}")
        sys.stdout.write("\n".join(lines) + "\n")
