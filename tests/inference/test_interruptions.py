"""Ctrl-C returns what was done, with a warning; where there are no draws yet it says so."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    HMC,
    MCMC,
    SMC,
    InferenceWarning,
    LogDensity,
    annealed_importance,
    importance,
    log_normalizer,
    predictive,
    sample,
)
from pyro_ebm.deadline import interruptions_pass


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
        (lambda model: annealed_importance(model, chains_per_group=8, progress=False), (6,)),
    ],
)
def test_an_interruption_before_the_draws_is_told(call, runs):
    for after in runs:
        told = "interrupted before .*there (are no draws|is nothing to return) yet"
        with pytest.raises(KeyboardInterrupt, match=told):
            call(stopping(after))


def slow(u):
    """Not to be captured: each evaluation runs this."""
    assert float(u.detach().flatten()[0]) < 1e9
    return -0.5 * ((u - 3.0) ** 2).sum(-1)


def one_by_one():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0] if z[1] > 0 else z[0] + 0.5, 1.0), obs=torch.tensor(1.0))


def energy(z):
    assert float(z.detach().flatten()[0]) < 1e9
    return -3.0 * z.sum(-1)


SMALL = {"particles_per_island": 64, "num_islands": 4, "progress": False, "seed": 0}
AIS = {"chains_per_group": 16, "num_groups": 4, "progress": False, "seed": 0}
LONG = {
    "importance": lambda: importance(one_by_one, num_samples=500, seed=0),
    "snis": lambda: sample(one_by_one, method="snis", num_samples=500, seed=0),
    "predictive": lambda: SimpleNamespace(value=predictive(one_by_one, num_samples=500, seed=0)["y"]),
    "predictive of draws": lambda: SimpleNamespace(
        value=predictive(one_by_one, draws={"z": torch.zeros(500, 2)}, num_samples=500, seed=0)["y"]
    ),
    "auto": lambda: sample(one_by_one, seed=0, progress=False),
    "smc": lambda: SMC(LogDensity(slow, 2), **SMALL).run(),
    "ais": lambda: annealed_importance(LogDensity(slow, 2), **AIS),
    "log_normalizer by smc": lambda: log_normalizer(BASE, energy, method="smc", num_samples=512, seed=0),
    "log_normalizer by ais": lambda: log_normalizer(BASE, energy, method="ais", num_samples=256, seed=0),
}
BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def stop_in_the_middle(name, monkeypatch):
    runs_models = name in ("importance", "snis", "auto", "predictive", "predictive of draws")
    where = "structure.batched" if runs_models else "inference.density.capture"
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == (110 if runs_models else 25):
            raise KeyboardInterrupt

    monkeypatch.setattr(f"pyro_ebm.{where}.check_time", stop)
    return calls


@pytest.mark.parametrize("name", LONG)
def test_within_a_larger_whole_nothing_half_done_is_kept(name, monkeypatch):
    """A study, a job or a fit does not go on with the half of what it asked for."""
    calls = stop_in_the_middle(name, monkeypatch)
    with interruptions_pass(), pytest.raises(KeyboardInterrupt):
        LONG[name]()
    assert len(calls) >= 25


@pytest.mark.parametrize("name", LONG)
def test_what_was_done_is_returned(name, monkeypatch):
    """Ctrl-C in the middle, as the model or its density runs."""
    calls = stop_in_the_middle(name, monkeypatch)
    with pytest.warns(InferenceWarning, match="interrupted"):
        found = LONG[name]()
    values = found.values.values() if hasattr(found, "values") else (found.value,)
    assert all(bool(value.isfinite().all()) for value in values) and len(calls) > 20


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_ctrl_c_while_starting_points_are_sought(method):
    """Draws so far of an importance sampler are no draws of these chains: they do not begin."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        runs.append(float(z))  # read: one run after another
        if len(runs) == 60:
            raise KeyboardInterrupt
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    runs: list[float] = []
    with pytest.raises(KeyboardInterrupt, match="there are no draws yet"):
        sample(model, method=method, num_samples=20, num_chains=2, seed=0, progress=False)
    assert len(runs) == 60
