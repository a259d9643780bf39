"""Which variable belongs to which of ArviZ's groups, by chain and draw, and what its dimensions are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.checks import whole_number
from pyro_ebm.errors import warn_user
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.pointwise import ModelSites

__all__ = ["SAMPLE_DIMS", "Pairing", "auto_dims", "fewer_chains", "renamed", "split_prior", "without_known"]

SAMPLE_DIMS = ("chain", "draw")
Arrays = Mapping[str, Any]


class Pairing:
    """How samples by site become (chain, draw, *site_shape): as the posterior's where they belong to its draws.

    Args:
        draws: the posterior, all its chains.
        chains: the chains that are kept.
        shapes: site -> shape of its value, as far as known.
        rows: of resampled draws, (draw,): the positions of theirs among the weighted ones.
        num_weighted: how many of these there were; so many samples belong to them.
    """

    def __init__(
        self,
        draws: Draws,
        chains: Tensor,
        shapes: Mapping[str, Sequence[int]],
        *,
        rows: Tensor | None = None,
        num_weighted: int = 0,
    ) -> None:
        self.lead = None if draws.log_weights is not None else (draws.num_chains, draws.num_draws)
        self.chains, self.shapes = chains, shapes
        self.rows, self.num_weighted = rows, num_weighted

    def __call__(self, group: str, samples: Arrays | None, *, paired: bool = False) -> dict[str, Tensor]:
        """The group's variables; dimensions of size one that Pyro puts before a site's own are dropped.

        Args:
            group: its name, for errors.
            samples: site -> (sample, *site_shape) or, if paired, (chain, draw, *site_shape).
            paired: whether samples as many as the posterior's draws belong to these, in their order.
        """
        if samples is not None and not isinstance(samples, Mapping):
            raise TypeError(f"{group} must map sites to samples, got {type(samples).__name__}")
        lead = self.lead if paired else None
        return {name: self._one(group, name, value, lead) for name, value in (samples or {}).items()}

    def _one(self, group: str, name: str, value: Any, lead: tuple[int, int] | None) -> Tensor:
        tensor = torch.as_tensor(value).detach()
        if tensor.ndim < 1:
            raise ValueError(f"{group}: {name!r} must have shape (sample, *site_shape), got {tuple(tensor.shape)}")
        known = self.shapes.get(name)
        if lead is not None and self.rows is not None and len(tensor) == self.num_weighted != math.prod(lead):
            tensor = tensor[self.rows.to(tensor.device)]
        if lead is not None and tensor.shape[0] == math.prod(lead):
            tensor = tensor.reshape(*lead, *tensor.shape[1:])[self.chains]
        elif lead is not None and tuple(tensor.shape[:2]) == lead:
            tensor = tensor[self.chains]
        else:
            tensor = tensor[None]
        least = 2 + (len(known) if known is not None else 0 if lead is None else tensor.ndim - 2)
        while tensor.ndim > least and tensor.shape[2] == 1:
            tensor = tensor.squeeze(2)
        return tensor


def fewer_chains(draws: Draws, chains: int | None) -> Tensor:
    """The chains to keep, evenly spread over those there are."""
    if chains is None or chains >= draws.num_chains:
        return torch.arange(draws.num_chains, device="cpu")
    whole_number("chains", chains)
    return torch.arange(chains, device="cpu") * draws.num_chains // chains


def without_known(samples: Mapping[str, Tensor], posterior: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Posterior predictive samples without the posterior's own values, which a predictive hands through."""
    return {name: value for name, value in samples.items() if name not in posterior or _is_new(value, posterior[name])}


def _is_new(value: Tensor, posterior: Tensor) -> bool:
    if value.shape[2:] != posterior.shape[2:]:
        return True  # for other data
    if value.shape != posterior.shape:
        return False  # drawn from them
    return not torch.allclose(value.double(), posterior.to(value.device).double(), rtol=1e-3, atol=1e-5, equal_nan=True)


def split_prior(samples: Mapping[str, Tensor], parameters: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Group ``prior`` for what the posterior has too, ``prior_predictive`` for the rest."""
    known = set(parameters)
    return {
        "prior": {name: value for name, value in samples.items() if name in known},
        "prior_predictive": {name: value for name, value in samples.items() if name not in known},
    }


def auto_dims(sites: ModelSites) -> dict[str, tuple[str | None, ...]]:
    """Names of dimensions after the plates they lie in; None where the default is to be used."""
    return {
        name: tuple(None if plate is None else _free_name(plate.replace("/", "."), SAMPLE_DIMS) for plate in plates)
        for name, plates in sites.plates.items()
    }


def renamed(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Site -> name of its variable, where that has to differ: ``/`` separates groups, chain and draw are dimensions.

    Warns:
        UserWarning: of sites called ``chain`` or ``draw``.
    """
    taken = {name for sites in groups.values() for name in sites}
    names = {name: name.replace("/", ".") for name in taken if "/" in name}
    for name in sorted(taken & set(SAMPLE_DIMS)):
        names[name] = _free_name(name, {*taken, *SAMPLE_DIMS})
        warn_user(
            f"the site {name!r} is called {names[name]!r} here: ArviZ calls its dimensions {SAMPLE_DIMS}", UserWarning
        )
    return names


def _free_name(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += "_"
    return name
