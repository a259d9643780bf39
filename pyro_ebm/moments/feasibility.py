"""Which means a distribution can have under any tilt: redundant features, and the hull that targets must lie inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.errors import InfeasibleError

__all__ = ["independent_basis", "infeasible", "separation"]

_REDUNDANT = 1e-8  # share of variance below which a combination of features is constant
_MISFIT = 1e-4  # of a target for such a combination: classifiers add up in single precision
_MAX_CUTS, _CUTS = 200, 64
_TOUCHING = 1e-6  # standard deviations

Name = Callable[[int], str]


def independent_basis(features: Tensor, target: Tensor, name: Name) -> Tensor:
    """The combinations of features that vary, (k, r), each of variance one.

    Args:
        features: (num, k) at draws of the base.
        target: (k,) means wanted.
        name: what feature j is called.

    Raises:
        InfeasibleError: nothing varies; a target that asks for another value of what does not.
    """
    mean, scale = features.mean(0), features.std(0, correction=0)
    size = features.abs().amax(0).clamp(min=1e-30)
    constant = scale <= 1e-7 * size
    unit = torch.where(constant, size, scale)
    z = (features - mean) / unit
    z[:, constant] = 0.0
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    varies = values > _REDUNDANT
    for direction in vectors[:, ~varies].T:
        wanted = direction @ ((target - mean) / unit)
        if float(wanted.abs()) > _MISFIT * float((direction * (mean / unit)).abs().max()) + 1e-6:
            part = direction / unit
            part = part / part[part.abs().argmax()]
            raise InfeasibleError(
                f"target contradicts the features: {_combination(part, name)} is {float(part @ mean):.6g} at all "
                f"draws of the base, but the target makes it {float(part @ target):.6g}; no tilt changes that: make "
                f"the target consistent"
            )
    if not bool(varies.any()):
        raise InfeasibleError("features do not vary under the base: there is nothing to tilt by")
    basis = vectors[:, varies] / values[varies].sqrt() / unit[:, None]
    idle = torch.linalg.qr(vectors[:, ~varies] / unit[:, None])[0]
    return basis - idle @ (idle.T @ basis)  # multipliers along constant combinations do nothing: they stay zero


def separation(points: Tensor) -> tuple[Tensor, float]:
    """A unit direction in which all points (num, r) lie below the origin, and how far they do; 0 if there is none.

    Of directions of largest entry one, that of the widest gap: a linear programme on the points that matter, which
    those that its last answer did not keep below join.
    """
    from scipy.optimize import linprog

    size = points.shape[1]
    axes = torch.cat([torch.eye(size), -torch.eye(size)]).to(points)
    chosen = (points @ axes.T).argmax(0).unique()
    direction = points.new_zeros(size)
    for _ in range(_MAX_CUTS):
        rows = torch.cat([points[chosen], points.new_ones(len(chosen), 1)], 1)
        bounds = [(-1, 1)] * size + [(None, None)]
        cost = [0.0] * size + [-1.0]
        found = linprog(cost, A_ub=rows.numpy(), b_ub=[0.0] * len(rows), bounds=bounds, method="highs")
        direction, margin = torch.as_tensor(found.x[:size]), float(found.x[size])
        if margin <= 1e-12:  # the origin lies among those chosen
            return direction, 0.0
        heights = points @ direction
        beyond = heights.topk(min(_CUTS, len(points))).indices
        beyond = beyond[heights[beyond] > -margin + 1e-9]
        if not len(beyond):
            break
        chosen = torch.cat([chosen, beyond]).unique()
    norm = float(direction.norm())
    return direction / norm, max(-float((points @ direction).max()), 0.0) / norm


def infeasible(features: Tensor, basis: Tensor, target: Tensor, name: Name) -> InfeasibleError:
    """The error that says why no tilt has these means.

    Args:
        features: (num, k) at all draws seen.
        basis: (k, r) their independent combinations.
        target: (k,) means wanted.
        name: what feature j is called.
    """
    direction, margin = separation((features - target) @ basis)
    low, high = features.amin(0), features.amax(0)
    beyond = ((target < low) | (target > high)).nonzero().flatten().tolist()
    outside = margin > _TOUCHING
    if outside and not beyond:
        part = basis @ direction
        part = part / part.abs().max()
        top = float((features @ part).max())
        what = f"{_combination(part, name)} is to be {float(part @ target):.4g} and is at most {top:.4g}"
    else:
        listed = beyond or range(len(target))
        what = "; ".join(
            f"{name(j)} is to be {target[j]:.4g}, its range is [{low[j]:.4g}, {high[j]:.4g}]" for j in listed
        )
    where = "outside" if outside or beyond else "at the boundary of"
    return InfeasibleError(
        f"target is infeasible: it lies {where} what any tilt of the base was seen to reach: {what}; ask for means "
        f"inside what the features can take"
    )


def _combination(direction: Tensor, name: Name) -> str:
    """``feature 0 + feature 1 - 0.5 * feature 2``."""
    text = ""
    for index, factor in enumerate(direction.tolist()):
        if abs(factor) > 1e-3:
            size = "" if abs(abs(factor) - 1) < 1e-3 else f"{abs(factor):.3g} * "
            sign = (" - " if factor < 0 else " + ") if text else ("-" if factor < 0 else "")
            text += f"{sign}{size}{name(index)}"
    return text
