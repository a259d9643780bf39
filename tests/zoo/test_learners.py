"""Twelve learners through every entry point that trains or judges: right against an exact twin, or refused by name."""

from __future__ import annotations

import copy
import functools

import pyro
import pyro.infer
import pytest
import torch
from torch import nn

from pyro_ebm import (
    Checkpoint,
    LinearEnergy,
    fit,
    fit_tilt,
    importance,
    load_weights,
    log_likelihood,
    predictive,
    sample,
    save_weights,
    tilt,
)
from tests.zoo.learners import LEARNERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning"),  # guides that have hardly learned
    pytest.mark.filterwarnings("ignore::pyro_ebm.TrainingWarning"),
    pytest.mark.filterwarnings("ignore:Found vars in model but not guide"),
    pytest.mark.uses_param_store,
]
QUICK = ("convolutional", "params")
BY_CHAINS = ("mixture", "deep Markov", "regression", "params")
ALL = pytest.mark.parametrize("learner", LEARNERS, ids=str)
MOST_SLOW = pytest.mark.parametrize(
    "learner", [pytest.param(each, marks=[] if each.name in QUICK else pytest.mark.slow) for each in LEARNERS], ids=str
)


@pytest.fixture(autouse=True)
def empty_store():
    """Each learner begins with no parameters of another's in Pyro's store."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def made(learner):
    torch.manual_seed(0)
    return learner.make()


def trained(learner, pair, **options):
    objective = None if learner.objective is None else learner.objective()
    settings = {"epochs": 3, "batch_size": 16, "objective": objective, "seed": 0, "progress": False}
    settings["optimizer"] = functools.partial(torch.optim.Adam, lr=0.02)
    return fit(pair.model, pair.guide, learner.data(), **{**settings, **learner.options, **options})


def refused(learner, entry_point):
    """Whether this entry point refuses the learner, in a ``with`` block that expects it."""
    return pytest.raises(ValueError, match=learner.refused[entry_point])


@ALL
def test_fit(learner):
    """The loss falls, and is no lower than minus the exact log likelihood: it is one of a lower bound."""
    pair = made(learner)
    result = trained(learner, pair, epochs=8, validation=None, keep="last")
    assert len(result.train_loss) == 8 and result.train_loss[-1] < result.train_loss[0]
    if learner.twin is None:
        return
    data = learner.data()
    elbo = pyro.infer.Trace_ELBO() if learner.objective is None else learner.objective()
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(pair.model, pair.guide, *data) / len(data[0]) for _ in range(20)])
    exact = -float(learner.twin(pair, *data).mean())
    assert exact < float(losses.mean()) + 4 * float(losses.std()) / 20**0.5


@MOST_SLOW
def test_log_likelihood(learner):
    pair, data = made(learner), learner.data()
    trained(learner, pair, epochs=40)
    rows = tuple(part[:12] for part in data)
    if "log_likelihood" in learner.refused:
        with refused(learner, "log_likelihood"):
            log_likelihood(pair.model, pair.guide, rows)
        return
    found = log_likelihood(pair.model, pair.guide, rows, num_samples=2000, seed=0)
    assert found.value.isfinite().all()
    if learner.twin is not None:
        sure = found.pareto_k < 0.5  # beyond, a guide that misses a side of the posterior may look well
        error = (found.value - learner.twin(pair, *rows)).abs()
        assert int(sure.sum()) >= 4 and (error[sure] < 5 * found.se[sure] + 2e-3).all()


@MOST_SLOW
def test_predictive(learner):
    """Prior predictive draws of the data have the mean of the twin's, and the log likelihood its entropy predicts."""
    pair, data = made(learner), learner.data()
    rows = tuple(part[:4] for part in data)
    with torch.no_grad():
        pair.guide(*data)  # autoguides make their parameters
        drawn = predictive(pair.model, *rows, num_samples=600, seed=0)
    assert all(value.shape[0] == 600 and value.isfinite().all() for value in drawn.values())
    if learner.twin is None or len(data) > 1 or learner.name == "deep Markov":
        return
    x = drawn["obs" if "obs" in drawn else "x"]
    # Of data from the model, log p(x) of the model itself is higher on average than of any other.
    at_home = learner.twin(pair, x.reshape(-1, *x.shape[2:]))
    away = learner.twin(pair, x.reshape(-1, *x.shape[2:]) + 0.5)
    assert float(at_home.mean()) > float(away.mean())


