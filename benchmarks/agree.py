"""Do the Pyro model, the plain torch density and the JAX density of a target say the same? Refuses to go on if not."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from benchmarks.targets import Target
from pyro_ebm import LogDensity

TOLERANCE = 1e-4  # relative to 1 + |value|, in single precision


def disagreement(target: Target, *, num: int = 64) -> float:
    """The largest relative difference in log density or gradient at points from the prior, over all pairs.

    Raises:
        ValueError: it is above 1e-4.
    """
    u = target.start(num, np.random.default_rng(3))
    versions = {"plain torch": _torch(target.log_prob, u), "pyro": _pyro(target, u)}
    if has_jax():
        versions["jax"] = _jax(target, u)
    value, grad = versions["plain torch"]
    worst = 0.0
    for name, (other_value, other_grad) in versions.items():
        value_error = float((np.abs(other_value - value) / (1 + np.abs(value))).max())
        grad_error = float((np.abs(other_grad - grad) / (1 + np.abs(grad).max(-1, keepdims=True))).max())
        if not max(value_error, grad_error) < TOLERANCE:
            raise ValueError(
                f"{target.name}: the {name} density differs from the plain torch one by {value_error:.2g} and its "
                f"gradient by {grad_error:.2g} (relative); at most {TOLERANCE:g} is allowed. Nothing is compared."
            )
        worst = max(worst, value_error, grad_error)
    return worst


def has_jax() -> bool:
    return importlib.util.find_spec("jax") is not None


def _torch(log_prob: Any, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value, grad = LogDensity(log_prob, u.shape[-1]).value_and_grad(torch.from_numpy(u))
    return value.numpy(), grad.numpy()


def _pyro(target: Target, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    density = LogDensity.from_model(target.model, *target.args)
    value, grad = density.value_and_grad(torch.from_numpy(u))
    return value.numpy(), grad.numpy()


def _jax(target: Target, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import jax

    from benchmarks.targets_jax import log_density

    value, grad = jax.vmap(jax.value_and_grad(log_density(target)))(u)
    return np.asarray(value), np.asarray(grad)
