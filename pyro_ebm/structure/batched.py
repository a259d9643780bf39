"""Run a model for many values of its sites at once: as an outer plate, under ``torch.vmap``, or one after another."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.deadline import check_time
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.numerics import FailuresAsNaN, by_halves, failed_numerically
from pyro_ebm.randomness import forked_rng
from pyro_ebm.structure.agreement import Batch, difference, differing, joined
from pyro_ebm.structure.sites import (
    event_dim_of,
    is_deterministic,
    is_factor,
    keep_dims,
    padded_shape,
    plate_depth,
    prototype_trace,
    sample_sites,
    subsampling_scale,
    unvalidated,
)
from pyro_ebm.structure.vmapped import DrawsApart
from pyro_ebm.structure.ways import WAYS, DoesNotBroadcast, Failure, candidate_ways

__all__ = ["Batch", "BatchedModel", "Layout", "batched_run", "nothing"]

_MOST_STACKED = 12  # scalar sites that somebody puts together by hand
_OUTER_PLATES = 8  # as many may lie around a model that is run in a plate of its own

Site = Mapping[str, Any]
Measure = Callable[[str, Site], Tensor | None]


@dataclass(frozen=True)
class Layout:
    """Where the sites of a model sit in one run.

    Args:
        depth: number of dims, from the right, that plates use.
        shapes: site -> shape of its value, factors left out.
        event_dims: site -> number of rightmost dims that are one event.
        latent: sites that are drawn.
        subsampled: whether a plate sees only part of its elements, others in each run.
    """

    depth: int
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    event_dims: Mapping[str, int] = field(default_factory=dict)
    latent: tuple[str, ...] = ()
    subsampled: bool = False

    @classmethod
    def of(cls, trace: poutine.Trace) -> Layout:
        """The layout that a run shows."""
        sites = {name: site for name, site in sample_sites(trace).items() if not is_factor(site)}
        return cls(
            plate_depth(trace),
            {name: torch.Size(site["value"].shape) for name, site in sites.items()},
            {name: event_dim_of(site) for name, site in sites.items()},
            tuple(name for name, site in sites.items() if not site["is_observed"] and not is_deterministic(site)),
            any(subsampling_scale(site) != 1 for site in sample_sites(trace).values()),
        )


def nothing(name: str, site: Site) -> None:
    """For runs of which only the values are wanted: measures no site."""


def batched_run(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    values: Mapping[str, Tensor] | None = None,
    num: int | None = None,
    *,
    vectorize: str = "auto",
) -> Batch:
    """Run a model once for each of many values of its sites; sites without values are drawn.

    Args:
        model: any Pyro model.
        args: its arguments, the same for all runs.
        kwargs: likewise.
        values: site -> (num, *site_shape), for some of its sites or none.
        num: number of runs; that of the values by default.
        vectorize: ``"auto"``: an outer plate left of all plates of the model; where the model gives other
            numbers there than alone, or fails, ``torch.vmap``; where that does not serve either, a loop. Or one of
            these ways: ``"plate"``, ``"vmap"``, ``"loop"``.

    Returns:
        Values and log probabilities of all sites, and the way that ran.

    Raises:
        DoesNotBroadcast: where the one way asked for does not serve the model.
        ValueError: values that do not fit the model.
    """
    return BatchedModel(model, args, kwargs or {}, vectorize=vectorize).run(values, num)


class BatchedModel:
    """A model to be run for many values, in a way that is found once and kept.

    Args:
        model: any Pyro model.
        args: its arguments.
        kwargs: likewise.
        vectorize: as in :func:`batched_run`.
        ways: those that ``"auto"`` may choose from.
        layout: where the sites sit, if known; else the model is run once to see.
        returned: sites whose values runs return; all by default.
        keep: plate dims (negative, ascending) that log probabilities are not summed over.

    Attributes:
        way: the way found by :meth:`choose`; None before.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        vectorize: str = "auto",
        ways: Sequence[str] = WAYS,
        layout: Layout | None = None,
        returned: Sequence[str] | None = None,
        keep: tuple[int, ...] = (),
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.candidates = candidate_ways(vectorize, ways)
        self.layout = Layout.of(prototype_trace(model, args, kwargs)) if layout is None else layout
        self.returned = tuple(self.layout.shapes) if returned is None else tuple(returned)
        self.keep = keep
        self.way: str | None = None

    def run(
        self, values: Mapping[str, Tensor] | None = None, num: int | None = None, *, measure: Measure | None = None
    ) -> Batch:
        """Run the model, in the way that was chosen (now, if none was yet): torch's global generator.

        Args:
            values: site -> (num, *site_shape), for some sites or none.
            num: number of runs; that of the values by default.
            measure: what is measured at a site, as a tensor of its batch shape, or None for nothing; by default
                its log probability, scaled and masked.
        """
        values = values or {}
        num = self._checked(values, num)
        way = self.way or self.choose(values)
        with pyro.validation_enabled(False):  # what is out of bounds in one run is not an error of all
            return self._run(way, values, num, self.returned, measure)

    @torch.no_grad()
    def choose(self, values: Mapping[str, Tensor] | None = None, *, measure: Measure | None = None) -> str:
        """Find the first way in which several runs at once give what each gives alone.

        Args:
            values: some of those that runs will be given; sites without are drawn.
            measure: what runs will measure beside log probabilities; it need only work.

        Raises:
            DoesNotBroadcast: where there is none.
        """
        failures = []
        for way in self.candidates:
            failure = None if way == "loop" else self._failure(way, values or {}, measure)
            if failure is None:
                self.way = way
                return way
            failures.append(failure)
        raise DoesNotBroadcast(failures, self.layout.depth)

    def _checked(self, values: Mapping[str, Tensor], num: int | None) -> int:
        for name, value in values.items():
            shape = self.layout.shapes.get(name)
            if shape is None or value.ndim == 0 or value.shape[1:] != shape:
                due = f"one of the sites {sorted(self.layout.shapes)}" if shape is None else tuple(shape)
                raise ValueError(
                    f"values of site {name!r}, of shape {tuple(value.shape[1:])}, do not fit the model, which has "
                    f"{due}; pass the arguments (data of the same size) that they were made with"
                )
            num = len(value) if num is None else num
            if len(value) != num:
                raise ValueError(f"values[{name!r}] must have {num} rows, one a run, got {len(value)}")
        if num is None:
            raise ValueError("num is needed where no values are given")
        return num

    def _failure(self, way: str, values: Mapping[str, Tensor], measure: Measure | None) -> Failure | None:
        """The one check of a way: several runs at once against each alone."""
        num = _number_of_test_runs(self.layout)
        given = {name: value[torch.arange(num, device=value.device) % len(value)] for name, value in values.items()}
        drawn = [name for name in self.layout.latent if name not in given]
        returned = tuple(dict.fromkeys((*self.returned, *drawn)))
        with forked_rng(0), poutine.block(), evaluation_mode(self.model), pyro.validation_enabled(False):
            try:
                together = self._run(way, given, num, returned)
                if measure is not None:
                    with torch.enable_grad():  # under which other operations may run
                        self._run(way, given, num, (), measure)
                if self.layout.subsampled:  # other elements in each run: nothing to compare
                    return None
                every = given | {name: together.values[name] for name in drawn}
                alone = self._run("loop", every, num, returned)
                failure = difference(way, together, alone)
                if failure is None:
                    return None
                again = self._run("loop", every, num, returned)
            except Exception as error:  # whatever the model's own code raises where shapes are not as it expects
                return Failure(way, None, _told(error))
        # A model may draw numbers of its own: what differs from run to run anyway tells nothing.
        return difference(way, together, alone, but=differing(alone, again))

    def _run(
        self, way: str, values: Mapping[str, Tensor], num: int, returned: Sequence[str], measure: Measure | None = None
    ) -> Batch:
        """All runs; where numbers of one fail, the measure is that of nothing, minus infinity, and the others go on."""
        try:
            return self._run_all(way, values, num, returned, measure)
        except Exception as error:
            if num == 1 or not failed_numerically(error):
                raise
            first = error

        def part(start: int, stop: int) -> Batch:
            rows = {name: value[start:stop] for name, value in values.items()}
            return self._run_all(way, rows, stop - start, returned, measure)

        with FailuresAsNaN():
            parts = by_halves(part, num)
        if all(batch is None for _, batch in parts):
            raise first
        return joined(parts, way)

    def _run_all(
        self, way: str, values: Mapping[str, Tensor], num: int, returned: Sequence[str], measure: Measure | None
    ) -> Batch:
        if way == "plate":
            return self._in_plate(values, num, returned, measure)
        single = functools.partial(self._single, returned=returned, measure=measure)
        if way == "vmap":
            if all(name in values for name in self.layout.latent):
                found, measured = _vmap(single, dict(values))
            else:
                found, measured = _vmap(_drawing(single), dict(values), torch.zeros(num))
            return Batch(found, measured, way)
        runs = [single({name: value[index] for name, value in values.items()}) for index in range(num)]
        return Batch(_stacked([found for found, _ in runs]), _stacked([measured for _, measured in runs]), way)

    def _single(
        self, row: Mapping[str, Tensor], *, returned: Sequence[str], measure: Measure | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One run: values and what was measured, by site."""
        trace = self._trace(row)
        found = {name: _in_shape(trace, name, self.layout.shapes[name]) for name in returned}
        return found, _measured(trace, self.keep, measure)

    def _in_plate(
        self, values: Mapping[str, Tensor], num: int, returned: Sequence[str], measure: Measure | None
    ) -> Batch:
        layout = self.layout
        with _free_plate(num, layout.depth) as dim:
            padded = {
                name: padded_shape(layout.shapes[name], layout.event_dims[name], -dim - 1)
                for name in (*values, *returned)
            }
            # Size-1 dims so that the dim of the runs lands left of all plates.
            data = {name: value.reshape(num, *padded[name]) for name, value in values.items()}
            trace = self._trace(data)
            measured = _measured(trace, (dim, *self.keep), measure)
        found = {}
        for name in returned:
            value, shape = trace.nodes[name]["value"], layout.shapes[name]
            if value.numel() != num * shape.numel():
                value = value.expand(num, *padded[name])
            found[name] = value.reshape(num, *shape)
        return Batch(found, {name: each.expand(num, *each.shape[1:]) for name, each in measured.items()}, "plate")

    def _trace(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        check_time()
        tracer = poutine.trace(poutine.condition(self.model, data=dict(values)))
        try:
            trace = tracer.get_trace(*self.args, **self.kwargs)
        except Exception as error:
            error.add_note(_reached(tracer.msngr.trace))
            raise
        for site in sample_sites(trace).values():
            site["fn"] = unvalidated(site["fn"])
        return trace


def _measured(trace: poutine.Trace, keep: tuple[int, ...], measure: Measure | None) -> dict[str, Tensor]:
    """Site -> (*kept), of a run alone; (runs, *kept) of one in a plate, whose dim is kept too."""
    sites = sample_sites(trace)
    if measure is None:
        trace.compute_log_prob()
        return {name: keep_dims(site["log_prob"], keep) for name, site in sites.items()}
    found = {name: measure(name, site) for name, site in sites.items()}
    return {name: keep_dims(each, keep) for name, each in found.items() if each is not None}


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = rows[0] if rows else {}
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"the model has other sites in some runs than {sorted(names)}: give it the same in each")
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def _in_shape(trace: poutine.Trace, name: str, shape: torch.Size) -> Tensor:
    value = trace.nodes[name]["value"]
    if value.shape != shape:
        raise ValueError(f"site {name!r} has shape {tuple(value.shape)} in one run and {tuple(shape)} in another")
    return value


def _vmap(function: Callable[..., Any], *rows: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # where torch has to loop
        return torch.vmap(function, randomness="different")(*rows)


def _drawing(single: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Tensor], Tensor], Any]:
    def draw(row: dict[str, Tensor], zero: Tensor) -> Any:
        with DrawsApart(zero):
            return single(row)

    return draw


def _number_of_test_runs(layout: Layout) -> int:
    """A number that neither a site has as a size nor a stack of sites, so that no shapes fit by accident."""
    sizes = {size for shape in layout.shapes.values() for size in shape}
    least = min(len(layout.latent), _MOST_STACKED) + 1
    return next(number for number in range(max(least, 2), max(least, 2) + len(sizes) + 1) if number not in sizes)


def _told(error: Exception) -> str:
    """The first line of an error (of torch.vmap's the first sentence), and how far the run came."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    if text.startswith("vmap: "):  # what torch says then is for those who work on torch
        text = text.partition(". ")[0]
    return text + "".join(getattr(error, "__notes__", ()))


def _reached(trace: poutine.Trace) -> str:
    """How far a run came, as text."""
    sites = list(sample_sites(trace))
    return f" (after site {sites[-1]!r})" if sites else " (before the first site)"


@contextmanager
def _free_plate(size: int, depth: int) -> Iterator[int]:
    """In a plate at the first free dim left of the model's own: others (chains, particles) may be around it."""
    for dim in range(-depth - 1, -depth - 1 - _OUTER_PLATES, -1):
        plate = pyro.plate(f"_runs{-dim}", size, dim=dim)
        try:
            plate.__enter__()
        except ValueError:  # this dim is taken
            continue
        try:
            yield dim
        finally:
            plate.__exit__(None, None, None)
        return
    raise ValueError(f"no free dimension for many runs of a model: at most {_OUTER_PLATES - 1} plates around it")
