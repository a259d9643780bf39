"""Graphs of tensor operations recorded by ``make_fx``: what changes in them from call to call, and what can go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["chosen_by_values", "is_mask", "results_of", "simplified", "varying"]

_NAMES = ("alias", "detach", "expand", "view", "_unsafe_view", "reshape")
# What they return depends on the shape of their argument only, and the shape is fixed.
_FILLS = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node returned."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n] = super().run_node(n)
        return self.results[n]


def results_of(graph: fx.GraphModule, *inputs: Tensor) -> dict[fx.Node, Any]:
    """What each node returns in a run."""
    recorder = _Recorder(graph)
    recorder.run(*inputs)
    return recorder.results


def simplified(graph: fx.GraphModule, *inputs: Tensor, live: bool = False) -> fx.GraphModule:
    """Compute once what does not depend on the inputs; drop operations that change nothing.

    Args:
        graph: recorded, and changed here.
        inputs: an example of them.
        live: tensors that were there before the recording, weights among them, may change from call to call.
    """
    results = results_of(graph, *inputs)
    changing = varying(graph, results, live=live)
    for node in list(graph.graph.nodes):
        result = results.get(node)
        if node.op != "call_function" or not isinstance(result, Tensor):
            continue
        if node not in changing:
            if any(user in changing or user.op == "output" for user in node.users):
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


def varying(graph: fx.GraphModule, results: Mapping[fx.Node, Any], *, live: bool = False) -> set[fx.Node]:
    """Nodes whose value changes from call to call, or whose memory is written to; if ``live``, all tensors kept."""
    written = {_memory(results[node.args[0]]) for node in graph.graph.nodes if _writes(node)}
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        depends = any(source in found for source in node.all_input_nodes) and _operation(node) not in _FILLS
        kept = live and node.op == "get_attr"
        if node.op == "placeholder" or kept or random or depends or _memory(results.get(node)) in written:
            found.add(node)
    return found


def _writes(node: fx.Node) -> bool:
    """Whether it changes its first argument in place, as ``out[..., 0] = z`` does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _memory(result: Any) -> int | None:
    return result.untyped_storage().data_ptr() if isinstance(result, Tensor) else None


def _operation(node: fx.Node) -> str:
    """``"view"`` of ``aten.view.default``."""
    return getattr(node.target, "_opname", "")


def chosen_by_values(graph: fx.GraphModule, results: Mapping[fx.Node, Any], changing: Collection[fx.Node]) -> bool:
    """Whether the shape of something in the graph changes from call to call: ``x[mask]``, ``nonzero``.

    Args:
        graph: recorded.
        results: what each node returned in a run.
        changing: nodes whose value changes from call to call.
    """
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        by = node.all_input_nodes
        if getattr(node.target, "_opname", "") == "index":
            by = [index for index in node.args[1] if is_mask(index, results)]
        if any(each in changing for each in by):
            return True
    return False


def is_mask(index: Any, results: Mapping[fx.Node, Any]) -> bool:
    """Whether an index of an indexing is a mask."""
    return isinstance(index, fx.Node) and results[index].dtype is torch.bool
