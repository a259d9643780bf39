"""Parameters in Pyro's global store (``pyro.param``, ``pyro.module``) as a module: it trains, is saved and restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

__all__ = ["StoreParameters", "stored_parameters"]


class StoreParameters(nn.Module):
    """Unconstrained values of Pyro's parameter store: they stay there, where models find them.

    Args:
        names: of the parameters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(names)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:  # noqa: ARG002
        held = dict(pyro.get_param_store().named_parameters())
        yield from ((name, held[name]) for name in self.names)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        del recurse
        yield from (value for _, value in self.named_parameters())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ARG002
        return {name: value.detach() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        for name, value in self.named_parameters():
            value.copy_(state_dict[name])


def stored_parameters(names: Iterable[str], known: Iterable[Tensor]) -> StoreParameters | None:
    """Those of the parameters that learn and are in no module known already; None where there are none."""
    seen = {id(parameter) for parameter in known}
    held = dict(pyro.get_param_store().named_parameters())
    new = [name for name in names if name in held and id(held[name]) not in seen and held[name].requires_grad]
    return StoreParameters(new) if new else None
