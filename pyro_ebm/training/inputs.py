"""Data as the arguments of a model: one tensor or several, by name, item by item, or in batches of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pyro_ebm.arrays import as_tensor, dense
from pyro_ebm.keywords import argument_names

__all__ = ["as_arguments", "in_memory", "row_batches"]

Tensors = tuple[Tensor, ...]
_KINDS = (
    "a tensor, an array or a table, a tuple or list of these, a dict of them by the model's arguments, a Dataset or a "
    "DataLoader"
)


def as_arguments(name: str, data: Any, model: Any, guide: Any = None) -> Any:
    """Data by name as a tuple in the order of the model's arguments; anything else as it is.

    Args:
        name: of the argument, for messages.
        data: what a person gave, or a batch of it.
        model: whose arguments they are.
        guide: gets the same.

    Raises:
        TypeError: names that are not the first arguments of the model, or that the guide has in another order.
    """
    if not isinstance(data, Mapping):
        return data
    arguments = argument_names(model)
    first = arguments[: len(data)]
    if not data or set(first) != set(data):
        takes = f"takes {list(arguments)}, in this order" if arguments else "shows no arguments by name"
        raise TypeError(
            f"{name} is given by the names {list(data)}, but the model {takes}: give its first ones, none left out, or "
            f"a tuple (functools.partial binds what is no data)"
        )
    theirs = argument_names(guide)[: len(data)]
    if set(theirs) == set(first) and theirs != first:
        raise TypeError(
            f"{name} is given by name, but model and guide take {list(first)} and {list(theirs)}: give both one order"
        )
    return tuple(data[each] for each in first)


def row_batches(name: str, data: Any, size: int, model: Any, guide: Any = None) -> Iterator[Tensors]:
    """The data once through, as they lie: tuples of tensors with one first dimension, arguments of model and guide.

    Args:
        name: of the argument, for messages.
        data: all that ``fit`` takes.
        size: rows in a batch; a DataLoader has its own.
        model: whose arguments they are.
        guide: gets the same.

    Raises:
        TypeError: what is no data.
        ValueError: tensors that differ in their first dimension, or none at all.
    """
    if isinstance(data, IterableDataset):
        raise TypeError(f"{name} is an {type(data).__name__}, which has no length: put it into a DataLoader")
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=size, collate_fn=_collated)
    if not isinstance(data, DataLoader):
        tensors = _rows(name, as_arguments(name, data, model, guide))
        yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)
        return
    empty = True
    for batch in data:
        empty = False
        yield _rows(f"a batch of {name}", as_arguments(name, batch, model, guide))
    if empty:
        raise ValueError(f"{name} must hold at least one datum, got none")


def in_memory(name: str, data: Any, model: Any, guide: Any = None) -> Tensors:
    """All of the data as arguments of model and guide; arguments and errors as in :func:`row_batches`."""
    if not isinstance(data, Dataset | DataLoader) or isinstance(data, TensorDataset):
        return next(row_batches(name, data, 2**62, model, guide))
    parts = row_batches(name, data, 256, model, guide)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _collated(items: Sequence[Any]) -> Any:
    """A batch of items, with arrays and numbers in torch's default dtype."""
    return default_collate([_item(item) for item in items])


def _item(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {name: _item(part) for name, part in item.items()}
    if isinstance(item, tuple | list):
        return tuple(map(_item, item))
    value = as_tensor(item)
    return torch.tensor(value) if isinstance(value, float) else value


def _rows(name: str, data: Any) -> Tensors:
    parts = tuple(map(as_tensor, data)) if isinstance(data, tuple | list) else (as_tensor(data),)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise TypeError(f"{name} must be {_KINDS}, got {kinds}")
    parts = tuple(dense(name, part) for part in parts)
    sizes = {part.shape[0] if part.ndim else None for part in parts}
    if len(sizes) > 1 or not all(sizes):
        raise ValueError(
            f"{name} must hold tensors with the same first dimension, at least 1, along the data, got shapes "
            f"{[tuple(part.shape) for part in parts]}"
        )
    return parts
