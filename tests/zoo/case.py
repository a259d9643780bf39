"""What a model of the zoo is: how it is called, what is known about it, in which ways it is run many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.structure import latent_sites, prototype_trace

Answers = Mapping[str, tuple[Any, Any]]
PLATE, VMAP, LOOP = ("plate", "vmap", "loop"), ("vmap", "loop"), ("loop",)


@dataclass(frozen=True)
class Case:
    """One way in which users write a model.

    Args:
        name: unique.
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        answers: site -> exact posterior mean and standard deviation, numbers or tensors of the site's shape.
        ways: those in which many runs give the log probabilities that each has alone.
        draws: those in which many runs can also draw the sites; ``ways`` where None.
        prior_reaches: whether importance sampling from the prior meets the answers.
        has_density: whether the latent sites have a density that a sampler on unconstrained space can follow.
        fills_param_store: whether a call leaves parameters in Pyro's store.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    ways: tuple[str, ...] = PLATE
    draws: tuple[str, ...] | None = None
    prior_reaches: bool = True
    has_density: bool = True
    fills_param_store: bool = False

    def __str__(self) -> str:
        return self.name


def kinds(case: Case) -> tuple[int, int]:
    """How many latent sites are continuous, how many discrete."""
    trace = prototype_trace(case.model, case.args, case.kwargs)
    discrete = [site["fn"].support.is_discrete for site in latent_sites(trace).values()]
    return len(discrete) - sum(discrete), sum(discrete)


def prior_runs(case: Case, num: int) -> list[dict[str, Tensor]]:
    """Latent values of so many runs of the model, one after another, as a user runs it."""
    with pyro.validation_enabled(False), torch.no_grad():
        traces = [poutine.trace(case.model).get_trace(*case.args, **case.kwargs) for _ in range(num)]
    return [{name: site["value"] for name, site in latent_sites(trace).items()} for trace in traces]


def registry() -> tuple[list[Case], Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    """An empty list of cases, and a decorator of models that fills it."""
    cases: list[Case] = []

    def case(*args: Any, name: str | None = None, **facts: Any) -> Callable[..., Any]:
        def register(model: Callable[..., Any]) -> Callable[..., Any]:
            cases.append(Case(name or model.__name__, model, args, **facts))
            return model

        return register

    return cases, case


def grid(log_joint: Callable[..., Tensor], **axes: tuple[float, float]) -> Answers:
    """Mean and standard deviation of each coordinate of a density in one to three dimensions.

    Args:
        log_joint: unnormalized log density of the coordinates, tensors that broadcast, in the order of ``axes``.
        **axes: coordinate -> its lower and upper end; the density is negligible outside.
    """
    size = {1: 20_001, 2: 801, 3: 121}[len(axes)]
    lines = [torch.linspace(low, high, size, dtype=torch.float64) for low, high in axes.values()]
    points = torch.meshgrid(*lines, indexing="ij")
    weights = log_joint(*points).flatten().softmax(0)
    found = {}
    for name, point in zip(axes, points, strict=True):
        mean = float(weights @ point.flatten())
        found[name] = (mean, float(weights @ (point.flatten() - mean) ** 2) ** 0.5)
    return found


def gaussian(prior: Tensor, design: Tensor, noise: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and sd of ``w ~ N(0, prior)`` given ``y ~ N(design w, noise^2 I)``.

    Args:
        prior: (d, d) covariance.
        design: (n, d).
        noise: standard deviation.
        y: (n,).
    """
    prior, design, y = prior.double(), design.double(), y.double()
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + design.T @ design / noise**2)
    return covariance @ design.T @ y / noise**2, covariance.diagonal().sqrt()


def normal_mean(y: Tensor, prior_sd: float = 1.0, noise: float = 1.0) -> tuple[float, float]:
    """Posterior of ``z ~ N(0, prior_sd^2)`` given data ``y ~ N(z, noise^2)``."""
    precision = prior_sd**-2 + y.numel() / noise**2
    return float(y.double().sum()) / noise**2 / precision, precision**-0.5


def of_gamma(shape: float, rate: float) -> tuple[float, float]:
    """Mean and standard deviation of a gamma distribution."""
    return shape / rate, shape**0.5 / rate


def of_beta(a: float, b: float) -> tuple[float, float]:
    """Mean and standard deviation of a beta distribution."""
    return a / (a + b), (a * b / (a + b) ** 2 / (a + b + 1)) ** 0.5


def of_enumeration(values: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of discrete values (states, *shape) under log weights (states,)."""
    weights = log_joint.double().softmax(0).reshape(-1, *([1] * (values.ndim - 1)))
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean) ** 2).sum(0).sqrt()
