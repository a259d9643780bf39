r"""The distribution of a VAE's data, tilted or not, z integrated out by draws of the encoder in the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, biject_to

from pyro_ebm.annotations import checked
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.estimates import log_mean_exp
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.tilts.normalizer import checked_energy

__all__ = ["marginal_density"]


@checked
def marginal_density(
    vae: Any,
    energy: Energy | Callable[[Tensor], Tensor] | None = None,
    *,
    num_particles: int = 8,
) -> LogDensity:
    r"""``p(x) ~ exp(-E(x)) p_vae(x)`` for samplers that move ``x`` guided by the importance-weighted ELBO.

    .. math:: \log p(x, \epsilon) = \log \tfrac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k \mid x)} - E(x)
              + \log N(\epsilon; 0, I), \qquad z_k = \mu(x) + \sigma(x) \epsilon_k

    The encoder's noise is part of the state. The average in the first term is an unbiased estimate of
    ``p_vae(x)``, so that the distribution of ``x`` under this joint density is the tilted one **for every K and every
    encoder**, and a sampler that is exact (HMC, ChEES, MALA) has no bias; a better encoder or a larger K only
    makes it mix faster. Langevin that draws new noise at each step and follows the gradient of the ELBO samples
    ``exp(ELBO(x) - E(x))`` instead, too seldom where the encoder is poor: by the factor
    ``exp(-KL(q(z|x) || p(z|x)))``.

    Args:
        vae: has ``prior``, ``encode(x)``, a diagonal normal, and ``decode(z)``, of continuous data.
        energy: (*batch, *event) -> (*batch,), or None for the VAE itself.
        num_particles: K.

    Returns:
        A density of sites ``"x"``, (*event), and ``"noise"``, (K, latent_dim), for ``MCMC(ChEES(density), ...)``.
        Start it with ``init={"x": vae.model(num_data=n), "noise": torch.randn(n, K, latent_dim)}``.

    Raises:
        TypeError: an encoder that is not a diagonal normal.
        ValueError: discrete data; ``num_particles`` below 1.

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders; Alenlöv, Doucet, Lindsten (2021),
        Pseudo-Marginal Hamiltonian Monte Carlo.

    Example:
        >>> import torch
        >>> from pyro_ebm import LinearEnergy, VAE
        >>> vae = VAE((3,), latent_dim=2, likelihood="gaussian", hidden=(8,))
        >>> density = marginal_density(vae, LinearEnergy([1.0, 0.0, 0.0]), num_particles=4)
        >>> density.dim, density(torch.zeros(5, 11)).shape
        (11, torch.Size([5]))
    """
    lacking = [name for name in ("prior", "encode", "decode") if not hasattr(vae, name)]
    if lacking:
        raise TypeError(f"vae must have prior, encode and decode, as VAE has; {type(vae).__name__} lacks {lacking}")
    target = _Marginal(vae, None if energy is None else as_energy(energy), num_particles)
    return LogDensity(
        target.log_prob, target.dim, constrain=target.constrain, unconstrain=target.unconstrain, like=target.like
    )


class _Marginal:
    """A VAE as a function of one flat vector, data first and noise after it."""

    @torch.no_grad()
    def __init__(self, vae: Any, energy: Energy | None, num_particles: int) -> None:
        self.vae, self.energy = vae, energy
        self.like = vae.prior.sample()
        likelihood = vae.decode(self.like)
        support = likelihood.support
        if support.is_discrete:
            raise ValueError(
                f"data of the {type(getattr(likelihood, 'base_dist', likelihood)).__name__} likelihood are "
                f"discrete and have no gradient; use a continuous likelihood (\"gaussian\", "
                f"\"continuous_bernoulli\"), importance sampling, or an energy of the decoded mean at site 'z'"
            )
        self.event_shape, self.transform = likelihood.event_shape, biject_to(support)
        self.noise_shape = torch.Size([num_particles, *self.like.shape])
        self.num_pixels = self.event_shape.numel()
        self.dim = self.num_pixels + self.noise_shape.numel()
        _encoded(vae, self.transform(torch.zeros(self.event_shape).to(self.like)))

    def log_prob(self, u: Tensor) -> Tensor:
        free, noise = self._split(u)
        x = self.transform(free)
        log_jacobian = self.transform.log_abs_det_jacobian(free, x)
        log_jacobian = log_jacobian.reshape(*u.shape[:-1], -1).sum(-1)
        with evaluation_mode(self.vae):
            loc, scale = (parameter.unsqueeze(-2) for parameter in _encoded(self.vae, x))
            z = loc + scale * noise
            log_q = (-0.5 * noise**2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
            # Points come in batches of any shape: the particles lie right of them, left of an event.
            log_x = self.vae.decode(z).log_prob(x.unsqueeze(-len(self.event_shape) - 1))
            log_p = log_mean_exp(log_x + self.vae.prior.log_prob(z) - log_q, -1)
        log_noise = (-0.5 * noise**2 - 0.5 * math.log(2 * math.pi)).sum((-2, -1))
        if self.energy is not None:
            log_p = log_p - checked_energy(self.energy, x, len(self.event_shape), "site 'x'")
        return log_p + log_noise + log_jacobian

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        free, noise = u.split([self.num_pixels, self.dim - self.num_pixels], -1)
        lead = u.shape[:-1]
        return free.reshape(lead + self.event_shape), noise.reshape(lead + self.noise_shape)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        free, noise = self._split(u)
        return {"x": self.transform(free), "noise": noise}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        shapes = {"x": self.event_shape, "noise": self.noise_shape}
        for name, shape in shapes.items():
            if name not in values or values[name].shape[1:] != shape:
                got = tuple(values[name].shape) if name in values else "nothing"
                raise ValueError(f"values[{name!r}] must have shape (*chains, {tuple(shape)}), got {got}")
        free = self.transform.inv(values["x"]).flatten(1)
        return torch.cat([free, values["noise"].flatten(1)], -1)


def _encoded(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of q(z | x)."""
    q = vae.encode(x)
    inner = q.base_dist if isinstance(q, Independent) else q
    if not isinstance(inner, Normal):
        raise TypeError(f"vae.encode(x) must return a diagonal normal, got {type(inner).__name__}")
    return inner.loc, inner.scale
