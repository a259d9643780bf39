"""Sampling until labels tell the balance, within the time; what must be said beside the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_ebm import DebiasConfig, Draws, class_balance
from pyro_ebm.inference.sample import METHODS as ALL_METHODS
from pyro_ebm.recipes import steps
from pyro_ebm.recipes.debias_config import METHODS
from pyro_ebm.recipes.result import remarks_on
from pyro_ebm.training.fit import FitResult

CLASSES = (0, 1, 2, 3, 4)


def test_the_job_knows_the_samplers_that_sample_knows():
    assert set(METHODS) == set(ALL_METHODS) - {"auto"}


class Machine:
    """Independent draws whose labels are their values; a second on the clock for a thousand of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, pace: float = 1e-3) -> None:
        self.first, self.pace, self.now = first, pace, 0.0
        self.shares: list[float] = []
        self.left: list[float] = []
        monkeypatch.setattr(steps, "draw", self.draw)
        monkeypatch.setattr(steps, "decoded_labels", lambda vae, z, classifier: z.long().flatten())
        monkeypatch.setattr(steps.time, "perf_counter", lambda: self.now)

    def draw(self, config: Any, method: str, *target: Any, share: float, max_seconds: float) -> Draws:
        self.shares.append(share)
        self.left.append(max_seconds)
        num = int(self.first * share) // 4
        self.now += 4 * num * self.pace
        generator = torch.Generator().manual_seed(len(self.shares))
        return Draws({"z": torch.randint(5, (4, num), generator=generator).float()}, method)

    def run(self, **settings: Any) -> tuple[Draws, float]:
        class Classifier:
            classes_ = CLASSES

        draws, labels = steps.draw_labeled(DebiasConfig(**settings), "chees", None, None, Classifier())  # type: ignore[arg-type]
        return draws, steps.label_balance(draws, labels, CLASSES).chance


def test_draws_go_on_until_labels_are_worth_enough(monkeypatch):
    """6,400 independent labels are worth it; 2,800 are not."""
    machine = Machine(monkeypatch, first=2_800)
    draws, chance = machine.run()
    assert machine.shares[0] == 1 and 2 < machine.shares[1] < 4 and len(machine.shares) == 2
    assert chance < steps.MAX_CHANCE and draws.num_chains * draws.num_draws > 6_400
    assert machine.left == [120, pytest.approx(120 - 2.8)]


@pytest.mark.parametrize(
    ("settings", "first", "pace"),
    [
        ({}, 10_000, 1e-3),  # enough at once
        ({"max_seconds": 8.0}, 2_800, 1e-3),  # the time is too short
        ({}, 800, 1e-3),  # ten times as many would be needed
        ({"quick": True}, 2_800, 1e-3),
    ],
)
def test_draws_are_made_once_where_more_would_not_do(monkeypatch, settings, first, pace):
    machine = Machine(monkeypatch, first=first, pace=pace)
    machine.run(**settings)
    assert machine.shares == [1]


def test_what_must_be_said():
    cut = {"stopped": "max_seconds", "num_samples": 3000}
    draws = {
        "prior": {
            "nuts": Draws({"z": torch.zeros(4, 812)}, "nuts", notes=cut),
            "snis": Draws({"z": torch.zeros(1, 9)}, "snis"),
        }
    }
    labels = torch.arange(10_000) % 5
    balances = {"nuts": class_balance(labels, CLASSES, ess=160), "snis": class_balance(labels, CLASSES)}
    fits = {
        "vae": FitResult([1.0], [], 1, 1, "early stopping", 0.0, 0),
        "tilt": FitResult([1.0], [], 1, 7, "degenerate weights", 0.0, 0),
    }
    found = list(remarks_on(DebiasConfig(quick=True), fits, draws, balances))
    assert len(found) == 4
    assert "numbers mean nothing" in found[0]
    assert found[1] == "Training of tilt ended before its time, after 7 epochs: degenerate weights."
    assert found[2] == "nuts was cut short on the prior: its 120 s were spent after 812 of 3,000 draws a chain."
    assert "labels of nuts are worth 160" in found[3] and "its TV of 0.000 is 0.000" in found[3]
    assert list(remarks_on(DebiasConfig(), {}, {"prior": {"snis": draws["prior"]["snis"]}}, balances)) == []


def test_settings_as_a_command():
    config = DebiasConfig(digits=(1, 7), proportions=(0.25, 0.75), seed=3, quick=True, methods=("snis",))
    wanted = "pyro-ebm debias --digits 1,7 --proportions 0.25,0.75 --methods snis --seed 3 --quick --out 'a b'"
    assert config.command("a b") == wanted
    assert DebiasConfig().command() == "pyro-ebm debias"
    assert DebiasConfig(data="mnist", num_samples=500).command() == "pyro-ebm debias --data mnist --num-samples 500"
