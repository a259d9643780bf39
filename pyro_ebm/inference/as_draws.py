"""Whatever holds draws (ours, Pyro's, a dictionary) as :class:`Draws`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.infer
import torch
from pyro.infer.mcmc.api import AbstractMCMC, StreamingMCMC
from torch import Tensor

from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.structure import observed_sites, prototype_trace

__all__ = ["as_draws", "samples_as_draws"]


def as_draws(draws: Any) -> Draws:
    """The draws of anything that has some.

    Args:
        draws: a :class:`Draws`; an ``MCMC`` after its ``run``, ours or Pyro's; Pyro's ``StreamingMCMC`` where its
            statistics keep the samples (``StatsOfDict(default=StackStats)``); or site -> (sample, *site_shape), as
            ``mcmc.get_samples()`` and ``Predictive`` return: one chain, of no known model.

    Raises:
        TypeError: if it is none of these.
        ValueError: an MCMC that has not run or keeps no samples; samples of different lengths, or that seem to be
            grouped by chain.
    """
    if isinstance(draws, Draws):
        return draws
    if isinstance(draws, MCMC):
        return draws.draws
    if isinstance(draws, AbstractMCMC):
        return _of_pyro(draws)
    if isinstance(draws, Mapping):
        found = samples_as_draws(draws)
        _check_not_by_chain(found.values)
        return found
    raise TypeError(
        f"draws must be a Draws, an MCMC (Pyro's or ours) or samples by site, got {type(draws).__name__}"
    )


def samples_as_draws(samples: Mapping[str, Any]) -> Draws:
    """Samples by site, (sample, *site_shape), as one chain."""
    if not samples:
        raise ValueError("draws: the samples are empty; give site -> (sample, *site_shape)")
    values = {name: torch.as_tensor(value).detach() for name, value in samples.items()}
    values = {name: value for name, value in values.items() if 0 not in value.shape}  # factors
    lengths = {name: value.shape[0] if value.ndim else None for name, value in values.items()}
    if None in lengths.values() or len(set(lengths.values())) != 1:
        raise ValueError(f"draws: all sites must have the same number of samples, the first dimension, got {lengths}")
    return Draws({name: value[None] for name, value in values.items()}, "samples")


def _check_not_by_chain(samples: Mapping[str, Tensor]) -> None:
    leads = {tuple(value.shape[1:3]) for value in samples.values()}
    lead = leads.pop()
    if not leads and len(lead) == 2 and lead[0] < lead[1]:
        raise ValueError(
            f"draws: samples of shapes {[tuple(v.shape[1:]) for v in samples.values()]} may be grouped by chain, or "
            f"one chain of {lead[0]} samples; say which: Draws(samples, 'nuts') takes (chain, draw, *site_shape)"
        )


def _of_pyro(mcmc: Any) -> Draws:
    """What a stock MCMC object remembers of its run."""
    values = _kept_samples(mcmc) if isinstance(mcmc, StreamingMCMC) else mcmc._samples
    if values is None:
        raise ValueError("draws: this MCMC has no samples; call its run(...) first")
    values = {name: value.detach() for name, value in values.items()}
    if not values:
        raise ValueError("draws: this MCMC has no latent sites")
    kernel: Any = mcmc.kernel
    source, observed = None, {}
    if getattr(kernel, "model", None) is not None:
        source = Source(kernel.model, tuple(mcmc._args or ()), dict(mcmc._kwargs or {}))
        observed = observed_sites(prototype_trace(kernel.model, source.args, source.kwargs))
    notes = {
        "inference_library": "pyro",
        "kernel": type(kernel).__name__,
        "warmup_steps": mcmc.warmup_steps,
        "acceptance_rate": "share of accepted moves over the whole chain, the same for each of its draws",
    }
    shape = tuple(next(iter(values.values())).shape[:2])
    method, stats = type(kernel).__name__.lower(), _stats_of_pyro(mcmc, shape)
    return Draws(values, method, stats=stats, observed=observed, notes=notes, source=source)


def _stats_of_pyro(mcmc: pyro.infer.MCMC, shape: tuple[int, ...]) -> dict[str, Tensor]:
    stats: dict[str, Tensor] = {}
    # not mcmc.diagnostics(): it also computes ESS and R-hat of every site, and fails on short runs
    found: list[dict[str, Any]] = [entry or {} for entry in mcmc._diagnostics]
    if all("divergences" in entry for entry in found):
        stats["diverging"] = torch.zeros(shape, dtype=torch.bool)
        for chain, entry in enumerate(found):
            stats["diverging"][chain, entry["divergences"]] = True
    if all("acceptance rate" in entry for entry in found):
        rates = torch.tensor([float(entry["acceptance rate"]) for entry in found])
        stats["acceptance_rate"] = rates[:, None].expand(shape)
    return stats


def _kept_samples(mcmc: Any) -> dict[str, Tensor] | None:
    """Samples (chain, draw, *site_shape) of a streaming run; None before it."""
    found = mcmc.get_statistics()
    if not found:
        return None
    samples: dict[str, list[Tensor]] = {}
    for (_, name), statistics in sorted(found.items(), key=lambda item: item[0][0]):
        if "samples" not in statistics:
            raise ValueError(
                f"draws: this StreamingMCMC keeps statistics ({sorted(statistics)}) and no samples; make it with "
                f"statistics=StatsOfDict(default=StackStats) of pyro.ops.streaming, or use MCMC"
            )
        samples.setdefault(name, []).append(statistics["samples"])
    return {name: torch.stack(chains) for name, chains in samples.items()}
