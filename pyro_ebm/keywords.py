"""Which keywords of a call are the model's and which the function's own: for all functions that run a model."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pyro
from pyro.poutine.messenger import _bound_partial, _context_wrap
from torch import nn
from torch.distributions import Distribution

from pyro_ebm.arrays import as_tensors, holds_arrays
from pyro_ebm.foreign import foreign_hint
from pyro_ebm.structure import prototype_trace, untilted

__all__ = ["ModelArguments", "argument_names", "model_arguments", "model_inputs", "passes_keywords", "sorted_keywords"]

P = ParamSpec("P")
R = TypeVar("R")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class ModelArguments:
    """What a model can be given by keyword.

    Args:
        names: arguments that no positional one has filled.
        unset: those of them that ``functools.partial`` has not set either.
        takes_any: whether it takes every keyword, ``**kwargs``, or cannot be looked into.
    """

    names: frozenset[str]
    unset: frozenset[str]
    takes_any: bool


def model_arguments(model: Any, num_args: int = 0) -> ModelArguments:
    """The keywords that a model has on its own, once ``num_args`` positional arguments are given.

    Looks through modules, ``functools.partial``, bound methods, Pyro's handlers, tilts, and wrappers with an attribute
    ``fn`` or ``__wrapped__``.
    """
    if isinstance(model, Distribution) or not callable(model):
        return ModelArguments(frozenset(), frozenset(), False)
    signature = _signature(model)
    if signature is None:
        return ModelArguments(frozenset(), frozenset(), True)
    parameters = list(signature.parameters.values())
    filled = {p.name for p in [p for p in parameters if p.kind in _POSITIONAL][:num_args]}
    names = frozenset(p.name for p in parameters if p.kind in _BY_NAME) - filled
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return ModelArguments(names, names - _set_by_partial(model), takes_any)


def argument_names(model: Any) -> tuple[str, ...]:
    """The arguments that a model takes by position, in their order; looks through what :func:`model_arguments` does."""
    signature = _signature(model) if callable(model) else None
    return () if signature is None else tuple(p.name for p in signature.parameters.values() if p.kind in _POSITIONAL)


def _inside(model: Any) -> Any:
    """What a wrapper wraps; None for anything else."""
    if isinstance(model, _bound_partial):  # a Pyro handler around a model
        return model.func
    if isinstance(model, functools.partial):
        return model.args[1] if model.func is _context_wrap else model.func
    if isinstance(model, nn.Module):
        return model.forward
    return vars(model).get("fn") if hasattr(model, "__dict__") else None


def _signature(model: Any) -> inspect.Signature | None:
    model = untilted(model)
    inner = _inside(model)
    if isinstance(model, functools.partial) and not isinstance(model, _bound_partial) and inner is model.func:
        found = _signature(inner)
        if found is None:
            return None

        def stand_in() -> None:
            """Has the signature of what the partial is of, which inspect cannot see in a module."""

        stand_in.__signature__ = found  # type: ignore[attr-defined]
        model = functools.partial(stand_in, *model.args, **model.keywords)
    elif callable(inner):
        return _signature(inner)
    try:
        return inspect.signature(model)
    except (TypeError, ValueError):
        return None


def _set_by_partial(model: Any) -> frozenset[str]:
    model = untilted(model)
    inner = _inside(model)
    own = frozenset(model.keywords) if isinstance(model, functools.partial) else frozenset()
    return own | _set_by_partial(inner) if callable(inner) else own


def sorted_keywords(
    owner: str,
    model: Any,
    num_args: int,
    options: frozenset[str],
    given: Mapping[str, Any],
    model_kwargs: Mapping[str, Any] | None,
    related: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords given to a function: its own options, and those of the model.

    Args:
        owner: what to call the function in errors.
        model: the model it runs.
        num_args: positional arguments given for the model.
        options: names of the function's options.
        given: the keywords of the call but for ``model_kwargs``.
        model_kwargs: keywords that are the model's whatever their names; that it was given, if empty, says that no
            other option is meant for the model.
        related: options that the function has elsewhere, and that are hardly meant for the model.

    Raises:
        TypeError: a keyword that neither has, one that both have (``model_kwargs`` tells which is meant), one given
            twice.
    """
    has = model_arguments(model, num_args)
    own = {name: value for name, value in given.items() if name in options}
    theirs = {name: value for name, value in given.items() if name not in options}
    both = sorted(set(own) & has.unset) if model_kwargs is None else []
    if both:
        name = both[0]
        raise TypeError(
            f"{owner} has an option {name!r} and the model an argument of that name: give the model's as "
            f"model_kwargs={{{name!r}: ...}}; if the option is meant, and the model's default will do, add "
            f"model_kwargs={{}}"
        )
    anywhere = options | related
    unknown = sorted(name for name in theirs if name not in has.names and not _may_be_meant(name, has, anywhere))
    if unknown:
        takes = f"it takes {sorted(options | {'model_kwargs'})}"
        arguments = f"arguments {sorted(has.names)}" if has.names else "no such argument"
        hint = foreign_hint(unknown, options, elsewhere=related, where="in other methods")
        close = [] if hint else difflib.get_close_matches(unknown[0], [*options, *has.names], 1)
        hint += f"; is {close[0]!r} meant?" if close else ""
        raise TypeError(f"{owner} has no option {unknown}; {takes}, and the model has {arguments}{hint}")
    twice = sorted(set(theirs) & set(model_kwargs or {}))
    if twice:
        raise TypeError(f"{twice} given twice: by keyword and in model_kwargs; leave one out")
    return own, {**theirs, **(model_kwargs or {})}


