"""Computations that fail at some points of a batch: NaN there, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FailuresAsNaN", "by_halves", "failed_numerically", "function_by_rows", "until_numbers_hold"]

T = TypeVar("T")
_TRIES = 20
_TRUE = torch.ones((), dtype=torch.bool, device="cpu")
# Of torch.distributions' checks, of the math module and of factorizations without an error class of their own.
_TOLD = (
    "to satisfy the constraint",
    "to be within the support",
    "math domain error",
    "singular",
    "cholesky",
    "using it on lu_solve",
    "not positive",
    "calling .item() on a Tensor",  # of the text of such an error, under vmap
)
# Operations that return what they found out beside their results: the position of it.
_WITH_INFO: Mapping[str, int] = {
    "linalg_cholesky_ex": 1,
    "linalg_inv_ex": 1,
    "_linalg_solve_ex": 3,
    "linalg_lu_factor_ex": 2,
    "linalg_ldl_factor_ex": 2,
}


def failed_numerically(error: BaseException) -> bool:
    """Whether an error is about the numbers of a point, and not about shapes, types or names.

    Never while a graph is recorded: what is done about it would be part of the graph.
    """
    if get_proxy_mode() is not None:
        return False
    if isinstance(error, ArithmeticError | torch.linalg.LinAlgError):
        return True
    return isinstance(error, ValueError | RuntimeError) and any(text in str(error) for text in _TOLD)


class FailuresAsNaN(TorchDispatchMode):
    """Factorizations, solutions and inverses are NaN for the matrices that have none, where torch ends the call.

    Distributions made with ``validate_args=True`` do not check their parameters under it.

    Under it a graph is recorded without torch's checks, which look at all matrices of a batch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name == "_linalg_check_errors":
            return None
        if name == "_is_all_true":  # so torch.distributions ask; what is out of bounds gets the density it has
            return _TRUE if args[0].device.type == "cpu" else _TRUE.to(args[0].device)
        if name in _WITH_INFO:
            found = func(*args, **kwargs)
            info = found[_WITH_INFO[name]]
            return tuple(_without(part, info != 0) for part in found)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not failed_numerically(error):
                raise
            return _by_matrix(func, args, kwargs)


def _without(part: Tensor, failed: Tensor) -> Tensor:
    if not part.is_floating_point() and not part.is_complex():
        return part
    return torch.where(failed.reshape(*failed.shape, *[1] * (part.ndim - failed.ndim)), torch.nan, part)


def _by_matrix(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation that raises for a whole batch, on one matrix after another."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    lead = first.shape[:-2]
    rows = [arg.flatten(0, len(lead) - 1) if isinstance(arg, Tensor) and lead else arg for arg in args]

    def run(start: int, stop: int) -> Any:
        return func(*(row[start:stop] if isinstance(row, Tensor) and lead else row for row in rows), **kwargs)

    parts = by_halves(run, lead.numel())
    template = next((part for _, part in parts if part is not None), None)
    if template is None:  # an example that has results of the same shapes
        eye = torch.eye(*first.shape[-2:], dtype=first.dtype, device=first.device)
        template = func(*(eye.expand(arg.shape) if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
        return _mapped(lambda part: torch.full_like(part, torch.nan if part.is_floating_point() else 0), template)

    def blank(part: Tensor) -> Tensor:
        return torch.full_like(part[:1], torch.nan if part.is_floating_point() or part.is_complex() else 0)

    whole = [_mapped(blank, template) if part is None else part for _, part in parts]
    if isinstance(template, Tensor):
        return torch.cat(whole).reshape(*lead, *template.shape[1:])
    return tuple(torch.cat(column).reshape(*lead, *column[0].shape[1:]) for column in zip(*whole, strict=True))


def _mapped(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    return function(results) if isinstance(results, Tensor) else tuple(function(each) for each in results)


def by_halves(run: Callable[[int, int], T], num: int) -> list[tuple[int, T | None]]:
    """Runs over parts of a batch, divided until each works or is a single row that does not.

    Args:
        run: maps the first row and the one after the last to a result.
        num: number of rows.

    Returns:
        For each part, in order, its number of rows and its result; ``None`` for a row that fails.
    """

    def parts(start: int, stop: int) -> list[tuple[int, T | None]]:
        try:
            return [(stop - start, run(start, stop))]
        except Exception as error:
            if not failed_numerically(error):
                raise
        if stop - start == 1:
            return [(1, None)]
        middle = (start + stop) // 2
        return parts(start, middle) + parts(middle, stop)

    return parts(0, num)


def function_by_rows(
    function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, blank: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """A function of points, with what ``blank`` returns for the rows of the batch at which it fails.

    Args:
        function: maps (n, ...) to tensors (n, ...).
        u: its argument.
        blank: what one row, (1, ...), gets where the function fails.
    """
    with FailuresAsNaN():
        parts = by_halves(lambda start, stop: function(u[start:stop]), len(u))
    rows, start = [], 0
    for size, part in parts:
        rows.append(blank(u[start : start + size]) if part is None else part)
        start += size
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def until_numbers_hold(run: Callable[[int], T]) -> T:
    """What a random run returns, tried again where its numbers fail: of many points some have none.

    Args:
        run: maps the number of the try, from 0, to a result; draws other numbers at each.

    Raises:
        Exception: of the first try, where all fail.
    """
    first: Exception | None = None
    for attempt in range(_TRIES):
        try:
            return run(attempt)
        except Exception as error:
            if not failed_numerically(error):
                raise
            first = first or error
    assert first is not None
    raise first
