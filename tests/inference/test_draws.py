"""Draws: shapes are checked, weighted statistics are those of the weights."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from pyro_ebm import Draws, Estimate


def weighted():
    log_weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    return Draws(values={"z": torch.tensor([[0.0, 2.0, 4.0, 1e6]])}, method="snis", log_weights=log_weights)


def test_shapes_and_merging_of_chains():
    values = torch.arange(24.0).reshape(2, 3, 4)
    draws = Draws(values={"z": values}, method="nuts")
    assert (draws.num_chains, draws.num_draws) == (2, 3)
    assert torch.equal(draws.flat("z"), values.reshape(6, 4))
    assert torch.equal(draws.weights, torch.full((6,), 1 / 6))


def test_unweighted_moments_are_plain_ones():
    values = torch.randn(3, 50, 2)
    draws = Draws(values={"z": values}, method="nuts")
    torch.testing.assert_close(draws.mean("z"), values.mean((0, 1)))
    torch.testing.assert_close(draws.std("z"), values.flatten(0, 1).std(0, correction=0))


def test_weighted_moments():
    draws = weighted()
    assert float(draws.mean("z")) == pytest.approx(1.5)
    assert float(draws.std("z")) == pytest.approx(math.sqrt(0.5 * 1.5**2 + 0.25 * 0.5**2 + 0.25 * 2.5**2))
    assert float(draws.weights.sum()) == pytest.approx(1.0)


def test_moments_of_counts_and_classes():
    draws = Draws(values={"k": torch.tensor([[0, 1, 1, 1]])}, method="snis")
    assert float(draws.mean("k")) == 0.75
    assert float(draws.std("k")) == pytest.approx(math.sqrt(0.75 * 0.25))


def test_double_precision_stays():
    values = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert float(Draws(values={"z": values}, method="nuts").mean("z")) == pytest.approx(1 / 3, abs=1e-15)


def test_resample_honours_the_weights_and_keeps_sites_together():
    draws = weighted()
    draws = Draws(values={**draws.values, "twice": 2 * draws.values["z"]}, method="snis", log_weights=draws.log_weights)
    chosen = draws.resample(4000, generator=torch.Generator().manual_seed(0))
    assert chosen["z"].shape == (4000,)
    assert torch.equal(chosen["twice"], 2 * chosen["z"])
    assert not (chosen["z"] == 1e6).any()
    for value, weight in ((0.0, 0.5), (2.0, 0.25), (4.0, 0.25)):
        share = float((chosen["z"] == value).double().mean())
        assert abs(share - weight) < 4 * math.sqrt(weight * (1 - weight) / 4000)


def test_resample_from_a_generator_leaves_the_global_one_alone(rng_untouched):
    with rng_untouched():
        first = weighted().resample(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first["z"], weighted().resample(20, generator=torch.Generator().manual_seed(1))["z"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"values": {}}, "values is empty"),
        ({"values": {"z": torch.zeros(3)}}, r"same \(chain, draw\) shape"),
        ({"values": {"z": torch.zeros(2, 3), "y": torch.zeros(2, 4)}}, r"same \(chain, draw\) shape"),
        ({"values": {"z": torch.zeros(2, 3)}, "stats": {"lp": torch.zeros(3)}}, r"stats\['lp'\] must have shape"),
        ({"values": {"z": torch.zeros(2, 3)}, "log_weights": torch.zeros(6)}, "log_weights must have shape"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Draws(method="nuts", **arguments)


def test_statistics_and_log_z_may_be_per_datum():
    stats = {"acceptance_rate": torch.zeros(2, 3, 7), "lp": torch.zeros(2, 3)}
    log_z = Estimate(torch.zeros(7), torch.ones(7))
    draws = Draws({"z": torch.zeros(2, 3, 7)}, "chees", stats=stats, log_z=log_z)
    assert draws.stats["acceptance_rate"].shape == (2, 3, 7)
    assert draws.log_z.value.shape == (7,)
    with pytest.raises(ValueError, match=r"stats\['lp'\] must have shape \(2, 3\) .*, got \(3, 2, 7\)"):
        Draws({"z": torch.zeros(2, 3, 7)}, "chees", stats={"lp": torch.zeros(3, 2, 7)})


def test_unknown_site_lists_those_there_are():
    with pytest.raises(ValueError, match=r"site 'x' is not among the draws; sites: \['z'\]"):
        weighted().mean("x")


# The model behind draws


def by_hand(x):
    return x


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_share_the_model(copied):
    data = torch.zeros(3)
    draws = weighted().with_model(by_hand, data, flag=True)
    source = copied(draws).source
    assert source is draws.source and source.args[0] is data and source.kwargs == {"flag": True}
    assert repr(source) == "Source(by_hand(Tensor, flag=))"


@pytest.mark.parametrize("model", [lambda: None, by_hand])
def test_pickled_draws_come_back_without_the_model(model):
    draws = weighted().with_model(model, torch.zeros(100_000))
    data = pickle.dumps(draws)
    assert len(data) < 5_000
    back = pickle.loads(data)
    assert back.source is None and torch.equal(back.values["z"], draws.values["z"])
    assert back.with_model(model).source.model is model


def test_equally_weighted_draws_follow_the_weights():
    draws = replace(weighted(), stats={"lp": torch.tensor([[0.0, 2.0, 4.0, 1e6]])})
    equal = draws.equally_weighted(20_000, generator=torch.Generator().manual_seed(0))
    assert equal.log_weights is None and equal.values["z"].shape == (1, 20_000)
    assert torch.equal(equal.stats["lp"], equal.values["z"])  # rows stay together
    assert abs(float(equal.mean("z")) - 1.5) < 4 * float(draws.std("z")) / math.sqrt(20_000)
    assert draws.equally_weighted().num_draws == 4
    even = replace(draws, log_weights=torch.full((1, 4), -math.log(4)))
    once = even.equally_weighted(generator=torch.Generator().manual_seed(0)).flat("z")
    assert sorted(once.tolist()) == sorted(draws.flat("z").tolist())  # each as often as its weight asks for
    chains = Draws({"z": torch.zeros(2, 3)}, "nuts")
    assert chains.equally_weighted() is chains


def test_dataframe_of_chains():
    values = {"mu": torch.arange(6.0).reshape(2, 3), "w": torch.arange(24.0).reshape(2, 3, 2, 2)}
    values["n"] = torch.ones(2, 3).long()
    table = Draws(values, "nuts").to_dataframe()
    assert list(table) == ["chain", "draw", "mu", "w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]", "n"]
    assert table["chain"].tolist() == [0, 0, 0, 1, 1, 1] and table["draw"].tolist() == [0, 1, 2, 0, 1, 2]
    row = table.query("chain == 1 and draw == 2").iloc[0]
    assert row["mu"] == 5.0 and row["w[1,0]"] == values["w"][1, 2, 1, 0]
    assert table["n"].dtype.kind == "i"


def test_dataframe_of_weighted_draws():
    table = weighted().to_dataframe()
    assert list(table) == ["chain", "draw", "weight", "z"]
    assert table["weight"].tolist() == pytest.approx([0.5, 0.25, 0.25, 0.0])
