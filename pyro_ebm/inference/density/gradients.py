"""Gradients that are no numbers where the density is one: found before anything moves by them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_ebm.inference.density.log_density import LogDensity

__all__ = ["broken_gradient", "check_gradients", "no_start"]

_SHARE = 0.2  # of the points: fewer may lie where numbers overflow, and chains leave them


def check_gradients(density: LogDensity, log_prob: Tensor, grad: Tensor) -> None:
    """Refuse a density that has a value at the points and no gradient: no method that uses it could move there.

    Args:
        density: what was evaluated.
        log_prob: at some points, (points, ..., *batch).
        grad: its gradient there, (points, ..., *batch, dim).

    Raises:
        ValueError: naming the observed sites that hold NaN, or the latent ones whose direction has no gradient.
    """
    observed = {} if density.target is None else density.target.observed
    batch = len(density.batch)
    lead = log_prob.ndim - batch
    bad = (log_prob.isfinite() & ~grad.isfinite().all(-1)).flatten(0, lead - 1)
    if bool((bad.double().mean(0) < _SHARE).any()):  # other data move; the one that cannot is reported with its draws
        return
    parts = density.split(grad) if density.by_name else {"u": grad}
    seen = log_prob.isfinite()
    sites = [name for name, part in parts.items() if not _finite(part, seen)]
    raise ValueError(broken_gradient(f"{int(bad.sum())} of {bad.numel()} points", sites, observed))


def _finite(part: Tensor, seen: Tensor) -> bool:
    return bool(part[seen].isfinite().all())


def broken_gradient(where: str, sites: list[str], observed: Mapping[str, Tensor]) -> str:
    """What is wrong and what to do, in words.

    Args:
        where: at which points.
        sites: latent ones whose direction has no gradient.
        observed: values by site, in which NaN may be the cause.
    """
    told = f"the gradient of the log density is not finite at {where} where the density itself is"
    return told + _cause(sites, observed)


def no_start(observed: Mapping[str, Tensor]) -> str:
    """Where Pyro gives up its search for a starting point without a word on the reason."""
    return f"Pyro found no starting point at which the log density and its gradient are finite{_cause([], observed)}"


def _cause(sites: list[str], observed: Mapping[str, Tensor]) -> str:
    holes = _holes_in(observed)
    if holes:
        return (
            f": the observed site(s) {holes} hold NaN, which a mask hides from the density and not from its "
            f"gradient (0 times NaN is NaN); put any number that the site allows in its place and keep the mask: "
            f"y = torch.where(mask, y, 0.0)"
        )
    direction = f", in the direction of the site(s) {sites}" if sites else ""
    return (
        f"{direction}: look for a torch.where() with a branch that is not finite (its gradient counts although it is "
        f"not chosen), sqrt() or norm() at 0, log(0), data with NaN, or a prior so vague that its draws are 0 or "
        f"infinite in floating point (Gamma(0.001, 0.001)): a tighter one, or chains, which start elsewhere; "
        f"importance sampling (method=\"snis\") needs no gradient"
    )


def _holes_in(observed: Mapping[str, Tensor]) -> list[str]:
    """The sites whose values hold NaN."""
    return [name for name, value in observed.items() if bool(torch.as_tensor(value).isnan().any())]
