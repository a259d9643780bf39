"""fit_moments(): the least change of a distribution under which chosen features have given means."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers, whole_number
from pyro_ebm.deadline import interruptions_pass
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.entry import entry
from pyro_ebm.errors import InfeasibleError, InferenceError, InferenceWarning, report
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
from pyro_ebm.inference.annealing.smc import SMC
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.moments.dual import Cloud, Optimum, group_error, minimize
from pyro_ebm.moments.energy import MomentEnergy
from pyro_ebm.moments.feasibility import independent_basis, infeasible, separation
from pyro_ebm.randomness import fingerprint
from pyro_ebm.tilts.distribution import TiltedDistribution
from pyro_ebm.tilts.normalizer import Normalizer, enumerated, is_exchangeable, site_log_weights

__all__ = ["METHODS", "MomentFit", "fit_moments"]

METHODS = ("auto", "importance", "qmc", "smc")
_GROUPS, _ISLANDS = 32, 16
_QMC_DIMS = 6  # above it Sobol points gain little
_LEAST_ESS, _STEP_ESS, _ARRIVED_ESS = 0.05, 0.1, 0.3  # shares of the draws: of the base, on the way, at the end
_LEAST_DRAWS = 10.0  # where draws cannot be made anew
_MAX_ROUNDS = 16
_COLLAPSED = 1e-9  # variance, relative to the base, at which the optimum lies at infinity
_PROGRESS = 0.05  # of a standard deviation, from round to round, toward a target that is out of reach


@dataclass(frozen=True, eq=False)
class MomentFit:
    """What :func:`fit_moments` found; ``energy.multipliers`` holds lambda too.

    Args:
        multipliers: (k,) lambda, the shortest among equivalent ones where features are redundant.
        multipliers_se: (k,) their standard errors.
        target: (k,) what was asked for.
        moments: (k,) means of the features under the fitted tilt, from draws that lambda has not seen.
        moments_se: (k,) their standard errors; those of lambda come on top.
        kl: KL divergence of the fitted tilt from the base, in nats, with its error: the price of the constraint.
        ess: effective sample size of the weighted draws that lambda was found with, per draw.
        pareto_k: of the same weights.
        method: ``"exact"``, ``"qmc"``, ``"importance"`` or ``"smc"``: what was used in the end.
        num_iterations: Newton steps in all.
        num_rounds: how often draws were made anew near the tilt; 0 where those of the base did.
    """

    multipliers: Tensor
    multipliers_se: Tensor
    target: Tensor
    moments: Tensor
    moments_se: Tensor
    kl: Estimate
    ess: float
    pareto_k: float
    method: str
    num_iterations: int
    num_rounds: int


@entry(gradients=True, of_model=False)
@checked
def fit_moments(
    base: Distribution,
    energy: MomentEnergy,
    target: Tensor | Sequence[float] | float,
    *,
    method: str = "auto",
    num_samples: int = 16384,
    seed: int | None = None,
    strict: bool = False,
) -> MomentFit:
    r"""Find the tilt of least KL divergence from the base under which features have given means.

    .. math:: \lambda = \arg\min_\lambda \; \log E_{base}[\exp(\lambda \cdot f(v))] - \lambda \cdot target

    Convex: damped Newton on draws that stay fixed, those of the base. Where the tilt lies too far for their weights
    (ESS below 5 % of the draws, or a Pareto k too large for their number), draws of the current tilt by :class:`SMC`,
    made anew after each stretch of the way. Give a :class:`TiltedDistribution` as base to hold the means of a tilt
    learned elsewhere: they are then right under the sum ``learned + energy``, and the KL is that from the learned one.

    Args:
        base: of the value; batch_shape () (or all elements alike), event_shape (*event); for SMC, continuous.
        energy: the features; its multipliers are replaced in place, and left alone where the fit fails.
        target: (k,) the means wanted.
        method: where draws come from: ``"auto"``; the base only (``"importance"``, ``"qmc"``); ``"smc"`` at once.
            Finitely many values are summed exactly whatever the method.
        num_samples: draws of the base; of particles a quarter as many.
        seed: a number for the same answer twice; ``None`` uses the global generator.
        strict: raise instead of warn where weights or particles cannot be trusted.

    Returns:
        Multipliers, the means reached on fresh draws, the KL paid, each with standard error, and diagnostics.

    Raises:
        TypeError: energy not a :class:`MomentEnergy`.
        ValueError: a target of the wrong shape, or not finite; features not finite.
        InfeasibleError: (a ValueError) a target that contradicts a constant combination of features (probabilities that
            must sum to one), or lies outside or at the boundary of what any tilt can reach.
        InferenceError: a target not reached in 16 rounds, or that draws of the base cannot tell; with ``strict``,
            where an :class:`InferenceWarning` would be given.

    Reference:
        Csiszar (1975), I-divergence geometry of probability distributions and minimization problems.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_ebm import MomentEnergy, fit_moments
        >>> die = dist.Categorical(torch.ones(6))
        >>> energy = MomentEnergy(lambda face: (face + 1.0)[..., None])
        >>> fit = fit_moments(die, energy, 4.5)  # the loaded die of Jaynes
        >>> round(float(fit.multipliers[0]), 4), round(float(fit.kl.value), 4)
        (0.371, 0.1782)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    whole_number("num_samples", num_samples, at_least=20 * _GROUPS)
    if not is_exchangeable(base):
        raise ValueError(
            f"base must be one distribution, got batch_shape {tuple(base.batch_shape)} with elements that differ"
            "; fit each alone"
        )
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    with torch.no_grad():
        given, root = _unwrapped(base)
        with evaluation_mode(energy, *([] if given is None else [given])):
            source = _Source(root, given, energy, method, num_samples, seed, strict)
            result = _Search(source, target).run()
        energy.set_multipliers(result.multipliers)
    return result


