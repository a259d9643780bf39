"""The same densities in JAX, of one point u (dim,), from the arrays the torch ones use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.targets import Target

_LOG_2PI = math.log(2 * math.pi)


def log_density(target: Target) -> Callable[[Any], Any]:
    """``target.log_prob`` for one point u (dim,), in the precision JAX is set to."""
    arrays = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in target.arrays.items()}
    if target.name.startswith("tilted_prior_"):
        return _tilted_prior(arrays)
    if target.name.startswith("posterior_"):
        return _posterior(arrays)
    if target.name.startswith("gaussian_"):
        return lambda u: -0.5 * u @ arrays["precision"] @ u - arrays["constant"]
    return {"eight_schools": _eight_schools, "logistic_25": _logistic}[target.name](arrays)


def _standard_normal(z: Any) -> Any:
    return -0.5 * (jnp.sum(z**2, -1) + z.shape[-1] * _LOG_2PI)


def _mlp(arrays: dict[str, Any], prefix: str) -> Callable[[Any], Any]:
    """A Sequential of torch's Linear and SiLU layers, whose linear ones have even numbers."""
    layers = [(arrays[f"{prefix}.{i}.weight"].T, arrays[f"{prefix}.{i}.bias"]) for i in (0, 2, 4)]

    def apply(value: Any) -> Any:
        for weight, bias in layers[:-1]:
            value = jax.nn.silu(value @ weight + bias)
        weight, bias = layers[-1]
        return value @ weight + bias

    return apply


def _tilted_prior(arrays: dict[str, Any]) -> Callable[[Any], Any]:
    energy = _mlp(arrays, "energy.net")
    return lambda z: _standard_normal(z) - energy(z)[..., 0]


def _posterior(arrays: dict[str, Any]) -> Callable[[Any], Any]:
    tilted, decoder, x = _tilted_prior(arrays), _mlp(arrays, "vae.decoder.layers"), arrays["x"]

    def log_prob(u: Any) -> Any:
        z = u.reshape(len(x), -1)
        logits = decoder(z)
        return jnp.sum(tilted(z)) + jnp.sum(logits * x - jax.nn.softplus(logits))

    return log_prob


def _eight_schools(arrays: dict[str, Any]) -> Callable[[Any], Any]:
    y, sigma = arrays["y"], arrays["sigma"]

    def log_prob(u: Any) -> Any:
        mu, log_tau, eta = u[0], u[1], u[2:]
        prior = -0.5 * (mu / 5) ** 2 - math.log(5) - 0.5 * _LOG_2PI + _standard_normal(eta)
        prior += math.log(2 / (5 * math.pi)) - jnp.log1p((jnp.exp(log_tau) / 5) ** 2) + log_tau
        return prior + _standard_normal((y - mu - jnp.exp(log_tau) * eta) / sigma) - jnp.sum(jnp.log(sigma))

    return log_prob


def _logistic(arrays: dict[str, Any]) -> Callable[[Any], Any]:
    x, y = arrays["x"], arrays["y"]

    def log_prob(u: Any) -> Any:
        logits = x @ u
        return _standard_normal(u) + logits @ y - jnp.sum(jax.nn.softplus(logits))

    return log_prob
