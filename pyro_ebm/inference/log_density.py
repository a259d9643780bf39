"""The seam between models and samplers: a batched, unnormalised log density on unconstrained space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to

from pyro_ebm.parameters import evaluation_mode
from pyro_ebm.structure import latent_sites, padded_shape, plate_depth, prototype_trace
from pyro_ebm.tilted_distribution import TiltedDistribution
from pyro_ebm.tilts import TiltedModel

__all__ = ["LogDensity", "keep_dims"]


@dataclass(frozen=True)
class _Site:
    """How one latent site sits in the unconstrained vector."""

    name: str
    shape: torch.Size  # of its value, without chains
    unconstrained_shape: torch.Size
    event_dim: int
    transform: Transform
    data_axis: int | None  # axis of `shape` that holds the independent plate

    @property
    def size(self) -> int:
        copies = 1 if self.data_axis is None else self.shape[self.data_axis]
        return self.unconstrained_shape.numel() // copies


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
        if not callable(log_prob):
            raise TypeError(f"log_prob must map (*chains, dim) to (*chains,), got {type(log_prob).__name__}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.batch = torch.Size(batch)
        self.like = torch.empty(0) if like is None else like.new_empty(0)
        self._log_prob = log_prob
        self._constrain = constrain or (lambda u: {"u": u})
        self._unconstrain = unconstrain or (lambda values: values["u"])

    def __call__(self, u: Tensor) -> Tensor:
        """Log density of each point; see the class for shapes."""
        expected = (*self.batch, self.dim)
        if u.ndim < len(expected) or tuple(u.shape[u.ndim - len(expected) :]) != expected:
            raise ValueError(f"u must have shape (*chains, {', '.join(map(str, expected))}), got {tuple(u.shape)}")
        value = self._log_prob(u)
        if value.shape != u.shape[:-1]:
            raise ValueError(
                f"log_prob must return one number per point, shape {tuple(u.shape[:-1])}, got {tuple(value.shape)}"
            )
        return value

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (*chains,) and its gradient with respect to ``u``, both detached."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Points as values of the model's sites, ``{site: (*chains, *site_shape)}``."""
        return self._constrain(u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the model's sites as points: the inverse of :meth:`constrain`."""
        return self._unconstrain(values)

    @classmethod
    def from_distribution(cls, distribution: Distribution, *, site: str = "z") -> LogDensity:
        """The law of one draw of a distribution; a tilted one without its log Z.

        Args:
            distribution: continuous, batch_shape ().
            site: what the values are called.
        """
        if distribution.batch_shape:
            raise ValueError(
                f"distribution must have batch_shape (), got {tuple(distribution.batch_shape)}; use to_event()"
            )

        def model() -> Tensor:
            return pyro.sample(site, _without_normalizer(distribution))

        return cls.from_model(model)

    @classmethod
    def from_model(
        cls, model: Callable[..., Any], *args: Any, independent: str | None = None, **kwargs: Any
    ) -> LogDensity:
        """The joint density of a Pyro model's latent sites given its observed ones.

        Constrained sites are moved to unconstrained space by Pyro's own transforms, Jacobians included.
        Chains are an outer plate left of all the model's plates, so the model must broadcast. A tilted
        model enters without its log Z. Modules behind the model are evaluated in ``eval`` mode.

        Args:
            model: any Pyro model whose latent sites are continuous.
            *args: the model's arguments.
            independent: name of a plate whose elements are independent of each other given the rest:
                each element becomes a density of its own.
            **kwargs: the model's keyword arguments.

        Raises:
            ValueError: no latent sites, a discrete one, a subsampled plate, a model that does not broadcast,
                an ``independent`` plate that does not hold every latent site.
        """
        target = _ModelTarget(model, args, kwargs, independent)
        density = cls(
            target.log_prob,
            sum(site.size for site in target.sites),
            constrain=target.constrain,
            unconstrain=target.unconstrain,
            batch=target.batch,
            like=target.like,
        )
        target.check_broadcast(density.dim)
        return density


def _without_normalizer(distribution: Distribution) -> Distribution:
    if not isinstance(distribution, TiltedDistribution):
        return distribution

    class Unnormalized(TiltedDistribution):
        def log_prob(self, value: Tensor) -> Tensor:
            return self.unnormalized_log_prob(value)

        def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
            return self.base.sample(sample_shape)  # only its shape is looked at

        def expand(self, batch_shape: Any, _instance: Any = None) -> TiltedDistribution:
            return Unnormalized(self.base.expand(torch.Size(batch_shape)), self.energy)

    return Unnormalized(distribution.base, distribution.energy)


class _ModelTarget:
    """A Pyro model seen as a function of one flat vector per chain."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], independent: str | None
    ) -> None:
        self.model = model.unnormalized() if isinstance(model, TiltedModel) else model
        self.args, self.kwargs = args, kwargs
        # The tilt changes no shapes: without it, a bad energy is seen in the density and not here.
        base = self.model.base_model if isinstance(self.model, TiltedModel) else self.model
        trace = prototype_trace(base, args, kwargs)
        self.depth = plate_depth(trace)
        self.data_dim, self.batch = _independent_plate(trace, independent)
        self.sites = [_describe(name, site, self.data_dim) for name, site in latent_sites(trace).items()]
        if not self.sites:
            raise ValueError("the model has no latent sample sites: nothing to sample")
        _check_no_subsampling(trace)
        self.like = trace.nodes[self.sites[0].name]["value"]

    def log_prob(self, u: Tensor) -> Tensor:
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        values, log_jacobian = self._unpack(u.reshape(-1, *u.shape[len(lead) :]))
        logs = self._site_log_probs(values, lead.numel())
        total = torch.stack(list(logs.values())).sum(0) + log_jacobian
        return total.reshape(lead + self.batch)

    def _site_log_probs(self, values: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
        """Log probability of every site, (chains, *batch)."""
        padded = {site.name: self._pad(site, values[site.name]) for site in self.sites}
        chain_dim = -self.depth - 1
        keep = (chain_dim,) if self.data_dim is None else (chain_dim, self.data_dim)
        with evaluation_mode(self.model), pyro.validation_enabled(False):
            with pyro.plate("_chains", chains, dim=chain_dim):
                trace = poutine.trace(poutine.condition(self.model, data=padded)).get_trace(
                    *self.args, **self.kwargs
                )
            trace.compute_log_prob()
        shape = (chains, *self.batch)
        return {
            name: keep_dims(site["log_prob"], keep).expand(shape)
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }

    def _pad(self, site: _Site, value: Tensor) -> Tensor:
        """Insert size-1 dims so that the chain dim lands left of all plates."""
        return value.reshape(value.shape[0], *padded_shape(site.shape, site.event_dim, self.depth))

    def _unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_jacobian = {}, u.new_zeros(u.shape[:-1])
        for site, part in zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True):
            flat = _to_site(part, site)
            values[site.name] = site.transform(flat)
            jacobian = site.transform.log_abs_det_jacobian(flat, values[site.name])
            axis = None if site.data_axis is None else site.data_axis + 1
            dims = [d for d in range(1, jacobian.ndim) if d != axis]
            log_jacobian = log_jacobian + (jacobian.sum(dims) if dims else jacobian)
        return values, log_jacobian

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        lead = u.shape[: u.ndim - 1 - len(self.batch)]
        values, _ = self._unpack(u.reshape(-1, *u.shape[len(lead) :]))
        return {name: value.reshape(lead + value.shape[1:]) for name, value in values.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        missing = [site.name for site in self.sites if site.name not in values]
        if missing:
            raise ValueError(f"values lacks the site(s) {missing}; sites: {[site.name for site in self.sites]}")
        parts = []
        for site in self.sites:
            value = values[site.name]
            lead = value.shape[: value.ndim - len(site.shape)]
            if value.shape[len(lead) :] != site.shape:
                raise ValueError(
                    f"values[{site.name!r}] must have shape (*chains, {', '.join(map(str, site.shape))}), "
                    f"got {tuple(value.shape)}"
                )
            flat = site.transform.inv(value)
            if site.data_axis is not None:
                flat = flat.movedim(len(lead) + site.data_axis, len(lead))
            parts.append(flat.reshape(*lead, *self.batch, -1))
        return torch.cat(parts, -1)

    def check_broadcast(self, dim: int) -> None:
        """Two chains at once must give what each gives alone; names the first site that does not."""
        generator = torch.Generator().manual_seed(0)
        u = 0.5 * torch.randn((2, *self.batch, dim), generator=generator, dtype=self.like.dtype)
        u = u.to(self.like.device)
        with torch.no_grad():
            try:
                alone = [self._site_log_probs(self._unpack(row[None])[0], 1) for row in u]
                together = self._site_log_probs(self._unpack(u)[0], 2)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"the model does not broadcast over chains (an extra batch dimension at {-self.depth - 1}): "
                    f"{str(error).splitlines()[0]}; index from the right (value[..., 0]) and sum over dim=-1"
                ) from error
        for name, both in together.items():
            separate = torch.cat([single[name] for single in alone])
            if not torch.allclose(both, separate, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"the model does not broadcast over chains: site {name!r} gives other log probabilities for "
                    f"two chains at once than for each alone; index from the right (value[..., 0]), sum over "
                    f"dim=-1, and let batch dimensions through"
                )
        if self.batch.numel() > 1:
            self._check_independent(u, alone[0])

    @torch.no_grad()
    def _check_independent(self, u: Tensor, before: Mapping[str, Tensor]) -> None:
        """Moving the first element of the plate must leave the log probabilities of the others alone."""
        moved = torch.cat([u[1, :1], u[0, 1:]])
        for name, after in self._site_log_probs(self._unpack(moved[None])[0], 1).items():
            if not torch.allclose(after[:, 1:], before[name][:, 1:], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"independent= names a plate whose elements depend on each other through site {name!r}; "
                    f"leave independent=None"
                )


def _describe(name: str, site: Mapping[str, Any], data_dim: int | None) -> _Site:
    fn, shape = site["fn"], site["value"].shape
    if not fn.support.is_discrete:
        transform = biject_to(fn.support)
        axis = None
        if data_dim is not None:
            axis = len(shape) - len(fn.event_shape) + data_dim
        return _Site(
            name, shape, torch.Size(transform.inverse_shape(shape)), len(fn.event_shape), transform, axis
        )
    raise ValueError(
        f"site {name!r} is discrete ({type(fn).__name__}): a log density over continuous space has no place for "
        f'it; use method="nuts" or "hmc", whose kernels sum discrete sites out, or marginalise it in the model'
    )


def _to_site(part: Tensor, site: _Site) -> Tensor:
    """(chains, [n,] size) -> (chains, *unconstrained_shape)."""
    if site.data_axis is None:
        return part.reshape(part.shape[0], *site.unconstrained_shape)
    rest = [s for axis, s in enumerate(site.unconstrained_shape) if axis != site.data_axis]
    return part.reshape(*part.shape[:2], *rest).movedim(1, 1 + site.data_axis)


def keep_dims(values: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Sum over all dims but those in ``keep`` (negative, ascending); absent ones appear with size 1."""
    values = values.reshape([1] * max(-min(keep) - values.ndim, 0) + list(values.shape))
    dims = [d for d in range(-values.ndim, 0) if d not in keep]
    return values.sum(dims) if dims else values


def _independent_plate(trace: poutine.Trace, name: str | None) -> tuple[int | None, torch.Size]:
    if name is None:
        return None, torch.Size()
    frames = {
        site: {frame.name: frame for frame in node["cond_indep_stack"] if frame.vectorized}
        for site, node in latent_sites(trace).items()
    }
    known = sorted({plate for stack in frames.values() for plate in stack})
    if name not in known:
        raise ValueError(f"independent={name!r} is not a plate of the model's latent sites; plates: {known}")
    outside = [site for site, stack in frames.items() if name not in stack]
    if outside:
        raise ValueError(
            f"independent={name!r} needs every latent site inside that plate, but {outside} lie outside; "
            f"condition on them, or leave independent=None"
        )
    frame = next(iter(frames.values()))[name]
    return frame.dim, torch.Size([int(frame.size)])


def _check_no_subsampling(trace: poutine.Trace) -> None:
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and int(frame.full_size) != int(frame.size):
                raise ValueError(
                    f"plate {frame.name!r} is subsampled ({frame.size} of {frame.full_size}): the density would "
                    f"change from call to call; run the model on all its data"
                )
