"""What is said of chains that cannot be trusted."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from pyro_ebm import Draws, InferenceError, InferenceWarning
from pyro_ebm.chain_statistics import r_hat
from pyro_ebm.inference.chains.report import report_chains


def draws(values=None, *, chains=4, num=100, rate=0.8, diverging=0, data=()):
    values = torch.randn(chains, num, 2) if values is None else values
    lead = (*values.shape[:2], *data)
    flags = torch.zeros(lead).bool()
    flags.view(-1)[:diverging] = True
    stats = {"acceptance_rate": torch.as_tensor(rate).expand(lead).clone(), "diverging": flags}
    return Draws({"z": values}, "nuts", stats=stats)


def said(found, *, early=None, **options):
    """The one warning, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report_chains(found, strict=False, early=early, **options)
    assert len(caught) <= 1 and all(each.category is InferenceWarning for each in caught)
    if caught and early is None:
        with pytest.raises(InferenceError) as error:
            report_chains(found, strict=True, **options)
        assert str(error.value) == str(caught[0].message)
    return str(caught[0].message) if caught else ""


def test_good_chains_are_passed_in_silence():
    report_chains(draws(), strict=True)
    assert said(draws()) == ""


def test_divergences():
    assert said(draws(diverging=3)) == (
        "nuts: 3 of 400 transitions diverged: raise target_accept_prob towards 0.95 or reparametrize the model"
    )
    assert said(draws(diverging=4), max_divergences=0.01) == ""
    assert "5 of 400 transitions" in said(draws(diverging=5), max_divergences=0.01)
    assert "of 1200 transitions" in said(draws(diverging=9, data=(3,)))


def test_chains_that_accept_nothing():
    found = draws()
    found.stats["acceptance_rate"][2] = 0.0
    assert said(found).startswith("nuts: chain(s) 2 accepted nothing: the step size is too large")
    one_datum = draws(data=(3,))
    one_datum.stats["acceptance_rate"][1, :, 2] = 0.0
    assert said(one_datum).startswith("nuts: chain(s) 1 of data 2 accepted nothing")
    many = draws(chains=12)
    many.stats["acceptance_rate"][:] = 0.0
    assert "chain(s) 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)" in said(many)
    assert said(draws(num=9, rate=0.0)) == ""  # too short to say


def test_chains_that_disagree():
    apart = torch.randn(4, 100, 2) + torch.tensor([0.0, 3.0]) * torch.arange(4.0)[:, None, None]
    assert said(draws(apart)).startswith(f"nuts: chains disagree (R-hat {r_hat(apart).max():.2f} > 1.05 at z[1]): run")
    assert said(draws(apart[:1])) == ""  # there is nobody to disagree with
    assert said(draws(apart[:, :3])) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite(bad):
    values = torch.randn(4, 100, 2)
    values[1, 50, 0] = bad
    text = said(draws(values))
    assert text.startswith("nuts: draws of ['z'] are not finite: the density is improper") and "disagree" not in text


def test_everything_in_one_warning():
    found = draws(torch.randn(4, 100, 2) + 5 * torch.arange(4.0)[:, None, None], diverging=2, rate=0.0)
    text = said(found)
    assert "2 of 400 transitions diverged" in text and "accepted nothing" in text and "chains disagree" in text
    assert text.count("; ") >= 2


def test_ctrl_c_is_said_and_is_no_error():
    assert said(draws(num=3), early="interrupted") == "nuts: interrupted: kept 4 chain(s) of 3 draws"
    assert "interrupted: kept 4 chain(s) of 100 draws; 3 of 400" in said(draws(diverging=3), early="interrupted")
    with pytest.warns(InferenceWarning, match="interrupted"):
        report_chains(draws(num=3), strict=True, early="interrupted")


def test_components_that_are_the_same_in_every_draw_have_no_r_hat():
    values = torch.randn(4, 100, 2)
    with_ones = torch.cat([torch.ones(4, 100, 1), values + torch.arange(4.0)[:, None, None]], -1)
    assert "at z[" in said(draws(with_ones)) and said(draws(torch.ones(4, 100))) == ""
