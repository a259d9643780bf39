"""What people expect of a training loop: metrics, rates by step, weights of data, minibatches added up."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.optim import lr_scheduler

from pyro_ebm import VAE, Batches, Checkpoint, CheckpointError, EachStep, Validation, Weighted, fit

GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(24, generator=GENERATOR)
Y = 2.0 * X + 0.5 * torch.randn(24, generator=GENERATOR)
WEIGHTS = torch.rand(24, generator=GENERATOR) + 0.5
SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Line(nn.Module):
    """A regression whose intercept has a prior and a point for a guide: every loss is exact."""

    def __init__(self):
        super().__init__()
        self.slope, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(0.5))

    def model(self, x, y):
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x + b, 0.5), obs=y)

    def guide(self, x, y):
        pyro.sample("b", dist.Delta(self.b))

    def loss(self, x, y, weights=1.0, *, prior=1.0):
        """By hand, over all data."""
        joint = (weights * dist.Normal(self.slope * x + self.b, 0.5).log_prob(y)).sum()
        return -(joint + prior * dist.Normal(0.0, 0.5).log_prob(self.b))


def run(module, data=(X, Y), **options):
    settings = {"epochs": 2, "batch_size": 24, "validation": None, "seed": 0, "progress": False, "optimizer": SGD}
    return fit(module.model, module.guide, data, **settings | options)


def values(module):
    return torch.stack([p.detach() for p in module.parameters()])


# --------------------------------------------------------------------------------------------- metrics


def slope_error(model, guide, x, y):
    assert not torch.is_grad_enabled()
    return (model.__self__.slope - 2.0).abs()


def test_metrics_are_told_and_resumed(tmp_path):
    seen = []
    told = Validation((X, Y), metrics={"error": slope_error, "mean y": lambda model, guide, x, y: y.mean()})
    result = run(Line(), validation=told, callbacks=[lambda state: seen.append(state.metrics["error"][-1])])
    assert result.metrics["error"] == seen and result.metrics["error"][1] < result.metrics["error"][0] < 2.0
    assert result.metrics["mean y"] == pytest.approx([Y.mean().item()] * 2, rel=1e-5)
    path = tmp_path / "run.pt"
    run(Line(), validation=told, epochs=1, checkpoint=path)
    again = run(Line(), validation=told, checkpoint=Checkpoint(path, resume=True))
    assert again.metrics == result.metrics
    with pytest.raises(CheckpointError, match="its validation settings, monitor is 'loss', here it is 'error'"):
        other = Validation((X, Y), metrics=told.metrics, monitor="error")
        run(Line(), validation=other, checkpoint=Checkpoint(path, resume=True))


@pytest.mark.parametrize("higher", [False, True])
def test_a_metric_can_choose_and_stop(higher):
    """The best slope is passed on the way from 0 to the answer near 2, or never left."""

    def distance(model, guide, x, y):
        away = (model.__self__.slope - 1.0).abs()
        return -away if higher else away

    module = Line()
    wanted = Validation((X, Y), metrics={"distance": distance}, monitor="distance", higher_is_better=higher)
    slow = functools.partial(torch.optim.SGD, lr=0.02)
    result = run(module, validation=wanted, epochs=60, patience=4, optimizer=slow)
    best = (max if higher else min)(result.metrics["distance"])
    assert result.stopped == "early stopping" and result.best_epoch == result.epochs - 4
    assert result.metrics["distance"][result.best_epoch - 1] == best
    assert abs(module.slope.item() - 1.0) < 0.3


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"metrics": {"loss": len}}, ValueError, "the name 'loss' is taken"),
        ({"metrics": {"error": 3}}, TypeError, "metrics must map names to functions"),
        ({"monitor": "error"}, ValueError, r"monitor must be one of \['loss'\], got 'error'"),
        ({"higher_is_better": True}, ValueError, "higher_is_better=True is for a metric"),
        ({"num_draws": 0}, ValueError, "num_draws must be a whole number of at least 1"),
        ({"data": None}, ValueError, "pass validation=None to fit"),
    ],
)
def test_impossible_validations(change, error, match):
    with pytest.raises(error, match=match):
        Validation(**change)


def test_a_metric_that_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"metrics\['y'\] must return one number, the mean over the batch, got shape"):
        run(Line(), validation=Validation((X, Y), metrics={"y": lambda model, guide, x, y: y}))


# ----------------------------------------------------------------------------------------- rates by step


def test_a_rate_moves_with_each_step_and_resumes_there(tmp_path):
    rates = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    make = EachStep(functools.partial(lr_scheduler.ExponentialLR, gamma=0.5))
    options = {"scheduler": make, "batch_size": 6, "optimizer": functools.partial(Noted, lr=0.1)}
    whole = Line()
    run(whole, **options)
    assert rates == pytest.approx([0.1 * 0.5**step for step in range(8)])
    path = tmp_path / "run.pt"
    run(Line(), epochs=1, checkpoint=path, **options)
    again = Line()
    run(again, checkpoint=Checkpoint(path, resume=True), **options)
    assert torch.equal(values(again), values(whole))
    with pytest.raises(CheckpointError, match="its scheduler by is 'step', here it is 'epoch'"):
        run(Line(), checkpoint=Checkpoint(path, resume=True), **options | {"scheduler": make.make})
    with pytest.raises(TypeError, match="ReduceLROnPlateau goes by the loss of an epoch"):
        run(Line(), scheduler=EachStep(lr_scheduler.ReduceLROnPlateau))


# ------------------------------------------------------------------------------------- minibatches added up


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO, functools.partial(RenyiELBO, num_particles=2)])
@pytest.mark.parametrize("size", [6, 5])
def test_minibatches_add_up_to_a_step(objective, size):
    """Also where the parts of a step differ in size."""
    whole, parts = Line(), Line()
    first = run(whole, objective=objective())
    second = run(parts, objective=objective(), batch_size=Batches(size, accumulate=5))
    torch.testing.assert_close(values(parts), values(whole))
    assert second.train_loss == pytest.approx(first.train_loss, rel=1e-5)


@pytest.mark.parametrize(("change", "match"), [({"size": 0}, "size"), ({"accumulate": 0}, "accumulate")])
def test_impossible_batches(change, match):
    with pytest.raises(ValueError, match=f"{match} must be a whole number of at least 1"):
        Batches(**change)


# ------------------------------------------------------------------------------------------ weights of data


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("batch_size", [24, 8])
def test_data_count_by_their_weights(objective, batch_size):
    module = Line()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    result = run(module, Weighted((X, Y), WEIGHTS), objective=objective(), batch_size=batch_size, optimizer=still)
    assert result.train_loss == pytest.approx([module.loss(X, Y, WEIGHTS).item() / 24] * 2, rel=1e-5)
    judged = run(module, Weighted((X, Y), WEIGHTS), validation=Weighted((X, Y), WEIGHTS), optimizer=still)
    assert judged.validation_loss == pytest.approx(judged.train_loss, rel=1e-5)


def test_weights_of_one_change_nothing_and_two_are_a_datum_twice():
    plain, ones, twice, doubled = Line(), Line(), Line(), Line()
    run(plain)
    run(ones, Weighted((X, Y), torch.ones(24)))
    torch.testing.assert_close(values(ones), values(plain))
    weights = torch.cat([torch.full((4,), 2.0), torch.ones(20)])
    # The same gradient per unit of weight, and the same prior.
    run(twice, Weighted((X, Y), weights), optimizer=functools.partial(torch.optim.SGD, lr=0.1 * 24 / 28))
    run(doubled, (torch.cat([X, X[:4]]), torch.cat([Y, Y[:4]])), batch_size=28)
    torch.testing.assert_close(values(twice), values(doubled))


def test_local_latents_are_weighted_in_model_and_guide():
    torch.manual_seed(0)
    vae, x = VAE((4,), 2, hidden=(5,)), torch.rand(12, 4)
    still = functools.partial(torch.optim.SGD, lr=0.0)
    options = {"objective": TraceMeanField_ELBO(), "optimizer": still, "epochs": 1, "batch_size": 12}
    one, both = (run(vae, Weighted(x, w), **options).train_loss[0] for w in (torch.ones(12), torch.full((12,), 3.0)))
    assert both == pytest.approx(3 * one, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "match"),
    [(torch.ones(3), "weights must be 24 numbers above zero"), (torch.zeros(24), "values from 0")],
)
def test_impossible_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        run(Line(), Weighted((X, Y), weights))


def test_data_that_no_plate_tells_apart_have_no_weights():
    class Flat(Line):
        def model(self, x, y):
            b = pyro.sample("b", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Normal(self.slope * x + b, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"the sites \['y'\] change with the data but lie in no plate"):
        run(Flat(), Weighted((X, Y), WEIGHTS))
    with pytest.raises(ValueError, match="validation must have weights where data have"):
        run(Line(), Weighted((X, Y), WEIGHTS), validation=(X, Y, WEIGHTS))


# -------------------------------------------------------------------------------------- models with their data


def test_a_model_that_holds_its_data_learns():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 24, subsample_size=12) as rows:
            pyro.sample("y", dist.Normal(w * X[rows], 0.5), obs=Y[rows])

    guide = AutoNormal(model, init_scale=0.05)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    result = fit(model, guide, None, epochs=150, optimizer=adam, validation=None, seed=0, progress=False)
    precision = 1 + (X**2).sum() / 0.25
    assert abs(guide.locs.w.item() - (X * Y).sum() / 0.25 / precision) < 4 * precision.rsqrt()
    assert result.epochs == 150 == result.kept_epoch
    with pytest.raises(ValueError, match="nothing can be held apart of data=None; pass validation=None"):
        fit(model, guide, None)
