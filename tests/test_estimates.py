"""What estimates are worth: against exact numbers, and against what repetitions show."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm import Draws, compare
from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.estimates import weighted_ess
from pyro_ebm.inference.importance import LogLikelihood
from pyro_ebm.recipes.result import likelihood_numbers

NUM = 200_000


def linear(num, a, seed=0):
    """Draws (num, 2) of N(0, I), and weights of the tilt by ``a`` along the first axis."""
    z = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, (a * z[:, 0]).softmax(0)


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_kishs_number_overstates_what_is_known_along_a_tilt(a):
    """Along it exp(-a^2) / (1 + a^2) per draw, across it exp(-a^2): Kish's number, which is all that weights tell."""
    z, weights = linear(NUM, a)
    along, across = (weighted_ess(weights, z) / NUM).tolist()
    assert along == pytest.approx(math.exp(-(a**2)) / (1 + a**2), rel=0.1)
    assert across == pytest.approx(math.exp(-(a**2)), rel=0.1)
    assert across <= float(importance_ess(weights.log())) / NUM + 1e-12


def test_repetitions_show_the_same():
    found, said = [], []
    for seed in range(300):
        z, weights = linear(500, 0.5, seed)
        found.append(weights @ z[:, 0])
        said.append(weighted_ess(weights, z)[0])
    shown = 1.0 / float(torch.stack(found).var())  # the tilted variance is one
    assert float(torch.stack(said).median()) == pytest.approx(shown, rel=0.25)


def test_a_constant_is_known_as_well_as_anything():
    _, weights = linear(100, 1.0)
    assert torch.equal(weighted_ess(weights, torch.ones(100, 1).double())[0], 1 / weights.square().sum())


def test_the_verdict_of_compare_is_of_the_worst_component():
    """Kish's number clears the limit of 400, and the tilted coordinate does not."""
    z, weights = linear(1400, 1.0)
    row = compare({"x": Draws({"z": z[None]}, "snis", log_weights=weights.log()[None], pareto_k=0.3)}).loc["x"]
    kish = float(importance_ess(weights.log()))
    assert kish > 400 > row.ess_bulk and "ess_bulk" in row.verdict


def test_the_error_of_a_mean_likelihood_is_no_mean_of_errors():
    """A tenth of a nat for each of 100 images is a hundredth for their mean; the error of log Z is common to all."""
    n, value = 100, torch.linspace(-60.0, -50.0, 100)
    for log_z_se, expected in ((0.0, 0.01), (0.03, math.hypot(0.01, 0.03))):
        se = torch.full((n,), math.hypot(0.1, log_z_se))
        found = LogLikelihood(value, se, torch.zeros(n), torch.full((n,), 90.0), torch.full((n,), log_z_se))
        numbers = likelihood_numbers({"tilted": found})
        assert numbers["test_log_likelihood"]["tilted"] == pytest.approx(-55.0)
        assert numbers["test_log_likelihood_se"]["tilted"] == pytest.approx(expected, rel=1e-4)
