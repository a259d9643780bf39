"""Points found by Pyro's strategies, ``pyro.infer.autoguide.init_to_*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.numerics import until_numbers_hold

__all__ = ["points_by_strategy"]


def points_by_strategy(density: LogDensity, num: int, strategy: Callable[..., Any]) -> Tensor:
    """Points (num, *batch, dim), each of one run of the model: torch's global generator.

    Args:
        density: of a model.
        num: how many.
        strategy: what gives each site its value.

    Raises:
        ValueError: a density that was made from a function.
    """
    target = density.target
    if target is None:
        raise ValueError("init_strategy works on the sites of a model; this target has none: give initial_params=")
    # Discrete sites need no value: they are summed out.
    model = poutine.enum(config_enumerate(target.base), first_available_dim=-1 - target.layout.depth)
    rows = []
    with evaluation_mode(target.base), poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        for _ in range(num):
            trace = until_numbers_hold(
                lambda attempt: poutine.trace(InitMessenger(strategy)(model)).get_trace(*target.args, **target.kwargs)
            )
            rows.append({site.name: trace.nodes[site.name]["value"].detach() for site in target.sites})
    return density.unconstrain({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
