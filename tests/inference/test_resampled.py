"""Draws that weigh the same, in place of weighted ones."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm import Draws
from pyro_ebm.inference.resampled import resampled


def tilted_normal(slope, shape=(1, 2000), seed=0, **changes):
    """Draws of N(0, 1), weighted to N(slope, 1)."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logs = (slope * z).flatten().log_softmax(0).reshape(shape)
    options = {"method": "snis", "stats": {"lp": -z}, "log_weights": logs}
    return Draws({"z": z}, **{**options, **changes})


def test_as_many_as_the_weights_are_worth_in_four_chains(rng_untouched):
    draws = tilted_normal(0.5)
    with rng_untouched():
        found, rows, told = resampled(draws)
    ess = 1 / float(draws.weights.square().sum())
    assert found.num_chains == 4 and ess - 4 < 4 * found.num_draws <= ess and found.log_weights is None
    assert torch.equal(found.flat("z"), draws.flat("z")[rows]) and torch.equal(found.stats["lp"], -found.values["z"])
    assert set(found.stats) == {"lp"} and told.startswith(f"{len(rows)} draws, resampled from 2000 weighted ones")
    assert torch.equal(resampled(draws).rows, rows)  # the same ones each time
    assert not torch.equal(resampled(tilted_normal(0.5, seed=1)).rows, rows)
    assert resampled(draws, 30).draws.values["z"].shape == (1, 30)


def test_resampling_adds_little_error():
    """Beside the error of the weighted mean: half the variance of as many draws that are chosen one by one."""
    errors = []
    for seed in range(200):
        draws = tilted_normal(1.0, seed=seed)
        found = resampled(draws).draws
        errors.append((found.mean("z") - draws.mean("z")) / draws.std("z") * math.sqrt(4 * found.num_draws))
    assert 0.2 < float(torch.stack(errors).square().mean()) < 0.7  # 1 if chosen one by one


@pytest.mark.parametrize(
    ("draws", "num"),
    [
        (tilted_normal(5.0), 100),  # worth a few
        (tilted_normal(0.5, (1, 50)), 100),
        (tilted_normal(0.5, (1, 50), method="quadrature"), 4000),
        (tilted_normal(0.5, (4, 500)), None),
    ],
)
def test_how_many(draws, num):
    found = resampled(draws).draws
    assert found.num_chains == 4
    assert 4 * found.num_draws == num or (num is None and 1000 < 4 * found.num_draws < 2000)


def test_what_weighs_the_same_is_kept():
    chains = Draws({"z": torch.randn(2, 9)}, "nuts")
    assert resampled(chains) == (chains, None, "")
    particles = tilted_normal(0.0, (3, 7))
    found, rows, told = resampled(particles)
    assert rows is None and found.log_weights is None and "weigh the same" in told
    assert found.values["z"] is particles.values["z"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    draws = tilted_normal(0.0, log_weights=torch.full((1, 2000), value))
    for choose in (resampled, Draws.equally_weighted):
        with pytest.raises(ValueError, match=r"log_weights are NaN, infinite or all -inf: .* sample again"):
            choose(draws)
