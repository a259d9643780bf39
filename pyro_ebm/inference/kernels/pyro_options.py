"""The arguments of Pyro's kernels that ours take: which do something, which mean nothing where chains are a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.errors import warn_user

__all__ = ["IGNORED", "Adapted", "Blocks", "check_full_mass", "warn_of_ignored"]

# Pyro's option, its default, and why it does nothing here.
IGNORED: Mapping[str, tuple[Any, str]] = {
    "jit_compile": (False, "graphs are captured; MCMC(..., compile=True) compiles them"),
    "jit_options": (None, "graphs are captured without torch.jit"),
    "ignore_jit_warnings": (False, "graphs are captured without torch.jit"),
    "use_multinomial_sampling": (True, "it belongs to NUTS"),
    "max_tree_depth": (10, "it belongs to NUTS; max_steps bounds a trajectory here"),
    "min_stepsize": (1e-10, "step sizes are bounded"),
    "max_stepsize": (1e10, "step sizes are bounded"),
}


class Adapted:
    """An option of a kernel that reads as given before a run, and as found by the warm-up after it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, kernel: Any, owner: type | None = None) -> Any:
        if kernel is None:
            return None  # the default, as a dataclass asks for it
        found = kernel.__dict__.get("_found", {})
        return found.get(self._name, kernel.__dict__[self._name])

    def __set__(self, kernel: Any, value: Any) -> None:
        kernel.__dict__[self._name] = value


def warn_of_ignored(kernel: Any) -> None:
    """One warning that names what was given and does nothing."""
    given = [name for name, (default, _) in IGNORED.items() if getattr(kernel, name) != default]
    if given:
        reasons = "; ".join(dict.fromkeys(f"{name}: {IGNORED[name][1]}" for name in given))
        warn_user(
            f"{type(kernel).__name__} ignores {', '.join(given)}, which {'has' if len(given) == 1 else 'have'} no "
            f"meaning for chains that move as one batch ({reasons})",
            UserWarning,
        )


def check_full_mass(full_mass: Any) -> None:
    """A flag, or a list of tuples of names, none twice."""
    if isinstance(full_mass, bool):
        return
    blocks = isinstance(full_mass, list) and all(
        isinstance(block, tuple) and block and all(isinstance(name, str) for name in block) for block in full_mass
    )
    if not blocks:
        raise ValueError(f"full_mass must be True, False or a list of tuples of site names, got {full_mass!r}")
    names = [name for block in full_mass for name in block]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"full_mass names the site(s) {twice} more than once: each belongs to one block")


@dataclass(frozen=True)
class Blocks:
    """Which coordinates of a point share a dense block of the mass matrix.

    Args:
        layout: site -> number of coordinates, in the order of the vector.
        full_mass: as the kernel takes it.
    """

    layout: Mapping[str, int]
    full_mass: bool | Sequence[tuple[str, ...]]

    def __post_init__(self) -> None:
        unknown = sorted({name for block in self.dense for name in block} - set(self.layout))
        if unknown:
            raise ValueError(f"full_mass names the site(s) {unknown}; the latent sites are {sorted(self.layout)}")

    @property
    def dense(self) -> list[tuple[str, ...]]:
        if isinstance(self.full_mass, bool):
            return [tuple(sorted(self.layout))] if self.full_mass else []
        return list(self.full_mass)

    def mask(self, like: Tensor) -> Tensor | None:
        """Ones inside the blocks and on the diagonal, (dim, dim); ``None`` where all is diagonal."""
        if not self.dense:
            return None
        mask = torch.eye(sum(self.layout.values()), dtype=like.dtype, device=like.device)
        for block in self.dense:
            index = self._index(block, like)
            mask[index[:, None], index] = 1.0
        return mask

    def _index(self, names: Sequence[str], like: Tensor) -> Tensor:
        ends = list(itertools.accumulate(self.layout.values()))
        where = {name: (end - size, end) for (name, size), end in zip(self.layout.items(), ends, strict=True)}
        return torch.cat([torch.arange(*where[name], device=like.device) for name in names])

    def by_site(self, inverse_mass: Tensor, factor: Tensor | None) -> dict[tuple[str, ...], Tensor]:
        """The inverse mass matrix as Pyro has it: tuple of sites -> (*batch, size, size), or (*batch, size)."""
        found = {}
        for block in self.dense:
            index = self._index(block, inverse_mass)
            if factor is None:
                found[block] = inverse_mass[..., index].diag_embed()
            else:
                found[block] = (factor @ factor.mT)[..., index[:, None], index]
        rest = tuple(sorted(set(self.layout).difference(*self.dense)))
        if rest:
            found[rest] = inverse_mass[..., self._index(rest, inverse_mass)]
        return found
