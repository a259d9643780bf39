"""numpy arrays and pandas tables as tensors: what users have their data in."""

from __future__ import annotations

from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Array", "as_tensor", "as_tensors", "dense", "holds_arrays"]


class _Table(Protocol):
    """What a pandas Series, Index or DataFrame has."""

    def to_numpy(self) -> Any:
        """The values."""


Array = Tensor | np.ndarray | _Table
_NUMBERS = "biufc"  # kinds of numpy's dtypes that torch knows


def as_tensors(values: Any) -> Any:
    """The same nest of tuples, lists and dicts with arrays and tables of numbers as tensors, all else untouched.

    Raises:
        TypeError: a table with columns that are no numbers.
    """
    return tree_map(as_tensor, values)


def holds_arrays(values: Any) -> bool:
    """Whether a nest of tuples, lists and dicts holds an array or a table."""
    return any(isinstance(leaf, np.ndarray | np.generic) or _is_table(leaf) for leaf in tree_leaves(values))


@overload
def as_tensor(value: Array) -> Tensor: ...


@overload
def as_tensor(value: Any) -> Any: ...


def as_tensor(value: Any) -> Any:
    """An array or table of numbers as a tensor; anything else as it is.

    Floating-point numbers take torch's default dtype, for numpy's is double whether one wants it or not; whole numbers
    and booleans keep theirs, and so do tensors. Always a copy, on torch's default device: later changes of the array
    are not seen. Missing values of a table and masked ones of an array become
    NaN.

    Args:
        value: a numpy array or scalar; a pandas Series (n,), Index (n,) or DataFrame (n, columns).

    Raises:
        TypeError: a table with columns that are no numbers.
    """
    if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:
        return value.item()
    if isinstance(value, np.ndarray):
        return _tensor(value) if value.dtype.kind in _NUMBERS else value
    if _is_table(value):
        return _tensor(_numbers(value))
    return value


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor, which is to be cut into rows; TypeError for a sparse or nested one."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of layout {tensor.layout}, of which rows cannot be taken: x.to_dense()")
    return tensor


def _is_table(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy")


def _tensor(array: np.ndarray) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):  # whose values are there, under the mask
        mask = np.ma.getmaskarray(array)
        array = np.where(mask, np.nan, array.data) if mask.any() else array.data
    # torch takes neither negative strides nor the other byte order.
    array = np.ascontiguousarray(array).reshape(array.shape)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch can do next to nothing with these
        array = array.astype(np.int64)
    return torch.tensor(array, dtype=torch.get_default_dtype() if array.dtype.kind == "f" else None)


def _numbers(table: Any) -> np.ndarray:
    """The values of a pandas object; nullable columns too."""
    from pandas.api.types import is_numeric_dtype

    columns = zip(table.columns, table.dtypes, strict=True) if table.ndim == 2 else [(table.name, table.dtype)]
    wrong = [str(name) for name, dtype in columns if not is_numeric_dtype(dtype)]
    if wrong:
        nameless = table.ndim == 1 and table.name is None
        values = f"the values (dtype {table.dtype})" if nameless else f"the columns {wrong}"
        raise TypeError(
            f"{values} of a pandas {type(table).__name__} are no numbers; encode them (with "
            f"pandas.factorize, for instance), choose others, or bind the table to the model with functools.partial, "
            f"which leaves it as it is"
        )
    array = table.to_numpy()
    return array if array.dtype.kind in _NUMBERS else table.to_numpy(dtype=float, na_value=np.nan)
