"""Starts far from where the mass is: a way down by Newton's method, before chains learn anything on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.deadline import check_time
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.kernels.kernel import State, ValueAndGrad, normals

__all__ = ["descended"]

_MOST_DIMS = 64  # a matrix of second derivatives for each chain
_FAR = 100.0  # of the squared gradient in units of the spread of the starts, for each coordinate
_GAIN = 10.0  # nats for each coordinate that a start may still have to gain where chains do as well by themselves
_ENOUGH_CHAINS = 16
_STEPS, _HALVINGS, _SHRINKINGS = 60, 25, 6
_LEAST_CURVATURE = 1e-6  # of the largest: flat directions are not followed to infinity
_ARMIJO = 1e-4


def descended(
    density: LogDensity, state: State, value_and_grad: ValueAndGrad, generator: torch.Generator
) -> tuple[State, int]:
    r"""The state with those chains that are far out moved to where the mass is near.

    A chain goes down by Newton's method, with absolute values of the curvature and a step length that improves the
    density, until the step promises less than one nat for each coordinate. There it is given the spread that the
    curvature says, :math:`u + |H|^{-1/2} \xi`, so that chains start apart, each in the valley that it found. Near
    starts are left as they are.

    Args:
        density: the target.
        state: where the chains start.
        value_and_grad: its log density and gradient, for points of that shape.
        generator: of the spread.

    Returns:
        The state, with scales where chains were moved, and the number of gradients that it took.
    """
    cost = _Cost()
    if density.dim > _MOST_DIMS or not _look_far(state):
        return state, 0
    try:
        points = _down(density, state, value_and_grad, generator, cost)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return state, cost.gradients  # no second derivatives: chains go by themselves
    return points, cost.gradients


class _Cost:
    gradients = 0


def _look_far(state: State) -> bool:
    """Whether gradients are large in units of the spread: a cheap first look."""
    size = (state.grad.square() * state.tuning.inverse_mass).sum(-1) / state.u.shape[-1]
    return bool((size > _FAR).double().mean() > 0.25)


def _down(
    density: LogDensity, state: State, value_and_grad: ValueAndGrad, generator: torch.Generator, cost: _Cost
) -> State:
    chains, dim = len(state.u), density.dim
    moved = torch.zeros_like(state.log_prob, dtype=torch.bool)
    for _ in range(_STEPS):
        check_time()
        step, gain, spread = _newton(density, state)
        cost.gradients += (dim + 1) * chains
        # What is on its way goes on until it is there.
        active = (gain > torch.where(moved, 1.0, _GAIN) * dim) & gain.isfinite()
        if not bool(active.any()):
            break
        moved = moved | active
        after = _improved(state, step * active[..., None], gain, value_and_grad, cost)
        if torch.equal(after.u, state.u):
            break
        state = after
    if not bool(moved.any()):
        return state
    step, _, spread = _newton(density, state)
    state = _spread_out(state, spread, moved, value_and_grad, generator, cost)
    # Of few chains the curvature says more than how they lie.
    scales = state.u.var(0) if chains >= _ENOUGH_CHAINS else spread.square().sum(-1).mean(0)
    known = (scales > torch.finfo(scales.dtype).tiny) & scales.isfinite()
    scales = torch.where(known, scales, state.tuning.inverse_mass)
    return state._replace(tuning=state.tuning._replace(inverse_mass=scales))


def _newton(density: LogDensity, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """The step, the nats that it promises, and a root of the covariance that the curvature says."""
    with torch.enable_grad():
        u = state.u.detach().requires_grad_()
        (grad,) = torch.autograd.grad(density(u).sum(), u, create_graph=True)
        rows = [torch.autograd.grad(grad[..., j].sum(), u, retain_graph=True)[0] for j in range(density.dim)]
    hessian = torch.stack(rows, -2).detach().double()
    hessian = torch.where(hessian.isfinite(), hessian, 0.0)
    hessian = 0.5 * (hessian + hessian.mT)
    # In units of each coordinate's own curvature: columns may differ by many orders of magnitude.
    unit = hessian.diagonal(dim1=-2, dim2=-1).abs()
    unit = unit.clamp(min=torch.finfo(torch.float64).tiny).rsqrt().clamp(max=1e12)
    values, vectors = torch.linalg.eigh(hessian * unit[..., None] * unit[..., None, :])
    values = values.abs()
    values = torch.maximum(values, _LEAST_CURVATURE * values.amax(-1, keepdim=True)).clamp(min=1e-12)
    root = unit[..., None] * vectors * values.rsqrt()[..., None, :]
    along = (root.mT @ state.grad.double()[..., None])[..., 0]
    step = (root @ along[..., None])[..., 0]
    return step.to(state.u), 0.5 * along.square().sum(-1).to(state.u), root.to(state.u)


def _improved(state: State, step: Tensor, gain: Tensor, value_and_grad: ValueAndGrad, cost: _Cost) -> State:
    """Each chain as far along its step as improves the density; one that finds nothing stays."""
    length = torch.ones_like(state.log_prob)
    done = (step == 0).all(-1)
    for _ in range(_HALVINGS):
        u = state.u + length[..., None] * step
        log_prob, grad = value_and_grad(u)
        cost.gradients += len(u)
        better = log_prob >= state.log_prob + _ARMIJO * length * 2 * gain
        better = better & log_prob.isfinite() & grad.isfinite().all(-1) & ~done
        state = _where(better, (u, log_prob, grad), state)
        # Those that took their step stand still: what is left of it is zero.
        done = done | better
        if bool(done.all()):
            break
        step = torch.where(done[..., None], 0.0, step)
        length = torch.where(done, length, 0.5 * length)
    return state


def _spread_out(
    state: State,
    root: Tensor,
    moved: Tensor,
    value_and_grad: ValueAndGrad,
    generator: torch.Generator,
    cost: _Cost,
) -> State:
    offset = (root @ normals(state.u, generator)[..., None])[..., 0]
    start, todo = state, moved
    most = 5.0 * state.u.shape[-1] + 10.0  # nats that such an offset may cost where the curvature is as it says
    for _ in range(_SHRINKINGS):
        u = start.u + torch.where(todo[..., None], offset, 0.0)
        log_prob, grad = value_and_grad(u)
        cost.gradients += len(u)
        good = todo & (log_prob > start.log_prob - most) & grad.isfinite().all(-1)
        state = _where(good, (u, log_prob, grad), state)
        todo, offset = todo & ~good, 0.5 * offset
        if not bool(todo.any()):
            break
    return state


def _where(chosen: Tensor, there: tuple[Tensor, Tensor, Tensor], state: State) -> State:
    u, log_prob, grad = there
    moved = chosen[..., None]
    return state._replace(
        u=torch.where(moved, u, state.u),
        log_prob=torch.where(chosen, log_prob, state.log_prob),
        grad=torch.where(moved, grad, state.grad),
    )
