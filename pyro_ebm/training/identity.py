"""What tells one training run from another: settings in words and numbers, compared when a run goes on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.randomness import fingerprint

__all__ = ["description", "differences", "frozen_weights", "settings_of_modules", "settings_of_optimizer"]

_PLAIN = (bool, int, float, str, type(None))
# What an ELBO finds out by itself, and what torch's modules and schedulers note down.
_PASSING = {"max_plate_nesting", "training", "last_epoch", "best", "num_bad_epochs", "cooldown_counter"}
_DEPTH = 4


def description(value: Any, depth: int = 0) -> Any:
    """A value in plain words and numbers, the same in another process; of objects their class and public settings."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"{tuple(value.shape)} {fingerprint((value,)):x}"
    if depth > _DEPTH:
        return type(value).__qualname__
    if isinstance(value, tuple | list):
        return [description(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {str(key): description(item, depth + 1) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return {"partial of": description(value.func, depth + 1), "with": description([value.args, value.keywords])}
    if isinstance(value, types.MethodType):
        return [value.__func__.__qualname__, description(value.__self__, depth + 1)]
    if isinstance(value, types.FunctionType):
        return _of_function(value, depth)
    if isinstance(value, type) or isinstance(value, nn.Module):
        return (value if isinstance(value, type) else type(value)).__qualname__
    return {"class": type(value).__qualname__, **_settings(value, depth)}


def _settings(value: Any, depth: int) -> dict[str, Any]:
    """Attributes that an object was made with, by their names, and does not itself carry from step to step."""
    try:
        made_with = set(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):  # of some classes written in C
        made_with = set()
    carried = set(value.state_dict()) if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") else set()
    skipped = carried | _PASSING
    return {
        name: description(item, depth + 1)
        for name, item in getattr(value, "__dict__", {}).items()
        if name in made_with and name not in skipped and not isinstance(item, Tensor)
    }


def _of_function(function: types.FunctionType, depth: int) -> dict[str, Any]:
    """Its name, its code, and the plain values and functions that it closes over."""
    cells: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(content, (*_PLAIN, types.FunctionType)) and content is not function:
            cells[name] = description(content, depth + 1)
    code = hashlib.blake2b(repr(_code(function.__code__)).encode(), digest_size=4).hexdigest()
    default = description([function.__defaults__, function.__kwdefaults__], depth + 1)
    return {"function": function.__qualname__, "code": code, "defaults": default, **cells}


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def settings_of_modules(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """Settings of modules that are no weights, by module and name; whole numbers count things and are left out."""
    found: dict[str, Any] = {}
    for index, module in enumerate(modules):
        for path, sub in module.named_modules():
            where = ".".join(part for part in (type(module).__name__, path) if part)
            for name, value in vars(sub).items():
                plain = isinstance(value, float | str | bool) or dataclasses.is_dataclass(value)
                if plain and not name.startswith("_") and name not in _PASSING:
                    found[f"{where}.{name} ({index})"] = description(value)
    return found


def settings_of_optimizer(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rates and all else that the groups of parameters were given."""
    return [description({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def frozen_weights(found: Sequence[nn.Module], learning: Sequence[Tensor]) -> int:
    """A number for the weights that stand still behind model and guide."""
    moving = {id(p) for p in learning}
    return fingerprint(p for module in found for p in module.parameters() if id(p) not in moving)


def differences(saved: Any, here: Any, name: str) -> Iterator[str]:
    """Where two descriptions differ, in words: the innermost names, and both values."""
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*saved, *here]):
            yield from differences(saved.get(key), here.get(key), f"{name}, {key}")
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for old, new in zip(saved, here, strict=True):
            yield from differences(old, new, name)
    elif saved != here and not (saved != saved and here != here):  # two NaN are the same
        yield f"its {name} is {saved!r}, here it is {here!r}"
