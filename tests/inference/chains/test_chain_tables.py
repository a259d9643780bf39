"""What ``MCMC`` says of a run in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.chain_statistics import r_hat
from pyro_ebm.inference.chains.tables import diagnostics_of, table
from pyro_ebm.inference.draws import Draws


def test_a_single_chain_has_the_r_hat_of_its_halves():
    still = torch.randn(1, 400, 2)
    moving = still + torch.linspace(0.0, 5.0, 400)[:, None]
    found = {name: diagnostics_of(Draws({"z": value}, "hmc")) for name, value in (("still", still), ("moving", moving))}
    halves = r_hat(torch.cat([moving[:, :200], moving[:, 200:]]))
    assert found["moving"]["z"]["r_hat"].tolist() == pytest.approx(halves.tolist()) and min(halves) > 1.5
    assert (found["still"]["z"]["r_hat"] < 1.05).all()
    rows = table(Draws({"z": still}, "hmc"), 0.9).splitlines()[2:]
    assert len(rows) == 2 and all(math.isfinite(float(row.split()[-1])) for row in rows)
