"""Many runs of a model, and whether several at once gave what each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.structure.ways import Failure

__all__ = ["Batch", "difference", "differing", "joined"]


class Batch(NamedTuple):
    """Many runs of a model.

    Args:
        values: site -> (num, *site_shape), for the sites asked for.
        measured: site -> (num, *kept), what was measured at each site: by default its log probability.
        way: ``"plate"``, ``"vmap"`` or ``"loop"``.
    """

    values: dict[str, Tensor]
    measured: dict[str, Tensor]
    way: str

    @property
    def total(self) -> Tensor:
        """Sum over the sites of what was measured, (num, *kept)."""
        first, *others = self.measured.values()
        return sum(others, start=first)


def difference(way: str, together: Batch, alone: Batch, but: Collection[tuple[str, str]] = ()) -> Failure | None:
    """The first difference that matters between runs at once and runs alone; None where there is none.

    Args:
        way: how the runs at once were made.
        together: those.
        alone: the same, one after another.
        but: what not to compare, as :func:`differing` lists it.
    """
    for what, name in _disagreements(together, alone):
        if (what, name) not in but:
            return Failure(way, name, f"site {name!r} gives other {what} for several runs at once than for each alone")
    return None


def differing(first: Batch, second: Batch) -> set[tuple[str, str]]:
    """What differs between two batches of the same runs, (what, site): random beyond the sites' values."""
    return set(_disagreements(first, second))


def _disagreements(first: Batch, second: Batch) -> Iterator[tuple[str, str]]:
    for what, ours, theirs in (
        ("log probabilities", first.measured, second.measured),
        ("values", first.values, second.values),
    ):
        for name in dict.fromkeys((*theirs, *ours)):
            if name not in ours or name not in theirs or not _agree(ours[name], theirs[name]):
                yield what, name


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        ours, theirs = torch.broadcast_tensors(ours, theirs)
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)


def joined(parts: Sequence[tuple[int, Batch | None]], way: str) -> Batch:
    """Parts of many runs as one; one that failed has no density, and some values, those of another."""
    example = next(batch for _, batch in parts if batch is not None)

    def together(pick: Callable[[Batch], Mapping[str, Tensor]], blank: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat([blank(like[:1]) if batch is None else pick(batch)[name] for _, batch in parts])
            for name, like in pick(example).items()
        }

    measured = together(lambda batch: batch.measured, lambda like: torch.full_like(like, -torch.inf))
    measured = {name: torch.where(each.isnan(), -torch.inf, each) for name, each in measured.items()}
    return Batch(together(lambda batch: batch.values, torch.clone), measured, way)
