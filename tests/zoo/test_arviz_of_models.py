"""to_arviz() of draws of every model: log likelihood and deterministic sites as each draw alone gives them."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine

from pyro_ebm import Draws, to_arviz
from pyro_ebm.inference.draws import Source
from pyro_ebm.inference.pointwise import model_sites
from pyro_ebm.randomness import forked_rng
from tests.zoo.case import prior_runs
from tests.zoo.cases import cases

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")  # Wishart draws in single precision
LEAD = (2, 3)


def runs_of(case, num):
    """Latent values of so many runs."""
    if case.name == "improper_uniform":  # cannot be drawn
        return [{"z": torch.tensor(0.1 * index)} for index in range(num)]
    with forked_rng(0):
        return prior_runs(case, num)


def alone(case, row):
    with pyro.validation_enabled(False), torch.no_grad():
        return poutine.trace(poutine.condition(case.model, data=row)).get_trace(*case.args, **case.kwargs)


@pytest.mark.parametrize("case", cases())
def test_to_arviz(case):
    rows = runs_of(case, 6)
    values = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    values = {name: value.reshape(*LEAD, *value.shape[1:]) for name, value in values.items()}
    draws = Draws(values, "prior", source=Source(case.model, case.args, case.kwargs))
    sites = model_sites(draws.source)
    tree = to_arviz(draws)
    assert set(tree["posterior"].data_vars) == {*values, *sites.deterministic}
    assert ("log_likelihood" in tree) == (bool(sites.observed) and not sites.subsampled)
    for index, row in enumerate(rows):
        nodes = alone(case, row).nodes
        where = divmod(index, LEAD[1])
        for name in sites.deterministic:
            found = torch.as_tensor(tree["posterior"][name].values[where])
            torch.testing.assert_close(found, nodes[name]["value"].detach(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for name in sites.observed if "log_likelihood" in tree else ():
            site = nodes[name]
            expected = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                expected = torch.where(torch.as_tensor(site["mask"]), expected, torch.zeros(()).to(expected))
            found = torch.as_tensor(tree["log_likelihood"][name].values[where])
            torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3, equal_nan=True)
