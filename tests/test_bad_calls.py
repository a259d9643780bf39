"""Bad values for arguments of every public name: an error that names the argument, at once, and nothing else."""

from __future__ import annotations

import random

import pytest

import pyro_ebm
from tests.bad_calls import BAD, RECORDS, Call, atoms, calls, fault, good_calls, is_bad

_QUICK = 250


@pytest.fixture(scope="module")
def goods():
    return good_calls()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Paths among the bad values are those of files that may be written."""
    monkeypatch.chdir(tmp_path)


def test_every_public_name_is_tried(goods):
    assert set(pyro_ebm.__all__) == set(goods) | RECORDS
    assert not set(goods) & RECORDS
    assert len(BAD) >= 12 and len(calls(goods)) > 5000


def test_what_an_annotation_admits():
    assert atoms("Mapping[str, Tensor | None] | np.ndarray | None") == {"Mapping", "ndarray", "None"}
    assert is_bad("seed", "int | None", "fraction") and not is_bad("seed", "int | None", "None")
    assert is_bad("num_samples", "int", "zero") and not is_bad("seed", "int", "minus one")


@pytest.mark.uses_global_rng
def test_good_calls_work(goods):
    """What is refused is refused for the one value that was changed."""
    for name in ("VAE", "MLPEnergy", "Draws", "importance", "tilt", "compare", "Normalizer"):
        goods[name].function(*goods[name].args, **goods[name].keywords)


@pytest.mark.uses_global_rng
def test_some_bad_values(goods):
    """A seeded part of them; `python -m tests.bad_calls 1000` tries more."""
    chosen = calls(goods)
    random.Random(0).shuffle(chosen)
    faults = {call: fault(call, goods) for call in chosen[:_QUICK]}
    assert {call: found for call, found in faults.items() if found} == {}


@pytest.mark.slow
@pytest.mark.uses_global_rng
def test_many_bad_values(goods):
    chosen = calls(goods)
    random.Random(1).shuffle(chosen)
    faults = {call: fault(call, goods) for call in chosen[:1500]}
    assert {call: found for call, found in faults.items() if found} == {}


def test_a_fault_is_seen(goods, monkeypatch):
    """The harness tells raw errors, errors without a name, and silence."""
    def accepts(num_samples: int) -> None: ...
    def raw(num_samples: int) -> None:
        raise AttributeError("'str' object has no attribute 'ndim'")
    def unnamed(num_samples: int) -> None:
        raise TypeError("'<' not supported")
    from tests.bad_calls import Good

    for function, word in ((accepts, "accepted"), (raw, "raw"), (unnamed, "unnamed")):
        found = fault(Call("f", "num_samples", "text"), {"f": Good(function, (), {"num_samples": 3})})
        assert found is not None and found.startswith(word)
