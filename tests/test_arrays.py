"""Arrays and tables as tensors: which dtype they get, that they are copied, and what is left alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

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
    "table, kind",
    [(pd.DataFrame({"name": ["u", "v"], "b": [1, 2]}), "DataFrame"), (pd.Series(["u"], name="name"), "Series")],
)
def test_a_table_with_words_is_an_error(table, kind):
    with pytest.raises(TypeError, match=rf"the columns \['name'\] of a pandas {kind} are no numbers; encode them"):
        as_tensor(table)