def _may_be_meant(name: str, has: ModelArguments, options: frozenset[str]) -> bool:
    """Whether a model that takes every keyword is meant: a misspelt option must not vanish in it."""
    return has.takes_any and not difflib.get_close_matches(name, options, 1, cutoff=0.85)


def model_inputs(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model, with arrays and tables as tensors where the model does not run on them as they are.

    A model that makes its tensors itself (``torch.from_numpy(x)``, ``table["y"]``) gets what was given, as it does from
    Pyro: numbers in double precision, and numpy's ``x.std()``, are others than those of a tensor. Without arrays among
    the arguments the model is not run.

    Raises:
        TypeError: a table with columns that are no numbers, on which the model does not run.
    """
    if not callable(model) or not holds_arrays((args, dict(kwargs))) or _runs(model, args, kwargs):
        return args, dict(kwargs)
    return as_tensors((args, dict(kwargs)))


def _runs(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model runs and has a density: an array observed as it is has none."""
    try:
        with pyro.validation_enabled(True):
            prototype_trace(untilted(model), args, kwargs).compute_log_prob()
    except Exception:  # whatever the model's own code raises
        return False
    return True


def _check_model(owner: str, name: str, given: Any) -> None:
    """Whoever calls sample(data) has forgotten the model."""
    if name in ("model", "target") and not callable(given) and not isinstance(given, Distribution):
        raise TypeError(
            f"{name} must be callable (a Pyro model), got {type(given).__name__}; call {owner}(model, ...), the "
            f"model's arguments after it"
        )


def passes_keywords(
    options: Callable[[Mapping[str, Any]], tuple[str, frozenset[str], frozenset[str]]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Pass the keywords that a function lacks on to the model it runs, and arrays as tensors.

    The function has a parameter ``model`` or ``target``, ``*args`` of the model, ``model_kwargs``, and ``**kwargs`` for
    readers of its signature only: all keywords of the model reach it in ``model_kwargs``.

    Args:
        options: where they depend on the call: from its keywords, what to call the function in errors, its options,
            and those it has in other calls. By default its own parameters.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = list(inspect.signature(function).parameters.values())
        first = [p.name for p in parameters if p.kind in _POSITIONAL]
        at = next((first.index(name) for name in ("model", "target") if name in first), 0)
        own = frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY).union(first[at + 1 :])

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = dict(kwargs)
            if len(args) == at and first[at] in given:  # the model by keyword
                args = (*args, given.pop(first[at]))  # type: ignore[assignment]
            if len(args) <= at:
                return function(*args, **kwargs)  # raises: the model is missing
            _check_model(function.__name__, first[at], args[at])
            before, after = args[: len(first)], args[len(first) :]
            model_kwargs = given.pop("model_kwargs", None)
            if not isinstance(model_kwargs, Mapping | None):
                raise TypeError(
                    f"model_kwargs must be a mapping of the model's keywords or None, got {type(model_kwargs).__name__}"
                )
            name, known, related = (f"{function.__name__}()", own, own) if options is None else options(given)
            known -= {"model_kwargs"}
            mine, theirs = sorted_keywords(name, args[at], len(after), known, given, model_kwargs, related)
            after, theirs = model_inputs(args[at], after, theirs)
            return function(*before, *after, **mine, model_kwargs=theirs)  # type: ignore[arg-type]

        return call

    return decorate
