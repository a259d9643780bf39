"""Whether chains agree: R-hat against a limit that knows how long the chains are, for tables, warnings and stops alike.

R-hat compares halves of chains. Where they agree it is about ``sqrt(1 + 1 / n)``, with n the effective draws of one half:
the limit of 1.01 asks for n = 50 of each half, which four chains need to know a mean, and which 64 chains need not. Many
chains also know their common autocorrelation well, and with it n. So what R-hat squared exceeds 1 by is judged after
that 1 / n is taken off, all of it for many chains and nothing for four; n counts as ten at least, since a chain that has
hardly moved says nothing of its own. Chains that stay in different places, or drift, exceed the limit as before.

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

__all__ = ["Agreement", "agreement", "component_name"]


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


def agreement(values: Mapping[str, Tensor], limit: float, superchains: int | None = None) -> Agreement:
    """Of all components of all sites, the one that is furthest beyond its limit, or nearest to it.

    Args:
        values: site -> (chain, draw, *shape).
        limit: of the R-hat of long chains.
        superchains: how many groups of chains started at common points, in the order of the chains; ``None``: none.
    """
    worst = Agreement(math.nan, limit, "", superchains is not None)
    furthest = -math.inf
    for site, value in values.items():
        shape = tuple(value.shape[2:])
        if superchains is None:
            found = chain_statistics(value, "r_hat_excess", "r_hat_allowance")
            excess, allowance = (found[name].ravel() for name in ("r_hat_excess", "r_hat_allowance"))
        else:
            excess = nested_r_hat(value, superchains).ravel()
            allowance = np.zeros_like(excess)
        if not len(excess) or np.isnan(excess).all():
            continue
        index = int(np.nanargmax(excess))
        if excess[index] > furthest:
            furthest, extra = float(excess[index]), float(allowance[index])
            hat, own = (math.sqrt(x * x + extra) for x in (furthest, limit))
            worst = Agreement(hat, own, component_name(site, shape, index), superchains is not None)
    return worst


def component_name(site: str, shape: Iterable[int], index: int) -> str:
    """``"mu"``, ``"z[3]"``, ``"w[0,2]"``: the name of one component, numbered as in a flattened value."""
    shape = tuple(shape)
    place: Any = np.unravel_index(index, shape) if shape else ()
    return site + (f"[{','.join(str(int(i)) for i in place)}]" if shape else "")
