"""The truth of each target: exact, by quadrature, importance sampling or a long run; kept in ``cache/``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Reference
from benchmarks.targets import Target, posterior
from benchmarks.weights import CACHE, checksum
from pyro_ebm import LogDensity, quadrature
from pyro_ebm.arviz_statistics import psis
from pyro_ebm.chain_statistics import ess_bulk, mcse_mean, r_hat

CHAINS, WARMUP, DRAWS = 64, 1_000, 2_000


def reference(target: Target, *, folder: Path = CACHE) -> Reference:
    """Compute it, or read it from the cache."""
    file = folder / f"reference_{target.name}_{checksum(target.arrays)}.npz"
    if not file.exists():
        found = _compute(target)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{k: np.asarray(v) for k, v in vars(found).items()})
    with np.load(file) as stored:
        return Reference(str(stored["kind"]), *(stored[k] for k in list(Reference.__dataclass_fields__)[1:]))


def _compute(target: Target) -> Reference:
    if target.name.startswith("gaussian_"):
        zeros = np.zeros(target.dim)
        return Reference("exact", zeros, np.diag(target.arrays["covariance"]).copy(), zeros, zeros)
    if target.name.startswith("posterior_"):
        return _join([_grid(posterior(1, first=i)) for i in range(target.dim // 2)])
    if target.name.startswith("logistic_"):
        return _laplace(target)
    return _grid(target) if target.dim <= 2 else _long_run(target)


def _grid(target: Target) -> Reference:
    found = quadrature(target.model, *target.args)
    values = found.flat("z").double().reshape(-1, target.dim).numpy()
    weights = found.weights.double().numpy()
    mean = weights @ values
    zeros = np.zeros(target.dim)
    return Reference("quadrature", mean, weights @ (values - mean) ** 2, zeros, zeros)


def _join(parts: list[Reference]) -> Reference:
    names = list(Reference.__dataclass_fields__)[1:]
    return Reference(parts[0].kind, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _laplace(target: Target, *, num: int = 400_000) -> Reference:
    """Importance sampling from the Gaussian at the mode of a log-concave density, a fifth wider than its curvature."""
    mode = torch.zeros(target.dim)
    for _ in range(20):
        _, gradient = LogDensity(target.log_prob, target.dim).value_and_grad(mode)
        precision = -torch.autograd.functional.hessian(target.log_prob, mode)
        mode = mode + torch.linalg.solve(precision, gradient)
    law = torch.distributions.MultivariateNormal(mode, precision_matrix=precision / 1.2**2)
    noise = torch.randn((num, target.dim), generator=torch.Generator().manual_seed(17))
    u = law.loc + noise @ law.scale_tril.T
    with torch.no_grad():
        logs = torch.cat([target.log_prob(part) - law.log_prob(part) for part in u.split(20_000)]).double()
    weights, values = logs.softmax(0).numpy(), u.double().numpy()
    effective, k = 1 / float(np.square(weights).sum()), psis(logs)[1]
    if not (effective > 20_000 and k < 0.5):
        raise RuntimeError(f"{target.name}: the reference weights have an ESS of {effective:.0f} and k {k:.2f}")
    mean = weights @ values
    squared = (values - mean) ** 2
    variance = weights @ squared
    ses = [np.sqrt(weights**2 @ (x - m) ** 2) for x, m in ((values, mean), (squared, variance))]
    return Reference(f"importance sampling from a Laplace approximation, ESS {effective:,.0f}", mean, variance, *ses)


def _long_run(target: Target) -> Reference:
    """NumPyro's NUTS in double precision, checked; called in a process of its own, because x64 is for all of JAX."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from benchmarks.peers_jax import numpyro_nuts

    start = target.start(CHAINS, np.random.default_rng(17)).astype(np.float64)
    run = numpyro_nuts(target, start, warmup=WARMUP, draws=DRAWS, seed=17, target_accept=0.9)
    worst, smallest = float(r_hat(run.values).max()), float(ess_bulk(run.values).min())
    if not (worst < 1.005 and smallest > 20_000):
        raise RuntimeError(f"{target.name}: the reference run has R-hat {worst:.3f} and ESS {smallest:.0f}")
    mean = run.values.mean((0, 1))
    squared = (run.values - mean) ** 2
    kind = f"NumPyro NUTS in double precision, {CHAINS} x {DRAWS} draws, ESS {smallest:,.0f}"
    return Reference(kind, mean, squared.mean((0, 1)), mcse_mean(run.values), mcse_mean(squared))
