"""Annotations as checks: what each admits, what is said of the rest, and what stays open."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_ebm import HMC, Draws, Normalizer, pyro_nuts
from pyro_ebm.annotations import checked
from pyro_ebm.inference import draws as draws_module


@checked
def call(
    seed: int | None = None, num_samples: int = 1, scale: float | None = None, strict: bool = False, name: str = "",
    function: Callable[..., Any] | None = None, shape: int | Sequence[int] = 1, names: Sequence[str] = (),
    values: Mapping[str, Tensor] | None = None, module: nn.Module | None = None, path: str | Path = "",
    open_ended: Any = None, unknown: NoSuchName = None, *args: int, **kwargs: int,  # noqa: F821
) -> str:  # fmt: skip
    """Returns."""
    return "called"


GOOD = {
    "seed": [None, 0, -1, 2**64 - 1, np.int64(3), torch.tensor(3)],
    "num_samples": [1, np.int32(7)],
    "scale": [None, 1, 0.5, np.float32(0.5), torch.tensor(0.5), float("inf")],
    "strict": [True, np.bool_(False)],
    "function": [None, len, nn.Identity()],
    "shape": [3, 0, (3, 4), [2], np.array([2, 3]), torch.Size([1])],
    "names": [(), ["a", "b"], np.array(["a"])],
    "values": [None, {}, {"a": torch.ones(2)}],
    "module": [None, nn.Identity()],
    "path": ["a", Path("a")],
    "open_ended": [3, "x", None],
    "unknown": [3, "x"],
    "other": ["goes to **kwargs, which are the model's"],
}
BAD = {
    "seed": [1.5, True, "a", 2**64, -(2**63) - 1, [3]],
    "num_samples": [0, -3, 1e4, True, None, "3", 10**30],
    "scale": [float("nan"), "1", True, 1j, [1.0], torch.ones(2), torch.tensor(True)],
    "strict": [1, 0, "yes", None],
    "name": [3, None, b"a"],
    "function": [3, "len"],
    "shape": [1.5, "3", (1.5,), ["a"], {2: 3}],
    "names": ["ab", [1], 3],
    "values": [[], {"a": 3}, 3],
    "module": [nn.Identity, 3],
    "path": [3, None, b"a"],
}


def pairs(table: Mapping[str, Sequence[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in table.items() for value in values]


@pytest.mark.parametrize("name, value", pairs(GOOD))
def test_what_the_annotation_says_is_let_through(name, value):
    assert call(**{name: value}) == "called"


@pytest.mark.parametrize("name, value", pairs(BAD))
def test_the_rest_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*got"):
        call(**{name: value})


def test_by_position_and_beyond():
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 0"):
        call(None, 0)
    everything = [None, 1, None, False, "", None, 1, (), None, None, "", None, None]
    assert call(*everything, "an argument of the model's") == "called"
    assert list(inspect.signature(call).parameters)[:2] == ["seed", "num_samples"]


@checked
@dataclass(frozen=True)
class Settings:
    """Of a class it is the constructor that is checked, by replace() too."""

    num_draws: int = 1


def test_classes():
    with pytest.raises(ValueError, match="num_draws must be a whole number of at least 1, got 0"):
        Settings(0)
    with pytest.raises(ValueError, match="num_draws"):
        replace(Settings(3), num_draws=2.5)


def root() -> None:
    """Never called: the arguments are looked at first."""
    raise AssertionError


@pytest.mark.parametrize(
    "bad",
    [
        lambda: HMC(root, target_accept_prob=2),
        lambda: pyro_nuts(root, target_accept_prob=2, progress=False),
        lambda: pyro_nuts(root, max_tree_depth=0, progress=False),
        lambda: HMC(root, max_tree_depth=0),
        lambda: HMC(root, trajectory_length=0.0),
        lambda: Normalizer(seed=10**30),
    ],
)
def test_limits_that_many_share(bad):
    with pytest.raises(ValueError, match="(target_accept_prob|max_tree_depth|trajectory_length|seed) must be"):
        bad()


def test_more_draws_than_multinomial_takes(monkeypatch):
    """torch.multinomial takes 2 ** 24 weights at most."""
    monkeypatch.setattr(draws_module, "_MOST_CATEGORIES", 10)
    weights = torch.tensor([[0.1, 0.2, 0.7]]).repeat(1, 40)
    draws = Draws({"z": torch.arange(3.0).repeat(40)[None]}, "snis", log_weights=weights.log().log_softmax(-1))
    found = draws.resample(20_000, generator=torch.Generator().manual_seed(0))["z"]
    shares = torch.stack([(found == k).double().mean() for k in range(3)])
    error = (shares * (1 - shares) / 20_000).sqrt()
    assert ((shares - torch.tensor([0.1, 0.2, 0.7]).double()).abs() < 4 * error).all()
    assert draws.resample(5)["z"].shape == (5,)
