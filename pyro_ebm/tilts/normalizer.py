r"""Estimates of ``log Z = log E_{p(v)}[exp(-E(v))]`` from draws of the untilted distribution.

The draws belong to a random stream of their own (``streams.py``). ``fit`` chooses one for each step, and one for all
its validations; elsewhere its seed is a function of the tilt: new weights, new draws; the same weights, the same
number. So a training step sees fresh draws, a sampler that moves only ``v`` sees a constant, a run can be resumed
exactly, and the global generator is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.checks import real_numbers, whole_number
from pyro_ebm.deadline import OutOfTime, check_time, time_left
from pyro_ebm.energies import Energy, FunctionEnergy, as_energy
from pyro_ebm.errors import report, warn_user
from pyro_ebm.estimates import Estimate, importance_estimate, log_mean_exp
from pyro_ebm.randomness import fingerprint, forked_rng
from pyro_ebm.structure import unmasked
from pyro_ebm.thresholds import weights_problem
from pyro_ebm.tilts.listeners import reported_log_mean_exp
from pyro_ebm.tilts.streams import current_stream, enough, hides_nothing, log_z_seed, seen_at_draws

__all__ = [
    "METHODS",
    "Normalizer",
    "base_parameters",
    "checked_energy",
    "energy_state",
    "enumerated",
    "is_exchangeable",
    "log_z_key",
    "sampled_log_normalizer",
    "score_term",
    "site_log_normalizer",
    "site_log_weights",
    "warn_if_unreliable",
]

METHODS = ("importance", "qmc")
_QMC_REPLICATES = 32
_PIECE = 512  # draws whose energies are computed between two looks at the clock
_REMEDY = (
    "bound the energy below (a smaller or regularized energy, a quadratic term `+ QuadraticEnergy(c)`), "
    "or draw more samples"
)


@checked
@dataclass(frozen=True)
class Normalizer:
    """How a tilt estimates its own ``log Z``.

    Args:
        method: ``"importance"`` (independent draws of the base) or ``"qmc"`` (scrambled Sobol points
            through the base's inverse cdf: far less noise in low dimensions).
        num_samples: draws of the base per model call; ``fit`` validates with 1,024 at least.
        seed: selects the random stream.
    """

    method: str = "importance"
    num_samples: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        whole_number("num_samples", self.num_samples, at_least=2)


def checked_energy(energy: Energy, value: Tensor, event_dim: int, name: str) -> Tensor:
    """``energy(value)``, or a ValueError when its shape is not that of the batch."""
    result = energy(value)
    batch = value.shape[: value.ndim - event_dim]
    if not isinstance(result, Tensor) or result.shape != batch:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"the energy of {name} must return one number per batch element, shape {tuple(batch)} for a "
            f"value of shape {tuple(value.shape)} with event_dim {event_dim}, got {got}; "
            f"sum over the rightmost {event_dim} dimension(s) only"
        )
    return real_numbers(f"what the energy of {name} returns", result)


def _leaf(base: Distribution) -> tuple[Distribution, int]:
    """The distribution inside wrappers, and how many of its rightmost batch dims are event dims."""
    extra = 0
    while isinstance(base, Independent | ExpandedDistribution | MaskedDistribution):
        extra += getattr(base, "reinterpreted_batch_ndims", 0)
        base = base.base_dist
    return base, extra


def base_parameters(base: Distribution) -> list[tuple[Tensor, int]] | None:
    """Parameter tensors with the number of their rightmost dims that are not batch; None if unknown."""
    leaf, extra = _leaf(base)
    if hasattr(leaf, "base_dist") and not isinstance(leaf, TransformedDistribution):
        return None  # a zero-inflated or skewed base, say: arg_constraints do not list the inner parameters
    found = []
    try:
        for name, constraint in leaf.arg_constraints.items():
            # Properties stand for parameters stored elsewhere (LogNormal, Beta); lazy ones are derived.
            if name in leaf.__dict__ or isinstance(getattr(type(leaf), name, None), property):
                value = getattr(leaf, name)
                found += [(value, constraint.event_dim + extra)] if isinstance(value, Tensor) else []
    except NotImplementedError:  # a distribution that does not say what its parameters are
        return None
    return found or None


def energy_state(energy: Energy) -> list[Tensor] | None:
    """All tensors that determine the energy; None where a plain function may depend on others."""
    for module in energy.modules():
        if isinstance(module, FunctionEnergy) and not isinstance(module.function, torch.nn.Module):
            if not module.owners:
                return None
    return [*energy.parameters(), *energy.buffers()]


def is_exchangeable(base: Distribution) -> bool:
    """Whether all batch elements of the base are known to have the same distribution."""
    if math.prod(base.batch_shape) == 1:
        return True
    parameters = base_parameters(base)
    batch_dims = len(_leaf(base)[0].batch_shape)
    if parameters is None or any(tensor.ndim - inner > batch_dims for tensor, inner in parameters):
        return _same_densities(base)  # parameters that are not known, or have dims of their own: those of components
    for tensor, inner in parameters:
        for dim in range(tensor.ndim - inner):
            if tensor.shape[dim] == 1 or tensor.stride(dim) == 0:
                continue
            first = tensor.narrow(dim, 0, 1)
            if tensor.requires_grad or not bool((tensor == first).all()):
                return False
    return True


def _same_densities(base: Distribution) -> bool:
    """Whether a few values have the same density in all batch elements: mixtures, flows, whatever hides parameters."""
    try:
        with torch.no_grad(), forked_rng(0):
            value = base.expand(torch.Size([4, *base.batch_shape])).sample()
            lead = value.ndim - len(base.event_shape)
            first = value[(slice(None), *[slice(0, 1)] * (lead - 1))].expand_as(value)
            found = base.log_prob(first).flatten(1)
    except (NotImplementedError, RuntimeError, ValueError):  # whatever has no density, or cannot be expanded
        return False
    if is_batchedtensor(found):
        return False
    return torch.allclose(found, found[:, :1].expand_as(found), rtol=1e-5, atol=1e-6)


def _qmc_points(base: Distribution, shape: torch.Size, num: int, seed: int) -> Tensor:
    """Scrambled Sobol points through the inverse cdf of the base, shape (*shape, *event)."""
    leaf, _ = _leaf(base)
    dim = base.event_shape.numel()
    engine = torch.quasirandom.SobolEngine(max(dim, 1), scramble=True, seed=seed % (2**31))
    reference = next(iter(base_parameters(base) or [(torch.zeros(()), 0)]))[0]
    uniform = engine.draw(num, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).to(reference)
    eps = torch.finfo(uniform.dtype).eps
    uniform = uniform.clamp(eps / 2, 1 - eps).reshape(*shape, *base.event_shape)
    try:
        return leaf.icdf(uniform)
    except NotImplementedError:
        raise ValueError(
            f'method="qmc" needs a base with an inverse cdf (independent Normal, Uniform, Laplace, ...), '
            f'got {type(leaf).__name__}; use method="importance"'
        ) from None


def score_term(base: Distribution, value: Tensor) -> Tensor:
    """Zero in value; carries the gradient to parameters of a base that cannot be reparametrized."""
    if getattr(base, "has_rsample", False) or not torch.is_grad_enabled():
        return torch.zeros((), dtype=value.dtype if value.is_floating_point() else None, device=value.device)
    log_prob = base.log_prob(value)
    return log_prob - log_prob.detach()  # under vmap no tensor says that it asks for gradients


def site_log_weights(
    base: Distribution, energy: Energy, settings: Normalizer, *, name: str = "site", seed: int | None = None
) -> Tensor:
    """``-E(v_k)`` for draws ``v_k`` of the base.

    Args:
        base: distribution with batch_shape (*batch) and event_shape (*event).
        energy: maps (..., *event) to (...).
        settings: how many draws, and of which kind.
        name: the site, for messages.
        seed: stream of the draws; ``None`` continues (and advances) the global generator.

    Returns:
        (num_samples,) where all batch elements share one distribution, else (num_samples, *batch). Bases with
        enumerable support are summed exactly: weights then carry ``log p(v) + log(support size)``.
    """
    base = unmasked(base)
    event_dim = len(base.event_shape)
    support = enumerated(base)
    if support is not None:
        value, log_prob = support
        return log_prob + math.log(value.shape[0]) - checked_energy(energy, value, 0, name)
    shared = is_exchangeable(base)
    copies = math.prod(base.batch_shape) if shared else 1
    repeats = math.ceil(settings.num_samples / copies)
    shape = torch.Size([repeats])
    if settings.method == "qmc":
        points_shape = shape + (base.batch_shape if shared else torch.Size([1] * len(base.batch_shape)))
        qmc_seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        value = _qmc_points(base, points_shape, repeats * copies, qmc_seed)
        score = score_term(base, value)
    elif seed is None:
        value, score = _draw(base, shape)
    else:
        with forked_rng(seed):
            value, score = _draw(base, shape)
    if shared:
        value = value.reshape(repeats * copies, *base.event_shape)[: settings.num_samples]
        score = score.reshape(-1)[: settings.num_samples] if score.ndim else score
    energies = checked_energy if time_left() == math.inf or torch.is_grad_enabled() else _energies_in_time
    return score - energies(energy, value, event_dim, name)


def _energies_in_time(energy: Energy, value: Tensor, event_dim: int, name: str) -> Tensor:
    """Energies of the first draws, as many as time allows."""
    pieces: list[Tensor] = []
    with suppress(OutOfTime):
        for piece in value.split(_PIECE):
            check_time()
            pieces.append(checked_energy(energy, piece, event_dim, name))
    if not pieces:
        raise OutOfTime
    return torch.cat(pieces)


def enumerated(base: Distribution) -> tuple[Tensor, Tensor] | None:
    """All values of a scalar base of finite support and their log probabilities.

    Shapes (support,) where all batch elements share one distribution, else (support, *batch).
    """
    leaf, _ = _leaf(base)
    if len(base.event_shape) or not getattr(leaf, "has_enumerate_support", False):
        return None
    try:
        value = leaf.enumerate_support(expand=True)
    except NotImplementedError:  # a Binomial whose total_count differs between batch elements
        return None
    log_prob = leaf.log_prob(value)
    if value.ndim > 1 and is_exchangeable(base):
        return value.flatten(1)[:, 0], log_prob.flatten(1)[:, 0]
    return value, log_prob


def _draw(base: Distribution, shape: torch.Size) -> tuple[Tensor, Tensor]:
    reparametrized = getattr(base, "has_rsample", False) and torch.is_grad_enabled()
    try:
        value = base.rsample(shape) if reparametrized else base.sample(shape)
    except RuntimeError:  # Pyro's mixtures of diagonal normals draw one for each batch element, and no more
        wide = base.expand(shape + base.batch_shape)
        value = wide.rsample() if reparametrized else wide.sample()
    return value, score_term(base, value)


def site_log_normalizer(
    base: Distribution, energy: Energy, settings: Normalizer, *, name: str, salt: Sequence[object] = ()
) -> Tensor:
    """``log Z`` of a tilt from its own distribution: 0-d where all batch elements share it, else (*batch).

    The gradient with respect to the energy is the self-normalized estimate of the negative phase,
    ``-sum_k w_k grad E(v_k)``, ``w = softmax(-E)``.
    """
    support = enumerated(base)
    if support is not None:
        value, log_prob = support
        # The second term is zero up to rounding; with it, a zero energy gives zero exactly.
        tilted = log_prob - checked_energy(energy, value, 0, name)
        return tilted.logsumexp(0) - log_prob.logsumexp(0)
    settings = replace(settings, num_samples=enough(settings.num_samples))
    seed = log_z_seed(lambda: _of_the_tilt(base, energy, name), settings.seed, name, *salt)
    return reported_log_mean_exp(site_log_weights(base, energy, settings, name=name, seed=seed))


def _of_the_tilt(base: Distribution, energy: Energy, name: str) -> list[Tensor]:
    return [*energy.parameters(), *_at_draws(base, energy, name)]


def _at_draws(base: Distribution, energy: Energy, name: str) -> list[Tensor]:
    """Energies at a few draws of the base, where the energy may depend on more than its own weights."""
    if hides_nothing(energy):
        return []
    return seen_at_draws([energy], lambda num: site_log_weights(base, energy, Normalizer(num_samples=num), name=name))


def log_z_key(base: Distribution, energy: Energy, name: str) -> int | None:
    """Identifies all that the estimate of log Z of a site depends on; None where that cannot be known."""
    state, parameters = energy_state(energy), base_parameters(base)
    if state is None or parameters is None:
        return None
    seen = [*state, *(value for value, _ in parameters), *_at_draws(base, energy, name)]
    # The number goes with the tensors to another device, and its bits differ between precisions.
    where = [(str(tensor.device), str(tensor.dtype)) for tensor in seen]
    return fingerprint(seen, *current_stream(), tuple(base.batch_shape), torch.is_grad_enabled(), *where)


def sampled_log_normalizer(
    base: Distribution,
    energy: Energy,
    *,
    method: str = "importance",
    num_samples: int = 16384,
    seed: int | None = None,
    strict: bool = False,
) -> Estimate:
    """``log Z`` and its standard error from independent draws or Sobol points of the base.

    Arguments, result and errors of :func:`pyro_ebm.log_normalizer`.
    """
    energy = as_energy(energy)
    settings = Normalizer(method, num_samples)
    with torch.no_grad():
        if method == "qmc":
            estimate, log_weights = _qmc_estimate(base, energy, num_samples, seed)
        else:
            log_weights = site_log_weights(base, energy, settings, name="the base", seed=seed)
            estimate = importance_estimate(log_weights)
        if enumerated(base) is not None and bool(estimate.value.isfinite().all()):
            return Estimate(estimate.value, torch.zeros_like(estimate.value))
    if len(log_weights) < 0.9 * num_samples and enumerated(base) is None:
        warn_user(f"stopped by the limit of time after {len(log_weights)} of {num_samples} draws of the base")
    warn_if_unreliable(log_weights, estimate, strict=strict)
    return estimate


def warn_if_unreliable(log_weights: Tensor, estimate: Estimate, *, strict: bool = False) -> None:
    """Warn (raise with ``strict``) where log Z is not finite or its weights have too heavy a tail."""
    report(_problem(log_weights, estimate), strict=strict)


def _qmc_estimate(
    base: Distribution, energy: Energy, num_samples: int, seed: int | None
) -> tuple[Estimate, Tensor]:
    settings = Normalizer("qmc", max(num_samples // _QMC_REPLICATES, 2))
    seeds = [None if seed is None else seed * _QMC_REPLICATES + r for r in range(_QMC_REPLICATES)]
    log_weights: list[Tensor] = []
    with suppress(OutOfTime):
        for each in seeds:
            log_weights.append(site_log_weights(base, energy, settings, name="the base", seed=each))
            check_time()
    log_weights = [part for part in log_weights if len(part) == len(log_weights[0])]  # part of a net is none
    if len(log_weights) < 2:
        raise OutOfTime
    estimate = importance_estimate(torch.stack([log_mean_exp(part) for part in log_weights]))
    return estimate, torch.cat(log_weights)


def _problem(log_weights: Tensor, estimate: Estimate) -> str | None:
    if not bool(estimate.value.isfinite().all()):
        values = estimate.value.flatten()[:5].tolist()
        return f"log Z is not finite ({values}): the energy is unbounded below or returns NaN; {_REMEDY}"
    columns = log_weights.reshape(log_weights.shape[0], -1)
    worst = int(estimate.se.reshape(-1).argmax())
    weights = columns[:, worst]
    problem = weights_problem(psis(weights)[1], float(importance_ess(weights)), len(weights))
    if problem:
        return (
            f"the estimate of log Z is not reliable: the weights exp(-E) have a heavy tail ({problem}), as when the "
            f"energy is unbounded below or the tilt is far from its base; {_REMEDY}"
        )
    return None
