"""Arrays and tables as tensors: which dtype they get, that they are copied, and what is left alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_ebm
from pyro_ebm import VAE, MLPEnergy, fit, fit_tilt, log_likelihood, tilt
from pyro_ebm.arrays import as_tensor, as_tensors

FRAME = pd.DataFrame({"a": [1, 2], "b": [0.5, -1.0]})


@pytest.mark.parametrize(
    "value, dtype, expected",
    [
        (np.array([1.0, 2.0]), torch.float32, [1.0, 2.0]),
        (np.array([1.0, 2.0], dtype=np.float16), torch.float32, [1.0, 2.0]),
        (np.array(3.0), torch.float32, 3.0),
        (np.arange(3), torch.int64, [0, 1, 2]),
        (np.arange(3, dtype=np.uint8), torch.uint8, [0, 1, 2]),
        (np.arange(3, dtype=np.uint32), torch.int64, [0, 1, 2]),
        (np.array([True, False]), torch.bool, [True, False]),
        (np.arange(3.0)[::-1], torch.float32, [2.0, 1.0, 0.0]),
        (np.arange(3, dtype=">i4"), torch.int32, [0, 1, 2]),
        (FRAME, torch.float32, [[1.0, 0.5], [2.0, -1.0]]),
        (FRAME["a"], torch.int64, [1, 2]),
        (FRAME["b"] > 0, torch.bool, [True, False]),
        (pd.Index([4, 5]), torch.int64, [4, 5]),
        (pd.Series([1, 2], dtype="Int64"), torch.int64, [1, 2]),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), torch.int64, [[1, 2]]),
    ],
)
def test_numbers_become_tensors(value, dtype, expected):
    found = as_tensor(value)
    assert found.dtype == dtype and found.tolist() == expected


def test_missing_values_are_nan():
    assert as_tensor(pd.Series([1, None], dtype="Int64")).isnan().tolist() == [False, True]


def test_floating_point_takes_the_default_dtype(monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert as_tensor(np.ones(2, dtype=np.float32)).dtype == torch.float64


def test_scalars_become_numbers():
    assert type(as_tensor(np.int64(3))) is int and type(as_tensor(np.float32(0.5))) is float


def test_an_array_is_copied_even_where_it_cannot_be_written():
    array = np.ones(2, dtype=np.float32)
    array.flags.writeable = False
    found = as_tensor(array)  # without torch's warning
    found += 1
    assert array.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [None, "x", 3, 0.5, [1, 2], np.array(["a"]), np.array([None]), object()])
def test_everything_else_is_left_alone(value):
    found = as_tensors((value,))[0]
    assert found is value or found == value


def test_tensors_keep_their_identity():
    x = torch.ones(2, dtype=torch.float64)
    found = as_tensors((x, {"y": (x, np.ones(1))}))
    assert found[0] is x and found[1]["y"][0] is x and isinstance(found[1]["y"][1], torch.Tensor)


@pytest.mark.parametrize(
    "table, said",
    [
        (pd.DataFrame({"name": ["u", "v"], "b": [1, 2]}), r"columns \['name'\] of a pandas DataFrame"),
        (pd.Series(["u"], name="name"), r"columns \['name'\] of a pandas Series"),
        (pd.Series(["u"], dtype="category"), r"values \(dtype category\) of a pandas Series"),
    ],
)
def test_a_table_with_words_is_an_error(table, said):
    with pytest.raises(TypeError, match=rf"the {said} are no numbers; encode them"):
        as_tensor(table)


# Functions that own the data they are given: arrays and tables do as tensors

G = torch.Generator().manual_seed(0)
ROWS, LABELS = torch.rand(60, 4, generator=G), torch.arange(60) % 3


def _vae():
    torch.manual_seed(0)
    return pyro_ebm.VAE((4,), latent_dim=1, hidden=(4,)).eval()


def _fitted(x):
    vae, energy = _vae(), pyro_ebm.LinearEnergy([0.0])
    model = pyro_ebm.tilt(vae.model, {"z": energy})
    pyro_ebm.fit_tilt(model, vae.guide, x, bound="elbo", max_steps=1, tolerance=None, folds=0, seed=0, progress=False)
    return energy.a.detach()


OWNERS = {
    "log_likelihood": lambda x, y: pyro_ebm.log_likelihood(_vae().model, _vae().guide, x, num_samples=4, seed=0).value,
    "posterior_draws": lambda x, y: pyro_ebm.posterior_draws(_vae().model, _vae().guide, x, num_samples=4, seed=0)[1],
    "snis_log_likelihood": lambda x, y: pyro_ebm.snis_log_likelihood(
        pyro_ebm.tilt(_vae().model, {"z": pyro_ebm.LinearEnergy([1.0])}), _vae().guide, x, num_samples=4, seed=0
    ).value,
    "fit_tilt": lambda x, y: _fitted(x),
    "biased_split": lambda x, y: pyro_ebm.biased_split(x, y, [0.4, 0.3, 0.3], 0.5, reference_size=6, test_size=6)
    .biased.images,
    "class_balance": lambda x, y: pyro_ebm.class_balance(y, (0, 1, 2), weights=x[:, 0]).proportions,
    "LabelClassifier": lambda x, y: pyro_ebm.LabelClassifier.fit(x, y).predict_proba(x),
    "density_ratio": lambda x, y: pyro_ebm.density_ratio(x[:30], x[30:]).log_ratio,
}


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "fit_tilt" else ()) for n in OWNERS])
def test_functions_that_own_data_take_arrays(name):
    expected = OWNERS[name](ROWS, LABELS)
    assert torch.equal(OWNERS[name](ROWS.double().numpy(), LABELS.numpy()), expected)
    if name not in ("class_balance", "density_ratio"):  # these tests take slices
        assert torch.equal(OWNERS[name](pd.DataFrame(ROWS.numpy()), pd.Series(LABELS.numpy())), expected)


def test_masked_entries_of_an_array_are_missing():
    whole = np.ma.masked_array([[1, 2], [3, 4]], [[False, False], [True, False]])
    assert torch.equal(as_tensor(whole).isnan(), torch.tensor([[False, False], [True, False]]))
    assert torch.equal(as_tensor(np.ma.masked_array([1, 2])), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        fit(VAE((2,), 1).model, VAE((2,), 1).guide, whole / 4)


@pytest.mark.parametrize("function", [fit, log_likelihood, fit_tilt])
def test_sparse_data_are_named(function):
    vae = VAE((2,), 1)
    model = tilt(vae.model, {"z": MLPEnergy((1,))}) if function is fit_tilt else vae.model
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo, .* x.to_dense\(\)"):
        function(model, vae.guide, torch.eye(2).to_sparse())
