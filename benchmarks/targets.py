"""The seven targets: each as a Pyro model, as a plain torch log density, and as arrays for JAX (``targets_jax.py``).

A point u is a flat vector in unconstrained space, the model's sites one after another in the order the model runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.weights import networks, trained
from pyro_ebm import VAE, LogDensity, tilt
from pyro_ebm.inference.chains.starts import chain_starts

NAMES = (
    "tilted_prior_2d", "tilted_prior_32d", "posterior_1", "posterior_100",
    "gaussian_10d", "eight_schools", "logistic_25",
)  # fmt: skip
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Target:
    """One density to sample.

    Args:
        name: as in ``NAMES``.
        dim: length of u.
        model: a Pyro model of it.
        args: the model's arguments.
        log_prob: the same density in plain torch, (*batch, dim) -> (*batch,).
        arrays: data and weights, from which ``targets_jax.py`` builds it a third time.
        start: (num, generator) -> points (num, dim), where every sampler starts: draws of the prior, or of the encoder.
        sites: site -> shape of its value, in the order of u.
        positive: the entries of u that are logarithms of what the model calls them.
        guide: proposes latent values given the model's arguments, where there is a good one.
        independent: name of the plate whose elements are separate targets, and how many there are.
    """

    name: str
    dim: int
    model: Callable[..., Any]
    args: tuple[Any, ...]
    log_prob: Callable[[Tensor], Tensor]
    arrays: dict[str, np.ndarray]
    start: Callable[[int, np.random.Generator], np.ndarray]
    sites: dict[str, tuple[int, ...]]
    positive: tuple[int, ...] = ()
    guide: Callable[..., Any] | None = None
    independent: tuple[str, int] | None = None

    def constrain(self, u: np.ndarray) -> np.ndarray:
        """Points (..., dim) as the values that are measured."""
        values = np.array(u, dtype=np.float64)
        for index in self.positive:
            values[..., index] = np.exp(values[..., index])
        return values


def load(name: str) -> Target:
    """One target by name; trains its networks if the cache does not have them."""
    if name.startswith("tilted_prior_"):
        return tilted_prior(int(name.removeprefix("tilted_prior_").removesuffix("d")))
    if name.startswith("posterior_"):
        return posterior(int(name.removeprefix("posterior_")))
    if name.startswith("gaussian_"):
        return gaussian(int(name.removeprefix("gaussian_").removesuffix("d")))
    if name == "eight_schools":
        return eight_schools()
    if name == "logistic_25":
        return logistic()
    raise ValueError(f"name must be one of {NAMES} (or another size of gaussian_ or posterior_), got {name!r}")


def _normal_start(dim: int) -> Callable[[int, np.random.Generator], np.ndarray]:
    return lambda num, generator: generator.standard_normal((num, dim)).astype(np.float32)


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * _LOG_2PI)


def tilted_prior(dim: int) -> Target:
    """N(0, I) tilted by the learned energy of a VAE's latent space."""
    arrays = trained(dim)
    vae, energy = networks(arrays, dim)

    def prior() -> Tensor:
        return pyro.sample("z", vae.prior)

    def log_prob(z: Tensor) -> Tensor:
        return _standard_normal(z) - energy.net(z).squeeze(-1)

    kept = {k: v for k, v in arrays.items() if k.startswith("energy.")}
    model = tilt(prior, {"z": energy}, normalize=False)
    return Target(f"tilted_prior_{dim}d", dim, model, (), log_prob, kept, _normal_start(dim), {"z": (dim,)})


def posterior(num_images: int, *, first: int = 0, latent_dim: int = 2) -> Target:
    """The tilted posteriors of some test images as one density; of one image for ``num_images=1``."""
    arrays = trained(latent_dim)
    vae, energy = networks(arrays, latent_dim)
    # More images than the test set has: the same ones again.
    x = torch.from_numpy(np.resize(arrays["images"], (first + num_images, 1, 8, 8))[first:].copy())
    flat, decoder = x.reshape(num_images, 64), _sequential(vae)

    def log_prob(u: Tensor) -> Tensor:
        z = u.reshape(*u.shape[:-1], num_images, latent_dim)
        logits = decoder(z)
        fits = -F.binary_cross_entropy_with_logits(logits, flat.expand_as(logits), reduction="none").sum(-1)
        return (_standard_normal(z) - energy.net(z).squeeze(-1) + fits).sum(-1)

    kept = {k: v for k, v in arrays.items() if k.startswith(("energy.", "vae.decoder."))} | {"x": flat.numpy()}
    model = tilt(vae.model, {"z": energy}, normalize=False)
    dim = num_images * latent_dim

    def start(num: int, generator: np.random.Generator) -> np.ndarray:
        """Resampled draws of the encoder: from the prior, chains end in modes that hold next to nothing."""
        density = LogDensity.from_model(model, x, independent="data")
        points, _ = chain_starts(density, num, guide=vae.guide, seed=int(generator.integers(2**31)))
        return points.reshape(num, dim).numpy()

    return Target(
        f"posterior_{num_images}", dim, model, (x,), log_prob, kept, start,
        {"z": (num_images, latent_dim)}, guide=vae.guide, independent=("data", num_images),
    )  # fmt: skip


