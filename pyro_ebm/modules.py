"""The modules behind a callable: which they are, in which mode they run, how SVI learns of them."""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn
from torch.distributions import constraints

__all__ = ["evaluation_mode", "frozen", "modules_of", "name_of", "own_parameters", "register_for_svi"]

_instance_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def modules_of(*callables: Any) -> list[nn.Module]:
    """The outermost modules behind models and guides, each once.

    Looks through bound methods (``vae.model``), ``functools.partial`` (its arguments too) and decorated
    functions. What a plain function reaches by a closure or a global name cannot be seen.
    """
    found: list[nn.Module] = []
    for item in callables:
        if isinstance(item, nn.Module):
            candidates = [item]
        elif isinstance(item, functools.partial):  # also what most Pyro handlers used as decorators return
            candidates = modules_of(item.func, *item.args, *item.keywords.values())
        elif isinstance(getattr(item, "__self__", None), nn.Module):
            candidates = [item.__self__]
        elif hasattr(item, "fn"):  # what poutine.trace(model) returns
            candidates = modules_of(item.fn)
        elif hasattr(item, "__wrapped__"):
            candidates = modules_of(item.__wrapped__)
        else:
            candidates = []
        found += [module for module in candidates if not any(module is seen for seen in found)]
    return found


def name_of(item: Any) -> str:
    """What a person calls a model: ``VAE.model``, ``eight_schools``, ``TiltedModel``; of handlers, what they wrap."""
    for inner in ("__wrapped__", "func"):  # of what Pyro's handlers return when used on a function; of a partial
        if not isinstance(item, nn.Module) and callable(getattr(item, inner, None)):
            return name_of(getattr(item, inner))
    owner = getattr(item, "__self__", None)
    if owner is not None and not isinstance(item, nn.Module) and hasattr(item, "__name__"):
        return f"{type(owner).__name__}.{item.__name__}"
    if isinstance(getattr(item, "__name__", None), str):
        return str(item.__name__)
    if not isinstance(item, nn.Module) and callable(getattr(item, "fn", None)):
        return name_of(item.fn)
    return type(item).__name__


def register_for_svi(module: nn.Module, prefix: str) -> None:
    """Tell ``pyro.infer.SVI`` about a module's parameters, under a name no other instance has.

    Does nothing unless something is collecting parameters just now, so that sampling, ``fit`` and
    plain calls leave Pyro's global parameter store alone. Frozen parameters stay out of it.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
        number = _instance_numbers.setdefault(module, next(_counter))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*because requires_grad=False")
            pyro.module(f"{prefix}_{number}", module)


@contextmanager
def own_parameters(*callables: Any) -> Iterator[None]:
    """Let the PyroModules behind the callables, as all autoguides are, use their own parameters and no other's.

    Pyro's global store knows the parameters of a PyroModule by names that a second one, of the same class or without
    a name, has too; whichever runs second is handed the parameters of the first. What other modules have there under
    the same names is out of the way meanwhile, and what these modules have put there is gone afterwards. Other
    parameters, also those loaded into the store for them, stay.
    """
    modules = [module for module in modules_of(*callables) if isinstance(module, PyroModule)]
    if not modules:
        yield
        return
    store = pyro.get_param_store()
    before = dict(store.named_parameters())
    names, own = _names_in_store(modules), {id(p) for module in modules for p in module.parameters()}
    prefixes = tuple(f"{module._pyro_name}." for module in modules if module._pyro_name)
    foreign = {
        name: (value, store._constraints[name])
        for name, value in before.items()
        if isinstance(value, nn.Parameter) and id(value) not in own and (name in names or name.startswith(prefixes))
    }
    for name in foreign:
        _forget(store, name)
    try:
        # Pyro would ask them for gradients when it first meets them: frozen ones too, and under torch.vmap in vain.
        for name, value in _plain_parameters(modules):
            if name not in store:
                _remember(store, name, value, constraints.real)
        yield
    finally:
        own = {id(p) for module in modules for p in module.parameters()}
        for name, value in list(store.named_parameters()):
            if id(value) in own and before.get(name) is not value:
                _forget(store, name)
        for name, (value, constraint) in foreign.items():
            _remember(store, name, value, constraint)


def _remember(store: Any, name: str, value: nn.Parameter, constraint: Any) -> None:
    store._params[name], store._constraints[name], store._param_to_name[value] = value, constraint, name


def _forget(store: Any, name: str) -> None:
    """Out of the store; a parameter that stands there under a second name, as in a flow, is known by the other then."""
    value = store._params.pop(name)
    store._constraints.pop(name)
    others = [other for other, theirs in store._params.items() if theirs is value]
    if others:
        store._param_to_name[value] = others[-1]
    else:
        store._param_to_name.pop(value, None)


def _plain_parameters(modules: list[PyroModule]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without a constraint, of PyroModules and of plain modules in them, by their names in Pyro's store."""
    for sub in (sub for module in modules for sub in module.modules() if isinstance(sub, PyroModule)):
        prefix = f"{sub._pyro_name}." if sub._pyro_name else ""
        own = ((name, p) for name, p in sub._parameters.items() if p is not None)
        yield from ((prefix + name, p) for name, p in own if not name.endswith("_unconstrained"))
        for child, module in sub._modules.items():
            if module is not None and not isinstance(module, PyroModule):
                inner = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
                yield from ((f"{prefix}{child}$$${name}", p) for name, p in inner)


def _names_in_store(modules: list[PyroModule]) -> set[str]:
    """The names in Pyro's store of the parameters that PyroModules have now.

    Raises:
        ValueError: two of the modules have a parameter of one name, which Pyro would make one parameter.
    """
    found: dict[str, tuple[nn.Parameter, PyroModule]] = {}
    names = set()
    for module in modules:
        for sub in module.modules():
            if not isinstance(sub, PyroModule):
                continue
            prefix = f"{sub._pyro_name}." if sub._pyro_name else ""
            names |= {prefix + name for name in sub._parameters}
            for name in getattr(sub, "_pyro_params", ()):
                value = sub._parameters[f"{name}_unconstrained"]
                other, owner = found.setdefault(prefix + name, (value, module))
                if other is not value:
                    raise ValueError(
                        f"{type(owner).__name__} and {type(module).__name__} both have a parameter {prefix + name!r} "
                        f"in Pyro's store, which would make them one; give one of them a name of its own: "
                        f"super().__init__(name={type(module).__name__.lower()!r})"
                    )
    return names | set(found)


@contextmanager
def evaluation_mode(*callables: Callable[..., Any]) -> Iterator[None]:
    """Put the modules behind the callables into ``eval`` mode, and each back into its own mode after.

    They use :func:`own_parameters` meanwhile.
    """
    submodules = [sub for module in modules_of(*callables) for sub in module.modules()]
    modes = [(sub, sub.training) for sub in submodules]
    try:
        for sub in submodules:
            sub.training = False
        with own_parameters(*callables):
            yield
    finally:
        for sub, mode in modes:
            sub.training = mode


@contextmanager
def frozen(*callables: Callable[..., Any]) -> Iterator[None]:
    """``evaluation_mode``, and no parameter behind the callables asks for gradients (each restored after)."""
    parameters = [p for module in modules_of(*callables) for p in module.parameters() if p.requires_grad]
    with evaluation_mode(*callables):
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
