"""Random numbers under ``torch.vmap``: what torch cannot draw there for each run on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DrawsApart"]

# They fill a tensor, one for all runs unless it has a row for each.
_FILLING = frozenset(
    getattr(Tensor, name)
    for name in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
)
# torch has no batching rule for them.
_SAMPLING = frozenset((torch._standard_gamma, torch.poisson, torch.binomial))


class DrawsApart(TorchFunctionMode):
    """Under ``vmap`` each run draws numbers of its own.

    Args:
        zero: a zero of each run, mapped over.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self._zero = zero

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FILLING:
            return func(args[0] + self._zero.to(args[0]), *args[1:], **(kwargs or {}))
        if func in _SAMPLING and not (func is torch._standard_gamma and torch.is_grad_enabled()):
            return _RowByRow.apply(func, args[0] + self._zero.to(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class _RowByRow(torch.autograd.Function):
    """A sampler of whole tensors, given the parameters of all runs at once, without a gradient."""

    @staticmethod
    def forward(func: Callable[..., Tensor], *args: Any) -> Tensor:
        return func(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Counts have no gradient; gamma numbers come here where none is asked for."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], func: Callable[..., Tensor], *args: Any) -> tuple[Tensor, int]:
        """All runs in front."""
        rows = [
            arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
            if isinstance(arg, Tensor) else arg
            for arg, dim in zip(args, in_dims[1:], strict=True)
        ]  # fmt: skip
        return func(*rows), 0
