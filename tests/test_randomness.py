"""Fingerprints: the same for the same bits wherever they lie, other ones after any change by any route."""

from __future__ import annotations

import time

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import LinearEnergy, TiltedDistribution
from pyro_ebm.randomness import fingerprint, one_source

LARGE = 3 * 2**14 + 5  # single precision: three whole pieces and a rest


def test_values_order_and_salt_are_told_apart():
    x = torch.tensor([0.0, 1.0, 1.0, 0.0])
    others = [
        [torch.tensor([1.0, 0.0, 0.0, 1.0])],  # the same norm and sum
        [torch.tensor([-0.5, 1.0, 1.0, 0.5])],
        [x + 1e-6],
        [x, x],
        [x[:2], x[2:]],
        [x.reshape(2, 2)],
        [x.double()],
        [x.to(torch.bfloat16)],
        [x.bool()],
        [x.long()],
        [x + 1j],
        [x, torch.zeros(0)],
        [],
    ]
    assert len({fingerprint(tensors) for tensors in ([x], *others)}) == len(others) + 1
    assert fingerprint([x], 0) != fingerprint([x], 1) != fingerprint([x])
    assert fingerprint([]) != fingerprint([], "salt")


def test_the_same_values_wherever_they_lie():
    x = torch.randn(300, 200)
    parameter = nn.Parameter(x.clone())
    with torch.inference_mode():
        inference = x.clone()
    for other in (x.clone(), x.T.contiguous().T, torch.cat([x, x])[300:], parameter, inference):
        assert fingerprint([other]) == fingerprint([x])
    for size in (1, 5, LARGE):
        assert fingerprint([torch.ones(()).expand(size)]) == fingerprint([torch.ones(size)])


def test_every_process_on_every_machine_finds_these_numbers():
    """A resumed run goes on with the draws of the run that stopped only where this holds."""
    assert fingerprint([torch.arange(300_000.0)], "salt") == 2885456068289364096
    assert fingerprint([torch.tensor([1.0, -2.5])], "salt", 3) == 2604536607408191426


@pytest.mark.parametrize("size", [7, LARGE], ids=["small", "large"])
def test_every_single_change_is_seen(size):
    x = torch.randn(size)
    before = fingerprint([x])
    for index in {0, 1, size // 2, min(2**14, size) - 1, 2**14 % size, size - 2, size - 1}:
        for change in (torch.neg, lambda v: torch.nextafter(v, torch.tensor(9.0)), lambda v: 0 * v):
            y = x.clone()
            y[index] = change(y[index])
            assert fingerprint([y]) != before
    swapped, all_flipped = x.clone(), -x
    swapped[[0, -1]] = x[[-1, 0]]
    assert len({before, fingerprint([swapped]), fingerprint([all_flipped]), fingerprint([x.flip(0)])}) == 4


def by_data(energy):
    energy.a.data[0] += 1.0


def by_data_of_a_part(energy):
    energy.a.data[3:5].neg_()


def by_shared_array(energy):
    energy.a.detach().numpy()[1] = 7.0


def by_no_grad(energy):
    with torch.no_grad():
        energy.a[2] = 3.0


def by_other_storage(energy):
    energy.a.data = energy.a.data + 1.0


def by_vector(energy):
    flat = nn.utils.parameters_to_vector(energy.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, energy.parameters())
    flat += 1.0  # the parameters are views of it now


def by_state(energy):
    energy.load_state_dict({"a": torch.randn(energy.a.shape)})


def by_optimizer(**options):
    def change(energy):
        energy.a.grad = torch.ones_like(energy.a)
        torch.optim.Adam(energy.parameters(), lr=0.1, **options).step()

    return change


ROUTES = {
    "data": by_data,
    "part of data": by_data_of_a_part,
    "array": by_shared_array,
    "no_grad": by_no_grad,
    "storage": by_other_storage,
    "vector": by_vector,
    "state": by_state,
    "Adam": by_optimizer(),
    "foreach": by_optimizer(foreach=True),
    "fused": by_optimizer(fused=True),
}


@pytest.mark.parametrize("size", [8, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_log_z_follows_the_weights_by_whatever_route_they_change(route, size):
    """A stale log Z would train a tilt on the draws, and report the constant, of other weights."""
    energy = LinearEnergy(torch.linspace(0.01, 0.02, size))
    base = dist.Normal(torch.zeros(size), 0.01).to_event(1)
    tilted = TiltedDistribution(base, energy)
    tilted.normalizer = type(tilted.normalizer)(num_samples=8)
    point = torch.zeros(size)
    with torch.no_grad():
        assert torch.equal(tilted.log_prob(point), tilted.log_prob(point))
        route(energy)
        fresh = TiltedDistribution(base, energy, normalizer=tilted.normalizer)
        assert torch.equal(tilted.log_prob(point), fresh.log_prob(point))


def test_a_freed_address_gives_no_stale_number():
    found = set()
    for number in range(50):  # the allocator hands out the same memory again and again
        found.add(fingerprint([torch.full((1000,), float(number))]))
    assert len(found) == 50


def test_batched_values_do_not_disturb_the_weights_fingerprint():
    tilted = TiltedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([1.0, 0.5]))
    points = torch.randn(5, 2)
    torch.testing.assert_close(torch.vmap(tilted.log_prob, randomness="same")(points), tilted.log_prob(points))


def test_one_pass_over_the_weights_is_cheap():
    """At each training step all weights are read: a millisecond for a million of them, ten on a slow machine."""
    weights = [torch.randn(1000, 1000)]
    fingerprint(weights)
    spent = []
    for _ in range(5):
        began = time.thread_time()
        fingerprint(weights)
        spent.append(time.thread_time() - began)
    assert min(spent) < 0.01


def test_seed_and_generator_exclude_each_other():
    one_source(1, None)
    one_source(None, torch.Generator())
    with pytest.raises(ValueError, match="seed and generator both given: one source of randomness, please"):
        one_source(0, torch.Generator())
