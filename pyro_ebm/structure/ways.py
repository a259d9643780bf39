"""The ways in which a model is run for many values at once, and what is raised where none serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["WAYS", "DoesNotBroadcast", "Failure", "candidate_ways", "slowest"]

WAYS = ("plate", "vmap", "loop")  # from the fastest to the one that serves every model


class Failure(NamedTuple):
    """Why a model cannot be run in one way: the first site that shows it, where one does, and what it shows."""

    way: str
    site: str | None
    reason: str


class DoesNotBroadcast(ValueError):
    """A model that none of the ways asked for can run for many values at once.

    Attributes:
        failures: one for each way that was tried.
        ways: their names.
    """

    def __init__(self, failures: Sequence[Failure], depth: int) -> None:
        self.failures = tuple(failures)
        self.ways = tuple(failure.way for failure in failures)
        how = {"plate": f"in an outer plate (an extra batch dimension at {-depth - 1})", "vmap": "under torch.vmap"}
        found = "; ".join(f"{how.get(each.way, each.way)}, {each.reason}" for each in failures)
        remedy = (
            "index from the right (value[..., 0]), sum over dim=-1 and let batch dimensions through (a value comes "
            "as (runs, 1 for each plate that it is outside of, ...))"
        )
        if "vmap" in self.ways:
            remedy += ", avoid Python branches on values, or run the model for one value after another"
        else:
            remedy += ', or leave the model as it is and run it under torch.vmap: vectorize="vmap"'
        super().__init__(f"the model does not broadcast: {found}; {remedy}")


def slowest(*ways: str) -> str:
    """The way to report for a job that runs several models."""
    return max(ways, key=WAYS.index)


def candidate_ways(vectorize: str, ways: Sequence[str] = WAYS) -> tuple[str, ...]:
    """The ways to try, in order.

    Raises:
        ValueError: a name that is none of them.
    """
    if vectorize == "auto":
        return tuple(ways)
    if vectorize not in ways:
        raise ValueError(f"vectorize must be one of {('auto', *ways)}, got {vectorize!r}")
    return (vectorize,)
