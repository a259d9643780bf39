"""Arguments checked against the annotations of their function, so that every wrong kind is told by name."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pyro_ebm.checks import is_number, is_whole_number, number, whole_number

__all__ = ["checked"]

T = TypeVar("T", bound=Callable[..., Any])

_SHOWN = 80  # characters of a value in a message
_MAY_BE_NAN = {"pareto_k", "seconds", "sampling_seconds"}  # what was measured, and may not have been
_TOLD_BETTER = {"kernel", "sampler", "scheduler", "optimizer", "train"}  # by the functions themselves
_VALUES_TOLD_BETTER = {"dims", "energies", "initial_params", "init", "draws"}
_SHOWN_WHOLE = ("a number", "text", "a whole number", "True or False", "a path")
_LOOSE = ("a number", "text", "a whole number")  # of tensors, coordinates, settings
# Numbers that mean the same wherever they are asked for; limits excluded.
_BETWEEN = {"target_accept_prob": (0.0, 1.0), "learning_rate": (0.0, math.inf), "trajectory_length": (0.0, 1e6)}
_FROM_ZERO = {"warmup_steps", "num_gradients", "test_size", "reference_size", "event_dim", "max_plate_nesting"}
_FROM_ONE = re.compile(
    r"(num|max|chains|particles)_.*|.*_(size|steps)|epochs|capacity|(latent_)?dim|every|thin|patience"
)


class _Kind(NamedTuple):
    """What one word of an annotation admits, and how it is called."""

    admits: Callable[[Any], bool]
    words: str


def checked(made: T) -> T:
    """A function, or the ``__init__`` of a class, whose arguments must be what its annotations say.

    ``int``: a whole number in the sense of :func:`~pyro_ebm.checks.whole_number` (counts: of at least 1; seeds: any
    that torch takes); ``float``: a number, and not NaN; ``bool``: True or False; ``str``,
    ``Callable``, ``Mapping``, ``Sequence`` with the items that it names, tensors and classes: one of these. What an
    annotation leaves open (``Any``, an alias, a name that is known to checkers alone) stays open. Limits that one
    argument has are the function's own. Arguments of ``*args`` and ``**kwargs`` belong to the user's model.

    Raises:
        TypeError, ValueError: when called; they name the argument, what it must be, and what came.
    """
    if isinstance(made, type):
        made.__init__ = _wrapped(made.__init__, _spaces(made))  # type: ignore[misc]
        return made
    return _wrapped(made, [getattr(made, "__globals__", {})])


def _spaces(made: type) -> list[Mapping[str, Any]]:
    """Where the names in the annotations of a class and of those it inherits from are defined."""
    return [vars(sys.modules[each.__module__]) for each in made.__mro__]


def _wrapped(function: Any, spaces: Sequence[Mapping[str, Any]]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        names, rules = known()
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in rules:
                _check(name, value, rules[name])
        return function(*args, **kwargs)

    @functools.cache
    def known() -> tuple[list[str], dict[str, list[_Kind]]]:
        # At the first call: by then all names that annotations use are defined.
        parameters = inspect.signature(function).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        rules = {p.name: _kinds(p.annotation, p.name, spaces) for p in parameters if p.kind not in open_ended}
        return [p.name for p in parameters if p.kind in positional], {k: v for k, v in rules.items() if v}

    return call


def _check(name: str, value: Any, kinds: list[_Kind]) -> None:
    if any(kind.admits(value) for kind in kinds):
        if name in _BETWEEN and value is not None:
            number(name, value, at_least=_BETWEEN[name][0], at_most=_BETWEEN[name][1], within=True)
        return
    words = [kind.words for kind in kinds]
    if "a whole number" in words and not set(words) - {"a whole number", "None"}:
        _refuse_count(name, value)
    plain = any(word in _SHOWN_WHOLE or word.startswith("a sequence") for word in words)
    shown = _shown(value) if plain else type(value).__name__
    if any(kind.words == "a number" for kind in kinds) and is_number(value):
        raise ValueError(f"{name} must be a number, got {shown}")
    raise TypeError(f"{name} must be {' or '.join(dict.fromkeys(words))}, got {shown}")


def _refuse_count(name: str, value: Any) -> None:
    if name == "seed":
        limit = " that fits 64 bits" if is_whole_number(value, at_least=-(2**200)) else ""
        raise ValueError(f"seed must be a whole number or None{limit}, got {_shown(value)}")
    if _least(name) >= 0:
        whole_number(name, value, at_least=_least(name))
    raise ValueError(f"{name} must be a whole number, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A plain value in a message as it is where it is short; of anything else its type."""
    text = repr(value) if isinstance(value, bool | int | float | complex | str | list | tuple | dict | None) else ""
    return text if 0 < len(text) <= _SHOWN and "\n" not in text else type(value).__name__


