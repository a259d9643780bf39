"""Where Markov chains start: at resampled importance draws, at Pyro's uniform ones, or where the user says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor

from pyro_ebm.deadline import interruptions_pass
from pyro_ebm.errors import InferenceWarning
from pyro_ebm.inference.chains.starts import LEAST_WORTH
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import importance
from pyro_ebm.inference.resampling import apart, tempered
from pyro_ebm.numerics import until_numbers_hold
from pyro_ebm.structure import DoesNotBroadcast

__all__ = ["INITS", "StartingPoints"]

INITS = ("importance", "uniform")
_POOL = 2000
_SMALL_POOL = 200  # where the model is run for one draw after another


@dataclass(frozen=True)
class StartingPoints:
    """Finds one starting point a chain.

    Args:
        model: the target.
        args: its arguments.
        kwargs: its keyword arguments.
        potential: minus its log density, a function of unconstrained values by site.
        transforms: site -> transform to unconstrained space, for each site that moves.
        shapes: site -> shape of its value.
        num_chains: how many points.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    potential: Callable[..., Tensor]
    transforms: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]
    num_chains: int

    def find(self, init: str | Mapping[str, Tensor], guide: Callable[..., Any] | None) -> tuple[dict[str, Tensor], str]:
        """Unconstrained points, site -> (num_chains, *shape), and the name of the rule that gave them."""
        if not isinstance(init, str):
            return self._given(init), "given"
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS} or a mapping of values, got {init!r}")
        with interruptions_pass():  # draws so far are no starting points
            points = self._resampled(guide) if init == "importance" else None
        if points is None or self._first_bad(points) is not None:
            return self._uniform(), "uniform"
        return points, "importance"

    def _given(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name in self.transforms:
            expected = (self.num_chains, *self.shapes[name])
            got = tuple(values[name].shape) if name in values else "nothing"
            if got != expected:
                raise ValueError(f"init[{name!r}] must have shape {expected}, one row a chain, got {got}")
        points = self._unconstrained(values)
        bad = self._first_bad(points)
        if bad is not None:
            raise ValueError(
                f"init: the density at the values for chain {bad} is zero or not finite; "
                f"give values inside the support of every site"
            )
        return points

    def _resampled(self, guide: Callable[..., Any] | None) -> dict[str, Tensor] | None:
        """Importance draws; None where there is no guide and the model's own prior cannot serve as one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)  # only starting points: chains do the rest
            try:
                values = self._chosen(self._pool(guide))
            except (RuntimeError, ValueError, IndexError, TypeError):
                if guide is not None:
                    raise
                return None  # the prior never meets the target
        return self._unconstrained(values) if all(name in values for name in self.transforms) else None

    def _pool(self, guide: Callable[..., Any] | None) -> Draws:
        options: dict[str, Any] = {"model_kwargs": self.kwargs}
        for way in ("plate", "vmap"):
            with suppress(DoesNotBroadcast):
                return importance(self.model, guide, *self.args, num_samples=_POOL, vectorize=way, **options)
        return importance(self.model, guide, *self.args, num_samples=_SMALL_POOL, vectorize="loop", **options)

    def _chosen(self, pool: Draws) -> dict[str, Tensor]:
        """Draws chosen by tempered weights: by those of a narrow posterior all chains would start at one point."""
        logs: Tensor = pool.log_weights  # type: ignore[assignment]  # importance draws
        if bool(logs.isnan().any()):
            raise ValueError("no draw has positive density")
        rows = torch.cat([value.reshape(pool.num_draws, -1) for value in pool.values.values()], 1)
        index = apart(rows, tempered(logs.flatten(), LEAST_WORTH), self.num_chains)
        return {site: pool.flat(site)[index] for site in pool.values}

    def _unconstrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: transform(values[name]).detach() for name, transform in self.transforms.items()}

    def _first_bad(self, points: Mapping[str, Tensor]) -> int | None:
        """The first chain that would start where the density is zero or not finite."""
        with pyro.validation_enabled(False):
            for index in range(self.num_chains):
                start = {name: value[index].clone() for name, value in points.items()}
                if not bool(potential_grad(self.potential, start)[1].isfinite()):
                    return index
        return None

    def _uniform(self) -> dict[str, Tensor]:
        with pyro.validation_enabled(False):
            sets = [until_numbers_hold(self._found_by_pyro) for _ in range(self.num_chains)]
        return {name: torch.stack([params[name] for params in sets]) for name in sets[0]}

    def _found_by_pyro(self, attempt: int) -> dict[str, Tensor]:
        return initialize_model(self.model, self.args, self.kwargs)[0]