def _sequential(vae: VAE) -> nn.Module:
    return vae.decoder.layers  # type: ignore[return-value]


def gaussian(dim: int, condition: float = 100.0) -> Target:
    """A Gaussian whose variances run from 1 to ``condition`` along axes that are rotated at random."""
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.standard_normal((dim, dim)))
    variances = np.logspace(0, np.log10(condition), dim)
    covariance = (rotation * variances) @ rotation.T
    precision = torch.tensor((rotation / variances) @ rotation.T, dtype=torch.float32)
    constant = 0.5 * (dim * _LOG_2PI + float(np.log(variances).sum()))
    law = dist.MultivariateNormal(torch.zeros(dim), precision_matrix=precision, validate_args=False)

    def model() -> Tensor:
        return pyro.sample("u", law)

    def log_prob(u: Tensor) -> Tensor:
        return -0.5 * ((u @ precision) * u).sum(-1) - constant

    def start(num: int, generator: np.random.Generator) -> np.ndarray:
        return (generator.standard_normal((num, dim)) * 10).astype(np.float32)  # wider than the target

    arrays = {"precision": precision.numpy(), "constant": np.float32(constant), "covariance": covariance}
    return Target(f"gaussian_{dim}d", dim, model, (), log_prob, arrays, start, {"u": (dim,)})


EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)


def eight_schools() -> Target:
    """Rubin's (1981) eight schools, non-centered: mu, tau and eight standardized effects."""
    y, sigma = torch.from_numpy(EFFECTS), torch.from_numpy(ERRORS)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8, dim=-1):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def log_prob(u: Tensor) -> Tensor:
        mu, log_tau, eta = u[..., 0], u[..., 1], u[..., 2:]
        prior = -0.5 * (mu / 5) ** 2 - math.log(5) - 0.5 * _LOG_2PI + _standard_normal(eta)
        # the density of tau on (0, inf), and the Jacobian of its logarithm
        prior = prior + math.log(2 / (5 * math.pi)) - torch.log1p((log_tau.exp() / 5) ** 2) + log_tau
        z = (y - mu[..., None] - log_tau.exp()[..., None] * eta) / sigma
        return prior + _standard_normal(z) - sigma.log().sum()

    def start(num: int, generator: np.random.Generator) -> np.ndarray:
        mu = 5 * generator.standard_normal((num, 1))
        tau = 5 * np.abs(np.tan(np.pi / 2 * generator.uniform(0.02, 0.98, (num, 1))))
        return np.hstack([mu, np.log(tau), generator.standard_normal((num, 8))]).astype(np.float32)

    sites: dict[str, tuple[int, ...]] = {"mu": (), "tau": (), "eta": (8,)}
    arrays = {"y": EFFECTS, "sigma": ERRORS}
    return Target("eight_schools", 10, model, (y,), log_prob, arrays, start, sites, positive=(1,))


def logistic(num_data: int = 1000) -> Target:
    """Logistic regression on simulated data of the size of German credit: 24 correlated features, an intercept."""
    generator = np.random.default_rng(1)
    mixing = np.eye(24) + 0.3 * generator.standard_normal((24, 24)) / np.sqrt(24) + 0.2
    features = generator.standard_normal((num_data, 24)) @ mixing
    features = (features - features.mean(0)) / features.std(0)
    design = np.hstack([features, np.ones((num_data, 1))]).astype(np.float32)
    coefficients = generator.standard_normal(25) * 0.7
    chance = 1 / (1 + np.exp(-design @ coefficients))
    labels = (generator.uniform(size=num_data) < chance).astype(np.float32)
    x, y = torch.from_numpy(design), torch.from_numpy(labels)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(25), 1.0).to_event(1))
        with pyro.plate("data", num_data, dim=-1):
            logits = (x * beta).sum(-1) if beta.ndim == 1 else beta.squeeze(-2) @ x.T
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def log_prob(u: Tensor) -> Tensor:
        logits = u @ x.T
        return _standard_normal(u) + (logits @ y) - F.softplus(logits).sum(-1)

    arrays = {"x": design, "y": labels}
    return Target("logistic_25", 25, model, (x, y), log_prob, arrays, _normal_start(25), {"beta": (25,)})
