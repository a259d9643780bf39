"""The exact reference in one or two dimensions: a grid of weighted points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.entry import entry
from pyro_ebm.errors import warn_user
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.draws import Draws, Source
from pyro_ebm.keywords import passes_keywords

__all__ = ["as_log_density", "quadrature"]

_CHUNK = 8192
_NEGLIGIBLE = 40.0  # nats below the peak: exp(-40) is far below the error of float32 sums
_ZOOMS = 60
_FARTHEST, _FARTHEST_MASS = 1e4, 1e12  # from where on a density is improper, and from where on nothing is looked for
_FLAT = 0.1  # share of the box that is near the peak
_REFINED, _RESOLVED = 2, 0.01  # how often the points are doubled along each axis, and the error of log Z that will do


def as_log_density(target: Any, *args: Any, **kwargs: Any) -> LogDensity:
    """A LogDensity as it is; a distribution or a Pyro model turned into one."""
    if isinstance(target, LogDensity):
        return target
    if isinstance(target, Distribution):
        return LogDensity.from_distribution(target)
    return LogDensity.from_model(target, *args, **kwargs)


@entry()
@passes_keywords()
@torch.no_grad()
@checked
def quadrature(
    target: LogDensity | Distribution | Callable[..., Any],
    *args: Any,
    num_points: int | None = None,
    radius: float = 10.0,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Draws:
    r"""Every expectation of a 1-D or 2-D target, by the trapezoidal rule on a grid that finds its mass.

    The grid lives in unconstrained space and zooms to where the density is within 40 nats of its peak; for
    smooth densities the error of the trapezoidal rule then falls faster than any power of the spacing.

    Args:
        target: a log density, a distribution (tilted ones without log Z), or a Pyro model.
        *args: the model's arguments.
        num_points: grid points per axis; 2,048 in 1-D and 256 in 2-D by default.
        radius: half-width of the first box, unconstrained units; grows while mass lies at its edge.
        model_kwargs: the model's keyword arguments, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        Weighted draws, ``method="quadrature"``; ``log_z`` of the unnormalized target, its ``se`` being the
        difference to the grid with every other point.

    Raises:
        ValueError: more than two dimensions, a density without a finite peak, with mass at infinity, or with mass that
            the grid does not find.

    Warns:
        InferenceWarning: a grid that does not resolve the density.
    """
    start = time.perf_counter()
    density = as_log_density(target, *args, model_kwargs=model_kwargs)
    if density.dim > 2 or density.batch:
        raise ValueError(
            f"quadrature needs a target of 1 or 2 dimensions, got {density.dim} with batch {tuple(density.batch)}; "
            f"use a sampler, or compare against a long trusted run"
        )
    num = (2048 if density.dim == 1 else 256) if num_points is None else num_points
    whole_number("num_points", num, at_least=3)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    box, evaluations = _find_mass(density, radius, 1024 if density.dim == 1 else 128)
    points, log_prob, log_z, error = _on_grid(density, box, num)
    for _ in range(_REFINED if num_points is None else 0):
        if error <= _RESOLVED:
            break
        evaluations, num = evaluations + len(points), 2 * num
        points, log_prob, log_z, error = _on_grid(density, box, num)
    if not error <= _RESOLVED:
        warn_user(
            f"quadrature: {num} points along each axis do not resolve the density (log Z differs by {error:.2g} from "
            f"that of every other point): give more num_points, scale or rotate the sites, or use a sampler"
        )
    keep = log_prob >= log_prob.max() - _NEGLIGIBLE
    log_weights = log_prob[keep].double().log_softmax(0)
    seconds = time.perf_counter() - start
    return Draws(
        values={name: value[None] for name, value in density.constrain(points[keep]).items()},
        method="quadrature",
        stats={"lp": log_prob[keep][None]},
        log_weights=log_weights[None].to(log_prob.dtype),
        log_z=Estimate(log_z, error),  # type: ignore[arg-type]
        observed={} if density.target is None else density.target.observed,
        source=Source.of(density.target),
        num_gradients=0,
        seconds=seconds,
        sampling_seconds=seconds,
        notes={"grid": num, "box": box.tolist(), "evaluations": evaluations + len(points)},
    )


def _find_mass(density: LogDensity, radius: float, num: int) -> tuple[Tensor, int]:
    """A box (2, dim) around all points within 40 nats of the peak, and the evaluations it took.

    Raises:
        ValueError: a density whose mass it does not find, naming the last box.
    """
    box = density.like.new_tensor([[-radius], [radius]]).expand(2, density.dim)
    evaluations, sound = 0, None
    for _ in range(_ZOOMS):
        points, spacing = _grid(box, num)
        log_prob = _evaluate(density, points)
        evaluations += len(points)
        if sound is not None and not bool((log_prob < math.inf).all()) and bool((sound - box).abs().max() > 1.0):
            box = (sound + box) / 2  # too far out: what overflows there says nothing of the density nearer by
            continue
        _check_finite(log_prob)
        sound = box
        inside = points[log_prob >= log_prob.max() - _NEGLIGIBLE]
        found = torch.stack([inside.amin(0) - 2 * spacing, inside.amax(0) + 2 * spacing])
        width = box[1] - box[0]
        outward = box.new_tensor([[-1.0], [1.0]])
        at_edge = torch.stack([inside.amin(0) <= box[0], inside.amax(0) >= box[1]])
        if not at_edge.any() and ((found[1] - found[0]) / width).prod() > 0.5:
            return found, evaluations
        if at_edge.any():
            # Flat as far as one sees, or rising towards mass that lies outside.
            flat = bool(((inside.amax(0) - inside.amin(0)) / width)[at_edge.any(0)].amax() > _FLAT)
            if float(box.abs().max()) > (_FARTHEST if flat else _FARTHEST_MASS):
                raise ValueError(
                    f"the density does not fall off: it is within {_NEGLIGIBLE:g} nats of its peak at the edge of "
                    f"{box.T.tolist()} (unconstrained units); it has heavy tails, or is improper (an energy that is "
                    f"unbounded below?)"
                )
            box = torch.where(at_edge, box + 2 * width * outward, box)
        else:
            box = found
        _check_precision(box, num)
    raise ValueError(
        f"the grid does not find the mass of the density, last sought in {box.T.tolist()} (unconstrained units): it is "
        f"too narrow for {num} points along each axis, or its coordinates are too strongly correlated; scale or rotate "
        f"the sites in the model, or use a sampler"
    )


def _check_precision(box: Tensor, num: int) -> None:
    width = (box[1] - box[0]).min()
    if float(width) <= 4 * num * torch.finfo(box.dtype).eps * float(box.abs().max()):
        raise ValueError(
            f"the density is too narrow for {str(box.dtype).removeprefix('torch.')} so far from zero, at "
            f"{box.mean(0).tolist()} (unconstrained units): give the model numbers in float64, or move its origin"
        )


def _grid(box: Tensor, num: int) -> tuple[Tensor, Tensor]:
    axes = [
        torch.linspace(float(low), float(high), num, dtype=box.dtype, device=box.device)
        for low, high in box.T
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, box.shape[1])
    return points, (box[1] - box[0]) / (num - 1)


def _on_grid(density: LogDensity, box: Tensor, num: int) -> tuple[Tensor, Tensor, float, float]:
    """Points, the log density there, log Z, and its difference to that of every other point."""
    num = num + 1 - num % 2
    points, spacing = _grid(box, num)
    log_prob = _evaluate(density, points)
    _check_finite(log_prob)
    cell = spacing.double().log().sum()
    log_z = log_prob.double().logsumexp(0) + cell
    coarse = _every_other(log_prob, num, density.dim).double().logsumexp(0) + cell + density.dim * math.log(2)
    return points, log_prob, float(log_z), float((coarse - log_z).abs())


def _every_other(log_prob: Tensor, num: int, dim: int) -> Tensor:
    return log_prob.reshape([num] * dim)[(slice(None, None, 2),) * dim].flatten()


def _evaluate(density: LogDensity, points: Tensor) -> Tensor:
    return torch.cat([density(chunk) for chunk in points.split(_CHUNK)])


def _check_finite(log_prob: Tensor) -> None:
    if bool(log_prob.isnan().any()) or not math.isfinite(float(log_prob.max())):
        raise ValueError(
            f"the log density is NaN at {int(log_prob.isnan().sum())} of {len(log_prob)} grid points (maximum "
            f"{float(log_prob.max())}); check the model and its energy"
        )
