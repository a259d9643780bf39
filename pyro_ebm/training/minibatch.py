"""What a minibatch counts for: sites outside the data's plate belong to all data, and a batch to a part of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import forked_rng

__all__ = ["Parts", "Shares", "Survey", "lone_datum_told", "num_data_of", "survey"]

Run = Callable[..., object]
_NUMBER = re.compile(r"\d+")


def num_data_of(batch: Sequence[Tensor]) -> int:
    """How many data a minibatch has; one where the model holds its data itself and is given none."""
    return batch[0].shape[0] if batch else 1


@contextmanager
def lone_datum_told(batch: Sequence[Tensor]) -> Iterator[None]:
    """What batch normalization says of a minibatch of one datum, by the argument that made it."""
    try:
        yield
    except ValueError as error:
        if num_data_of(batch) > 1 or "more than 1 value" not in str(error):
            raise
        raise ValueError(
            "batch_size: a minibatch has one datum alone, the last of a pass, and batch normalization needs two: "
            "choose another batch_size, or give a DataLoader with drop_last=True"
        ) from error


@dataclass(frozen=True)
class Shares:
    r"""What a minibatch counts for, as in Pyro's ``plate(size, subsample_size=)``, per datum of the training data.

    The loss of a minibatch of ``b`` data is their own part, and ``b / n`` of what belongs to all ``n``: the priors of
    sites outside the data's plate. Where the model scales its minibatch up itself, its loss is that of all data.

    Args:
        outside: sites that belong to all data.
        num_data: how many these are; None: nobody knows.
        full_size: of the plate that scales the minibatch up; None: there is none.
        plates: along the data.
        weighted: whether the last tensor of a minibatch has the weights of its data.
    """

    outside: frozenset[str] = frozenset()
    num_data: int | None = None
    full_size: int | None = None
    plates: frozenset[str] = frozenset()
    weighted: bool = False

    def arguments(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What of a minibatch model and guide are called with."""
        return batch[:-1] if self.weighted else batch

    def counting(self, batch: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Within this block data count by their weights, and the sites that belong to all data in part."""
        num, weights = num_data_of(batch), batch[-1] if self.weighted else None
        factor = 1.0 if self.num_data is None else num / self.num_data
        if weights is None and (not self.outside or factor == 1):
            return nullcontext()
        return _Scaled(self.outside, factor, self.plates, weights)

    def divisor(self, batch: Sequence[Tensor]) -> int:
        """What turns the loss of a minibatch into a loss per datum."""
        return num_data_of(batch) if self.full_size is None else self.full_size


class _Scaled(Messenger):
    """Scales some sites by a factor, and those in some plates by weights along these."""

    def __init__(
        self, sites: frozenset[str], factor: float, plates: frozenset[str], weights: Tensor | None
    ) -> None:
        super().__init__()
        self.sites, self.factor, self.plates, self.weights = sites, factor, plates, weights

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            msg["scale"] = msg["scale"] * self.factor
        elif self.weights is not None and not site_is_subsample(msg):
            for frame in msg["cond_indep_stack"]:
                if frame.name in self.plates and frame.dim is not None:
                    msg["scale"] = msg["scale"] * self.weights.reshape(-1, *[1] * (-frame.dim - 1))


@dataclass
class Survey:
    """What a first look at a loss showed.

    Attributes:
        shares: what a minibatch counts for.
        params: names of the ``pyro.param`` statements that it met, those of PyroModules and ``pyro.module`` included.
        unshared: sites that belong to all data, where nobody knows how many these are.
        plate: the plate that scales the minibatch up.
        inside: sites that change with the minibatch.
        last_row: sites that a minibatch without its last datum has not.
    """

    shares: Shares = field(default_factory=Shares)
    params: list[str] = field(default_factory=list)
    unshared: list[str] = field(default_factory=list)
    plate: str | None = None
    inside: frozenset[str] = frozenset()
    last_row: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Parts:
    """What a loss will be given: a minibatch, those of other sizes, and what they are parts of."""

    batch: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()
    everything: Callable[[], tuple[Tensor, ...]] = tuple

    def without_weights(self, weighted: bool) -> Parts:
        """Without the last tensor, where that has the weights."""
        if not weighted:
            return self
        everything = self.everything
        return Parts(self.batch[:-1], tuple(other[:-1] for other in self.others), lambda: everything()[:-1])


def survey(
    run: Run, parts: Parts, found: Sequence[nn.Module], *,
    num_data: int | None, whole: bool, weighted: bool = False, seed: int = 0,
) -> Survey:  # fmt: skip
    """Look at a loss: which sites it visits, and which of them belong to all data.

    A site does if nothing about it changes with the minibatch: neither its plates nor its shape with the number of
    data, nor, where it is observed, its density with their values.

    Args:
        run: takes a minibatch.
        parts: one, and what else will come.
        found: the modules behind it, for their mode.
        num_data: how many data there are in all; None: nobody knows.
        whole: whether no other minibatch is ever taken than the whole data.
        weighted: whether data have weights.
        seed: of the noise, and so of what starts at random when it is first met.

    Raises:
        ValueError: a plate of the model takes a subsample that is none of the minibatch's; weights of data that no
            plate tells apart; what has the size of all data, or of one minibatch.
    """
    batch = parts.batch
    first, error = _look(run, batch, found, seed)
    if error is not None:
        _refuse_subsample(first, batch, error)
        _refuse_whole_size(run, parts, found, seed, first, error)
        if any(isinstance(module, PyroModule) for module in found):
            raise error  # what makes its parameters at its first call is left half made
        run = torch.enable_grad()(run)  # some losses are made of gradients
        first, error = _look(run, batch, found, seed)
    if error is not None:
        return Survey(params=list(first.params))  # the training itself will say better what is wrong
    num = num_data_of(batch)
    if (whole and not weighted) or num < 2:
        plates = frozenset(plate for stack in first.plates.values() for plate, size in stack if size == num)
        return Survey(Shares(num_data=num_data, plates=plates, weighted=weighted), list(first.params))
    fewer, error = _look(run, tuple(part[: num - 1] for part in batch), found, seed)
    if error is not None:
        _refuse_subsample(fewer, batch, error)
        inside = {name for name, seen in first.sites.items() if any(num in shape for shape in seen)}
        fewer, last = _Look(), frozenset[str]()
        scaled = {plate: full for plate, (size, full) in first.enlarged.items() if size == num}
        outside = [name for name in first.sites if name not in inside]
    else:
        others, _ = _look(run, tuple(part[1:] for part in batch), found, seed)
        inside = {name for name, seen in first.sites.items() if seen != fewer.sites.get(name)}
        inside |= {name for name, density in fewer.densities.items() if density != others.densities.get(name)}
        if all(torch.equal(part[1:], part[:-1]) for part in batch):  # other rows are no other data
            inside |= {name for name, density in fewer.densities.items() if density != first.densities.get(name)}
        # z_0, z_1, ...: where the last of them goes with a datum, all are of single data.
        last = frozenset(first.sites.keys() - fewer.sites.keys())
        numbered = {_NUMBER.sub("#", name) for name in last}
        inside |= {name for name in first.sites if _NUMBER.sub("#", name) in numbered}
        scaled = {plate: full for plate, (size, full) in fewer.enlarged.items() if size == num - 1}
        # A share that follows the minibatch was given by hand.
        outside = [n for n in first.sites if n not in inside and first.scales[n] == fewer.scales.get(n)]
    params = list(first.params)
    plates = frozenset(plate for stack in first.plates.values() for plate, size in stack if size == num)
    plates -= {plate for stack in fewer.plates.values() for plate, size in stack if size == num}
    if not scaled:
        _refuse_autoguides(found, inside - set(first.densities), num)
    if error is not None:
        _refuse_one_size(run, parts, found, seed, first)
    if weighted:
        _require_plates(first, inside, plates)
    if scaled:
        plate, full = next(iter(scaled.items()))
        shares = Shares(full_size=full, plates=plates, weighted=weighted)
        return Survey(shares, params, plate=plate, inside=frozenset(inside), last_row=last)
    if num_data is not None and num < num_data:  # so is one that is a minibatch's
        outside = [n for n in outside if not math.isclose(first.scales[n], num / num_data, rel_tol=0.02)]
    outside = outside if inside else []
    shares = Shares(frozenset(outside), num_data, None, plates, weighted)
    unshared = outside if num_data is None else []
    return Survey(shares, params, unshared, inside=frozenset(inside), last_row=last)


def _require_plates(seen: _Look, inside: set[str], plates: frozenset[str]) -> None:
    alone = [name for name in sorted(inside) if not plates & {plate for plate, _ in seen.plates[name]}]
    if alone:
        raise ValueError(
            f"the sites {alone} change with the data but lie in no plate along them, so that no datum has a weight of "
            f"its own; put them into pyro.plate('data', len(x))"
        )


def _refuse_autoguides(found: Sequence[nn.Module], latent: set[str], num: int) -> None:
    """Autoguides have parameters for each datum of a minibatch: they would be shared by those at the same place."""
    for guide in (sub for module in found for sub in module.modules() if isinstance(sub, AutoGuide)):
        known = () if guide.prototype_trace is None or isinstance(guide, AutoGuideList) else guide.prototype_trace.nodes
        local = sorted(latent & set(known))
        if local:
            raise ValueError(
                f"{type(guide).__name__} has parameters of its own for each datum of site(s) {local}, but is given "
                f"minibatches of {num} data or others to validate on, whose data would share them by their places; "
                f"give it all data in one batch (batch_size=, validation=None), or take a guide that reads the data"
            )


class _Look(Messenger):
    """Notes what is visited."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, list[tuple[Any, ...]]] = {}
        self.plates: dict[str, tuple[tuple[str, int], ...]] = {}
        self.densities: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.params: dict[str, None] = {}
        self.drawn: dict[str, tuple[int, int]] = {}
        self.enlarged: dict[str, tuple[int, int]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["fn"].subsample_size is not None:
            size, taken = msg["fn"].size, msg["fn"].subsample_size
            self.drawn |= {msg["name"]: (taken, size)} if taken < size else {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, value = msg["name"], msg["value"]
        for frame in msg["cond_indep_stack"]:
            enlarged = frame.full_size is not None and frame.full_size != frame.size
            self.enlarged |= {frame.name: (frame.size, frame.full_size)} if enlarged else {}
        plates = tuple((frame.name, frame.size) for frame in msg["cond_indep_stack"])
        self.plates[name] = (*self.plates.get(name, ()), *plates)
        seen = (*(size for _, size in plates), *getattr(value, "shape", ()), *msg["fn"].batch_shape)
        self.sites.setdefault(name, []).append((*(plate for plate, _ in plates), *seen))
        self.scales[name] = _mean(msg["scale"])
        if msg["is_observed"]:
            with suppress(Exception):  # a density that cannot be had decides nothing
                self.densities[name] = float(msg["fn"].log_prob(value).detach().sum())

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = None


def _mean(scale: Any) -> float:
    return float(scale.detach().float().mean()) if isinstance(scale, Tensor) else float(scale)


def _look(
    run: Run, batch: tuple[Tensor, ...], found: Sequence[nn.Module], seed: int
) -> tuple[_Look, Exception | None]:
    seen = _Look()
    with forked_rng(seed), torch.no_grad(), evaluation_mode(*found), poutine.block(), seen:
        try:
            run(*batch)
        except Exception as error:
            return seen, error
    return seen, None


def _refuse_subsample(seen: _Look, batch: tuple[Tensor, ...], error: Exception) -> None:
    if not seen.drawn:
        return
    name, (taken, size) = next(iter(seen.drawn.items()))
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise ValueError(
        f"plate {name!r} of the model takes a subsample of its own, {taken} of {size}, but is given minibatches of "
        f"{num_data_of(batch)} data ({said}); either give it the minibatch, "
        f"pyro.plate({name!r}, {size}, subsample_size=len(x)), or leave all subsampling to it: "
        f"batch_size={size}, validation=None"
    ) from error


def _refuse_whole_size(
    run: Run, parts: Parts, found: Sequence[nn.Module], seed: int, failed: _Look, error: Exception
) -> None:
    """Refuse where what fails with a minibatch runs with all the data."""
    num, everything = num_data_of(parts.batch), parts.everything()
    if num_data_of(everything) <= num or _look(run, everything, found, seed)[1] is not None:
        return
    _refuse_size(failed, num_data_of(everything), num, error)


def _refuse_one_size(run: Run, parts: Parts, found: Sequence[nn.Module], seed: int, first: _Look) -> None:
    """Refuse where what runs with a minibatch fails with others that will come."""
    for other in parts.others:
        _, error = _look(run, other, found, seed)
        if error is not None:
            _refuse_size(first, num_data_of(parts.batch), num_data_of(other), error)


def _refuse_size(seen: _Look, fits: int, fails: int, error: Exception) -> None:
    sites = sorted(name for name, shapes in seen.sites.items() if any(fits in shape for shape in shapes))
    where = f"at site(s) {sites} " if sites else ""
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise ValueError(
        f"model and guide run with {fits} data but not with {fails}, as minibatches or validation have them ({said}): "
        f"something {where}has the size of {fits} data; give all data in one batch, batch_size=len(x), "
        f"validation=None, or make it follow the rows that are given: pyro.plate('data', len(x)), and in the guide "
        f"what reads x"
    ) from error
