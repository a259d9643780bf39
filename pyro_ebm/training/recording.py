"""A loss and its gradients as one graph of tensor operations, and all that must not have happened meanwhile."""

from __future__ import annotations

import functools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ebm.graphs import chosen_by_values, results_of, simplified, varying
from pyro_ebm.imports import whole_import
from pyro_ebm.numerics import FailuresAsNaN
from pyro_ebm.tilts.listeners import weights_reported_to

__all__ = ["NotRecordable", "elbo_in_tensors", "memory_of", "python_state", "recorded"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LISTS = (list, dict, set)
_MACHINERY = (__name__, "pyro_ebm.numerics", "torch.utils", "torch.fx", "torch._", "torch.overrides")
_READS = ("_local_scalar_dense", "equal")
# They write to their running means, and do not say so.
_RUNNING = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


class NotRecordable(RuntimeError):
    """Why a loss has no graph."""


def recorded(
    loss: Callable[..., Tensor], parameters: Sequence[Tensor], batch: tuple[Tensor, ...], buffers: Iterable[Tensor]
) -> fx.GraphModule:
    """A graph that maps a minibatch to the loss, whether all checks of distributions hold, and the gradients.

    Weights and buffers in it are those in use. Where there are no checks, None stands in place of their outcome.

    Args:
        loss: maps a minibatch to a number.
        parameters: that the gradients are for; None in place of one that the loss does not depend on.
        batch: an example of a minibatch.
        buffers: all that the loss may write to.

    Raises:
        NotRecordable: the loss reads values in Python, writes to what outlives it, or has shapes that depend on values.
    """

    def run(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        watch = _TensorsOnly(buffers)
        with _NoNumpy(), FailuresAsNaN(), watch, weights_reported_to(_refuse_log_z):
            value = loss(*inputs)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            valid = torch.stack([check.all() for check in watch.checks]).all() if watch.checks else None
            return (value.detach(), valid, *gradients)

    whole_import("torch._inductor")  # which make_fx needs
    graph = make_fx(run)(*batch)
    with torch.no_grad():
        results = results_of(graph, *batch)
        if chosen_by_values(graph, results, varying(graph, results, live=True)):
            raise NotRecordable("the shapes of its operations depend on values")
        return simplified(graph, *batch, live=True)


def _refuse_log_z(log_weights: Tensor) -> None:
    del log_weights
    raise NotRecordable("it samples log Z, with draws of their own for each step")


class _NoNumpy(TorchFunctionMode):
    """Refuses what takes values out of torch where no graph sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__", "__dlpack__"):
            raise NotRecordable(f"it reads values in Python (.{func.__name__}())")
        return func(*args, **(kwargs or {}))


class _TensorsOnly(TorchDispatchMode):
    """Refuses to read a value in Python, and to write to what was there before and is no buffer.

    Distributions read whether their arguments are valid: they are told so, and what they asked is kept in ``checks``.
    Pyro reads whether a density is NaN or infinite, only to warn: it is told no.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self.checks: list[Tensor] = []
        self._may_write = {memory_of(buffer) for buffer in buffers}
        self._alive: list[Tensor] = []  # so that no memory is used twice meanwhile
        self._yes = torch.ones((), dtype=torch.bool, device="cpu")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._opname
        if name == "_is_all_true" and _asked_by("torch.distributions"):
            self.checks.append(args[0])
            return self._yes
        if name in _READS:
            if args[0] is self._yes:
                return True
            if _asked_by("pyro.util", "warn_if_nan", "warn_if_inf"):
                return False
            raise NotRecordable("it reads values in Python (.item(), float(), an if)")
        if func._schema.is_mutable or name in _RUNNING:
            self._check_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self._alive.append(each)
                self._may_write.add(memory_of(each))
        return result

    def _check_writes(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            running = func._opname in _RUNNING and argument.name.startswith("running")
            if not running and (argument.alias_info is None or not argument.alias_info.is_write):
                continue
            target = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(target, Tensor) and memory_of(target) not in self._may_write:
                raise NotRecordable("it writes to a tensor that is no buffer of its modules")


def _asked_by(module: str, *functions: str) -> bool:
    """Whether the operation at hand was called in a module, beneath torch's own machinery."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(_MACHINERY):
            return name.startswith(module) and (not functions or frame.f_code.co_name in functions)
        frame = frame.f_back
    return False


def memory_of(tensor: Tensor) -> int:
    """The place of a tensor's numbers."""
    return int(tensor.untyped_storage().data_ptr())


def elbo_in_tensors(elbo: Trace_ELBO, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor) -> Tensor:
    """``Trace_ELBO().differentiable_loss``, which reads its terms as Python numbers, without reading them."""
    losses, surrogates = [], []
    for model_trace, guide_trace in elbo._get_traces(model, guide, batch, {}):
        values, parts = [], []
        for site in _sample_sites(model_trace):
            values.append(_in_double(site["log_prob_sum"]))
            parts.append(site["log_prob_sum"])
        for site in _sample_sites(guide_trace):
            _, score_function, entropy = site["score_parts"]
            values.append(-_in_double(site["log_prob_sum"]))
            if not _is_zero(entropy):
                parts.append(-entropy.sum())
            if not _is_zero(score_function):
                raise NotRecordable("its guide draws a site without reparametrization")
        losses.append(_share(-_total(values), elbo.num_particles))
        surrogates.append(_share(-_total(parts), elbo.num_particles))
    loss, surrogate = _total(losses), _total(surrogates)
    if not isinstance(surrogate, Tensor) or not isinstance(loss, Tensor):
        raise NotRecordable("its loss is a plain number")
    return loss.to(surrogate.dtype) + (surrogate - surrogate.detach())


def _sample_sites(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _total(terms: Sequence[Any]) -> Any:
    """Their sum, from left to right."""
    return functools.reduce(operator.add, terms) if terms else 0.0


def _share(value: Any, num: int) -> Any:
    return value if num == 1 else value / num


def _in_double(value: Any) -> Any:
    """As Python's numbers are."""
    return value.detach().double() if isinstance(value, Tensor) else value


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def python_state(*owners: Any) -> list[Any]:
    """What a model may change in Python while it runs: plain attributes, sizes of lists, which tensors it holds."""
    found: list[Any] = [random.getstate(), _numpy_state()]
    seen: set[int] = set()
    for owner in owners:
        found += _state_of(owner, seen)
    return found


def _numpy_state() -> list[Any]:
    state = np.random.get_state()
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in state]


def _state_of(owner: Any, seen: set[int], depth: int = 0) -> Iterator[Any]:
    if id(owner) in seen or depth > 3:
        return
    seen.add(id(owner))
    if isinstance(owner, nn.Module):
        for path, module in owner.named_modules():
            seen.add(id(module))
            for name, value in vars(module).items():
                yield from _item((path, name), value, seen, depth)
            for method in vars(type(module)).values() if _is_users(type(module)) else ():
                yield from _state_of(method, seen, depth + 1) if isinstance(method, types.FunctionType) else ()
    elif isinstance(owner, types.MethodType):
        yield from _state_of(owner.__self__, seen, depth)
        yield from _state_of(owner.__func__, seen, depth)
    elif isinstance(owner, functools.partial):
        for each in (owner.func, *owner.args, *owner.keywords.values()):
            yield from _state_of(each, seen, depth)
    elif isinstance(owner, types.FunctionType):
        yield from _of_function(owner, seen, depth)
    elif isinstance(getattr(owner, "__dict__", None), dict) and not isinstance(owner, type | types.ModuleType):
        for name, value in list(vars(owner).items()):
            yield from _item(name, value, seen, depth)


def _of_function(function: types.FunctionType, seen: set[int], depth: int) -> Iterator[Any]:
    """The values of what it closes over, and of the global names in it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield from _item(name, cell.cell_contents, seen, depth)
        except ValueError:  # not filled yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield from _item(name, function.__globals__[name], seen, depth)


def _item(name: Any, value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if isinstance(value, np.ndarray):
        yield name, id(value), value.tobytes()
    elif isinstance(value, np.random.Generator):
        yield name, repr(value.bit_generator.state)
    elif isinstance(value, random.Random):
        yield name, value.getstate()
    elif isinstance(value, torch.Generator):
        yield name, value.get_state().tolist()
    elif isinstance(value, _LISTS):
        inner = value.values() if isinstance(value, dict) else value
        yield name, len(value), [_plain(each) for each in inner if isinstance(each, (*_PLAIN, Tensor))]
    elif isinstance(value, (*_PLAIN, Tensor)):
        yield name, _plain(value)
    elif _is_users(value):
        yield from _state_of(value, seen, depth + 1)


def _plain(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value


def _is_users(value: Any) -> bool:
    """Whether it is an object or function of the user's, and not of a library."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0] not in ("torch", "pyro", "numpy", "builtins", "weakref", "pyro_ebm")
