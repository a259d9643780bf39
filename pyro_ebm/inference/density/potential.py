"""The log density of a potential: a function of one chain's values by name, as Pyro's kernels take it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ebm.inference.density.log_density import LogDensity

__all__ = ["potential_density"]

Potential = Callable[[Mapping[str, Tensor]], Tensor]


def potential_density(
    potential: Potential, example: Mapping[str, Tensor], transforms: Mapping[str, Any] | None = None
) -> LogDensity:
    """``-potential`` as a density of points: names in the order of ``example``, each value flat.

    The potential is run for all chains at once by ``torch.vmap``, or where it does not allow that, one chain after
    another.

    Args:
        potential: maps the values of one chain, in unconstrained space, to minus their log density.
        example: values of one chain.
        transforms: name -> transform to unconstrained space; values without one stay as they are.

    Raises:
        ValueError: no values.
    """
    if not example:
        raise ValueError("initial_params is empty: potential_fn= needs at least one value to move")
    shapes = {name: value.shape for name, value in example.items()}
    sizes = [shape.numel() for shape in shapes.values()]
    transforms = {} if transforms is None else transforms
    like = _common(list(example.values()))

    def by_name(u: Tensor) -> dict[str, Tensor]:
        parts = zip(shapes.items(), u.split(sizes, -1), strict=True)
        return {name: part.reshape(*u.shape[:-1], *shape) for (name, shape), part in parts}

    def one(values: Mapping[str, Tensor]) -> Tensor:
        return -torch.as_tensor(potential(dict(values))).reshape(())

    runner = _vectorized if _vmap_agrees(one, by_name(_probe(example, like))) else _one_by_one

    def log_prob(u: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            return runner(one, by_name(u.reshape(-1, u.shape[-1]))).reshape(u.shape[:-1])

    def constrain(u: Tensor) -> dict[str, Tensor]:
        return {name: _moved_back(name, value, transforms) for name, value in by_name(u).items()}

    def unconstrain(values: Mapping[str, Tensor]) -> Tensor:
        flat = [transforms[name](values[name]) if name in transforms else values[name] for name in shapes]
        lead = flat[0].shape[: flat[0].ndim - len(next(iter(shapes.values())))]
        return torch.cat([value.reshape(*lead, -1) for value in flat], -1)

    density = LogDensity(log_prob, sum(sizes), constrain=constrain, unconstrain=unconstrain, like=like)
    density.shapes = shapes
    density.way = "vmap" if runner is _vectorized else "loop"
    return density


def _common(values: list[Tensor]) -> Tensor:
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return values[0].to(dtype if dtype.is_floating_point else torch.get_default_dtype())


def _moved_back(name: str, value: Tensor, transforms: Mapping[str, Any]) -> Tensor:
    return transforms[name].inv(value) if name in transforms else value


def _probe(example: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Two points near the example, (2, dim)."""
    point = torch.cat([value.detach().reshape(-1).to(like) for value in example.values()])
    return torch.stack([point, point + 0.01])


def _vectorized(one: Callable[..., Tensor], values: Mapping[str, Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # where torch has to loop
        return torch.vmap(one)(dict(values))


def _one_by_one(one: Callable[..., Tensor], values: Mapping[str, Tensor]) -> Tensor:
    chains = len(next(iter(values.values())))
    return torch.stack([one({name: value[index] for name, value in values.items()}) for index in range(chains)])


def _vmap_agrees(one: Callable[..., Tensor], values: Mapping[str, Tensor]) -> bool:
    with torch.no_grad(), pyro.validation_enabled(False):
        alone = _one_by_one(one, values)
        try:
            together = _vectorized(one, values)
        except Exception:  # torch raises all kinds where a function cannot be vectorized
            return False
    return torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True)
