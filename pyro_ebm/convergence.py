"""Whether chains agree: R-hat against a limit that knows how long the chains are, for tables, warnings and stops alike.

R-hat compares halves of chains. Where they agree it is about ``sqrt(1 + 1 / n)``, n the effective draws of one half.
The limit of 1.01 asks for n = 50 of each half, which four chains need to know a mean, and which 64 chains need not.
Many chains also know their common autocorrelation well, and with it n. So what R-hat squared exceeds 1 by is judged
after that 1 / n is taken off, all of it for many chains and nothing for four; n counts as ten at least, since a chain
that has hardly moved says nothing of its own. Chains that stay in different places, or drift, exceed the limit as
before. From 64 chains on chance adds less, and one chain astray shows less: what is left may then be less, as one by
the root of their number.

Where chains start in groups at common points (``superchains``), nested R-hat judges instead: what groups differ by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_ebm.chain_statistics import chain_statistics, nested_r_hat
from pyro_ebm.thresholds import above

__all__ = ["Agreement", "agreement", "component_name", "superchains_of", "worst_agreement"]

_MANY = 64  # chains


class Agreement(NamedTuple):
    """The component on which chains agree least, as the limits for their length see it.

    Args:
        r_hat: of it; NaN where no component has one.
        limit: what it may be.
        where: its name, as ``"z[3]"``.
        nested: whether both are of nested R-hat.
    """

    r_hat: float
    limit: float
    where: str
    nested: bool = False

    @property
    def holds(self) -> bool:
        """Whether the chains agree; not where nothing is known."""
        return self.r_hat <= self.limit

    @property
    def disagrees(self) -> bool:
        """Whether the chains are known to disagree."""
        return self.r_hat > self.limit

    def told(self) -> str:
        """``R-hat 1.08 > 1.01 at z[3]``."""
        limit = float(f"{self.limit:.4g}")
        return f"{'nested ' if self.nested else ''}R-hat {above(max(self.r_hat, limit), limit)} at {self.where}"


def agreement(
    values: Mapping[str, Tensor], limit: float, superchains: int | None = None, *, in_time: bool = True
) -> Agreement:
    """Of all components of all sites, the one that is furthest beyond its limit, or nearest to it.

    Args:
        values: site -> (chain, draw, *shape).
        limit: of the R-hat of long chains.
        superchains: how many groups of chains started at common points, in the order of the chains; ``None``: none.
        in_time: whether draws follow each other, as those of chains do. The limit of particles is as given.
    """
    parts, names = [], []
    for site, value in values.items():
        shape = tuple(value.shape[2:])
        if superchains is None:
            found = chain_statistics(value, *(("r_hat_excess", "r_hat_allowance") if in_time else ("r_hat",)))
            hats, *explained = (each.ravel() for each in found.values())
            parts.append([hats, *(explained or [np.zeros_like(hats)])])
        else:
            nested = nested_r_hat(value, superchains).ravel()
            parts.append([nested, np.zeros_like(nested)])
        names += [(site, shape, index) for index in range(math.prod(shape))]
    if not names:
        return Agreement(math.nan, limit, "")
    excess, allowance = (np.concatenate(column) for column in zip(*parts, strict=True))
    chains = max(len(value) for value in values.values())
    worst, index = worst_agreement(excess, allowance, limit, chains if superchains is None and in_time else 0)
    return worst._replace(where=component_name(*names[index]), nested=superchains is not None)


def worst_agreement(excess: Any, allowance: Any, limit: float, chains: int) -> tuple[Agreement, int]:
    """The worst of some components, and its position.

    Args:
        excess: (component,), the statistic ``"r_hat_excess"``; NaN where there is none.
        allowance: (component,), ``"r_hat_allowance"``.
        limit: of the R-hat of long chains.
        chains: how many there are.
    """
    excess, allowance = np.asarray(excess), np.asarray(allowance)
    allowed = (limit * limit - 1) * min(1.0, math.sqrt(_MANY / max(chains, 1)))
    if np.isnan(excess).all():
        return Agreement(math.nan, math.sqrt(1 + allowed), ""), 0
    index = int(np.nanargmax(excess))
    extra = float(allowance[index])
    return Agreement(math.sqrt(float(excess[index]) ** 2 + extra), math.sqrt(1 + allowed + extra), ""), index


def component_name(site: str, shape: Iterable[int], index: int) -> str:
    """``"mu"``, ``"z[3]"``, ``"w[0,2]"``: the name of one component, numbered as in a flattened value."""
    shape = tuple(shape)
    place: Any = np.unravel_index(index, shape) if shape else ()
    return site + (f"[{','.join(str(int(i)) for i in place)}]" if shape else "")


def superchains_of(draws: Any) -> int | None:
    """How many groups of chains of the draws started at common points, where they say so."""
    groups = draws.notes.get("superchains")
    known = isinstance(groups, int) and groups > 1 and draws.num_chains % groups == 0
    return groups if known else None