def _least(name: str) -> int:
    """The smallest count of this name; where it has no limit, the function's own will do."""
    if name in _FROM_ZERO:
        return 0
    return 1 if _FROM_ONE.fullmatch(name) else -(2**53)


def _kinds(annotation: Any, name: str, spaces: Sequence[Mapping[str, Any]]) -> list[_Kind]:
    """What the parts of `A | B | None` admit; empty where one of them is open."""
    if not isinstance(annotation, str) or name in _TOLD_BETTER:
        return []
    kinds = [_kind(part, name, spaces) for part in _parts(annotation.strip("'\""))]
    if len(kinds) - ("None" in _parts(annotation)) > 1:  # `int | Sequence[int]`: limits are the function's
        kinds = [_WHOLE if kind and kind.words == _WHOLE.words else kind for kind in kinds]
    return [] if None in kinds else [kind for kind in kinds if kind is not None]


def _parts(annotation: str, separator: str = "|") -> list[str]:
    """An annotation at the separators outside its brackets."""
    parts, depth = [""], 0
    for letter in annotation:
        depth += (letter == "[") - (letter == "]")
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _kind(part: str, name: str, spaces: Sequence[Mapping[str, Any]]) -> _Kind | None:
    word, _, rest = part.partition("[")
    items = _parts(rest.removesuffix("]"), ",") if rest else []
    if word == "int":
        return _Kind(_seed if name == "seed" else functools.partial(_count, least=_least(name)), "a whole number")
    if word == "float" and name in _MAY_BE_NAN:
        return _Kind(is_number, "a number")
    if word in _PLAIN:
        return _PLAIN[word]
    if word in ("Sequence", "Iterable", "tuple", "list", "Set"):
        return _of_items(word, items, name, spaces)
    if word in ("Mapping", "dict"):
        return _of_values(items, name, spaces)
    found = _resolved(word, spaces)
    if isinstance(found, type) and found is not Any and not getattr(found, "_is_protocol", False):
        return _Kind(lambda value: isinstance(value, found), _named(found))
    return None


def _of_items(word: str, items: list[str], name: str, spaces: Sequence[Mapping[str, Any]]) -> _Kind | None:
    """A sequence, whose items are checked where the annotation names one kind."""
    item = items[0] if items and (len(items) == 1 or items[1] == "...") else "Any"
    of_item = {"int": [_WHOLE], "float": [_Kind(is_number, "a number")]}.get(item) or _kinds(item, name, spaces)
    of_item = [] if any(kind.words.startswith("a sequence") for kind in of_item) else of_item  # shapes are its own
    plural = {"int": " of whole numbers", "float": " of numbers", "str": " of names"}.get(item, "")
    many = _is_iterable if word in ("Iterable", "Set") else _is_sequence

    def admits(value: Any) -> bool:
        if not many(value):
            return False
        listed = (isinstance(value, Sequence | np.ndarray) or _is_tensor(value)) and of_item
        return not listed or all(any(kind.admits(each) for kind in of_item) for each in value)

    return _Kind(admits, f"a sequence{plural}")


def _of_values(items: list[str], name: str, spaces: Sequence[Mapping[str, Any]]) -> _Kind:
    """A mapping, whose values are checked where the annotation names tensors or classes."""
    of_value = _kinds(items[1], name, spaces) if len(items) == 2 and name not in _VALUES_TOLD_BETTER else []
    of_value = [] if any(kind.words in _LOOSE for kind in of_value) else of_value
    words = " or ".join(kind.words for kind in of_value)

    def admits(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            not of_value or any(kind.admits(each) for kind in of_value) for each in value.values()
        )

    return _Kind(admits, f"a mapping of names to {words}" if words else "a mapping")


