"""What annealed samplers share: the path from a distribution one can draw from to the target, and the kernel on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from pyro_ebm.annotations import checked
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.inference.density.gradients import check_gradients
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.kernels.hmc import HMC
from pyro_ebm.inference.kernels.kernel import Kernel, State, Tuning, ValueAndGrad
from pyro_ebm.modules import frozen
from pyro_ebm.randomness import forked_rng

__all__ = ["Annealing", "Path", "Points", "kernel_for", "path_to"]


@checked
@dataclass(frozen=True)
class Annealing:
    """What :class:`SMC` and :func:`annealed_importance` share: where the way to the target begins, and who goes it.

    Args:
        kernel: what moves the particles or chains: a class (``ChEES``) or a kernel made for the target; :class:`HMC`
            by default. Step size and scales are set at each temperature, for each island (or group) by the particles
            of the others: the kernel must not depend on what it moves.
        guide: a distribution of the latent sites to start from instead of the prior.
        base: a distribution of points in unconstrained space, event_shape (dim,); the standard normal for a
            :class:`LogDensity` made from a function.
        independent: name of a plate of the model whose elements are targets of their own, each with its own
            temperatures and log Z.
        vectorize: how the model is run on many particles; see :meth:`LogDensity.from_model`.
        generator: a source of randomness instead of a seed.
        compile: hand the captured graph to ``torch.compile``.

    Example:
        ``SMC(model, annealing=Annealing(ChEES, guide=guide), seed=0).run(x)``
    """

    kernel: Kernel | type[Kernel] | None = None
    _: KW_ONLY
    guide: Callable[..., Any] | None = None
    base: Distribution | None = None
    independent: str | None = None
    vectorize: str = "auto"
    generator: torch.Generator | None = None
    compile: bool = False

    def kernel_of(self, target: Any) -> Kernel:
        """The kernel for this target; errors of :func:`kernel_for`."""
        return kernel_for(target, self.kernel, independent=self.independent, vectorize=self.vectorize)


class Points(NamedTuple):
    """Points (particles, groups, *batch, dim), with the log densities (particles, groups, *batch) of both ends."""

    u: Tensor
    log_base: Tensor
    grad_base: Tensor
    log_target: Tensor
    grad_target: Tensor

    def log_ratio(self) -> Tensor:
        """``log target - log base``: minus infinity where the target is zero or NaN."""
        ratio = self.log_target - self.log_base
        return torch.where(ratio.isnan(), -torch.inf, ratio)

    def state(self, beta: Tensor, tuning: Tuning, iteration: int = 0) -> State:
        """The state of a kernel whose target is the distribution at ``beta``."""
        log_prob, grad = _mix(beta, self)
        return State(self.u, log_prob, grad, tuning, iteration)

    def take(self, index: Tensor) -> Points:
        """Other particles in place of these: ``index`` (particles, groups, *batch)."""
        return Points(
            *(
                part.gather(0, index if part.ndim == index.ndim else index[..., None].expand_as(part))
                for part in self
            )
        )


def _mix(beta: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    # Where one end has no say it may be infinite or NaN.
    rest = 1 - beta
    value = torch.where(rest > 0, rest * points.log_base, 0.0) + torch.where(beta > 0, beta * points.log_target, 0.0)
    beta, rest = beta[..., None], rest[..., None]
    grad = torch.where(rest > 0, rest * points.grad_base, 0.0) + torch.where(beta > 0, beta * points.grad_target, 0.0)
    return value, grad


class Path:
    r"""The distributions between a base and a target, :math:`p_\beta \propto p_0^{1 - \beta} p_1^\beta`.

    Args:
        target: where the path ends.
        base: where it begins, a density of the same points.
        draw: maps a number n to n points (n, *batch, dim) of the base.
        owners: models and guides whose modules are to be evaluated, not trained.
    """

    def __init__(
        self,
        target: LogDensity,
        base: LogDensity,
        draw: Callable[[int], Tensor],
        *,
        owners: tuple[Any, ...] = (),
    ) -> None:
        self.target, self.base = target, base
        self._draw, self._owners = draw, owners
        self._function: Callable[[Tensor], tuple[Tensor, ...]] = self._both_ends
        self.graph = "eager"
        self.graph_problem: str | None = None
        self.num_gradients = 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No gradients but those of the path, no dropout, no checks of every distribution."""
        with torch.no_grad(), frozen(*self._owners), pyro.validation_enabled(False):
            yield

    def start(self, num: int, groups: int, *, seed: int, compile: bool = False) -> Points:
        """Draws of the base; records the graph of both densities for points of that shape."""
        u = self.draw(num, groups, seed=seed)
        recorded = captured(self._both_ends, u, compile=compile)
        self._function, self.graph, self.graph_problem = recorded, recorded.kind, recorded.problem
        points = self.at(u)
        check_gradients(self.target, points.log_target, points.grad_target)
        check_gradients(self.base, points.log_base, points.grad_base)
        return points

    def draw(self, num: int, groups: int, *, seed: int) -> Tensor:
        """Independent draws of the base, (num, groups, *batch, dim)."""
        with forked_rng(seed):
            u = self._draw(num * groups).detach().to(self.target.like)
        return u.reshape(num, groups, *self.target.batch, self.target.dim)

    def at(self, u: Tensor) -> Points:
        """Both densities and their gradients; points of the shape of :meth:`start`."""
        self.num_gradients += u.shape[0] * u.shape[1]
        log_base, grad_base, log_target, grad_target = self._function(u)
        return Points(u, log_base, grad_base, log_target, grad_target)

    def value_and_grad(self, beta: Tensor) -> ValueAndGrad:
        """The log density at ``beta`` (groups, *batch), and its gradient."""
        return lambda u: _mix(beta, self.at(u))

    def _both_ends(self, u: Tensor) -> tuple[Tensor, ...]:
        return (*self.base.value_and_grad(u), *self.target.value_and_grad(u))


