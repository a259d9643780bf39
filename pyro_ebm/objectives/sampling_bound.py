"""The sampling bound: a tilted prior that a procedure draws from, so that finite draws give a true lower bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.energies import Energy
from pyro_ebm.inference.importance import Data, LogLikelihood, log_likelihood
from pyro_ebm.structure import event_dim_of
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, enumerated, is_exchangeable, site_log_weights
from pyro_ebm.tilts.tilt import TiltedModel
from pyro_ebm.training.inputs import in_memory

__all__ = ["SamplingBound", "snis_log_likelihood"]

_POOL = 2**18  # proposals in one pass of the energy, where each particle would have a set of its own


@checked
class SamplingBound:
    r"""The ELBO of a model whose tilted site is drawn by self-normalized importance sampling with K proposals.

    The site is one of K draws of its base, chosen with weights :math:`\exp(-E)`. That is a model of its own, close
    to the tilt for large K and never further from the data than its bound says:

    .. math:: \log p_K(z) \ge \mathbb{E}_{z_{2:K} \sim p}\Big[ \log p(z) - E(z)
        - \log \tfrac{1}{K} \big( e^{-E(z)} + \textstyle\sum_{k=2}^{K} e^{-E(z_k)} \big) \Big]

    The ELBO with this in place of log p(z) is a lower bound on ``log p_K(x)`` for any K, however wild the energy; the
    gain over the untilted ELBO is at most log K. Encoder, decoder and energy can learn from it together. log Z does
    not enter: in its place stands the average over the K draws, the site's own value among them, whose gradient is
    unbiased for the bound. The K - 1 proposals are drawn once per call and shared by the whole batch. K = 1 is
    the untilted ELBO.

    Args:
        num_proposals: K, at least 1.
        num_particles: draws of the guide per datum; the bound stays what it is, its gradient gets less noisy.

    Raises:
        TypeError: in a call, a model that is not tilted.
        ValueError: an argument out of its range; in a call, a tilted site with random parents or finite support.

    Reference:
        Lawson, Tucker, Dai, Ranganath (2019), Energy-Inspired Models: Learning with Sampler-Induced Distributions.

    Example:
        ``fit(tilted, vae.guide, x, objective=SamplingBound(num_proposals=1024))``
    """

    def __init__(self, *, num_proposals: int = 1024, num_particles: int = 1) -> None:
        self.num_proposals = whole_number("num_proposals", num_proposals)
        self.num_particles = whole_number("num_particles", num_particles)

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """Minus the bound, summed over the batch.

        Args:
            model: a tilted model; how it estimates log Z plays no part.
            guide: draws its latent sites.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        sampled = _sampled_model(model, batch, self.num_proposals)
        loss = Trace_ELBO(num_particles=self.num_particles).differentiable_loss(sampled, guide, *batch)
        return torch.as_tensor(loss)


@checked
def snis_log_likelihood(
    model: TiltedModel,
    guide: Callable[..., Any],
    x: Data,
    *,
    num_samples: int = 1000,
    num_proposals: int = 1024,
    seed: int | None = None,
    batch_size: int = 100,
) -> LogLikelihood:
    r"""Importance-weighted estimate of ``log p_K(x_i)``, the likelihood that :class:`SamplingBound` is a bound of.

    .. math:: \log \tfrac{1}{S} \sum_s \frac{p(x, z_s)}{q(z_s | x)}
        \frac{e^{-E(z_s)}}{\frac{1}{K} ( e^{-E(z_s)} + \sum_{k=2}^{K} e^{-E(z_k)} )}, \qquad z_s \sim q, \; z_k \sim p

    Below the truth in expectation for any S and K, closing as S grows. The proposals are the same for all data of a
    pass; particles have sets of their own, or share them where these would be more than 2^18 draws.

    Args:
        model: a tilted model that takes ``x``; all its sites lie in one plate at dim -1, along the data.
        guide: proposes the latent sites given ``x``.
        x: (n, *event), or several, as in :func:`log_likelihood`.
        num_samples: draws of the guide per datum, S.
        num_proposals: draws of the base, K; as many as in training, since K belongs to the model.
        seed: a number for the same answer twice.
        batch_size: data per pass, to bound memory.

    Returns:
        ``value``, ``se``, ``pareto_k``, ``ess``, each (n,); the error is that of the S draws.

    Raises:
        TypeError: a model that is not tilted.
        ValueError: a number out of its range; a tilted site with random parents or finite support.

    Reference:
        Lawson et al. (2019); Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
    """
    x = in_memory("x", x, model, guide)
    first = tuple(part[:1] for part in x)
    sampled = _sampled_model(model, first, whole_number("num_proposals", num_proposals))
    return log_likelihood(sampled, guide, x, num_samples=num_samples, seed=seed, batch_size=batch_size)


