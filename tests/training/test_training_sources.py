"""fit() on arrays, tables, a Dataset and a DataLoader: the same weights as on tensors, or the order of the loader."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_ebm import Checkpoint, fit
from pyro_ebm.training.sources import source_of, validation_of

X = torch.linspace(-1.0, 1.0, 20)
Y = 2.0 * X + 0.5
CPU = torch.device("cpu")


class Line(nn.Module):
    """y = slope x + noise of scale one; keeps the batches it was given."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.seen = []

    def model(self, x, y):
        self.seen.extend([x.detach().clone()] if torch.is_grad_enabled() else [])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x, 1.0), obs=y)

    def guide(self, x, y):
        pass


class Items(Dataset):
    """Reads one item at a time, and counts how often."""

    def __init__(self, num=20):
        self.num, self.read = num, 0

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        self.read += 1
        return X[index].double().numpy(), float(Y[index])


class Stream(IterableDataset):
    def __init__(self, num=20):
        self.num = num

    def __iter__(self):
        yield from zip(X[: self.num], Y[: self.num], strict=True)


def trained(data, **options):
    line = Line()
    options = {"epochs": 3, "batch_size": 6, "seed": 0, "progress": False, **options}
    return line, fit(line.model, line.guide, data, **options)


KINDS = {
    "arrays": lambda: (X.double().numpy(), Y.numpy()),
    "series": lambda: [pd.Series(X.numpy()), pd.Series(Y.double().numpy())],
    "tensors in a dataset": lambda: TensorDataset(X, Y),
    "dataset": Items,
}


@pytest.mark.parametrize("validation", [0.2, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_data_changes_nothing(kind, validation):
    """The same order, the same share held apart, the same weights."""
    expected, record = trained((X, Y), validation=validation)
    line, found = trained(KINDS[kind](), validation=validation)
    assert torch.equal(line.slope, expected.slope) and line.slope != 0
    assert (found.train_loss, found.validation_loss) == (record.train_loss, record.validation_loss)


def test_a_table_is_a_matrix():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def model(self, rows):
            with pyro.plate("data", len(rows)):
                pyro.sample("rows", dist.Normal(self.loc, 1.0).to_event(1), obs=rows)

    rows = Rows()
    fit(rows.model, lambda rows: None, pd.DataFrame({"x": X.numpy(), "y": Y.numpy()}), train=rows, epochs=1,
        validation=None, seed=0, progress=False)  # fmt: skip
    assert rows.loc[1] != 0


def test_a_dataset_is_read_as_it_is_needed():
    items = Items()
    source = source_of("data", items)
    next(source.batches(6, CPU, torch.Generator().manual_seed(0)))
    assert items.read == 6


def test_a_loader_keeps_its_batches_and_their_order():
    line, result = trained(DataLoader(TensorDataset(X, Y), batch_size=8), validation=None, epochs=1)
    assert [len(x) for x in line.seen] == [8, 8, 4] and torch.equal(torch.cat(line.seen), X)
    assert len(result.train_loss) == 1


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_a_run_on_a_loader_or_dataset_resumes_exactly(kind, tmp_path):
    def data():
        return DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True) if kind == "loader" else Items()

    whole, result = trained(data(), validation=None, epochs=4)
    trained(data(), validation=None, epochs=2, checkpoint=tmp_path / "run.pt")
    line, resumed = trained(data(), validation=None, epochs=4, checkpoint=Checkpoint(tmp_path / "run.pt", resume=True))
    assert torch.equal(line.slope, whole.slope) and resumed.train_loss == result.train_loss
    assert not torch.equal(torch.cat(whole.seen[:4]), X)  # it did shuffle


def test_a_stream_and_a_second_loader_to_validate_on():
    data, other = DataLoader(Stream(), batch_size=6), DataLoader(TensorDataset(X[:5], Y[:5]), batch_size=2)
    line, result = trained(data, validation=other, epochs=2)
    expected, record = trained((X, Y), validation=(X[:5], Y[:5]), epochs=2)
    assert len(result.validation_loss) == 2 and result.validation_loss[-1] < result.validation_loss[0]
    losses = -dist.Normal(line.slope.detach() * X[:5], 1.0).log_prob(Y[:5]).mean()
    assert result.validation_loss[-1] == pytest.approx(float(losses))  # per datum, though batches differ in size


@pytest.mark.parametrize(
    "data, options, error, match",
    [
        (DataLoader(TensorDataset(X, Y)), {}, ValueError, "validation=0.1: no share of a DataLoader can be held apart"),
        (Stream(), {}, TypeError, "data is an Stream, which has no length: put it into a DataLoader"),
        (Items(0), {}, ValueError, "data must hold at least one item, got an empty Items"),
        (Items(2), {"validation": 0.9}, ValueError, "validation=0.9 leaves none of 2 data to train on"),
        (DataLoader(Stream(0)), {"validation": None}, ValueError, "data: the DataLoader gave no batch"),
        ({"z": X}, {}, TypeError, r"data is given by the names \['z'\], but the model takes \['x', 'y'\]"),
        ((np.array(["a"]), np.ones(1)), {}, TypeError, "got ndarray, Tensor"),
        (DataLoader([{"z": 1.0}]), {"validation": None}, TypeError, r"data is given by the names \['z'\], but"),
        (DataLoader(TensorDataset(X / 0, Y)), {"validation": None}, ValueError, r"a batch of data\[0\] must be finite"),
    ],
)  # fmt: skip
def test_data_that_will_not_do(data, options, error, match):
    with pytest.raises(error, match=match):
        trained(data, **options)


def test_looking_at_the_first_batch_changes_nothing(rng_untouched):
    source = source_of("data", DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True))
    with rng_untouched():
        assert len(source.first(6)[0]) == 6
    assert validation_of(None, source) == 0.0


@pytest.mark.parametrize("data", [(X, Y), Items()], ids=["tensors", "dataset"])
def test_all_data_at_once_come_in_their_order(data):
    """A model without a plate along its data may count on it, as one with a vector of effects."""
    line = Line()
    fit(line.model, line.guide, data, epochs=3, validation=None, seed=0, progress=False)
    assert len(line.seen) == 3 and all(torch.equal(x, X) for x in line.seen)


class OneIterator(IterableDataset):
    """A stream that begins anew at each pass, or never."""

    def __init__(self, num, anew):
        self.rows, self.anew = list(zip(X[:num], Y[:num], strict=True)), anew
        self.left = iter(self.rows)

    def __iter__(self):
        self.left = iter(self.rows) if self.anew else self.left
        return self

    def __next__(self):
        return next(self.left)


@pytest.mark.parametrize("num", [20, 4])
@pytest.mark.parametrize("anew", [True, False])
def test_looking_at_a_stream_loses_none_of_it(num, anew):
    line = Line()
    stream = DataLoader(OneIterator(num, anew), batch_size=4)
    fit(line.model, line.guide, stream, epochs=1, validation=None, seed=0, progress=False)
    assert torch.equal(torch.cat(line.seen), X[:num])
