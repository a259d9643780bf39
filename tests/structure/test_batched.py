"""A model for many values at once: which way runs, that it is checked, and what is said where none does."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import LogDensity
from pyro_ebm.structure import BatchedModel, DoesNotBroadcast, batched_run, candidate_ways, slowest, unconditioned
from pyro_ebm.structure.batched import Layout

GROUP = torch.tensor([0, 1, 1])


def groups(y=None):
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(a[GROUP], 1.0), obs=y)


def hierarchy(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def branches():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Normal(z if z > 0 else -z, 1.0))


@pytest.mark.parametrize("model, way", [(hierarchy, "plate"), (groups, "vmap"), (branches, "loop")])
def test_the_first_way_that_serves(model, way):
    batch = batched_run(model, num=50)
    assert batch.way == way
    first, second = list(batch.values)[:2]
    assert all(len(value) == 50 for value in (*batch.values.values(), *batch.measured.values()))
    for name in (first, second):
        assert len(batch.values[name].unique()) == batch.values[name].numel()  # each run drew its own numbers
    torch.testing.assert_close(
        batch.measured[first], dist.Normal(0.0, 1.0).log_prob(batch.values[first]).reshape(50, -1).sum(1)
    )


@pytest.mark.parametrize("way", ["plate", "vmap", "loop"])
def test_values_given_in_part(way):
    """Mu is given: the rest is drawn from its distribution given that, in every way."""
    mu = torch.linspace(-50.0, 50.0, 101)
    batch = batched_run(hierarchy, values={"mu": mu}, vectorize=way)
    assert torch.equal(batch.values["mu"], mu) and batch.values["z"].shape == (101, 3)
    error = batch.values["z"] - mu[:, None]
    assert abs(float(error.mean())) < 5 / 303**0.5 and 0.8 < float(error.std()) < 1.2
    torch.testing.assert_close(batch.values["twice"], 2 * batch.values["z"])
    torch.testing.assert_close(batch.total, sum(batch.measured.values()))


@pytest.mark.parametrize("way", ["plate", "vmap", "loop"])
def test_dims_kept_and_sites_measured(way):
    model = BatchedModel(hierarchy, (), {}, vectorize=way, keep=(-1,), returned=["z"])
    batch = model.run(num=5, measure=lambda name, site: site["fn"].log_prob(site["value"]) if name == "z" else None)
    assert list(batch.measured) == ["z"] and batch.measured["z"].shape == (5, 3) and list(batch.values) == ["z"]


def test_data_kept_and_redrawn():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(batched_run(hierarchy, (y,), num=4).values["y"], y.expand(4, 3))
    drawn = batched_run(unconditioned(hierarchy), (y,), num=4)
    assert len(drawn.values["y"].unique()) == 12 and drawn.way == "plate"


def test_inside_another_plate():
    with pyro.plate("outer", 7, dim=-2), poutine.block():
        assert batched_run(hierarchy, num=4).values["z"].shape == (4, 3)


def test_the_way_is_found_once():
    calls = []

    def counted():
        calls.append(1)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    model = BatchedModel(counted, (), {})
    model.run(num=3)
    first = len(calls)
    model.run(num=3)
    assert len(calls) == first + 1 and model.way == "plate"


@pytest.mark.parametrize("way, site, reason", [
    ("plate", "y", "site 'y' gives other log probabilities for several runs at once than for each alone"),
    ("vmap", None, "data-dependent control flow"),
])  # fmt: skip
def test_what_fails_is_told(way, site, reason):
    def mixed():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if way == "vmap":
            z = z if z > 0 else -z
        pyro.sample("y", dist.Normal(z.sum(), 1.0))

    with pytest.raises(DoesNotBroadcast, match="the model does not broadcast: .*index from the right") as caught:
        batched_run(mixed, num=3, vectorize=way)
    (failure,) = caught.value.failures
    assert failure.way == way and failure.site == site and reason in failure.reason
    assert ('vectorize="vmap"' in str(caught.value)) == (way == "plate")


def test_wrong_deterministic_values_are_found_out():
    def cumulated():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("path", z.cumsum(0), event_dim=1)

    batch = batched_run(cumulated, num=5)
    assert batch.way == "vmap"
    torch.testing.assert_close(batch.values["path"], batch.values["z"].cumsum(1))
    with pytest.raises(DoesNotBroadcast, match="site 'path' gives other values"):
        batched_run(cumulated, num=5, vectorize="plate")


def test_shapes_that_fit_by_accident_are_found_out():
    """Two runs would pass: as many as a site has elements."""

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert len(b) == 2

    model_at_many = BatchedModel(model, (), {})
    assert model_at_many.choose() == "vmap" and len(model_at_many.run(num=5).values["b"]) == 5


@pytest.mark.parametrize("draw", [
    dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Poisson(3.0), dist.HalfCauchy(1.0), dist.Exponential(1.0),
    dist.Bernoulli(0.5), dist.Binomial(10, torch.tensor(0.5)), dist.Categorical(torch.ones(5)), dist.StudentT(3.0),
    dist.NegativeBinomial(torch.tensor(5.0), torch.tensor(0.5)), dist.LogNormal(0.0, 1.0),
], ids=lambda draw: type(draw).__name__)  # fmt: skip
def test_draws_under_vmap(draw):
    """Numbers of its own for each run, of the right distribution."""
    found = batched_run(lambda: pyro.sample("z", draw), num=4000, vectorize="vmap").values["z"].double()
    expected = draw.sample((4000,)).double()
    low, high = expected.clamp(max=20).mean(), found.clamp(max=20).mean()
    spread = expected.clamp(max=20).std()
    assert abs(low - high) < 5 * spread * (2 / 4000) ** 0.5
    assert abs(found.clamp(max=20).std() - spread) < 0.2 * spread


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"vectorize must be one of \('auto', 'plate', 'vmap', 'loop'\), got 'pmap'"):
        batched_run(hierarchy, num=3, vectorize="pmap")
    with pytest.raises(ValueError, match="num is needed where no values are given"):
        batched_run(hierarchy)
    with pytest.raises(ValueError, match=r"site 'z', of shape \(2,\), do not fit the model, which has \(3,\)"):
        batched_run(hierarchy, values={"z": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="values of site 'w'.*which has one of the sites"):
        batched_run(hierarchy, values={"w": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"values\['z'\] must have 4 rows, one a run, got 5"):
        batched_run(hierarchy, values={"mu": torch.zeros(4), "z": torch.zeros(5, 3)})


def test_sites_that_come_and_go():
    def model():
        if pyro.sample("z", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="other sites in some runs"):
        BatchedModel(model, (), {}, layout=Layout(0, {"z": torch.Size()}, {"z": 0}, ("z",))).run(num=40)


@pytest.mark.parametrize("num_sites", [2, 3])
def test_scalar_sites_stacked_in_front(num_sites):
    """As many runs as sites would fit by accident."""
    X = torch.arange(5.0 * num_sites).reshape(5, num_sites)

    def model():
        stacked = torch.stack([pyro.sample(f"b{i}", dist.Normal(0.0, 1.0)) for i in range(num_sites)])
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(X @ stacked, 1.0), obs=torch.zeros(5))

    assert batched_run(model, num=20).way == "vmap"
    assert LogDensity.from_model(model).proposal().draw(100).shape == (100, num_sites)


def test_a_model_with_numbers_of_its_own_is_no_reason_for_a_loop():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("noise", torch.rand(()) * z)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    assert batched_run(model, num=20).way == "plate"


def test_ways():
    assert candidate_ways("auto") == ("plate", "vmap", "loop") and candidate_ways("vmap") == ("vmap",)
    assert slowest("plate", "vmap") == "vmap" and slowest("loop", "plate") == "loop"
