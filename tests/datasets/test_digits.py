"""The bundled digits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from pyro_ebm.datasets import digits


def test_all_digits_are_scikit_learns() -> None:
    data, bunch = digits(), load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    assert data.labels.dtype == torch.int64
    assert data.name == "digits"
    assert data.images.min() == 0.0
    assert data.images.max() == 1.0
    torch.testing.assert_close(data.images[:, 0] * 16, torch.tensor(bunch.images, dtype=torch.float32))
    assert data.labels.tolist() == bunch.target.tolist()


def test_classes_are_selected_and_keep_their_labels() -> None:
    data = digits([7, 3])
    assert data.classes == (3, 7)
    assert data.counts == {3: 183, 7: 179}
    assert len(data) == 362
    assert data.event_shape == (1, 8, 8)
    everything = digits()
    assert torch.equal(data.images, everything.images[(everything.labels == 3) | (everything.labels == 7)])


@pytest.mark.parametrize(("classes", "message"), [([1, 12], r"unknown: \[12\]"), ([], "got none")])
def test_classes_that_do_not_exist(classes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"classes must be among the labels of digits.*{message}"):
        digits(classes)
