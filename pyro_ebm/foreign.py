"""Names that other libraries, or earlier versions of this one, give to what is here, and what it is called here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

__all__ = ["foreign_hint", "named_elsewhere", "pointer"]

T = TypeVar("T", bound=type)

# Their name: whose it is, and the name here.
_OPTIONS = {
    "num_warmup": ("NumPyro's ", "warmup_steps"),
    "progress_bar": ("NumPyro's ", "progress"),
    "thinning": ("NumPyro's ", "thin"),
    "dense_mass": ("NumPyro's ", "full_mass"),
    "rng_key": ("NumPyro's ", "seed"),
    "draws": ("PyMC's ", "num_samples"),
    "tune": ("PyMC's ", "warmup_steps"),
    "chains": ("PyMC's ", "num_chains"),
    "random_seed": ("PyMC's ", "seed"),
    "target_accept": ("PyMC's ", "target_accept_prob"),
    "progressbar": ("PyMC's ", "progress"),
    "warmup": ("", "warmup_steps"),
}
_NEEDLESS = {
    "chain_method": "leave NumPyro's chain_method out: chains always move as one batch here",
    "extra_fields": "leave NumPyro's extra_fields out: draws.stats has them all",
    "cores": "leave PyMC's cores out: chains share this process",
}
_MODULE = {
    "NUTS": "MCMC runs pyro.infer.NUTS(model) as it is; ChEES moves many chains at once",
    "nuts": "it is called pyro_nuts",
    "hmc": "it is called pyro_hmc",
    "centred": "it is called centered",
    "noncentred": "it is called noncentered",
}


def foreign_hint(
    names: Iterable[str], here: Container[str], *, elsewhere: Container[str] = (), where: str = ""
) -> str:
    """What options of other libraries are called here, as the end of a message; empty where none is known.

    Args:
        names: options that a call does not have.
        here: the options it has.
        elsewhere: options to be given in another place.
        where: that place.
    """
    hints = []
    for name in names:
        whose, ours = _OPTIONS.get(name, ("", ""))
        if name in _NEEDLESS:
            hints.append(_NEEDLESS[name])
        elif ours and (ours in here or ours in elsewhere):
            hints.append(f"{whose}{name} is {ours}= {'here' if ours in here else where}")
    return "".join(f"; {hint}" for hint in hints)


def named_elsewhere(made: T) -> T:
    """A dataclass whose ``TypeError`` for an option of another library names the one here, or the place for it."""
    init: Callable[..., None] = made.__init__  # type: ignore[misc]
    fields = {field.name for field in dataclasses.fields(made)}
    of_runner = {ours for _, ours in _OPTIONS.values()} - fields

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - fields:
            hint = foreign_hint([name], fields, elsewhere=of_runner, where="of MCMC(kernel, ...)")
            if hint:
                raise TypeError(f"{made.__name__}() got an unexpected keyword argument {name!r}{hint}")
        init(self, *args, **kwargs)

    made.__init__ = checked  # type: ignore[misc]
    return made


def pointer(name: str) -> str | None:
    """What to use instead of a name that ``pyro_ebm`` does not have; None where nobody would look for it."""
    return _MODULE.get(name)
