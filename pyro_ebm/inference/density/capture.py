"""A function of tensors as a graph of tensor operations, recorded once and free of what Pyro does around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.deadline import check_time
from pyro_ebm.errors import InferenceError
from pyro_ebm.inference.density.masked_writes import chosen_by_values, without_masked_writes
from pyro_ebm.numerics import FailuresAsNaN, failed_numerically, function_by_rows

__all__ = ["Captured", "captured"]

_Function = Callable[[Tensor], tuple[Tensor, ...]]
_NAMES = ("alias", "detach", "expand", "view", "_unsafe_view", "reshape")
# What they return depends on the shape of their argument only, and the shape is fixed.
_FILLS = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


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
        graph = make_fx(recorded)(u)
        results = _recorded(graph, u)
        without_masked_writes(graph, results)
        if chosen_by_values(graph, results, _varying(graph, results)):
            return Captured(function, "eager", function, "the shapes of its operations depend on the values")
        graph = _simplified(graph, u)
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


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node returned."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n] = super().run_node(n)
        return self.results[n]


def _recorded(graph: fx.GraphModule, u: Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(graph)
    recorder.run(u)
    return recorder.results


def _simplified(graph: fx.GraphModule, u: Tensor) -> fx.GraphModule:
    """Compute once what does not depend on ``u``; drop operations that change nothing."""
    results = _recorded(graph, u)
    varying = _varying(graph, results)
    for node in list(graph.graph.nodes):
        result = results.get(node)
        if node.op != "call_function" or not isinstance(result, Tensor):
            continue
        if node not in varying:
            if any(user in varying or user.op == "output" for user in node.users):
                name = f"_constant_of_{node.name}"
                graph.register_buffer(name, result.detach())
                with graph.graph.inserting_before(node):
                    node.replace_all_uses_with(graph.graph.get_attr(name))
        elif _operation(node) in _NAMES:
            source = results[node.args[0]]
            same = source.shape == result.shape and source.stride() == result.stride()
            if same and source.dtype == result.dtype:
                node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _varying(graph: fx.GraphModule, results: Mapping[fx.Node, Any]) -> set[fx.Node]:
    """Nodes whose value changes from call to call, or whose memory is written to."""
    written = {_memory(results[node.args[0]]) for node in graph.graph.nodes if _writes(node)}
    varying: set[fx.Node] = set()
    for node in graph.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        depends = any(source in varying for source in node.all_input_nodes) and _operation(node) not in _FILLS
        if node.op == "placeholder" or random or depends or _memory(results.get(node)) in written:
            varying.add(node)
    return varying


def _writes(node: fx.Node) -> bool:
    """Whether it changes its first argument in place, as ``out[..., 0] = z`` does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _memory(result: Any) -> int | None:
    return result.untyped_storage().data_ptr() if isinstance(result, Tensor) else None


def _operation(node: fx.Node) -> str:
    """``"view"`` of ``aten.view.default``."""
    return getattr(node.target, "_opname", "")
