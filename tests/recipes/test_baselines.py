"""The baselines: images that count by weights, budgets, and what stays untouched."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_ebm import VAE, Weighted, fit
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes import baselines as module
from pyro_ebm.recipes.baselines import fine_tune, train_vae, train_weighted
from pyro_ebm.recipes.debias_config import Schedule

TINY = Schedule(hidden=(8,), vae_epochs=2, vae_batch=16, tilt_epochs=2, patience=3)


def images(num: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vae() -> VAE:
    with forked_rng(1):
        return VAE((1, 2, 3), 2, hidden=(8,))


def loss(vae: VAE, x: torch.Tensor, weights: torch.Tensor) -> float:
    """Of one step, with weights that stand still."""
    still = functools.partial(torch.optim.SGD, lr=0.0)
    options: dict[str, Any] = {"objective": TraceMeanField_ELBO(), "optimizer": still, "epochs": 1, "validation": None}
    return fit(vae.model, vae.guide, Weighted(x, weights), seed=5, progress=False, **options).train_loss[0]


def test_each_image_counts_by_its_weight(vae):
    """The loss is linear in the weights, with the same noise, and that of the images by themselves."""
    x, weights = images(20), torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1
    first = (torch.arange(20) < 10) * 1.0
    tiny = 1e-9
    halves = [loss(vae, x, weights * half + tiny) for half in (first, 1 - first)]
    assert loss(vae, x, weights) == pytest.approx(sum(halves), rel=1e-5)
    assert loss(vae, x, 3 * weights) == pytest.approx(3 * sum(halves), rel=1e-5)


def test_fine_tuning_works_on_a_copy(vae):
    before = [p.clone() for p in vae.parameters()]
    tuned, result = fine_tune(vae, images(40), TINY, seed=0, progress=False)
    assert all(torch.equal(p, old) for p, old in zip(vae.parameters(), before, strict=True))
    assert not all(torch.equal(p, old) for p, old in zip(tuned.parameters(), before, strict=True))
    assert result.epochs == 2


def test_the_seed_decides(rng_untouched):
    with rng_untouched():
        first, again, other = (train_vae(images(40), 2, TINY, seed=s, progress=False)[0] for s in (0, 0, 1))
    z = torch.zeros(1, 2)
    assert torch.equal(first.decode(z).mean, again.decode(z).mean)
    assert not torch.equal(first.decode(z).mean, other.decode(z).mean)


@pytest.mark.parametrize(
    ("num", "budget", "epochs", "validation"),
    # 160 images: 9 steps an epoch of 16; 20: 1 step with 4 held apart; 600 of them as many as asked for.
    [(20, None, 2, 0.1), (20, 160, 18, 0.2), (600, 160, 2, 0.1), (160, 160, 2, 0.2)],
)
def test_a_small_set_gets_as_many_steps_as_a_large_one(monkeypatch, num, budget, epochs, validation):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "fit", lambda *args, **options: asked.update(options))
    train_vae(images(num), 2, TINY, budget=budget, seed=0)
    assert (asked["epochs"], asked["validation"]) == (epochs, validation)
    assert asked["patience"] == 3 * epochs // 2


def test_weighted_training_sees_both_sets_and_their_weights(monkeypatch):
    """Dark and bright images, 90 to 10 against 50 to 50: the bright ones of the biased set weigh more."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "fit", lambda model, guide, data, **options: asked.update(options, data=data))
    bright = torch.arange(200) % 10 == 0
    biased = 0.1 * images(200) + 0.8 * bright[:, None, None, None]
    reference = 0.1 * images(60, seed=1) + 0.8 * (torch.arange(60) % 2)[:, None, None, None]
    _, _, ratio = train_weighted(biased, reference, 2, TINY, seed=0)
    together, weights = asked["data"].data, asked["data"].weights
    assert torch.equal(together, torch.cat([biased, reference])) and torch.equal(weights[200:], torch.ones(60))
    assert torch.equal(weights[:200], ratio.weights()) and ratio.auc > 0.6
    # 0.5 / 0.1 = 5 and 0.5 / 0.9 = 0.56; the ratio of the two is 9
    assert 4 < float(weights[:200][bright].mean() / weights[:200][~bright].mean()) < 14
