"""The front door to log Z of a tilted distribution: five ways to estimate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import limited
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.entry import entry
from pyro_ebm.errors import report
from pyro_ebm.estimates import BoundedEstimate, Estimate
from pyro_ebm.inference.annealing.ais import annealed_importance, bridge
from pyro_ebm.inference.annealing.smc import SMC
from pyro_ebm.inference.annealing.tempering import Annealing
from pyro_ebm.randomness import fingerprint, random_stream
from pyro_ebm.structure import unmasked
from pyro_ebm.tilts.normalizer import METHODS as SAMPLED
from pyro_ebm.tilts.normalizer import checked_energy, enumerated, is_exchangeable, sampled_log_normalizer
from pyro_ebm.tilts.tilt import TiltedModel, tilt

__all__ = ["METHODS", "log_normalizer"]

METHODS = (*SAMPLED, "smc", "bridge", "ais")
_NUM_SAMPLES = {"importance": 16384, "qmc": 16384, "smc": 8192, "bridge": 8192, "ais": 1024}
_ISLANDS = 8
_BRIDGE_ISLANDS = 16
_GROUPS = 16
_LEAST_OVERLAP = 50.0  # draws


@entry(of_model=False)
@checked
def log_normalizer(
    base: Distribution,
    energy: Energy | Callable[[Tensor], Tensor],
    *,
    method: str = "importance",
    num_samples: int | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    strict: bool = False,
) -> Estimate:
    r"""Estimate ``log Z = log E_{base}[exp(-E(v))]`` with its standard error.

    ``"importance"``: ``logsumexp_k(-E(v_k)) - log K`` with delta-method error
    ``sqrt((1/ess - 1/K))``, ess = effective sample size of the weights. ``"qmc"``: the mean of
    32 independently scrambled Sobol nets, with the error between them. For a tilt far from its base: ``"smc"``, the
    estimate of :class:`SMC` on 8 islands; ``"bridge"``, Bennett's acceptance ratio between draws of the base and
    particles of SMC, the z at which ``sum_i sigmoid(-E(base_i) - z) = sum_j sigmoid(z + E(tilted_j))``, far less
    noise than importance as long as both still overlap; and ``"ais"``, the same between both ends of annealed
    chains, which adds a lower and an upper bound (:func:`annealed_importance`).

    Args:
        base: distribution with batch_shape (*batch) and event_shape (*event); for ``"smc"``, ``"bridge"`` and ``"ais"``
            continuous and, where batch elements differ, with one batch dimension.
        energy: maps (..., *event) to (...).
        method: one of ``"importance"``, ``"qmc"``, ``"smc"``, ``"bridge"``, ``"ais"``.
        num_samples: draws of the base in all, 16,384 by default; particles (8,192; for ``"bridge"`` as many draws
            of the base too); chains in each direction (1,024).
        max_seconds: when so much time is spent, return what was done so far, with a warning; ``None``: no limit.
        seed: a number for the same answer twice; ``None`` uses the global generator.
        strict: raise instead of warn when the estimate cannot be trusted.

    Returns:
        ``(value, se)``, each 0-d where all batch elements share one distribution, else (*batch); with ``"ais"`` also
        ``.lower`` and ``.upper``. Finitely many values of the base are summed exactly whatever the method.

    Raises:
        ValueError: unknown method, an energy of the wrong shape, a base that the method cannot serve.
        InferenceError: with ``strict``, where an :class:`InferenceWarning` would be given.

    Reference:
        Bennett (1976), Efficient estimation of free energy differences from Monte Carlo data; Meng, Wong (1996).

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy
        >>> from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> value, se = log_normalizer(base, LinearEnergy([1.0, 0.0]), seed=0)
        >>> bool(abs(value - 0.5) < 4 * se)
        True
    """
    energy = as_energy(energy)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    num = _NUM_SAMPLES[method] if num_samples is None else whole_number("num_samples", num_samples, at_least=2)
    if method in SAMPLED:
        with limited(max_seconds):
            return sampled_log_normalizer(base, energy, method=method, num_samples=num, seed=seed, strict=strict)
    base = unmasked(base)
    if enumerated(base) is not None:
        exact = sampled_log_normalizer(base, energy, strict=strict)
        return BoundedEstimate(*exact, exact.value, exact.value) if method == "ais" else exact
    model, independent = _tilted_model(base, energy, method)
    options: dict[str, Any] = {"seed": seed, "progress": False, "strict": strict, "max_seconds": max_seconds}
    options["annealing"] = Annealing(independent=independent)
    if method == "ais":
        return annealed_importance(model, chains_per_group=max(num // _GROUPS, 2), num_groups=_GROUPS, **options)
    islands = min(_BRIDGE_ISLANDS if method == "bridge" else _ISLANDS, max(num // 2, 1))
    draws = SMC(model, particles_per_island=max(num // islands, 2), num_islands=islands, **options).run()
    if method == "bridge":
        return _bridged(base, energy, draws.values["v"], seed=seed, strict=strict)
    return Estimate(*(torch.as_tensor(part).to(draws.values["v"]) for part in draws.log_z))  # type: ignore[union-attr]


@torch.no_grad()
def _bridged(
    base: Distribution, energy: Energy, tilted: Tensor, *, seed: int | None, strict: bool
) -> Estimate:
    """Bennett's ratio between particles (islands, num, *site) and as many new draws of the base, error by islands."""
    law = _OneElement(base) if base.batch_shape and is_exchangeable(base) else base
    with random_stream(None if seed is None else fingerprint((), "bridge", seed)):
        untilted = law.sample(tilted.shape[:2])
    ends = [-checked_energy(energy, value, len(base.event_shape), "the base") for value in (untilted, tilted)]
    forward, backward = (end.double().transpose(0, 1) for end in ends)
    islands = bridge(forward, backward)
    value = bridge(forward.flatten(0, 1), backward.flatten(0, 1))
    overlap = float((forward - value).sigmoid().sum((0, 1)).min())
    if not overlap >= _LEAST_OVERLAP:
        problem = (
            f"bridge: the base and the tilt hardly overlap (worth {overlap:.1f} draws of {forward[..., 0].numel()}): "
            f'log Z is not reliable; use method="ais", or more num_samples'
        )
        report(problem, strict=strict)
    se = islands.std(0) / islands.shape[0] ** 0.5
    return Estimate(value.to(tilted), se.to(tilted))


