"""Weights tempered, points chosen by them, and how many of the points differ."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.inference.resampling import apart, effective, next_step, number_of_distinct, systematic, tempered


def test_steps_leave_weights_worth_what_was_asked_for():
    log_ratio = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([2.0, 50.0, 0.1])
    step = next_step(log_ratio, torch.ones(3, dtype=torch.float64), 0.5)
    worth = (step * log_ratio).softmax(0).square().sum(0).reciprocal() / 4000
    torch.testing.assert_close(worth[:2], torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-3, atol=0)
    assert step[2] == 1 and worth[2] > 0.5
    # Normal log ratios of variance v: exp(step * ratio) is worth exp(-step^2 v)
    expected = math.sqrt(math.log(2)) / torch.tensor([2.0, 50.0])
    assert ((step[:2] / expected - 1).abs() < 0.1).all()


def test_steps_count_only_particles_that_live():
    log_ratio = torch.zeros(1000, 1)
    log_ratio[100:] = -math.inf
    assert next_step(log_ratio, torch.tensor([0.4]), 0.9) == torch.tensor([0.4])
    assert next_step(torch.zeros(10, 2), torch.tensor([0.0, 0.2]), 0.9).tolist() == pytest.approx([0.0, 0.2])


def test_systematic_resampling():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(200, 2, 3)
    log_weights[:50] = -math.inf
    log_weights[:, 1, 1] = 0.3
    counts = torch.zeros(200, 2, 3)
    for _ in range(400):
        index = systematic(log_weights, generator)
        assert index.shape == log_weights.shape
        once = torch.zeros(200, 2, 3).scatter_add_(0, index, torch.ones(200, 2, 3))
        expected = 200 * log_weights.softmax(0)
        assert (once >= expected.floor() - 1e-3).all() and (once <= expected.ceil() + 1e-3).all()
        assert torch.equal(index[:, 1, 1], torch.arange(200))
        counts += once
    # A place is taken or not: the variance of a count is at most 1/4 a round
    assert ((counts / 400 - expected).abs() < 5 * 0.5 / math.sqrt(400)).all()
    assert (counts[:50].reshape(50, -1)[:, [0, 1, 2, 3, 5]] == 0).all()


def test_few_points_chosen_by_spread_weights_all_differ():
    index = systematic(torch.randn(500, 2).mul(0.5), torch.Generator().manual_seed(1), num=20)
    assert index.shape == (20, 2) and number_of_distinct(index[..., None], batch=1) == 20


@pytest.mark.parametrize("scale", [0.1, 30.0, 1e9])
def test_tempered_weights_are_worth_the_least_asked_for(scale):
    log_weights = scale * torch.randn(2000, 3)
    log_weights[:7] = -math.inf
    found = tempered(log_weights, 32)
    worth = effective(found)
    assert (worth >= 31.9).all() and (found[:7] == -math.inf).all()
    if scale == 0.1:  # nothing to temper
        torch.testing.assert_close(found.softmax(0).float(), log_weights.softmax(0))
    else:
        assert (worth < 33).all() and torch.equal(found.argmax(0), log_weights.argmax(0))


def test_weights_on_few_points_are_spread_over_those():
    log_weights = torch.full((100,), -math.inf)
    log_weights[:3] = torch.tensor([0.0, -50.0, -60.0])
    found = tempered(log_weights, 32)
    assert 2.6 < float(effective(found)) < 2.8 and (found[3:] == -math.inf).all()


def test_the_number_of_distinct_points_is_that_of_the_worst_datum():
    points = torch.randn(6, 2, 3)
    assert number_of_distinct(points, batch=1) == 6
    points[4:, 1] = points[0, 1]
    points[1, 1] = points[0, 1].flip(0)  # the same sum
    assert number_of_distinct(points, batch=1) == 4 and number_of_distinct(points) == 6
    assert number_of_distinct(torch.zeros(5, 2)) == 1


def test_places_are_shared_out_between_modes():
    """Of two modes with half of the weight each, along no axis, four places go to two points in either."""
    side = torch.ones(400, 2)
    side[200:] = -1
    points = torch.randn(400, 2, 2) + side[..., None] * torch.tensor([3.0, -3.0])
    log_weights = torch.zeros(400, 2)
    log_weights[200:, 1] = -math.log(3)  # here three places to one
    for _ in range(20):
        index = apart(points, log_weights, 4)
        assert number_of_distinct(index[..., None], batch=1) == 4
        assert side.gather(0, index).sum(0).tolist() == pytest.approx([0.0, 2.0])