def modules(pair):
    return [each for each in (pair, getattr(pair, "guide", None)) if isinstance(each, nn.Module)]


@ALL
def test_weights_are_saved_and_loaded(learner, tmp_path):
    pair, other, data = made(learner), made(learner), learner.data()
    trained(learner, pair)
    if not modules(pair):
        pytest.skip("its parameters lie in Pyro's store, which has save() and load()")
    for index, (ours, theirs) in enumerate(zip(modules(pair), modules(other), strict=True)):
        if learner.name == "regression":
            theirs(*data)
        save_weights(ours, tmp_path / f"{index}.pt")
        load_weights(theirs, tmp_path / f"{index}.pt")
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@MOST_SLOW
def test_a_stopped_run_goes_on_bit_for_bit(learner, tmp_path):
    first, path = made(learner), tmp_path / "run.pt"
    start = copy.deepcopy({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    whole = trained(learner, first, epochs=4)
    pyro.clear_param_store()
    if learner.name == "SVI first":
        assert start  # what SVI left
    trained(learner, made(learner), epochs=2, checkpoint=Checkpoint(path))
    pyro.clear_param_store()
    resumed = trained(learner, made(learner), epochs=4, checkpoint=Checkpoint(path, resume=True))
    assert resumed.train_loss == whole.train_loss and len(whole.train_loss) == 4


@MOST_SLOW
def test_fit_tilt(learner):
    """The loss of a linear tilt is minus what the exact likelihood gains, where the twin knows."""
    pair, data = made(learner), learner.data()
    trained(learner, pair, epochs=8)
    if learner.site is None:
        return
    energy = LinearEnergy(torch.zeros(1 if learner.name == "deep Markov" else 2))
    tilted = tilt(pair.model, {learner.site: energy})
    options = {"max_steps": 60, "tolerance": None, "learning_rate": 0.05, "seed": 0, "progress": False}
    if "fit_tilt" in learner.refused:
        with refused(learner, "fit_tilt"):
            fit_tilt(tilted, pair.guide, data, **options)
        return
    result = fit_tilt(tilted, pair.guide, data, folds=0, bound="exact", num_particles=200, **options)
    assert result.train_loss[-1] < 1e-3 and bool((energy.a != 0).all())
    tilted_values = log_likelihood(tilted, pair.guide, data, num_samples=2000, seed=0)
    base_values = log_likelihood(pair.model, pair.guide, data, num_samples=2000, seed=0)
    gained = float((tilted_values.value - base_values.value).mean())
    assert abs(gained + result.train_loss[-1]) < 0.1 + 0.1 * abs(gained)


@pytest.mark.slow
@pytest.mark.parametrize("learner, method", [
    pytest.param(each, method, id=f"{each}-{method}")
    for each in LEARNERS for method in ("smc", "chees") if method == "smc" or each.name in BY_CHAINS
])  # fmt: skip
def test_sample(learner, method):
    """The posterior of two data, against importance sampling from the prior."""
    pair, data = made(learner), learner.data()
    trained(learner, pair, epochs=20)
    rows = tuple(part[:2] for part in data)
    options = {"warmup_steps": 300, "num_chains": 32} if method == "chees" else {}
    draws = sample(pair.model, *rows, method=method, num_samples=500, seed=0, progress=False, **options)
    reference = importance(pair.model, None, *rows, num_samples=40_000, seed=0)
    site = learner.site or "slope"
    ours = draws.resample(4000)[site] if draws.log_weights is not None else draws.values[site].flatten(0, 1)
    weights = reference.weights.flatten().double()
    theirs = reference.flat(site).double()
    mean = (weights.reshape(-1, *[1] * (theirs.ndim - 1)) * theirs).sum(0)
    spread = ours.double().std(0)
    assert ((ours.double().mean(0) - mean).abs() < 0.2 * spread + 0.05).all()