class _Source:
    """Where draws come from: the base, or SMC at given multipliers."""

    def __init__(
        self,
        base: Distribution,
        given: Energy | None,
        energy: MomentEnergy,
        method: str,
        num_samples: int,
        seed: int,
        strict: bool,
    ) -> None:
        self.base, self.given, self.energy, self.method = base, given, energy, method
        self.num_samples, self.seed, self.strict = num_samples, seed, strict
        self.exact = enumerated(base) is not None
        self.may_anneal = method in ("auto", "smc") and not self.exact and _is_continuous(base)
        if method == "smc" and not (self.may_anneal or self.exact):
            raise ValueError(f'method="smc" needs a continuous base, got {type(base).__name__}; use "importance"')
        self.dtype = torch.get_default_dtype()

    def from_base(self, stream: int) -> Cloud:
        """Draws of the base, with the weights of the given tilt."""
        if self.exact or self.method in ("importance", "qmc"):
            return self._from_base("importance" if self.exact else self.method, stream)
        if self.method == "auto" and self.base.event_shape.numel() <= _QMC_DIMS:
            try:
                return self._from_base("qmc", stream)
            except ValueError as error:
                if 'method="qmc" needs' not in str(error):  # else: a base without an inverse cdf
                    raise
        return self._from_base("importance", stream)

    def _from_base(self, method: str, stream: int) -> Cloud:
        seen: list[Tensor] = []

        def watch(value: Tensor) -> Tensor:
            seen.append(self.energy.features(value))
            return seen[-1].new_zeros(seen[-1].shape[:-1]) if self.given is None else self.given(value)

        repeats = _GROUPS if method == "qmc" else 1  # each a net of its own
        settings = Normalizer(method, self.num_samples // repeats)
        seeds = [fingerprint((), self.seed, stream, index) for index in range(repeats)]
        logs = [site_log_weights(self.base, as_energy(watch), settings, name="the base", seed=seed) for seed in seeds]
        self.dtype = seen[0].dtype
        features, log_weights = _finite(torch.cat(seen).double().cpu()), torch.cat(logs).double().cpu()
        groups = 1 if self.exact else _GROUPS
        num = len(features) // groups
        return Cloud(
            features[: num * groups].reshape(groups, num, -1),
            log_weights[: num * groups].reshape(groups, num),
            torch.zeros(features.shape[-1], dtype=torch.float64),
            "exact" if self.exact else method,
        )

    def from_smc(self, multipliers: Tensor, stream: int, *, quiet: bool) -> Cloud:
        """Draws of the tilt at these multipliers, an island a group."""
        if self.base.batch_shape:
            raise ValueError(
                f"base must have batch_shape () for SMC, got {tuple(self.base.batch_shape)}; give one element"
            )
        tilted: Energy = MomentEnergy(self.energy.features, multipliers.to(self.dtype))
        tilted = tilted if self.given is None else self.given + tilted
        sampler = SMC(
            TiltedDistribution(self.base, tilted),  # type: ignore[arg-type]
            particles_per_island=self.num_samples // (4 * _ISLANDS),
            num_islands=_ISLANDS,
            seed=fingerprint((), self.seed, "smc", stream) % 2**31,
            progress=False,
            strict=self.strict and not quiet,
        )
        with warnings.catch_warnings():
            if quiet:  # on the way, a bad population is of no concern
                warnings.simplefilter("ignore", InferenceWarning)
            with interruptions_pass():
                draws = sampler.run()
        features = _finite(self.energy.features(draws.values["z"]).double().cpu())
        log_z = torch.tensor(draws.notes["log_z_of_islands"], dtype=torch.float64)
        return Cloud(features, log_z[:, None].expand(features.shape[:2]), multipliers, "smc")

    def log_z_before(self) -> Estimate:
        """Log Z of the given tilt, where the draws are not those of the base."""
        if self.given is None:
            return Estimate(torch.zeros(()), torch.zeros(()))
        num = self.num_samples // 2
        options: dict[str, Any] = {"num_samples": num, "seed": self.seed, "strict": self.strict}
        with interruptions_pass():
            found = log_normalizer(self.base, self.given, method="smc", **options)
        return Estimate(found.value.double().cpu(), found.se.double().cpu())


class _Search:
    """One run of fit_moments."""

    def __init__(self, source: _Source, target: Tensor | Sequence[float] | float) -> None:
        self.source, self.name = source, source.energy.name
        self.prior = source.from_base(0)
        self.seen = [self.prior.features.flatten(0, 1)]
        self.target = _checked_target(target, self.seen[0].shape[1])
        self.basis = independent_basis(self.seen[0], self.target, self.name)
        self.iterations = self.rounds = 0

    def run(self) -> MomentFit:
        source, lam = self.source, torch.zeros_like(self.target)
        cloud, found = self.prior, Optimum(lam, False, 0)
        if source.method != "smc" or source.exact:
            limit = 0.0 if source.exact else _LEAST_DRAWS / cloud.log_weights.numel()
            found = self.descend(cloud, lam, _LEAST_ESS if source.may_anneal else limit)
        if source.may_anneal and not self.trusted(cloud, found, _LEAST_ESS):
            cloud, found = self.anneal(found.multipliers)
        lam = found.multipliers
        if not found.converged:
            self.refuse_if_outside(cloud)
        self.refuse_if_collapsed(cloud, lam)
        fresh = cloud
        if not source.exact:
            fresh = source.from_smc(lam, -1, quiet=False) if self.rounds else source.from_base(1)
        return self.result(cloud, fresh, lam)

    def descend(self, cloud: Cloud, start: Tensor, least_ess: float) -> Optimum:
        found = minimize(cloud, self.basis, self.target, start=start, least_ess=least_ess)
        self.iterations += found.num_iterations
        return found

    def trusted(self, cloud: Cloud, found: Optimum, least_ess: float) -> bool:
        lam = found.multipliers
        return found.converged and cloud.ess(lam) >= least_ess and cloud.pareto_k(lam) <= cloud.k_limit

    def anneal(self, start: Tensor) -> tuple[Cloud, Optimum]:
        """Rounds of draws at the current tilt, and of Newton steps on them."""
        lam, gap = start, torch.inf
        for _ in range(_MAX_ROUNDS):
            self.rounds += 1
            cloud = self.source.from_smc(lam, self.rounds, quiet=True)
            self.seen.append(cloud.features.flatten(0, 1))
            found = self.descend(cloud, lam, _STEP_ESS)
            if self.trusted(cloud, found, _ARRIVED_ESS):
                return cloud, found
            lam = found.multipliers
            if not found.converged:
                before, gap = gap, separation((torch.cat(self.seen) - self.target) @ self.basis)[1]
                if gap > before - _PROGRESS and gap > 0:
                    raise self.infeasible()
            self.refuse_if_collapsed(cloud, lam)
        raise InferenceError(
            f"fit_moments: the target {self.target.tolist()} was not reached in {_MAX_ROUNDS} rounds, means are "
            f"{cloud.moments(lam)[0].tolist()} so far: it lies very far from the base, or hardly inside what can be"
        )

    def infeasible(self) -> InfeasibleError:
        return infeasible(torch.cat(self.seen), self.basis, self.target, self.name)

    def refuse_if_outside(self, cloud: Cloud) -> None:
        """Newton's method came to no end on draws of the base, and there are no others."""
        if self.source.exact or separation((self.seen[0] - self.target) @ self.basis)[1] > 0:
            raise self.infeasible()
        raise InferenceError(
            f"fit_moments: the weights of {cloud.log_weights.numel()} draws of the base do not reach the target "
            f"{self.target.tolist()}: it lies far from the base; use method='auto' or 'smc', or more num_samples"
        )

    def refuse_if_collapsed(self, cloud: Cloud, multipliers: Tensor) -> None:
        """Multipliers that grow until nothing varies any more have their optimum at infinity."""
        covariance = self.basis.T @ cloud.moments(multipliers)[1] @ self.basis
        if float(torch.linalg.eigvalsh(covariance)[0]) < _COLLAPSED:
            raise self.infeasible()

    def result(self, cloud: Cloud, fresh: Cloud, lam: Tensor) -> MomentFit:
        moments, error = group_error(fresh, lam, lambda weight, total, log_z: total / weight)
        kl, variance = group_error(fresh, lam, lambda weight, total, log_z: (lam @ self.target - log_z)[None])
        before = self.source.log_z_before() if fresh.method == "smc" else Estimate(torch.zeros(()), torch.zeros(()))
        price = (kl[0] + before.value, (variance[0, 0] + before.se**2).sqrt())
        spread = group_error(cloud, lam, lambda weight, total, log_z: total / weight)[1]
        hessian = self.basis.T @ cloud.moments(lam)[1] @ self.basis
        inverse = self.basis @ torch.linalg.solve(hessian, self.basis.T)
        se = (inverse @ spread @ inverse).diagonal().clamp(min=0).sqrt()
        ess, k, dtype = cloud.ess(lam), cloud.pareto_k(lam), self.source.dtype
        self.report(ess * cloud.log_weights.numel(), k, cloud.k_limit)
        return MomentFit(
            multipliers=lam.to(dtype),
            multipliers_se=se.to(dtype),
            target=self.target.to(dtype),
            moments=moments.to(dtype),
            moments_se=error.diagonal().sqrt().to(dtype),
            kl=Estimate(*(part.to(dtype) for part in price)),
            ess=ess,
            pareto_k=k,
            method=cloud.method,
            num_iterations=self.iterations,
            num_rounds=self.rounds,
        )

    def report(self, ess: float, k: float, limit: float) -> None:
        if self.source.exact or (ess >= 100 and k <= limit):
            return
        problem = (
            f"fit_moments: the weights are not reliable (Pareto k = {k:.2f}, trusted up to {limit:.2g}; effective "
            f"sample size {ess:.1f}): the tilt is far from its base; use method='auto' or 'smc', or more num_samples"
        )
        report(problem, strict=self.source.strict)


def _unwrapped(base: Distribution) -> tuple[Energy | None, Distribution]:
    """The tilt that a base already has, and its untilted distribution."""
    given: Energy | None = None
    while isinstance(base, TiltedDistribution):
        given = base.energy if given is None else base.energy + given
        base = base.base
    return given, base


def _checked_target(target: Tensor | Sequence[float] | float, num: int) -> Tensor:
    values = real_numbers("target", torch.as_tensor(target)).detach().double().cpu()
    values = values[None] if values.ndim == 0 else values
    if values.shape != (num,):
        raise ValueError(f"target must have one value for each of the {num} features, shape ({num},), "
                         f"got {tuple(values.shape)}")  # fmt: skip
    if not bool(values.isfinite().all()):
        raise ValueError(f"target must be finite, got {values.tolist()}")
    return values


def _finite(features: Tensor) -> Tensor:
    bad = ~features.isfinite().all(-1)
    if bool(bad.any()):
        raise ValueError(f"features must be finite, got NaN or infinity for {int(bad.sum())} of {bad.numel()} draws")
    return features


def _is_continuous(base: Distribution) -> bool:
    try:
        biject_to(base.support)
    except NotImplementedError:
        return False
    return not base.support.is_discrete  # type: ignore[union-attr]