def _resolved(word: str, spaces: Sequence[Mapping[str, Any]]) -> Any:
    first, *others = word.split(".")
    for space in spaces:
        if first in space:
            found = space[first]
            for other in others:
                found = getattr(found, other, None)
            return found
    return None  # the module imports it for checkers alone


def _named(found: type) -> str:
    """``an Energy``, ``a torch Module``."""
    home = found.__module__.split(".")[0]
    name = found.__qualname__ if home in ("pyro_ebm", "builtins") else f"{home} {found.__qualname__}"
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _seed(value: Any) -> bool:
    return is_whole_number(value, at_least=-(2**63)) and not is_whole_number(value, at_least=2**64)


def _count(value: Any, least: int) -> bool:
    return is_whole_number(value, at_least=least) and not is_whole_number(value, at_least=2**53)


def _whole(value: Any) -> bool:
    return is_whole_number(value, at_least=-(2**40)) and not is_whole_number(value, at_least=2**40)


_WHOLE = _Kind(_whole, "a whole number")


def _is_float(value: Any) -> bool:
    countable = not isinstance(value, int) or abs(value) < 2**63
    return countable and is_number(value) and bool(value == value)


def _is_iterable(value: Any) -> bool:
    many = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return many and not isinstance(value, str | bytes | Mapping)


def _is_sequence(value: Any) -> bool:
    listed = (isinstance(value, Sequence | np.ndarray) or _is_tensor(value)) or hasattr(value, "to_numpy")
    return listed and _is_iterable(value)


def _is_array(value: Any) -> bool:
    numbers = isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf"
    return _is_tensor(value) or numbers or hasattr(value, "to_numpy")


def _holds_arrays(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_array(each) for each in value.values())


def _makes_modules(value: Any) -> bool:
    return callable(value) and (not isinstance(value, type) or _is_module_class(value))


# Whoever passes an object of torch's or Pyro's has imported it; the command's help does not load them.


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_module_class(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, type) and issubclass(value, torch.nn.Module)


def _is_distribution(value: Any) -> bool:
    kinds = [sys.modules.get("torch.distributions"), sys.modules.get("pyro.distributions")]
    return any(kind is not None and isinstance(value, kind.Distribution) for kind in kinds)


_PLAIN: dict[str, _Kind] = {
    "None": _Kind(lambda value: value is None, "None"),
    "bool": _Kind(lambda value: isinstance(value, bool | np.bool_), "True or False"),
    "float": _Kind(_is_float, "a number"),
    "str": _Kind(lambda value: isinstance(value, str), "text"),
    "Path": _Kind(lambda value: isinstance(value, os.PathLike), "a path"),
    "os.PathLike": _Kind(lambda value: isinstance(value, os.PathLike), "a path"),
    "Tensor": _Kind(_is_tensor, "a tensor"),
    "torch.Tensor": _Kind(_is_tensor, "a tensor"),
    "Array": _Kind(_is_array, "a tensor, an array or a table of numbers"),
    "Distribution": _Kind(_is_distribution, "a distribution of Pyro"),
    "TorchDistribution": _Kind(_is_distribution, "a distribution of Pyro"),
    "Callable": _Kind(callable, "callable"),
    "MakeOptimizer": _Kind(callable, "callable"),
    "MakeScheduler": _Kind(callable, "callable"),
    "Arrays": _Kind(_holds_arrays, "a mapping of names to arrays"),
    "type": _Kind(_is_module_class, "a class of modules"),
    "Activation": _Kind(_makes_modules, "a class of modules, or a function that makes one"),
    "Hook": _Kind(callable, "callable"),
    "Quantity": _Kind(callable, "callable"),
    "NDArray": _Kind(lambda value: isinstance(value, np.ndarray) and value.dtype == object, "an array of Axes"),
    "np.ndarray": _Kind(lambda value: isinstance(value, np.ndarray), "an array"),
    "Axes": _Kind(lambda value: hasattr(value, "get_figure"), "matplotlib Axes"),
    "pd.DataFrame": _Kind(lambda value: type(value).__name__ == "DataFrame", "a pandas DataFrame"),
}
