"""A function of tensors as a graph of tensor operations, recorded once and free of what Pyro does around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.deadline import check_time
from pyro_ebm.errors import InferenceError
from pyro_ebm.graphs import chosen_by_values, results_of, simplified, varying
from pyro_ebm.imports import whole_import
from pyro_ebm.inference.density.masked_writes import without_masked_writes
from pyro_ebm.numerics import FailuresAsNaN, failed_numerically, function_by_rows

__all__ = ["Captured", "captured"]

_Function = Callable[[Tensor], tuple[Tensor, ...]]


class Captured:
    """A function ready to be called many times with points of one shape, (chains, ...).

    Where the numbers of one chain fail, as a singular matrix does, its results are NaN, which no sampler accepts: a
    graph is recorded without torch's checks, and what raises all the same is called for parts of the chains.

    Attributes:
        kind: ``"captured"``, ``"compiled"``, or ``"eager"`` where the function could not be captured.
        problem: why it could not.
    """

    def __init__(self, function: _Function, kind: str, eager: _Function, problem: str | None = None) -> None:
        self._function, self.kind, self._eager, self.problem = function, kind, eager, problem
        self._shapes: list[torch.Size] = []  # of one chain's results, once there are some

    def __call__(self, u: Tensor) -> tuple[Tensor, ...]:
        check_time()
        with torch.no_grad():  # weights in the graph may ask for gradients
            try:
                results = self._function(u)
            except Exception as error:
                if not self._shapes or not failed_numerically(error):
                    raise
                return function_by_rows(self._eager, u, self._blank)
            self._shapes = self._shapes or [result.shape[1:] for result in results]
            return results

    def _blank(self, row: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.new_full((1, *shape), torch.nan) for shape in self._shapes)


@torch.no_grad()
def captured(function: _Function, u: Tensor, *, compile: bool = False) -> Captured:
    """Record the operations a function does to a point, and leave out what does not depend on it.

    Only for points of the shape, dtype and device of ``u``. Weights are those of the moment. A function
    whose operations depend on the values (a Python branch) stays as it is, with the reason in ``problem``.

    Args:
        function: maps ``u`` to tensors; may use ``torch.autograd.grad`` inside.
        u: an example of its argument.
        compile: hand the graph to ``torch.compile``: seconds to compile, then faster.

    Raises:
        InferenceError: if ``torch.compile`` fails (it needs a C++ compiler).
    """
    def recorded(point: Tensor) -> tuple[Tensor, ...]:
        with FailuresAsNaN():
            return tuple(function(point))

    try:
        whole_import("torch._inductor")  # which make_fx needs
        graph = make_fx(recorded)(u)
        results = results_of(graph, u)
        without_masked_writes(graph, results)
        if chosen_by_values(graph, results, varying(graph, results)):
            return Captured(function, "eager", function, "the shapes of its operations depend on the values")
        graph = simplified(graph, u)
        problem = _difference(graph, function, u)
    except Exception as error:  # torch raises all kinds where operations depend on values
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem:
        return Captured(function, "eager", function, problem)
    if not compile:
        return Captured(graph, "captured", function)
    try:
        compiled = torch.compile(graph, dynamic=False)
        compiled(u)
    except Exception as error:
        raise InferenceError(
            f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}); if that is for want of a "
            f"C++ compiler, put one on the path, or leave compile=False, which captures the graph without one"
        ) from error
    return Captured(compiled, "compiled", function)


def _difference(graph: _Function, function: _Function, u: Tensor) -> str | None:
    """Whether the graph does something else elsewhere: a branch that was taken once for all."""
    generator = torch.Generator(u.device).manual_seed(0)
    for scale in (0.1, 1.0):
        elsewhere = u + scale * torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)
        pairs = list(zip(graph(elsewhere), function(elsewhere), strict=True))
        # A point without a density may have none in other words: NaN or minus infinity, and any gradient.
        values = [pair for pair in pairs if pair[0].shape == u.shape[:-1]]
        known = torch.stack([theirs.isfinite() for _, theirs in values]).all(0) if values else torch.ones(()).bool()
        same = all(torch.equal(ours.isfinite(), theirs.isfinite()) for ours, theirs in values)
        if not same or not all(_close(*pair, known.to(u.device)) for pair in pairs):
            return "its operations depend on the values, or it is random"
    return None


def _close(ours: Tensor, theirs: Tensor, known: Tensor) -> bool:
    """Equal but for rounding, at the points that are known."""
    if known.ndim:
        ours, theirs = ours[known], theirs[known]
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * _size(theirs), equal_nan=True)


def _size(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0
