"""What belongs to all data counts once per pass, however these are cut into minibatches."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_ebm import LinearEnergy, TrainingWarning, fit, tilt

N = 40
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(N, generator=GENERATOR)
Y = 0.8 * X + 0.3 * torch.randn(N, generator=GENERATOR)


class Point(nn.Module):
    """A point for w: every ELBO is then the log joint density there, without noise."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, *args):
        pyro.sample("w", dist.Delta(self.w))


def plated(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


def unplated(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    pyro.sample("y", dist.Normal(w * x, 0.3).to_event(1), obs=y)


def by_factor(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    pyro.factor("y", dist.Normal(w * x, 0.3).log_prob(y).sum())


def penalized(x, y):
    """The prior as a penalty by hand, which belongs to all data as well."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).mask(False))
    pyro.factor("prior", dist.Normal(2.0, 0.1).log_prob(w))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


def enlarged(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


def weighted_by_hand(x, y):
    with pyro.poutine.scale(scale=len(x) / N):
        w = pyro.sample("w", dist.Normal(2.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


def looped(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    for i in range(len(x)):
        pyro.sample(f"y_{i}", dist.Normal(w * x[i], 0.3), obs=y[i])


def in_turn(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y_{i}", dist.Normal(w * x[i], 0.3), obs=y[i])


MODELS = [looped, in_turn, plated, unplated, by_factor, penalized, enlarged, weighted_by_hand]
ELBOS = [
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceGraph_ELBO,
    functools.partial(TraceEnum_ELBO, strict_enumeration_warning=False),
    functools.partial(RenyiELBO, num_particles=2),
]


def one_pass(model, batch_size, data=(X, Y), **options):
    """One pass with weights that stand still, and the mean of the gradients of its steps."""
    point, grads = Point(), []

    class Still(torch.optim.SGD):
        def step(self, closure=None):
            grads.append(point.w.grad.clone())

    options = {"validation": None, "epochs": 1, "seed": 0, "progress": False, **options}
    make = functools.partial(Still, lr=0.0)
    options |= {} if batch_size is None else {"batch_size": batch_size}
    return fit(model, point, data, optimizer=make, train=point, **options), torch.stack(grads).mean()


def log_joint(w):
    w = torch.tensor(w, requires_grad=True)
    joint = dist.Normal(2.0, 0.1).log_prob(w) + dist.Normal(w * X, 0.3).log_prob(Y).sum()
    gradient = torch.autograd.grad(joint, w)[0]
    return joint.detach(), gradient


@pytest.mark.parametrize("batch_size", [10, 16, N])
@pytest.mark.parametrize("model", MODELS)
def test_a_pass_counts_the_prior_once(model, batch_size):
    result, gradient = one_pass(model, batch_size)
    joint, exact = log_joint(0.3)
    assert result.train_loss[0] == pytest.approx(float(-joint) / N, rel=1e-4)
    if N % batch_size == 0:  # a smaller last batch has more than its share in the mean
        assert float(gradient) == pytest.approx(float(-exact) / N, rel=1e-4)


@pytest.mark.parametrize("elbo", ELBOS)
def test_every_elbo_counts_so(elbo):
    result, gradient = one_pass(plated, 10, objective=elbo())
    joint, exact = log_joint(0.3)
    assert result.train_loss[0] == pytest.approx(float(-joint) / N, rel=1e-4)
    assert float(gradient) == pytest.approx(float(-exact) / N, rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_validation_counts_the_prior_as_training_does(model):
    result, _ = one_pass(model, 10, validation=(X, Y))
    assert result.validation_loss == pytest.approx(result.train_loss, rel=1e-4)


def test_a_loader_counts_so_and_a_stream_says_that_it_cannot():
    result, _ = one_pass(plated, None, DataLoader(TensorDataset(X, Y), batch_size=10))
    assert result.train_loss[0] == pytest.approx(float(-log_joint(0.3)[0]) / N, rel=1e-4)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    with pytest.warns(TrainingWarning, match=r"the sites \['w'\] belong to all data, but nobody knows how many"):
        one_pass(plated, None, DataLoader(Stream(), batch_size=10))
    one_pass(enlarged, None, DataLoader(Stream(), batch_size=10))  # the model knows


def test_local_sites_count_in_full():
    """An ELBO without sites that belong to all data is that of its minibatches, bit for bit."""

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x / 2))

    local = Local()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    result = fit(local.model, local.guide, X, optimizer=still, epochs=1, batch_size=10, validation=None, seed=0,
                 progress=False)  # fmt: skip
    assert result.train_loss[0] == pytest.approx(Trace_ELBO().loss(local.model, local.guide, X) / N, rel=1e-5)


def test_a_tilt_of_what_belongs_to_all_data_counts_once():
    energy = LinearEnergy(torch.tensor(1.5))
    tilted = tilt(plated, {"w": energy}, normalize=0.7)
    result, _ = one_pass(tilted, 10)
    assert result.train_loss[0] == pytest.approx(float(-log_joint(0.3)[0] - 1.5 * 0.3 + 0.7) / N, rel=1e-4)


def test_latents_of_single_data_count_in_full_whatever_their_names():
    def model(x):
        for i in range(len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            for i in range(len(x)):
                pyro.sample(f"z_{i}", dist.Delta(self.slope * x[i]))

    guide = Guide()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    options = {"optimizer": still, "epochs": 1, "validation": None, "seed": 0, "progress": False}
    result = fit(model, guide, X, batch_size=10, **options)
    assert result.train_loss[0] == pytest.approx(Trace_ELBO().loss(model, guide, X) / N, rel=1e-5)


def test_a_factor_of_constant_data_counts_in_full():
    def model(y):
        w = pyro.sample("w", dist.Normal(2.0, 0.1))
        pyro.factor("y", -((y - w) ** 2).sum())

    result, _ = one_pass(model, 10, torch.ones(N))
    loss = 0.7**2 * N - dist.Normal(2.0, 0.1).log_prob(torch.tensor(0.3)).item()
    assert result.train_loss[0] == pytest.approx(loss / N, rel=1e-4)


@pytest.mark.uses_param_store
@pytest.mark.parametrize("options", [{"batch_size": 10}, {"batch_size": N, "validation": 0.2}])
@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_an_autoguide_of_single_data_is_named(guide, options):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    settings = {"epochs": 1, "validation": None, "seed": 0, "progress": False, **options}
    with pytest.raises(ValueError, match=rf"{guide.__name__} has parameters of its own for each datum .*\['z'\]"):
        fit(model, guide(model), X, **settings)
    fit(model, guide(model), X, **settings | {"batch_size": N, "validation": None})
    both = nn.Module()
    both.auto, both.slope = guide(pyro.poutine.block(model, hide=["z", "data", "x"])), nn.Parameter(torch.tensor(0.5))

    def reading(x):
        both.auto(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(both.slope * x))

    fit(model, reading, X, train=both, **settings | {"batch_size": 10})


def test_a_loss_made_of_gradients_counts_so():
    def loss(model, guide, *batch):
        value = Trace_ELBO().differentiable_loss(model, guide, *batch)
        return value + 0 * torch.autograd.grad(value, guide.w, create_graph=True)[0] ** 2

    result, _ = one_pass(plated, 10, objective=loss)
    assert result.train_loss[0] == pytest.approx(float(-log_joint(0.3)[0]) / N, rel=1e-4)


def own_rows(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    with pyro.plate("data", N, subsample_size=20) as rows:
        pyro.sample("y", dist.Normal(w * x[rows], 0.3), obs=y[rows])


def fixed_size(x, y):
    w = pyro.sample("w", dist.Normal(2.0, 0.1))
    with pyro.plate("data", N, subsample_size=10):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


@pytest.mark.parametrize("model", [own_rows, fixed_size])
def test_a_subsample_of_the_models_own_is_named(model):
    with pytest.raises(ValueError, match=r"plate 'data' .* takes a subsample of its own, [12]0 of 40.*batch_size=40"):
        one_pass(model, 10)


def test_all_subsampling_can_be_the_models():
    losses = [one_pass(own_rows, N, seed=seed)[0].train_loss[0] for seed in range(60)]
    exact = float(-log_joint(0.3)[0]) / N
    found = torch.tensor(losses)
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 60**0.5


def test_a_plate_of_other_data_than_those_trained_on_is_told():
    with pytest.warns(TrainingWarning, match=r"plate 'data' of the model has 40 data, training has 30"):
        one_pass(enlarged, 10, validation=0.25)
