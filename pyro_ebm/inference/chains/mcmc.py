"""The runner of batched kernels, with the argument names of ``pyro.infer.MCMC``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.util import print_summary
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.arrays import as_tensors
from pyro_ebm.chain_statistics import ess_bulk, r_hat
from pyro_ebm.checks import whole_number
from pyro_ebm.inference.chains.loop import Chains
from pyro_ebm.inference.chains.report import report_chains
from pyro_ebm.inference.chains.starts import chain_starts, given_starts
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.kernels.kernel import Kernel
from pyro_ebm.randomness import one_source, random_seed

__all__ = ["MCMC"]

_WARMUP = 500
_SHARE_OF_DIVERGENCES = 1e-3  # of the many transitions of many chains


class MCMC:
    """Run a batched kernel: many chains at once, in this process, as one tensor.

    Changing the imports of a ``pyro.infer`` program is enough; the kernel is one of :class:`ChEES`,
    :class:`HMC`, :class:`MALA`, :class:`ULA`. A hundred chains cost little more than one. During warm-up, chains that
    accept nothing where they started are moved to where others are; ``notes["rescued"]`` of the draws counts them.

    Args:
        kernel: what moves the chains.
        num_samples: draws per chain that are kept.
        warmup_steps: adaptation steps; as many as ``num_samples``, at most 500, when ``None``.
        initial_params: as in Pyro, values in unconstrained space, {site: (num_chains, *shape)}; or points
            (num_chains, dim). Goes before ``init``.
        num_chains: chains.
        init: ``"importance"`` (resampled draws of the guide, or of the prior), ``"prior"``, ``"guide"``,
            ``"uniform"``, or values by site as the model has them, (num_chains, *site_shape).
        guide: for the starting points.
        thin: keep every ``thin``-th draw.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        generator: a source of randomness instead of a seed.
        keep_warmup: keep the warm-up in ``draws.warmup``.
        compile: hand the captured graph to ``torch.compile``: seconds first, then faster.
        capture: ``False`` runs the model at each step.
        progress: show a progress bar.
        disable_progbar: Pyro's word for ``not progress``; either will do.
        strict: raise instead of warn when the draws cannot be trusted.

    Raises:
        TypeError: a kernel that is not one of ours.
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
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | Tensor | None = None,
        num_chains: int = 64,
        *,
        init: str | Mapping[str, Tensor] = "importance",
        guide: Callable[..., Any] | None = None,
        thin: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        keep_warmup: bool = False,
        compile: bool = False,
        capture: bool = True,
        progress: bool = True,
        disable_progbar: bool | None = None,
        strict: bool = False,
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"kernel must be one of ChEES, HMC, MALA, ULA of pyro_ebm, got {type(kernel).__module__}."
                f"{type(kernel).__name__}; Pyro's own kernels run by pyro_nuts(model, ...) and pyro_hmc(model, ...)"
            )
        whole_number("num_samples", num_samples)
        warmup_steps = min(num_samples, _WARMUP) if warmup_steps is None else warmup_steps
        for name, value, least in (
            ("warmup_steps", warmup_steps, 0),
            ("num_chains", num_chains, 1),
            ("thin", thin, 1),
        ):
            whole_number(name, value, at_least=least)
        one_source(seed, generator)
        self.kernel, self.num_samples, self.warmup_steps = kernel, num_samples, warmup_steps
        self.initial_params, self.num_chains, self.init, self.guide = initial_params, num_chains, init, guide
        self.thin, self.seed, self.generator = thin, seed, generator
        self.keep_warmup, self.strict = keep_warmup, strict
        self.progress = progress if disable_progbar is None else not disable_progbar
        self.graph = "compiled" if compile else "captured" if capture else "eager"
        self._draws: Draws | None = None

    def run(self, *args: Any, **kwargs: Any) -> Draws:
        """Warm up and draw.

        Args:
            *args: arguments of the model.
            **kwargs: its keyword arguments.

        Returns:
            Draws with stats ``lp``, ``acceptance_rate``, ``diverging``, ``energy``, ``step_size``, ``n_steps``.
            After Ctrl-C, the draws so far.

        Warns:
            InferenceWarning: when the draws cannot be trusted.
        """
        return self.run_with(self._fixed_number, as_tensors(args), as_tensors(kwargs))

    def _fixed_number(self, chains: Chains) -> dict[str, Any]:
        chains.extend(self.num_samples, thin=self.thin)
        return {}

    def run_with(
        self, drive: Callable[[Chains], Mapping[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Draws:
        """Warm up, and let ``drive`` extend the chains; what it returns goes into the notes of the draws."""
        began = time.perf_counter()
        self._draws = None
        density = self.kernel.density(*args, **kwargs)
        generator = self.generator or torch.Generator().manual_seed(random_seed(self.seed, None))
        # A seed of their own for the starts: from the same stream, the first velocities would equal prior draws.
        u, rule = self._starts(density, random_seed(None, generator))
        if generator.device != u.device:
            generator = torch.Generator(u.device).manual_seed(random_seed(None, generator))
        total = self.warmup_steps + self.num_samples * self.thin
        notes = {"init": rule, "num_samples": self.num_samples, "warmup_steps": self.warmup_steps, "thin": self.thin}
        with tqdm(total=total, desc=self.kernel.name, disable=not self.progress, mininterval=0.5) as bar:
            chains = Chains(self.kernel, density, u, generator=generator, graph=self.graph, bar=bar)
            try:
                chains.warm_up(self.warmup_steps, keep=self.keep_warmup)
                notes.update(drive(chains))
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted during the warm-up: there are no draws yet") from None
        if not len(chains.record):
            raise KeyboardInterrupt("interrupted before the first draw: there are no draws yet")
        self._draws = chains.draws(seconds=time.perf_counter() - began, notes=notes)
        report_chains(
            self._draws,
            strict=self.strict,
            interrupted=chains.interrupted,
            max_divergences=_SHARE_OF_DIVERGENCES,
        )
        return self._draws

    def _starts(self, density: LogDensity, seed: int) -> tuple[Tensor, str]:
        given = self.initial_params
        if given is None:
            return chain_starts(density, self.num_chains, init=self.init, guide=self.guide, seed=seed)
        u = given if isinstance(given, Tensor) else self._packed(density, given)
        return given_starts(density, self.num_chains, u, guide=self.guide), "given"

    def _packed(self, density: LogDensity, params: Mapping[str, Tensor]) -> Tensor:
        if density.target is None:
            raise ValueError("initial_params: this target has no sites; give points, a tensor (num_chains, dim)")
        for site in density.target.sites:
            expected = (self.num_chains, *site.unconstrained_shape)
            got = tuple(params[site.name].shape) if site.name in params else "nothing"
            if self.num_chains == 1 and got == expected[1:]:  # a single chain, as in Pyro
                params = {**params, site.name: params[site.name][None]}
            elif got != expected:
                raise ValueError(
                    f"initial_params[{site.name!r}] must have shape {expected}, unconstrained values with one row a "
                    f"chain, got {got}"
                )
        return density.target.pack(params)

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
        draws = self.draws
        found: dict[str, dict[str, Any]] = {
            site: {"n_eff": torch.from_numpy(ess_bulk(value)), "r_hat": torch.from_numpy(r_hat(value))}
            for site, value in draws.values.items()
        }
        rate = draws.stats["acceptance_rate"]
        diverging = draws.stats["diverging"].reshape(*rate.shape[:2], -1).any(-1)  # any datum's
        chains = range(draws.num_chains)
        found["divergences"] = {f"chain {i}": diverging[i].nonzero().flatten().tolist() for i in chains}
        found["acceptance rate"] = {f"chain {i}": float(rate[i].mean()) for i in chains}
        return found

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's table: mean, sd, median, interval, n_eff, R-hat; then the divergences.

        Args:
            prob: probability of the interval.
        """
        draws = self.draws
        print_summary(draws.values, prob=prob)
        sys.stdout.write(f"Number of divergences: {int(draws.stats['diverging'].sum())}\n")
