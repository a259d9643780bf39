"""The arguments of ``MCMC``: Pyro's, NumPyro's and ours, told apart before anything runs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_ebm.arrays import as_tensor
from pyro_ebm.checks import whole_number
from pyro_ebm.errors import warn_user
from pyro_ebm.foreign import foreign_hint
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.kernels.kernel import Kernel

__all__ = [
    "as_params",
    "check_kernel",
    "check_names",
    "check_saved",
    "check_superchains",
    "number_of_chains",
    "packed",
    "refuse_foreign",
    "refuse_of_batch",
    "warn_of_ignored",
]


def refuse_foreign(given: Mapping[str, Any], runner: Callable[..., Any]) -> None:
    """Say what an argument of another library is called here.

    Raises:
        TypeError: where there is any.
    """
    own, of_kernel = inspect.signature(runner).parameters, {field.name for field in dataclasses.fields(Kernel)}
    for name in given:
        hint = foreign_hint([name], own, elsewhere=of_kernel, where="of the kernel")
        raise TypeError(f"MCMC() got an unexpected keyword argument {name!r}{hint}")


def warn_of_ignored(*, mp_context: str | None, disable_validation: bool | None, stock: bool) -> None:
    """One warning that names what was given and does nothing."""
    ignored = [] if mp_context is None else [f"mp_context={mp_context!r} (chains share this process)"]
    if not stock and disable_validation is not True:
        ignored.append(f"disable_validation={disable_validation} (many chains at once are run without validation)")
    if ignored:
        warn_user(f"MCMC ignores {', '.join(ignored)}", UserWarning)


def check_kernel(kernel: Any, initial_params: Any) -> bool:
    """Whether a kernel is one of ours, which move chains as a batch, and not one of Pyro's.

    Raises:
        TypeError: neither.
        ValueError: a potential, whose values have no shapes, without values to start from.
    """
    if not isinstance(kernel, Kernel | MCMCKernel):
        if isinstance(kernel, type) and issubclass(kernel, Kernel | MCMCKernel):
            raise TypeError(f"kernel is the class {kernel.__name__}: call it, MCMC({kernel.__name__}(model), ...)")
        raise TypeError(
            f"kernel must be one of ChEES, HMC, MALA, ULA of pyro_ebm, or a kernel of Pyro's such as "
            f"pyro.infer.NUTS(model), got {type(kernel).__module__}.{type(kernel).__name__}"
        )
    if getattr(kernel, "potential_fn", None) is not None and kernel.model is None:
        if not isinstance(initial_params, Mapping):
            raise ValueError(
                "a kernel of potential_fn= needs initial_params=, {name: value} in unconstrained space, to start from"
            )
    return isinstance(kernel, Kernel)


def refuse_of_batch(kernel: Any, given: Mapping[str, Any]) -> None:
    """Options that only batched kernels have, by name, must not be set: false, zero or ``None``.

    Raises:
        ValueError: naming those that are.
    """
    names = [f"{name}=" for name, value in given.items() if value is not None and value is not False and value != 0]
    if names:
        raise ValueError(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} for the batched kernels (ChEES, HMC, MALA, ULA); "
            f"{type(kernel).__module__}.{type(kernel).__name__} runs as Pyro runs it"
        )


def check_saved(save_params: Iterable[str] | None, sites: Iterable[str]) -> None:
    """The sites to keep must be some of those that move.

    Raises:
        ValueError: unknown names.
    """
    check_names("save_params", save_params, sites)


def check_superchains(superchains: int | None, num_chains: int) -> None:
    """Groups of chains must be of one size, and two at least.

    Raises:
        TypeError: no whole number.
        ValueError: so many do not fit.
    """
    if superchains is None:
        return
    whole_number("superchains", superchains, at_least=2)
    if num_chains % superchains:
        raise ValueError(f"superchains={superchains} must divide num_chains={num_chains}: all have as many chains")


def check_names(option: str, names: Iterable[str] | None, sites: Iterable[str]) -> None:
    """An option by site must be about some of those that move.

    Raises:
        ValueError: unknown names.
    """
    sites = set(sites)
    unknown = sorted(set(names or ()) - sites)
    if unknown:
        raise ValueError(f"{option} names the site(s) {unknown}; the latent sites are {sorted(sites)}")


def number_of_chains(density: LogDensity, given: Mapping[str, Tensor] | Tensor | None, default: int) -> int:
    """How many chains there are where nobody said: one for each row of the points given, one for a single point."""
    if given is None:
        return default
    if isinstance(given, Tensor):
        return len(given)
    for name, value in given.items():
        if name in density.shapes:
            single = tuple(value.shape) == _shape(density, name)
            return 1 if single or not value.ndim else len(value)
    return default


def as_params(given: Any, option: str = "initial_params") -> Any:
    """Starting points with numbers, lists and arrays as tensors of floating-point numbers.

    Raises:
        TypeError: naming the site, of what is no number.
    """
    if given is None or isinstance(given, Tensor):
        return given
    if isinstance(given, Mapping):
        return {name: _as_floats(f"{option}[{name!r}]", value) for name, value in given.items()}
    return _as_floats(option, given)


def _as_floats(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(as_tensor(value)).to(torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor, an array or a number, got {type(value).__name__}") from None


def packed(density: LogDensity, params: Mapping[str, Tensor], num_chains: int) -> Tensor:
    """Unconstrained values by site as points, (num_chains, *batch, dim); a single chain needs no first dimension.

    Raises:
        ValueError: sites that are missing or unknown, values of other shapes.
    """
    if not density.by_name:
        raise ValueError("initial_params: this target has no sites; give points, a tensor (num_chains, dim)")
    unknown = sorted(set(params) - set(density.shapes))
    if unknown:
        raise ValueError(
            f"initial_params has the unknown site(s) {unknown}; the latent sites are {sorted(density.shapes)}"
        )
    rows = {}
    for name in density.shapes:
        expected = (num_chains, *_shape(density, name))
        got = tuple(params[name].shape) if name in params else "nothing"
        if got == expected:
            rows[name] = params[name]
        elif num_chains == 1 and got == expected[1:]:
            rows[name] = params[name][None]
        else:
            raise ValueError(
                f"initial_params[{name!r}] must have shape {expected}, unconstrained values with one row a chain, "
                f"got {got}"
            )
    return density.pack(rows)


def _shape(density: LogDensity, name: str) -> tuple[int, ...]:
    """Of a site's unconstrained value, all elements of an independent plate in it."""
    if density.target is None:
        return tuple(density.shapes[name])
    return next(tuple(site.unconstrained_shape) for site in density.target.sites if site.name == name)
