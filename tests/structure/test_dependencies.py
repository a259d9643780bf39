"""What one run of a model shows: dependencies, plates, inputs, subsampling."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_ebm.structure import (
    event_dim_of,
    latent_sites,
    model_structure,
    observed_sites,
    plate_depth,
    prototype_trace,
    unconditioned,
)


def hierarchy(c, x=None, *, batch=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    twice = pyro.deterministic("twice", 2 * mu)
    with pyro.plate("outer", 3, dim=-2):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(c), subsample_size=batch, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(c[index], 1.0))
            y = pyro.sample("y", dist.Normal(z + twice, 1.0))
            pyro.factor("penalty", -(y**2))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)


C = torch.arange(4.0)


def test_order_leaves_bookkeeping_out():
    structure = model_structure(hierarchy, (C,), {"batch": 2})
    assert structure.order == ("mu", "twice", "w", "z", "y", "x")
    assert structure.subsampled == {"data"}
    assert structure.sizes == {"outer": 3, "data": 2}
    assert structure.max_plate_nesting == 2
    assert model_structure(hierarchy, (C,), {}).subsampled == frozenset()


def test_ancestors_go_through_deterministic_sites():
    ancestors = model_structure(hierarchy, (C,), {}).ancestors
    assert ancestors["mu"] == ancestors["w"] == ancestors["z"] == frozenset()
    assert ancestors["twice"] == {"mu"}
    assert ancestors["y"] == {"z", "twice", "mu"}
    assert ancestors["x"] == {"y", "z", "twice", "mu"}


@pytest.mark.parametrize("how", ["index", "where", "matmul", "distribution"])
def test_ancestors_through_kinds_of_operations(how):
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        if how == "index":
            loc = torch.tensor([-1.0, 1.0])[k]
        elif how == "where":
            loc = torch.where(k > 0, 1.0, -1.0)
        elif how == "matmul":
            loc = (torch.eye(2)[k] @ torch.ones(2, 1)).squeeze(-1)
        else:
            loc = dist.Normal(k.float(), 1.0).mean
        pyro.sample("x", dist.Normal(loc, 1.0))

    assert model_structure(model, (), {}).ancestors["x"] == {"k"}


def test_inputs_are_seen_but_observations_do_not_count():
    x = torch.zeros(3, 4)
    structure = model_structure(hierarchy, (C, x), {})
    assert structure.uses_inputs == {"z", "y", "x"}

    def simple(x=None):
        with pyro.plate("data", 4 if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert model_structure(simple, (), {"x": torch.ones(5)}).uses_inputs == frozenset()


def test_plates_shared_by_a_site_and_all_it_depends_on():
    structure = model_structure(hierarchy, (C,), {})
    assert structure.plates["y"] == {"outer": -2, "data": -1}
    assert structure.free_plates(["z"]) == {"outer": -2, "data": -1}
    assert structure.free_plates(["y"]) == {}  # mu is common to all elements
    assert structure.free_plates(["w"]) == {"outer": -2}
    assert structure.free_plates(["w", "z"]) == {"outer": -2}


def make(source):
    """A plate of three, z -> y; the slope of y reaches the model in different ways."""
    slope = torch.ones(3) if source == "same" else torch.tensor([1.0, 2.0, 3.0])

    def model(argument=None):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if source == "python numbers":
                loc = torch.stack([z[..., 0], 2 * z[..., 1], 3 * z[..., 2]], -1)
            else:
                loc = z * (slope if argument is None else argument)
            if source == "deterministic":
                loc = pyro.deterministic("loc", loc, event_dim=0)
            pyro.sample("y", dist.Normal(loc, 1.0))

    return model


@pytest.mark.parametrize("source", ["closure", "python numbers", "deterministic"])
def test_elements_with_laws_of_their_own_are_not_pooled(source):
    structure = model_structure(make(source), (), {})
    assert structure.uses_inputs == frozenset()  # provenance cannot see it
    assert structure.varying["z"] == frozenset()
    assert structure.varying["loc" if source == "deterministic" else "y"] == {"data"}
    assert structure.is_pooled(["z"]) and not structure.is_pooled(["y"])


def test_elements_with_one_law_are_pooled():
    structure = model_structure(make("same"), (), {})
    assert structure.is_pooled(["y"]) and structure.is_pooled(["z", "y"])
    # an argument may hold other numbers at the next call, so it never pools
    assert not model_structure(make("same"), (torch.ones(3),), {}).is_pooled(["y"])


def test_bounded_support_that_differs_by_element():
    def model():
        with pyro.plate("data", 2):
            pyro.sample("u", dist.Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0])))

    assert model_structure(model, (), {}).varying["u"] == {"data"}


def test_event_dims_of_deterministic_sites_leave_the_plates_out():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("default", z)
            pyro.deterministic("named", z, event_dim=1)
            pyro.deterministic("scalar", z.sum(-1), event_dim=0)
        pyro.deterministic("all", z)

    trace = poutine.trace(model).get_trace()
    dims = {name: event_dim_of(trace.nodes[name]) for name in model_structure(model, (), {}).order}
    assert dims == {"z": 1, "default": 1, "named": 1, "scalar": 0, "all": 2}


def test_unconditioned_draws_observations_and_keeps_deterministic_sites():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((3,), 9.0))
            return z, twice

    trace = poutine.trace(unconditioned(model)).get_trace()
    z, twice = trace.nodes["_RETURN"]["value"]
    assert torch.equal(twice, 2 * z)
    assert not trace.nodes["x"]["is_observed"] and (trace.nodes["x"]["value"] != 9.0).all()


def test_sites_of_a_trace():
    x = torch.zeros(3, 4)
    trace = prototype_trace(hierarchy, (C, x), {})
    assert list(latent_sites(trace)) == ["mu", "w", "z", "y"]
    observed = observed_sites(trace)
    assert "penalty" not in observed and torch.equal(observed["x"], x)
    assert plate_depth(trace) == 2
    assert plate_depth(poutine.trace(lambda: pyro.sample("a", dist.Normal(0.0, 1.0))).get_trace()) == 0


@pytest.mark.parametrize("look", [model_structure, prototype_trace])
def test_looking_leaves_no_trace(look, rng_untouched):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1))

    model = Model()
    with rng_untouched(), poutine.trace() as outer:
        look(model, (), {})
    assert list(outer.trace.nodes) == []
    assert model.training and int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("how", ["buffer", "item"])
def test_parents_that_tracking_cannot_see(how):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        loc = torch.zeros(2)
        loc[0] = a if how == "buffer" else a.item()
        pyro.deterministic("loc", loc)
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1))

    ancestors = model_structure(model, (), {}).ancestors
    assert {"a", "b"} <= ancestors["y"] and {"a", "b"} <= ancestors["loc"] and not ancestors["b"]
