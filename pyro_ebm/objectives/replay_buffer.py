"""Chains that outlive a training step: where the next negatives start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number

__all__ = ["ReplayBuffer"]


@checked
class ReplayBuffer:
    r"""A population of chains that training steps move on: most are taken up where they stopped, a few start anew.

    Of the starts that :meth:`draw` gives, a share ``1 - fresh`` are places where chains of earlier steps stopped, each
    chain at most once, and the others are draws of the base; :meth:`put` keeps where each of them arrived. A chain
    that starts anew takes a free slot or, once all are taken, that of another chain; so chains are
    replaced about every ``capacity / (fresh * num)`` steps and every mode of the base is visited again. An energy
    trained on such chains sees a mixture of ages: the fresher, the nearer to the base.

    Args:
        capacity: chains at most; at least as many as a batch has elements.
        fresh: share of the starts that are draws of the base.

    Raises:
        ValueError: an argument out of its range.

    Reference:
        Du and Mordatch (2019), Implicit Generation and Modeling with Energy-Based Models. Tieleman (2008), Training
        restricted Boltzmann machines using approximations to the likelihood gradient.

    Example:
        >>> import torch
        >>> buffer, generator = ReplayBuffer(capacity=8, fresh=0.25), torch.Generator().manual_seed(0)
        >>> starts, slots = buffer.draw(4, lambda num: torch.zeros(num, 2), generator)
        >>> buffer.put(starts + 1.0, slots)
        >>> len(buffer)
        4
    """

    def __init__(self, *, capacity: int = 10_000, fresh: float = 0.05) -> None:
        if not 0 <= fresh <= 1:
            raise ValueError(f"fresh must be a share between 0 and 1, got {fresh!r}")
        self.capacity, self.fresh = whole_number("capacity", capacity), fresh
        self._size = 0
        self._slots: Tensor | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> Tensor:
        """Where the chains are, (len(buffer), *event)."""
        return torch.empty(0) if self._slots is None else self._slots[: self._size]

    def draw(
        self, num: int, fresh_draws: Callable[[int], Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Places to start from.

        Args:
            num: how many.
            fresh_draws: gives so many draws of the base, (count, *event).
            generator: decides which start anew, and which of the chains go on.

        Returns:
            Starts (num, *event) and their slots (num,), for :meth:`put`.

        Raises:
            ValueError: more starts than the buffer has places.
        """
        if num > self.capacity:
            raise ValueError(
                f"capacity must be at least the number of chains in a step, {num}, got {self.capacity}; "
                "build a larger ReplayBuffer, or train with a smaller batch_size"
            )
        device = generator.device
        restarts = int((torch.rand(num, generator=generator, device=device) < self.fresh).sum())
        continued = min(num - restarts, self._size)
        order = torch.randperm(self._size, generator=generator, device=device)
        free = torch.cat([torch.arange(self._size, self.capacity, device=device), order[continued:]])
        slots = torch.cat([order[:continued], free[: num - continued]])
        parts = [self._slots[slots[:continued].to(self._slots.device)]] if self._slots is not None else []
        parts += [fresh_draws(num - continued)] if num > continued else []
        return torch.cat([part.to(parts[-1]) for part in parts]), slots

    def put(self, values: Tensor, slots: Tensor) -> None:
        """Keep where the chains of :meth:`draw` arrived.

        Args:
            values: (num, *event).
            slots: (num,), as :meth:`draw` gave them.
        """
        if self._slots is None:
            self._slots = values.new_zeros(self.capacity, *values.shape[1:])
        if values.shape[1:] != self._slots.shape[1:]:
            raise ValueError(
                f"values must have the event shape of the buffer, {tuple(self._slots.shape[1:])}, "
                f"got {tuple(values.shape[1:])}; use a ReplayBuffer of its own for each site"
            )
        self._slots[slots.to(self._slots.device)] = values.detach().to(self._slots)
        self._size = max(self._size, int(slots.max()) + 1)

    def state_dict(self) -> dict[str, Any]:
        """The chains, as copies: what a checkpoint keeps."""
        return {"values": self.values.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the chains of :meth:`state_dict`.

        Raises:
            ValueError: more chains than this buffer has places.
        """
        values = state["values"]
        if len(values) > self.capacity:
            raise ValueError(
                f"the saved buffer holds {len(values)} chains, this one has room for {self.capacity}; "
                f"build it with the capacity of the run that saved it"
            )
        self._slots, self._size = None, 0
        if len(values):
            self.put(values, torch.arange(len(values), device=values.device))
