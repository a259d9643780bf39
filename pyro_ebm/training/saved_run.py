"""What the file of a training run must hold: numbers that a run can have written, refused before any is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.checks import is_whole_number
from pyro_ebm.errors import CheckpointError

__all__ = ["require_possible"]


def require_possible(
    saved: Mapping[str, Any], path: str | Path, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Raise a CheckpointError that names the first entry which no run of these modules can have written.

    Args:
        saved: the payload of the file; its weights have the names, shapes and dtypes of the modules.
        path: of the file, for the message.
        modules: that learn.
        optimizer: over their parameters, as the run that goes on has it.
    """
    for problem in (*_of_progress(saved), *_of_weights(saved, modules), *_of_optimizer(saved, optimizer)):
        raise CheckpointError(
            f"{path} is damaged ({problem}); restore it from a copy, or start anew with resume=False"
        )


def _of_progress(saved: Mapping[str, Any]) -> Iterator[str]:
    epoch: Any = saved.get("epoch")
    best: Any = saved.get("best_epoch")
    kept: Any = saved.get("kept_epoch")
    if not is_whole_number(epoch, at_least=0):
        yield f"its epoch is {epoch!r}, no whole number from 0 on"
    elif not is_whole_number(best, at_least=0) or best > epoch:
        yield f"its best_epoch is {best!r}, none of the {epoch} it had"
    elif not is_whole_number(kept, at_least=0) or kept > epoch:
        yield f"its kept_epoch is {kept!r}, none of the {epoch} it had"
    else:
        for name, lengths in (("train_loss", (epoch,)), ("validation_loss", (0, epoch))):
            yield from _of_curve(name, saved.get(name), lengths)
    if not _is_number(saved.get("best_loss")) or math.isnan(saved["best_loss"]):
        yield f"its best_loss is {saved.get('best_loss')!r}"
    if not _is_number(saved.get("seconds")) or not 0 <= saved["seconds"] < math.inf:
        yield f"its seconds are {saved.get('seconds')!r}"
    if not is_whole_number(saved.get("seed"), at_least=-(2**63)):
        yield f"its seed is {saved.get('seed')!r}"


def _of_curve(name: str, curve: Any, lengths: tuple[int, ...]) -> Iterator[str]:
    if not isinstance(curve, list) or len(curve) not in lengths:
        yield f"its {name} has not one number for each of {lengths[-1]} epochs"
    elif not all(_is_number(loss) and math.isfinite(loss) for loss in curve):
        yield f"its {name} is not finite"


def _of_weights(saved: Mapping[str, Any], modules: Sequence[nn.Module]) -> Iterator[str]:
    for part in ("weights", "best"):
        for state, module in zip(saved[part], modules, strict=True):
            for name, parameter in module.named_parameters():
                if name in state and parameter.is_floating_point() and not _finite(state[name]):
                    yield f"{name!r} of its {part} is not finite"


def _of_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    state, wanted = saved.get("optimizer"), optimizer.state_dict()["param_groups"]
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict) or not isinstance(groups, list):
        yield "its optimizer has no state"
        return
    if [group.get("params") for group in groups] != [group["params"] for group in wanted]:
        yield "the parameters of its optimizer are not those of the modules"
        return
    for group in groups:
        for name, value in group.items():
            if any(_is_number(number) and not math.isfinite(number) for number in _flat(value)):
                yield f"{name!r} of its optimizer is {value!r}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in wanted for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        yield from _of_moments(state["state"].get(index, {}), parameter)


def _of_moments(moments: Any, parameter: Tensor) -> Iterator[str]:
    """What optimizers keep of a parameter: numbers of its shape and dtype, and a count of steps."""
    if not isinstance(moments, dict):
        yield f"the state of its optimizer is {type(moments).__name__} where numbers belong"
        return
    for name, value in moments.items():
        if name == "step":
            count = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
            if not _is_number(count) or not 0 <= count < math.inf:
                yield f"the step of its optimizer is {count!r}"
        elif isinstance(value, Tensor) and value.ndim > 0:
            # Adafactor keeps rows and columns, L-BFGS flat vectors: those have other names.
            same = name not in _LIKE_PARAMETERS or (value.shape == parameter.shape and value.dtype == parameter.dtype)
            if not same:
                yield f"{name!r} of its optimizer is {value.dtype} {list(value.shape)} for {list(parameter.shape)}"
            elif value.is_floating_point() and not _finite(value):
                yield f"{name!r} of its optimizer is not finite"


_LIKE_PARAMETERS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta"),
    *("grad_avg", "sum", "ax", "prev"),
)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value.item() if _is_scalar(value) else value]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
