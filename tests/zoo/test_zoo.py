"""Every model of the zoo: many runs at once give what each gives alone, and its answers are right."""

from __future__ import annotations

import pytest
import torch

from pyro_ebm import importance
from pyro_ebm.structure import (
    WAYS,
    BatchedModel,
    DoesNotBroadcast,
    batched_run,
    latent_sites,
    prototype_trace,
    unconditioned,
)
from tests.zoo.case import prior_runs
from tests.zoo.cases import CASES, cases

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning"),  # importance sampling of a few of them
    pytest.mark.filterwarnings("ignore:Singular sample detected"),  # Wishart draws in single precision
]
ROWS = 4


def prior_values(case):
    """Values of the latent sites, a row a run."""
    runs = prior_runs(case, ROWS)
    names = latent_sites(prototype_trace(case.model, case.args, case.kwargs))
    return {name: torch.stack([run[name] for run in runs]) for name in names}


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", cases(lambda case: case.draws != ()))
def test_ways(case):
    """The ways that the case says serve it do, no other one does, and each gives the same numbers."""
    values = prior_values(case)
    alone = None
    for way in ("loop", "vmap", "plate"):
        model = BatchedModel(case.model, case.args, case.kwargs, vectorize=way)
        if way not in case.ways and way != "loop":
            with pytest.raises(DoesNotBroadcast):
                model.choose(values)
            continue
        batch = model.run(values)
        assert batch.way == way
        if way == "loop":
            alone = batch
        for name in () if model.layout.subsampled else alone.measured:
            torch.testing.assert_close(batch.measured[name], alone.measured[name], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("case", cases(lambda case: case.draws != ()))
def test_auto_takes_the_first_way(case):
    assert BatchedModel(case.model, case.args, case.kwargs).choose(prior_values(case)) == case.ways[0]
    drawn = batched_run(unconditioned(case.model), case.args, case.kwargs, num=3)
    assert drawn.way == (case.draws or case.ways)[0]


@pytest.mark.parametrize("case", cases(lambda case: case.answers and case.prior_reaches))
def test_answers(case):
    slowest = max((case.ways[0], (case.draws or case.ways)[0]), key=WAYS.index)
    num = 300 if slowest == "loop" else 10_000
    draws = importance(case.model, None, *case.args, num_samples=num, seed=0, model_kwargs=case.kwargs)
    assert draws.notes["vectorize"] == slowest
    for site, (mean, sd) in case.answers.items():
        if site not in draws.values:
            continue  # a deterministic one
        mean, sd = torch.as_tensor(mean).double(), torch.as_tensor(sd).double()
        found, weights = draws.flat(site).double(), draws.weights.double().flatten()
        assert torch.broadcast_shapes(mean.shape, sd.shape, found.shape[1:]) == found.shape[1:]
        weights = weights.reshape(-1, *([1] * (found.ndim - 1)))
        error, se = (weights * (found - mean)).sum(0), (weights * (found - mean)).square().sum(0).sqrt()
        assert (error.abs() <= 5 * se + 1e-5).all(), (site, error, se)
        squares = weights * ((found - mean) ** 2 - sd**2)
        assert (squares.sum(0).abs() <= 5 * squares.square().sum(0).sqrt() + 1e-5).all(), (site, squares.sum(0))
