"""What a guide must be, to propose the latent sites of a model and to have a density there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ebm.errors import InputError
from pyro_ebm.structure import latent_sites, leaf_of, sample_sites

__all__ = ["by_way_of_others", "check_proposes", "check_supports"]


def check_proposes(sites: list[str], proposed: poutine.Trace) -> None:
    """A proposal must draw every latent site of the model.

    Raises:
        InputError: naming those that it does not.
    """
    found = latent_sites(proposed)
    missing = [site for site in sites if site not in found]
    if missing:
        raise InputError(
            f"guide does not propose the latent site(s) {missing} (it has {sorted(found)}); "
            f"every latent site of the model needs a proposal"
        )


def by_way_of_others(sites: list[str], proposed: poutine.Trace) -> list[str]:
    """Sites that a guide computes from auxiliary draws."""
    if not any(site["infer"].get("is_auxiliary") for site in sample_sites(proposed).values()):
        return []
    return [name for name in sites if isinstance(leaf_of(proposed.nodes[name]["fn"]), Delta)]


def check_supports(supports: Mapping[str, Constraint], proposed: poutine.Trace) -> None:
    """A guide must propose points of the space that the model's sites have.

    Args:
        supports: site -> its support in the model.
        proposed: a run of the guide.

    Raises:
        InputError: naming a site that it proposes elsewhere.
    """
    for name, support in supports.items():
        fn = proposed.nodes[name]["fn"]
        if not isinstance(leaf_of(fn), Delta) and not _alike(fn.support, support, proposed.nodes[name]["value"]):
            raise InputError(
                f"the guide proposes site {name!r} from {type(leaf_of(fn)).__name__}, on {fn.support}, where the model "
                f"has {support}: propose it on the model's support (LogNormal or Gamma for positive numbers, Beta for "
                f"shares, TransformedDistribution for others)"
            )


def _alike(first: Any, second: Any, value: Tensor) -> bool:
    """Whether both supports come from the same points of unconstrained space."""
    u = torch.zeros(biject_to(second).inverse_shape(value.shape), dtype=value.dtype, device=value.device)
    ours, theirs = biject_to(first)(u), biject_to(second)(u)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
