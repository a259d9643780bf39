"""What torch says of numbers within a model, by whose they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_ebm.arrays import as_tensor
from pyro_ebm.modules import modules_of

__all__ = ["told_of_data"]

_OF_PRECISION = ("dtype", "scalar type")


def told_of_data(error: Exception, given: Any) -> str | None:
    """What to say where a model fails by its data: their precision is not that of the parameters.

    Args:
        error: what the model, its guide or its network raised.
        given: arguments of a call, the model and its data among them.

    Returns:
        None where it is about something else, or nobody can see whose numbers they are.
    """
    said, leaves = str(error).partition("\n")[0], pytree.tree_leaves(given)
    if type(error) is RuntimeError and any(word in said for word in _OF_PRECISION):
        return _of_precision(said, leaves)
    return None


def _of_precision(said: str, leaves: list[Any]) -> str | None:
    modules = {id(module): module for leaf in leaves for module in _behind(leaf)}.values()
    own = {p.dtype: type(module).__name__ for module in modules for p in module.parameters() if p.is_floating_point()}
    other = [leaf.dtype for leaf in map(_tensor, leaves) if leaf is not None and leaf.dtype not in own]
    if len(own) != 1 or not other:
        return None
    ((wanted, owner),) = own.items()
    found = min(other, key=lambda dtype: not dtype.is_floating_point)
    arrays = f" (floating-point arrays and tables come as {_name(torch.get_default_dtype())}, torch's default dtype)"
    return (
        f"the parameters of {owner} are {_name(wanted)}, and of its data some are {_name(found)} ({said}): give them "
        f"as tensors, x.to({wanted}), or move the module{arrays if found == torch.get_default_dtype() else ''}"
    )


def _behind(leaf: Any) -> list[nn.Module]:
    """The modules of a model, or of a kernel or a sampler that was made with one, without those of its tilt."""
    if isinstance(leaf, Tensor):
        return []
    for inner in ("kernel", "model", "base_model"):
        if callable(getattr(leaf, inner, None)):
            return _behind(getattr(leaf, inner))
    return modules_of(leaf)


def _tensor(leaf: Any) -> Tensor | None:
    try:
        found = as_tensor(leaf)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, Tensor) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
