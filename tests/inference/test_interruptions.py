"""Ctrl-C where there are no draws yet says so."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest

from pyro_ebm import HMC, MCMC, SMC, importance, sample


def stopping(after):
    """A model that is interrupted in one of its runs."""
    runs = []

    def model():
        runs.append(1)
        if len(runs) > after:
            raise KeyboardInterrupt
        pyro.sample("z", dist.Normal(0.0, 1.0))

    return model


@pytest.mark.parametrize(
    ("call", "runs"),
    [
        (lambda model: importance(model), (0, 4)),
        (lambda model: sample(model, method="snis"), (0, 4)),
        (lambda model: MCMC(HMC(model), 3, progress=False).run(), (0, 2)),
        (lambda model: SMC(model, particles_per_island=8, progress=False).run(), (6,)),
    ],
)
def test_an_interruption_before_the_draws_is_told(call, runs):
    for after in runs:
        with pytest.raises(KeyboardInterrupt, match="interrupted (before|at) .*there are no draws yet"):
            call(stopping(after))