def _sampled_model(model: TiltedModel, batch: tuple[Any, ...], num_proposals: int) -> Callable[..., Any]:
    """The model with each tilted site chosen among its proposals."""
    if not isinstance(model, TiltedModel):
        raise TypeError(f"model must be what tilt() returns, got {type(model).__name__}")
    ancestors = model.structure(*batch).ancestors
    for site in model.energies:
        if ancestors[site]:
            raise ValueError(
                f"the sampling bound needs a site without random parents, but {site!r} has {sorted(ancestors[site])}; "
                "use pyro.infer.Trace_ELBO(), for which log Z is estimated by running the model forward"
            )
    depth = model.structure(*batch).max_plate_nesting
    return functools.partial(_run_sampled, model, num_proposals, depth)


def _run_sampled(model: TiltedModel, num_proposals: int, depth: int, *args: Any, **kwargs: Any) -> Any:
    with _ProposalMessenger(model.energies, num_proposals, depth):
        return model.base_model(*args, **kwargs)


class _ProposalMessenger(Messenger):
    """Adds ``-E(v) - log mean`` right after each tilted site, the mean over the value's and the proposals' weights."""

    def __init__(self, energies: Mapping[str, Energy], num_proposals: int, depth: int) -> None:
        super().__init__()
        self.energies, self.num_proposals, self.depth = energies, num_proposals, depth

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.energies:
            energy = self.energies[name]
            log_weight = -checked_energy(energy, msg["value"], event_dim_of(msg), f"site {name!r}")
            others = _proposed(msg["fn"], energy, self.num_proposals - 1, self.depth, name).to(log_weight)
            total = torch.logaddexp(log_weight, others) - math.log(self.num_proposals)
            pyro.factor(f"{name}_tilt", log_weight - total)


def _proposed(base: Distribution, energy: Energy, num: int, depth: int, name: str) -> Tensor:
    """``log sum exp(-E)`` over ``num`` fresh draws of the base, of a shape that broadcasts with (*batch).

    One set of draws for all data, and several for the rows of an outer plate of particles.
    """
    if enumerated(base) is not None:
        raise ValueError(
            f"the sampling bound draws proposals, but the values of site {name!r} can be listed and its log Z summed "
            "exactly; use pyro.infer.Trace_ELBO()"
        )
    if num == 0:
        return torch.tensor(-math.inf)
    particles = base.batch_shape[0] if len(base.batch_shape) == depth + 1 else 1
    sets = min(particles, max(1, _POOL // num)) if is_exchangeable(base) else 1
    # A Normalizer has at least two draws.
    settings = Normalizer(num_samples=max(num * sets, 2))
    log_weights = site_log_weights(base, energy, settings, name=f"site {name!r}")[: num * sets]
    if sets == 1:
        return log_weights.logsumexp(0)
    sums = log_weights.reshape(num, sets).logsumexp(0)
    return sums[torch.arange(particles, device=sums.device) % sets].reshape(-1, *[1] * depth)