def kernel_for(
    target: Any, kernel: Kernel | type[Kernel] | None, *, independent: str | None = None, vectorize: str = "auto"
) -> Kernel:
    """The kernel as given, or made for the target; :class:`HMC` by default.

    Raises:
        TypeError: neither a kernel nor a class of kernels.
        ValueError: a kernel of another target, or one that says otherwise about ``independent`` or ``vectorize``.
    """
    if kernel is None:
        kernel = HMC
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        return kernel(target, independent=independent, vectorize=vectorize)
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel must be one of ChEES, HMC, MALA (the class, or one made for the target), got {kernel!r}"
        )
    if kernel.target is not target and kernel.target != target:
        raise ValueError(
            f"kernel was made for another target than the one given; pass the class, kernel={type(kernel).__name__}, "
            f"or {type(kernel).__name__}(target, ...)"
        )
    if kernel.full_mass:
        raise ValueError("full_mass: particles are moved with a scale for each coordinate; use full_mass=False")
    for name, given, default in (("independent", independent, None), ("vectorize", vectorize, "auto")):
        if given not in (default, getattr(kernel, name)):
            raise ValueError(f"{name}={given!r} and a kernel made with {name}={getattr(kernel, name)!r}: give one")
    return kernel


def path_to(
    kernel: Kernel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    guide: Callable[..., Any] | None = None,
    base: Distribution | None = None,
) -> Path:
    """The path to a kernel's target from the guide, from ``base``, or from the model's untilted prior.

    Args:
        kernel: its target is where the path ends.
        args: arguments of the model.
        kwargs: its keyword arguments.
        guide: a distribution of the model's latent sites.
        base: a distribution of points in unconstrained space, batch_shape () and event_shape (dim,); the standard
            normal for a log density that has no model.

    Raises:
        ValueError: both guide and base, or a base of the wrong shape.
    """
    density = kernel.density(*args, **kwargs)
    if guide is not None and base is not None:
        raise ValueError("guide and base both given: the path begins at one distribution")
    owners = () if density.target is None else (density.target.model,)
    if base is None and density.target is not None:
        proposal = density.proposal(guide)
        proposal.target.check_has_density()  # type: ignore[union-attr]
        return Path(density, proposal, proposal.draw, owners=owners if guide is None else (*owners, guide))
    if guide is not None:
        raise ValueError("a log density made from a function has no sites for a guide to propose; give base= instead")
    base = _standard_normal(density) if base is None else base
    if base.batch_shape or base.event_shape != (density.dim,):
        raise ValueError(
            f"base must have batch_shape () and event_shape ({density.dim},), got {tuple(base.batch_shape)} and "
            f"{tuple(base.event_shape)}; use to_event(1)"
        )
    log_prob = LogDensity(base.log_prob, density.dim, batch=density.batch, like=density.like)
    return Path(density, log_prob, lambda num: base.sample((num, *density.batch)), owners=owners)


def _standard_normal(density: LogDensity) -> Distribution:
    zero = density.like.new_zeros(density.dim)
    return Independent(Normal(zero, torch.ones_like(zero)), 1)