def _tilted_model(base: Distribution, energy: Energy, method: str) -> tuple[TiltedModel, str | None]:
    """The tilted base as a model, and the plate whose elements have a log Z each."""
    try:
        biject_to(base.support)
    except NotImplementedError:
        raise ValueError(
            f"method={method!r} needs a continuous base on a support that torch can map to real numbers, got "
            f'{type(base).__name__}; use method="importance"'
        ) from None
    if is_exchangeable(base):
        single = _OneElement(base) if base.batch_shape else base
        return tilt(lambda: pyro.sample("v", single), {"v": energy}, normalize=False), None
    if len(base.batch_shape) > 1:
        raise ValueError(
            f"method={method!r} needs a base with one batch dimension where batch elements differ, got "
            f'batch_shape {tuple(base.batch_shape)}; flatten it, use to_event(), or method="importance"'
        )

    def model() -> None:
        with pyro.plate("elements", base.batch_shape[0], dim=-1):
            pyro.sample("v", base)

    return tilt(model, {"v": energy}, normalize=False), "elements"


class _OneElement(TorchDistribution):
    """One batch element of a distribution whose elements are all alike."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own attribute)

    def __init__(self, base: Distribution) -> None:
        self.base = base
        transform = biject_to(base.support)
        if transform.forward_shape(transform.inverse_shape(base.event_shape)) != base.event_shape:
            raise ValueError(
                f"base has a support for each element of its batch_shape {tuple(base.batch_shape)}; give that "
                f'of one element, or use method="importance"'
            )
        super().__init__(torch.Size(), base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return self.base.support  # type: ignore[return-value]

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch's own signature)
        shape = torch.Size(sample_shape)
        repeats = math.ceil(shape.numel() / self.base.batch_shape.numel())
        values = self.base.sample(torch.Size([repeats])).reshape(-1, *self.event_shape)
        return values[: shape.numel()].reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        lead = value.shape[: value.ndim - len(self.event_shape)]
        ones = torch.Size([1] * len(self.base.batch_shape))
        every = self.base.log_prob(value.reshape(lead + ones + self.event_shape))
        return every.reshape(*lead, -1)[..., 0]
