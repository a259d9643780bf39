"""What training data can be: tensors in memory, a Dataset read item by item, a DataLoader as it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import as_tensor, as_tensors
from pyro_ebm.randomness import fingerprint, forked_rng
from pyro_ebm.training.data import (
    Tensors,
    batches,
    checked_data,
    checked_share,
    checked_validation,
    held_apart_and_rest,
    take,
)
from pyro_ebm.training.inputs import as_arguments

__all__ = ["Source", "Weighted", "is_weighted", "source_of", "split_of", "validation_of"]


class Source(Protocol):
    """Data as minibatches."""

    def num_data(self) -> int | None:
        """Data of one pass; None where nobody knows."""

    def num_batches(self, size: int) -> int:
        """Minibatches of one pass."""

    def batches(self, size: int, device: torch.device, order: torch.Generator | None = None) -> Iterator[Tensors]:
        """One pass: in an order drawn from the generator, or as the data lie."""

    def split(self, share: float, seed: int) -> tuple[Source, Source | None]:
        """The data without a share of them, and that share (None where it is zero)."""

    def first(self, size: int) -> Tensors:
        """A minibatch; where it is looked at changes nothing in the passes to come."""

    def fingerprint(self) -> int:
        """A number that tells other data from these, as far as can be seen without reading all."""


def source_of(name: str, data: Any, model: Any = None, guide: Any = None) -> Source:
    """The data of an argument as a source of minibatches; by name in the order of the arguments of model and guide.

    Raises:
        TypeError: what is none.
        ValueError: no data, or such with NaN or infinite values, where they lie in memory.
    """
    if data is None:
        return _Nothing()
    if isinstance(data, Weighted):
        return data.source(name, model, guide)
    if isinstance(data, DataLoader):
        return _Loader(name, data, functools.partial(as_arguments, name, model=model, guide=guide))
    if isinstance(data, TensorDataset):
        return _Memory(checked_data(name, data.tensors))
    if isinstance(data, IterableDataset):
        raise TypeError(f"{name} is an {type(data).__name__}, which has no length: put it into a DataLoader")
    if isinstance(data, Dataset):
        ordered = functools.partial(as_arguments, name, model=model, guide=guide)
        return _Items(name, data, torch.arange(len(data)), ordered)  # type: ignore[arg-type]
    return _Memory(checked_data(name, as_arguments(name, data, model, guide)))


def validation_of(validation: Any, source: Source, model: Any = None, guide: Any = None) -> float | Source:
    """A share of the data in [0, 1), or other data to validate on."""
    if validation is None or isinstance(validation, int | float):
        if isinstance(source, _Nothing) and validation:
            raise ValueError(f"validation={validation!r}: nothing can be held apart of data=None; pass validation=None")
        if isinstance(source, _Nothing):
            return 0.0
        if isinstance(source, _Loader):
            if validation:
                raise ValueError(
                    f"validation={validation!r}: no share of a DataLoader can be held apart; pass a second DataLoader, "
                    f"other data, or None"
                )
            return 0.0
        return checked_share(validation, len(source))  # type: ignore[arg-type]
    other = source_of("validation", validation, model, guide)
    if is_weighted(source) != is_weighted(other):
        raise ValueError("validation must have weights where data have, and none where they have none: Weighted(x, w)")
    if isinstance(source, _Memory) and isinstance(other, _Memory):
        checked_validation(other.tensors, source.tensors)
    return other


def split_of(source: Source, held_apart: float | Source, seed: int) -> tuple[Source, Source | None]:
    """What to train on, and what to validate on or None; ``held_apart`` from :func:`validation_of`."""
    return source.split(held_apart, seed) if isinstance(held_apart, float) else (source, held_apart)


@checked
@dataclass(frozen=True)
class Weighted:
    """Data that count by weights of their own: ``fit(model, guide, Weighted(x, weights))``.

    The part of each datum in the loss, its sites in the plate along the data, is multiplied by its weight; what belongs
    to all data (the prior of a global parameter) is not. Weights with mean one leave the whole as large as it was.

    Args:
        data: tensors, arrays or tables, as ``fit`` takes them.
        weights: (n,) above zero.

    Example:
        >>> import torch
        >>> Weighted(torch.rand(3, 2), torch.tensor([0.5, 2.0, 0.5])).weights.shape
        torch.Size([3])
    """

    data: Any
    weights: Any

    def source(self, name: str, model: Any, guide: Any) -> Source:
        """The data with their weights as the last tensor."""
        if isinstance(self.data, Dataset | DataLoader) and not isinstance(self.data, TensorDataset):
            raise TypeError(f"{name} with weights must be tensors, arrays or tables, got {type(self.data).__name__}")
        tensors = self.data.tensors if isinstance(self.data, TensorDataset) else self.data
        rows = checked_data(name, as_arguments(name, tensors, model, guide))
        (weights,) = checked_data("weights", self.weights)
        if weights.shape != rows[0].shape[:1] or not bool((weights > 0).all()):
            raise ValueError(
                f"weights must be {len(rows[0])} numbers above zero, one for each datum, got shape "
                f"{tuple(weights.shape)} and values from {float(weights.min()):g}"
            )
        found = _Memory((*rows, weights))
        found.weighted = True
        return found


def is_weighted(source: Source) -> bool:
    """Whether the last tensor of the minibatches has the weights of their data."""
    return getattr(source, "weighted", False)


class _Nothing:
    """No data: the model holds its own, and each pass is one step."""

    def num_data(self) -> int | None:
        return 1

    def num_batches(self, size: int) -> int:
        return 1

    def batches(self, size: int, device: torch.device, order: torch.Generator | None = None) -> Iterator[Tensors]:
        yield ()

    def split(self, share: float, seed: int) -> tuple[Source, Source | None]:
        return self, None

    def first(self, size: int) -> Tensors:
        return ()

    def fingerprint(self) -> int:
        return 0


class _Memory:
    """Tensors with one first dimension."""

    weighted = False

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def num_data(self) -> int | None:
        return len(self)

    def num_batches(self, size: int) -> int:
        return math.ceil(len(self) / size)

    def batches(self, size: int, device: torch.device, order: torch.Generator | None = None) -> Iterator[Tensors]:
        return batches(self.tensors, size, device, _order(len(self), size, order))

    def split(self, share: float, seed: int) -> tuple[Source, Source | None]:
        rest, apart = held_apart_and_rest(len(self), share, seed)
        if apart is None:
            return self, None
        parts = _Memory(take(self.tensors, rest)), _Memory(take(self.tensors, apart))
        for part in parts:
            part.weighted = self.weighted
        return parts

    def first(self, size: int) -> Tensors:
        return tuple(tensor[:size] for tensor in self.tensors)

    def fingerprint(self) -> int:
        return fingerprint(self.tensors)


class _Items:
    """Some items of a Dataset, read when their minibatch comes."""

    def __init__(self, name: str, dataset: Any, index: Tensor, ordered: Callable[[Any], Any]) -> None:
        if not len(index):
            raise ValueError(f"{name} must hold at least one item, got an empty {type(dataset).__name__}")
        self.name, self.dataset, self.index, self.ordered = name, dataset, index, ordered

    def __len__(self) -> int:
        return len(self.index)

    def num_data(self) -> int | None:
        return len(self)

    def num_batches(self, size: int) -> int:
        return math.ceil(len(self) / size)

    def batches(self, size: int, device: torch.device, order: torch.Generator | None = None) -> Iterator[Tensors]:
        shuffled = _order(len(self), size, order)
        index = self.index if shuffled is None else self.index[shuffled]
        for part in index.split(size):
            yield _on(device, self._read(part))

    def split(self, share: float, seed: int) -> tuple[Source, Source | None]:
        rest, apart = held_apart_and_rest(len(self), share, seed)
        if apart is None:
            return self, None
        parts = (_Items(self.name, self.dataset, self.index[chosen], self.ordered) for chosen in (rest, apart))
        return next(parts), next(parts)

    def first(self, size: int) -> Tensors:
        with forked_rng(0):  # items may be augmented at random
            return self._read(self.index[:size])

    def _read(self, index: Tensor) -> Tensors:
        batch = default_collate([tree_map(_part, self.dataset[i]) for i in index.tolist()])
        return _checked(self.name, self.ordered(batch))

    def fingerprint(self) -> int:
        return fingerprint((self.index,), type(self.dataset).__name__, len(self.dataset))


class _Loader:
    """A DataLoader: its own batches in its own order."""

    def __init__(self, name: str, loader: DataLoader, ordered: Callable[[Any], Any]) -> None:
        self.name, self.loader, self.ordered = name, loader, ordered
        self.looked_at: Tensors | None = None  # of a stream that has but one iterator, which looking moves on

    def num_data(self) -> int | None:
        try:
            return len(self.loader.sampler)  # type: ignore[arg-type]
        except TypeError:  # of a stream nobody knows
            return None

    def num_batches(self, size: int) -> int:
        try:
            return len(self.loader)
        except TypeError:  # of a stream nobody knows
            return 1

    def batches(self, size: int, device: torch.device, order: torch.Generator | None = None) -> Iterator[Tensors]:
        before, self.looked_at = self.looked_at, None
        seen = False
        for batch in self.loader:
            found = _checked(self.name, self.ordered(batch))
            if not seen and before is not None and not _same(before, found):
                yield _on(device, before)
            seen = True
            yield _on(device, found)
        if not seen and before is not None:
            seen = True
            yield _on(device, before)
        if not seen:
            raise ValueError(
                f"{self.name}: the DataLoader gave no batch; a stream must begin anew at each pass, and with "
                f"drop_last=True there must be as many data as a batch has"
            )

    def split(self, share: float, seed: int) -> tuple[Source, Source | None]:
        return self, None

    def first(self, size: int) -> Tensors:
        own = {self.loader.generator, getattr(self.loader.sampler, "generator", None)} - {None}
        states = [(generator, generator.get_state()) for generator in own]
        try:
            with forked_rng(0):
                batch = next(self.batches(size, torch.device("cpu")))
            stream = self.loader.dataset
            if isinstance(stream, IterableDataset) and iter(stream) is iter(stream):
                self.looked_at = batch
            return batch
        finally:
            for generator, state in states:
                generator.set_state(state)

    def fingerprint(self) -> int:
        about = (type(self.loader.dataset).__name__, self.num_batches(0), self.loader.batch_size)
        return fingerprint((), *about)


def _order(num: int, size: int, order: torch.Generator | None) -> Tensor | None:
    """A shuffle of the data; none where all come at once: a model without a plate may count on their order."""
    if order is None or size >= num:
        return None
    return torch.randperm(num, generator=order, device=order.device)


def _same(one: Tensors, other: Tensors) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b.to(a.device)) for a, b in zip(one, other, strict=True))


def _part(value: Any) -> Any:
    """A part of an item: numbers and arrays in the default dtype, where torch's own collation has doubles."""
    value = as_tensor(value)
    return torch.tensor(value) if isinstance(value, float) else value


def _on(device: torch.device, batch: Tensors) -> Tensors:
    return tuple(part.to(device) for part in batch)


def _checked(name: str, batch: Any) -> Tensors:
    """A batch as a tuple of finite tensors."""
    parts = tuple(as_tensors(batch)) if isinstance(batch, tuple | list) else (as_tensors(batch),)
    if not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{name} must give tensors, one or several a datum, got batches of {kinds}")
    return checked_data(f"a batch of {name}", parts)
