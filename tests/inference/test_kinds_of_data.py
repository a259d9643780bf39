"""One answer for the same data however they come, at every entry point that takes data and a guide."""

from __future__ import annotations

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_ebm import LinearEnergy, fit, fit_tilt, log_likelihood, posterior_draws, snis_log_likelihood, tilt

W = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.6]])
N, BATCH = 12, 5


class Conditional(nn.Module):
    """p(y | x) with z ~ N(0, I): linear and Gaussian, y ~ N(x + z W + shift, 1)."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def model(self, x, y, shift=0.0):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.slope * x + z @ W + shift, 1.0).to_event(1), obs=y)

    def guide(self, x, y, shift=0.0):
        spread = torch.linalg.inv(torch.eye(2) + W @ W.T)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal((y - x - shift) @ W.T @ spread, spread))


def truth(x, y, shift=0.0):
    return dist.MultivariateNormal(x + shift, torch.eye(3) + W.T @ W).log_prob(y)


class Items(Dataset):
    def __init__(self, *parts, names=None):
        self.parts, self.names = parts, names

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        row = tuple(part[index] for part in self.parts)
        return row if self.names is None else dict(zip(self.names, row, strict=True))


def arrays(x, y):
    return tuple(np.asarray(part, dtype=np.float64) for part in (x, y))


KINDS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "arrays": arrays,
    "dict": lambda x, y: {"y": y, "x": x},
    "tensor dataset": TensorDataset,
    "dataset": Items,
    "dataset of dicts": lambda x, y: Items(x, y, names=("x", "y")),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=BATCH),
    "loader of dicts": lambda x, y: DataLoader(Items(x, y, names=("x", "y")), batch_size=BATCH),
}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator)
    return x, x + torch.randn(N, 2, generator=generator) @ W + torch.randn(N, 3, generator=generator)


def of_log_likelihood(pair, given):
    return log_likelihood(pair.model, pair.guide, given, num_samples=20, batch_size=BATCH, seed=0).value


def of_posterior_draws(pair, given):
    values, weights = posterior_draws(pair.model, pair.guide, given, num_samples=4, batch_size=BATCH, seed=0)
    return torch.cat([values["z"].flatten(1), weights], 1)


def of_snis(pair, given):
    tilted = tilt(pair.model, {"z": LinearEnergy([0.3, -0.2])})
    options = {"num_samples": 8, "num_proposals": 16, "seed": 0}
    return snis_log_likelihood(tilted, pair.guide, given, batch_size=N, **options).value


def of_fit(pair, given):
    """Before the first step the guide is the posterior: the loss is exact, whatever the order of the data."""
    if isinstance(given, DataLoader):
        given = DataLoader(given.dataset, batch_size=N)
    result = fit(pair.model, pair.guide, given, epochs=1, batch_size=N, validation=None, seed=0, progress=False)
    return torch.tensor(result.train_loss)


def of_fit_tilt(pair, given, bound="exact"):
    energy = LinearEnergy([0.0, 0.0])
    tilted = tilt(pair.model, {"z": energy})
    options = {"max_steps": 3, "tolerance": None, "num_particles": 4, "seed": 0, "progress": False}
    result = fit_tilt(tilted, pair.guide, given, bound=bound, folds=2 if bound == "exact" else 0, **options)
    return torch.cat([energy.a.detach(), torch.tensor(result.train_loss)])


def of_fit_tilt_by_the_elbo(pair, given):
    return of_fit_tilt(pair, given, "elbo")


ENTRY_POINTS = [of_log_likelihood, of_posterior_draws, of_snis, of_fit, of_fit_tilt, of_fit_tilt_by_the_elbo]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_same_data_the_same_answer(entry_point, kind):
    expected = entry_point(Conditional(), data())
    found = entry_point(Conditional(), KINDS[kind](*data()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_inputs_have_the_exact_likelihood(kind):
    """The guide is the posterior: the estimate has no error."""
    pair = Conditional()
    x, y = data()
    found = log_likelihood(pair.model, pair.guide, KINDS[kind](x, y), num_samples=5, batch_size=BATCH, seed=0)
    torch.testing.assert_close(found.value, truth(x, y), atol=1e-4, rtol=1e-4)
    shifted = log_likelihood(pair.model, pair.guide, KINDS[kind](x, y), num_samples=5, shift=0.5, seed=0)
    torch.testing.assert_close(shifted.value, truth(x, y, 0.5), atol=1e-4, rtol=1e-4)


def test_a_tilt_of_two_inputs_has_the_exact_likelihood():
    """With z ~ N(a, I), y | x ~ N(x + a W, I + W'W)."""
    pair, a = Conditional(), torch.tensor([0.6, -0.4])
    x, y = data()
    tilted = tilt(pair.model, {"z": LinearEnergy(a)})
    found = log_likelihood(tilted, pair.guide, {"x": x, "y": y}, num_samples=1000, batch_size=BATCH, seed=0)
    expected = truth(x, y, a @ W)
    assert ((found.value - expected).abs() < 4 * found.se).all() and (found.se < 0.1).all()


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_data_by_other_names_are_refused(entry_point):
    x, y = data()
    with pytest.raises(TypeError, match=r"is given by the names \['x', 'z'\], but the model takes \['x', 'y', 's"):
        entry_point(Conditional(), {"x": x, "z": y})
    with pytest.raises(TypeError, match=r"given by the names \['y'\], .* give its first ones, none left out"):
        entry_point(Conditional(), {"y": y})


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_guide_with_another_order_is_refused(entry_point):
    class Turned(Conditional):
        def guide(self, y, x, shift=0.0):
            return super().guide(x, y, shift)

    with pytest.raises(TypeError, match=r"model and guide take \['x', 'y'\] and \['y', 'x'\]: give both one order"):
        entry_point(Turned(), KINDS["dict"](*data()))


def test_a_keyword_with_a_row_for_each_datum_is_refused():
    pair, (x, y) = Conditional(), data()
    with pytest.raises(ValueError, match="shift has a row for each of the 12 data: give it with them"):
        log_likelihood(pair.model, pair.guide, (x, y), shift=torch.zeros(N, 3))


@pytest.mark.parametrize("call", [log_likelihood, functools.partial(posterior_draws, num_samples=2)])
def test_misspelt_options_are_named(call):
    pair, (x, y) = Conditional(), data()
    with pytest.raises(TypeError, match=r"\(\) has no option \['shfit'\]"):
        call(pair.model, pair.guide, (x, y), shfit=1.0)


@pytest.mark.parametrize("given", [(torch.ones(3, 3), torch.ones(2, 3)), torch.tensor(1.0), (), torch.ones(0, 3), "x"])
def test_what_is_no_data_is_named(given):
    pair = Conditional()
    with pytest.raises((TypeError, ValueError), match="x must (be a tensor|hold tensors with the same first dim)"):
        log_likelihood(pair.model, pair.guide, given)
