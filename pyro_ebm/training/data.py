"""Training data as minibatches: checked once, split once, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.arrays import as_tensor, dense

__all__ = [
    "Tensors",
    "batches",
    "checked_data",
    "checked_share",
    "checked_validation",
    "held_apart_and_rest",
    "take",
]

Tensors = tuple[Tensor, ...]


def checked_data(name: str, data: Any) -> Tensors:
    """The data as a tuple of tensors with one first dimension and finite values; arrays and tables as tensors."""
    data = tuple(map(as_tensor, data)) if isinstance(data, tuple | list) else as_tensor(data)
    if isinstance(data, Tensor):
        tensors: Tensors = (data,)
    elif isinstance(data, tuple | list) and data and all(isinstance(item, Tensor) for item in data):
        tensors = tuple(data)
    else:
        kinds = [type(item).__name__ for item in (data if isinstance(data, tuple | list) else [data])]
        raise TypeError(
            f"{name} must be a tensor, an array or a table, or a tuple of these, got "
            f"{', '.join(kinds) or 'an empty tuple'}; convert with torch.as_tensor"
        )
    tensors = tuple(dense(name, tensor) for tensor in tensors)
    lengths = [t.shape[0] if t.ndim else None for t in tensors]
    if len(set(lengths)) > 1 or None in lengths or 0 in lengths:
        raise ValueError(
            f"{name} must hold tensors with the same first dimension, at least 1, "
            f"got shapes {[tuple(t.shape) for t in tensors]}"
        )
    for index, tensor in enumerate(tensors):
        bad = 0 if tensor.isfinite().all() else int((~tensor.isfinite()).sum())
        if bad:
            which = name if len(tensors) == 1 else f"{name}[{index}]"
            raise ValueError(
                f"{which} must be finite, got {bad} NaN or infinite values of {tensor.numel()}; "
                "remove these rows, or fill them in and pass a mask as a further tensor"
            )
    return tensors


def checked_share(share: float | None, num: int) -> float:
    """A share of ``num`` data, in [0, 1), that leaves something to train on; 0 for None."""
    if share is None:
        return 0.0
    if isinstance(share, bool) or not 0 <= share < 1:
        raise ValueError(f"validation must be a share of the data in [0, 1), data, or None, got {share!r}")
    if _num_held_apart(share, num) >= num:
        raise ValueError(f"validation={share!r} leaves none of {num} data to train on; pass None")
    return float(share)


def checked_validation(validation: Any, data: Tensors) -> Tensors:
    """Validation data with the shapes of the training data."""
    tensors = checked_data("validation", validation)
    if [t.shape[1:] for t in tensors] != [t.shape[1:] for t in data]:
        raise ValueError(
            "validation must have the form of data, got shapes "
            f"{[tuple(t.shape) for t in tensors]} beside {[tuple(t.shape) for t in data]}"
        )
    return tensors


def held_apart_and_rest(num: int, share: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Which of ``num`` data to train on, and which to validate on (None for a share of zero)."""
    size = _num_held_apart(share, num)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order[size:], order[:size] if size else None


def batches(data: Tensors, size: int, device: torch.device, order: Tensor | None = None) -> Iterator[Tensors]:
    """Minibatches on a device, in the given order or as they lie."""
    if order is None:
        parts = zip(*(tensor.split(size) for tensor in data), strict=True)
        yield from (tuple(part.to(device) for part in batch) for batch in parts)
        return
    orders = [order.to(tensor.device).split(size) for tensor in data]
    for indices in zip(*orders, strict=True):
        yield tuple(t.index_select(0, i).to(device) for t, i in zip(data, indices, strict=True))


def _num_held_apart(share: float, num: int) -> int:
    # A share above zero holds something apart even of few data.
    return max(1, round(share * num)) if share > 0 else 0


def take(data: Tensors, index: Tensor) -> Tensors:
    """The rows of an index, of each tensor."""
    return tuple(tensor.index_select(0, index.to(tensor.device)) for tensor in data)
