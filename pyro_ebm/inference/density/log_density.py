"""The seam between models and samplers: a batched, unnormalized log density on unconstrained space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers, whole_number
from pyro_ebm.deadline import check_time
from pyro_ebm.inference.density.model_target import ModelTarget
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.numerics import failed_numerically, function_by_rows
from pyro_ebm.tilts.distribution import TiltedDistribution
from pyro_ebm.tilts.tilt import tilt

__all__ = ["LogDensity"]


@checked
class LogDensity:
    """``density(u) -> log p(u)`` up to a constant, for a batch of points in unconstrained space.

    Make one with :meth:`from_model`, :meth:`from_distribution`, or directly from a function.

    Args:
        log_prob: maps (*chains, dim) to (*chains,).
        dim: length of one point.
        constrain: maps (*chains, dim) to ``{site: (*chains, *site_shape)}``; the identity, as site
            ``"u"``, by default.
        unconstrain: the inverse of ``constrain``.
        like: a tensor of the dtype and device that points should have.

    Attributes:
        dim: length of one point.
        like: an empty tensor of the dtype and device of points.
        target: the model behind it; ``None`` for a plain function.
        shapes: site -> shape of its part of a point, in order: unconstrained, of one element of the batch.
        way: how the model is run for many points, ``"plate"``, ``"vmap"`` or ``"loop"``; ``""`` for a function.
        batch: ``()``, or ``(n,)`` where the target is n independent densities (``independent=``):
            points are then (*chains, n, dim) and values (*chains, n).
    """

    def __init__(
        self,
        log_prob: Callable[[Tensor], Tensor],
        dim: int,
        *,
        constrain: Callable[[Tensor], dict[str, Tensor]] | None = None,
        unconstrain: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        batch: torch.Size = torch.Size(),  # noqa: B008  (immutable)
        like: Tensor | None = None,
    ) -> None:
        self.dim = whole_number("dim", dim)
        self.batch = torch.Size(batch)
        self.like = torch.empty(0) if like is None else like.new_empty(0)
        self.target: ModelTarget | None = None
        self.shapes: Mapping[str, torch.Size] = {"u": torch.Size([dim])}
        self.way = ""
        self._draw: Callable[[int], Tensor] | None = None
        self._log_prob = log_prob
        self._constrain = constrain or (lambda u: {"u": u})
        self._unconstrain = unconstrain or (lambda values: values["u"])

    def __call__(self, u: Tensor) -> Tensor:
        """Log density of each point; see the class for shapes."""
        check_time()
        expected = (*self.batch, self.dim)
        if u.ndim < len(expected) or tuple(u.shape[u.ndim - len(expected) :]) != expected:
            raise ValueError(f"u must have shape (*chains, {', '.join(map(str, expected))}), got {tuple(u.shape)}")
        try:
            value = self._log_prob(u)
        except Exception as error:
            if not failed_numerically(error):
                raise
            value = self._by_rows(lambda rows: (self._log_prob(rows),), u, lambda row: (row.sum(-1) * torch.nan,))[0]
        if value.shape != u.shape[:-1]:
            raise ValueError(
                f"log_prob must return one number per point, shape {tuple(u.shape[:-1])}, got {tuple(value.shape)}"
            )
        real_numbers("what log_prob returns", value)
        return value.to(u.dtype)  # data of another dtype than the parameters promote it

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (*chains,) and its gradient with respect to ``u``, both detached."""
        try:
            return self._value_and_grad(u)
        except Exception as error:  # of the backward pass
            if not failed_numerically(error):
                raise
            found = self._by_rows(self._value_and_grad, u, lambda row: (row.sum(-1) * torch.nan, row * torch.nan))
            return found[0], found[1]

    def _value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    def _by_rows(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, blank: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """A point at which the model's numbers fail has no density; the others have theirs."""
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        found = function_by_rows(function, u.reshape(-1, *u.shape[len(lead) :]), blank)
        return tuple(part.reshape(*lead, *part.shape[1:]) for part in found)

    @property
    def by_name(self) -> bool:
        """Whether its coordinates belong to sites, or to the values of a potential."""
        return self.target is not None or self.way != ""

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Points as unconstrained values, ``{site: (*chains, *batch, *shape)}``."""
        parts = zip(self.shapes.items(), u.split([shape.numel() for shape in self.shapes.values()], -1), strict=True)
        return {name: part.reshape(*u.shape[:-1], *shape) for (name, shape), part in parts}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained values, {site: (chains, *unconstrained_shape)}, as points."""
        if self.target is not None:
            return self.target.pack(values)
        rows = [values[name].reshape(len(values[name]), -1) for name in self.shapes]
        return torch.cat(rows, -1)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Points as values of the model's sites, ``{site: (*chains, *site_shape)}``."""
        return self._constrain(u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the model's sites as points: the inverse of :meth:`constrain`."""
        return self._unconstrain(values)

    @classmethod
    def from_distribution(cls, distribution: Distribution, *, site: str = "z") -> LogDensity:
        """The density of one draw of a distribution; a tilted one without its log Z.

        Args:
            distribution: continuous, batch_shape ().
            site: what the values are called.
        """
        if distribution.batch_shape:
            raise ValueError(
                f"distribution must have batch_shape (), got {tuple(distribution.batch_shape)}; use to_event()"
            )

        base = distribution.base if isinstance(distribution, TiltedDistribution) else distribution

        def model() -> Tensor:
            return pyro.sample(site, base)

        if isinstance(distribution, TiltedDistribution):
            # As a tilted model it knows its prior, which starting points and tempering begin with.
            return cls.from_model(tilt(model, {site: distribution.energy}, normalize=False))
        return cls.from_model(model)

    @classmethod
    @passes_keywords()
    def from_model(
        cls,
        model: Callable[..., Any],
        *args: Any,
        independent: str | None = None,
        vectorize: str = "auto",
        transforms: Mapping[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogDensity:
        """The joint density of a Pyro model's latent sites given its observed ones.

        Constrained sites are moved to unconstrained space by Pyro's own transforms, Jacobians included.
        Chains are an outer plate left of all the model's plates where the model broadcasts; one that does not
        runs under ``torch.vmap``. A tilted model enters without its log Z. Modules behind the model are
        evaluated in ``eval`` mode.

        Args:
            model: any Pyro model; discrete latent sites are summed out, as in Pyro's own kernels.
            *args: the model's arguments.
            independent: name of a plate whose elements are independent of each other given the rest:
                each element becomes a density of its own.
            vectorize: ``"plate"``: chains are an outer plate, fast; ``"vmap"``: the model runs as it would for
                one chain, under ``torch.vmap`` (no Python branches on values, no in-place changes of them);
                ``"auto"``: the first of the two that gives what each chain gives alone. ``density.target.vectorize``
                says which it was.
            transforms: site -> transform to unconstrained space, instead of Pyro's own for its support.
            max_plate_nesting: leave so many dimensions, from the right, to plates; what they use when ``None``.
            model_kwargs: the model's keyword arguments, whatever their names.
            **kwargs: the same, where no option has their name.

        Raises:
            DoesNotBroadcast: a model that none of these ways can run for many chains.
            ValueError: no continuous latent sites, a discrete one without a finite list of values, a subsampled
                plate, an ``independent`` plate that does not hold every latent site.
        """
        target = ModelTarget(
            model,
            args,
            dict(model_kwargs or {}),
            independent=independent,
            vectorize=vectorize,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
        )
        target.choose_way()
        return cls._of(target)

    @classmethod
    def _of(cls, target: ModelTarget) -> LogDensity:
        density = cls(
            target.log_prob,
            target.dim,
            constrain=target.constrain,
            unconstrain=target.unconstrain,
            batch=target.batch,
            like=target.like,
        )
        density.target = target
        density.shapes, density.way = target.shapes, target.vectorize
        return density

    def draw(self, num_draws: int) -> Tensor:
        """Independent points (num_draws, *batch, dim), of a density made by :meth:`proposal` only."""
        if self._draw is None:
            raise ValueError("only a proposal (a prior or a guide) can be drawn from; use a sampler")
        return self._draw(num_draws)

    def proposal(self, guide: Callable[..., Any] | None = None) -> LogDensity:
        """The density of a guide, or of the model's untilted prior, at the same points."""
        if self.target is None:
            raise ValueError("this log density was made from a function: it has no prior and no guide")
        target = self.target.proposal(guide)
        density = self._of(target)
        density._draw = target.draw
        return density
