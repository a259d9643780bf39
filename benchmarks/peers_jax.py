"""NumPyro's vectorized NUTS and blackjax's ChEES-HMC; both compiled by XLA, on its own threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.infer
import optax
from blackjax.adaptation.base import get_filter_adapt_info_fn

from benchmarks.measure import Run
from benchmarks.targets import Target
from benchmarks.targets_jax import log_density

jax.devices()  # starts XLA's runtime, as an import would


def numpyro_nuts(
    target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int, target_accept: float = 0.8
) -> Run:
    """All chains in one compiled program, ``chain_method="vectorized"``; everything else at its default."""
    begin = time.perf_counter()
    log_prob = log_density(target)
    kernel = numpyro.infer.NUTS(potential_fn=lambda u: -log_prob(u), target_accept_prob=target_accept)
    mcmc = numpyro.infer.MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=len(start), chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    key = jax.random.PRNGKey(seed)
    mcmc.warmup(key, init_params=jnp.asarray(start))
    mcmc.run(key, extra_fields=("num_steps",))
    u = np.asarray(mcmc.get_samples(group_by_chain=True))
    steps = float(np.asarray(mcmc.get_extra_fields()["num_steps"], np.float64).sum())
    seconds = time.perf_counter() - begin
    # The same draws once more, now compiled: the draws alone.
    begin = time.perf_counter()
    mcmc.run(key, extra_fields=("num_steps",))
    np.asarray(mcmc.get_samples(group_by_chain=True))
    return Run(target.constrain(u), seconds, time.perf_counter() - begin, steps, warmup)


def blackjax_chees(
    target: Target, start: np.ndarray, *, warmup: int, draws: int, seed: int,
    learning_rate: float = 0.05, mass: str | None = "diagonal",
) -> Run:  # fmt: skip
    """ChEES adaptation over all chains, then its jittered HMC, each phase one compiled program."""
    begin = time.perf_counter()
    log_prob, num_chains = log_density(target), len(start)
    adaptation = blackjax.chees_adaptation(
        log_prob, num_chains, adaptation_info_fn=get_filter_adapt_info_fn(), mass_matrix_estimation=mass
    )
    optimizer = optax.adam(learning_rate)
    functions: dict[str, Any] = {}

    @jax.jit
    def warm(key: Any, positions: Any) -> Any:
        (states, parameters), _ = adaptation.run(key, positions, 0.1, optimizer, warmup, max_sampling_steps=draws)
        # What draws the number of steps is a function, not data: kept aside while this is being traced.
        functions.update({k: v for k, v in parameters.items() if callable(v)})
        return states, {k: v for k, v in parameters.items() if not callable(v)}

    key, warm_key = jax.random.split(jax.random.PRNGKey(seed))
    states, parameters = jax.block_until_ready(warm(warm_key, jnp.asarray(start)))

    def sample(key: Any, states: Any, parameters: Any) -> Any:
        step = jax.vmap(blackjax.dynamic_hmc(log_prob, **parameters, **functions).step)

        def one(states: Any, key: Any) -> Any:
            states, info = step(jax.random.split(key, num_chains), states)
            return states, (states.position, info.num_integration_steps.sum())

        return jax.lax.scan(one, states, jax.random.split(key, draws))[1]

    compiled = jax.jit(sample).lower(key, states, parameters).compile()
    began = time.perf_counter()
    positions, steps = jax.block_until_ready(compiled(key, states, parameters))
    u = np.asarray(positions).swapaxes(0, 1)
    end = time.perf_counter()
    tuned = {k: np.asarray(v).tolist() for k, v in parameters.items() if k == "step_size"}
    notes = {"steps per draw": float(np.asarray(steps, np.float64).mean() / num_chains), **tuned}
    total = float(np.asarray(steps, np.float64).sum())
    return Run(target.constrain(u), end - begin, end - began, total, warmup, notes=notes)


def blackjax_hmc_cost(target: Target, start: np.ndarray, *, step_size: float, steps: int, draws: int) -> float:
    """Seconds per draw of all chains, HMC with a fixed number of steps, compiled, without warm-up."""
    log_prob, num_chains = log_density(target), len(start)
    kernel = blackjax.hmc(
        log_prob, step_size=step_size, inverse_mass_matrix=jnp.ones(target.dim), num_integration_steps=steps
    )

    @jax.jit
    def sample(key: Any, positions: Any) -> Any:
        def one(states: Any, key: Any) -> Any:
            states, _ = jax.vmap(kernel.step)(jax.random.split(key, num_chains), states)
            return states, states.position

        return jax.lax.scan(one, jax.vmap(kernel.init)(positions), jax.random.split(key, draws))[1]

    def run() -> None:
        np.asarray(sample(jax.random.PRNGKey(0), jnp.asarray(start)))

    run()
    return min(_timed(run) for _ in range(3)) / draws


def _timed(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
