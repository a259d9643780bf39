"""Reads and writes by a mask in a captured graph, as operations of one shape.

``y[mask] = x[mask]`` moves as many numbers as the mask has ones, which a graph recorded once cannot follow. Splines
(and much else) write so outside of an interval. The same is ``y = where(mask, x, y)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from pyro_ebm.graphs import is_mask

__all__ = ["without_masked_writes"]

_aten = torch.ops.aten
_SAME_NUMBERS = ("view", "_unsafe_view", "reshape", "alias", "detach", "clone")
_NEW = ("new_zeros", "new_ones", "new_full", "new_empty")
_FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


def without_masked_writes(graph: fx.GraphModule, results: dict[fx.Node, Any]) -> None:
    """Replace writes by a mask in place, where what is written was read by the same mask or is one number.

    Args:
        graph: recorded, and changed here.
        results: what each node returned in a run; new ones are added.
    """
    read: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # node -> the tensor and the mask it was read by
    for node in list(graph.graph.nodes):
        name = getattr(node.target, "_opname", "")
        if name == "index" and (mask := _mask(node, results)) is not None:
            read[node] = (node.args[0], mask)
        elif node.args and node.args[0] in read:
            if name in _SAME_NUMBERS and results[node].ndim <= 1:
                read[node] = read[node.args[0]]
            elif name == "sum" and results[node.args[0]].numel() == 1:  # by which a single number was spread
                read[node] = read[node.args[0]]
            elif name in _NEW:  # of which only the kind of numbers matters
                node.update_arg(0, read[node.args[0]][0])
        elif name in ("index_put", "index_put_") and (mask := _mask(node, results)) is not None:
            _replace(graph, node, mask, read, results)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _mask(node: fx.Node, results: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The mask that an indexing goes by, where it is one over the whole tensor."""
    indices: Any = node.args[1]
    if len(indices) != 1 or not is_mask(indices[0], results):
        return None
    return indices[0] if results[indices[0]].shape == results[node.args[0]].shape else None  # type: ignore[index]


def _replace(
    graph: fx.GraphModule, node: fx.Node, mask: fx.Node, read: Mapping[fx.Node, tuple[fx.Node, fx.Node]],
    results: dict[fx.Node, Any],
) -> None:  # fmt: skip
    target, value = node.args[0], node.args[2]
    adds = bool(node.args[3]) if len(node.args) > 3 else bool(node.kwargs.get("accumulate", False))
    assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
    with graph.graph.inserting_before(node):
        source: Any = None
        if value in read and read[value][1] is mask:
            source = read[value][0]
        elif results[value].numel() == 1 and results[value].ndim == 0:
            source = value
        elif getattr(value.target, "_opname", "") in _FILLS:
            source = _filled(graph, target, results[value])
        if source is None:
            return
        if adds:
            source = graph.graph.call_function(_aten.add.Tensor, (target, source))
        new = graph.graph.call_function(_aten.where.self, (mask, source, target))
        if getattr(node.target, "_opname", "") == "index_put_":
            new = graph.graph.call_function(_aten.copy_.default, (target, new))
    results[new] = results[node]  # the same shape and numbers
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _filled(graph: fx.GraphModule, like: fx.Node, value: Tensor) -> fx.Node | None:
    """One number for all that is written; None where none is, so that it cannot be told which."""
    number = float(value.flatten()[0]) if value.numel() else 0.0
    if value.numel() and not bool((value == number).all()):
        return None
    return graph.graph.call_function(_aten.full_like.default, (like, number))
