"""Models that differ in the shapes of their sites, and in how these are put together."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

from tests.zoo.case import LOOP, VMAP, gaussian, normal_mean, registry

SHAPES, case = registry()
Y = torch.tensor([0.3, -1.0, 2.0])
X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
YX = torch.tensor([0.2, 0.9, 2.3, 2.7])
GROUP = torch.tensor([0, 0, 1, 1, 1])
YG = torch.tensor([0.5, 1.5, -1.0, -0.5, 0.0])
HALVED = (Y / 2, math.sqrt(0.5))
COEFFICIENTS = gaussian(torch.eye(2), X, 1.0, YX)
BY_GROUP = gaussian(torch.eye(2), torch.nn.functional.one_hot(GROUP).float(), 1.0, YG)


@case(Y[0], answers={"z": normal_mean(Y[:1])})
def scalar(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": HALVED}, ways=VMAP)
def vector_without_to_event(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(Y, answers={"z": HALVED})
def vector_with_to_event(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


@case(Y, answers={"z": normal_mean(Y)})
def one_plate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


NESTED = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 0.0, -2.0]])
_a_nested = gaussian(
    torch.tensor([[1.0, 1, 1], [1, 2, 1], [1, 1, 2]]),
    torch.tensor([[0.0, 1, 0]] * 3 + [[0.0, 0, 1]] * 3), 1.0, NESTED.flatten(),
)  # fmt: skip


@case(NESTED, answers={"mu": (_a_nested[0][0], _a_nested[1][0]), "a": (_a_nested[0][1:, None], _a_nested[1][1:, None])})
def nested_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


_design = torch.cat([torch.eye(2).repeat_interleave(3, 0), torch.eye(3).repeat(2, 1)], 1)
_crossed = gaussian(torch.eye(5), _design, 1.0, NESTED.flatten())


@case(
    NESTED,
    answers={"a": (_crossed[0][:2, None], _crossed[1][:2, None]), "b": (_crossed[0][2:], _crossed[1][2:])},
)
def crossed_plates(y):
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


@case(Y, answers={f"z_{i}": normal_mean(Y[i : i + 1]) for i in range(3)})
def sequential_plate(y):
    for i in pyro.plate("data", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


@case(Y, answers={"z_0": (Y / 3, math.sqrt(2 / 3)), "z_1": (2 * Y / 3, math.sqrt(2 / 3))})
def plate_inside_a_loop(y):
    loc = 0.0
    for t in range(2):
        with pyro.plate(f"data_{t}", len(y)):
            loc = pyro.sample(f"z_{t}", dist.Normal(loc, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@case(GROUP, YG, answers={"a": BY_GROUP}, ways=VMAP)
def group_indexing(group, y):
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)


@case(GROUP, YG, answers={"a": BY_GROUP})
def group_indexing_from_the_right(group, y):
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[..., group], 1.0), obs=y)


@case(X, YX, answers={"b": COEFFICIENTS}, ways=VMAP)
def matrix_times_vector(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


@case(X, YX, answers={"b": COEFFICIENTS}, ways=VMAP)
def matmul_method(x, y):
    with pyro.plate("columns", 2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.matmul(b), 1.0).to_event(1), obs=y)


@case(X, YX, answers={"b": COEFFICIENTS}, ways=VMAP)
def einsum(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.einsum("nd,d->n", x, b), 1.0).to_event(1), obs=y)


@case(X, YX, answers={"b": COEFFICIENTS})
def einsum_with_an_ellipsis(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.einsum("nd,...d->...n", x, b), 1.0).to_event(1), obs=y)


_walk = gaussian(torch.eye(3), torch.tensor([[-1.0, 1, 0], [0, -1, 1]]), 0.5, torch.tensor([1.0, -0.5]))


@case(torch.tensor([1.0, -0.5]), answers={"z": _walk}, ways=VMAP)
def slices(steps):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("steps", dist.Normal(z[1:] - z[:-1], 0.5).to_event(1), obs=steps)


_sum = gaussian(torch.eye(2), torch.ones(1, 2), 1.0, torch.tensor([1.5]))


@case(torch.tensor(1.5), answers={"z": _sum}, ways=VMAP)
def unbind(y):
    a, b = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)).unbind()
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


@case(YX[:2], answers={"a": normal_mean(YX[:1]), "b": normal_mean(YX[1:2])}, ways=VMAP)
def stack_in_front(y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.stack([a, b]), 1.0).to_event(1), obs=y)


@case(YX[:2], answers={"a": normal_mean(YX[:1]), "b": normal_mean(YX[1:2])})
def stack_behind(y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.stack([a, b], -1), 1.0).to_event(1), obs=y)


@case(Y, answers={"a": normal_mean(Y[:1]), "b": (Y[1:] / 2, math.sqrt(0.5))}, ways=VMAP)
def cat(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.cat([a[None], b]), 1.0).to_event(1), obs=y)


@case(YX[:2], answers={"a": normal_mean(YX[:1]), "b": normal_mean(YX[1:2])}, ways=LOOP)
def writes_into_a_buffer(y):
    loc = torch.zeros(2)
    loc[0] = pyro.sample("a", dist.Normal(0.0, 1.0))
    loc[1] = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


@case(Y, answers={"z": HALVED}, ways=VMAP)
def shape_asserts(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    assert z.shape == (3,)
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


@case(Y, answers={"z": normal_mean(Y)}, ways=LOOP)
def prints_and_items(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    f"z is {z.item():.2f}"  # noqa: B018  (what a user prints)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@case(torch.tensor(0.4), answers={"z": (0.2, math.sqrt(0.5))}, ways=LOOP)
def python_branch(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z > 0 else 1.0 * z
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@case(Y, answers={"z": normal_mean(Y)}, ways=VMAP)
def sums_over_everything(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("likelihood", dist.Normal(z, 1.0).log_prob(y[:, None]).sum())
