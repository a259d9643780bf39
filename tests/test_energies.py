"""Every energy: shapes, precision, errors; sums, scalings, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_ebm import ConvEnergy, Energy, LinearEnergy, MLPEnergy, QuadraticEnergy
from pyro_ebm.energies import FunctionEnergy, as_energy, gaussian_log_normalizer

# name -> (builder, event shape)
ENERGIES = {
    "mlp": (lambda: MLPEnergy(3, hidden=(8,)), (3,)),
    "mlp image": (lambda: MLPEnergy((2, 3), hidden=(4, 4)), (2, 3)),
    "mlp scalar": (lambda: MLPEnergy((), hidden=(4,)), ()),
    "mlp no hidden layer": (lambda: MLPEnergy(3, hidden=()), (3,)),
    "conv": (lambda: ConvEnergy((1, 8, 6), channels=(2, 3)), (1, 8, 6)),
    "linear": (lambda: LinearEnergy([1.0, -2.0, 0.5]), (3,)),
    "linear scalar": (lambda: LinearEnergy(0.5), ()),
    "quadratic": (lambda: QuadraticEnergy(0.7), (3,)),
    "quadratic scalar": (lambda: QuadraticEnergy(0.7, event_dim=0), ()),
    "quadratic matrix": (lambda: QuadraticEnergy(0.7, event_dim=2), (2, 3)),
    "sum": (lambda: LinearEnergy([1.0, 2.0]) + QuadraticEnergy(1.0) + MLPEnergy(2, hidden=(4,)), (2,)),
    "scaled": (lambda: 0.5 * LinearEnergy([1.0, 2.0]), (2,)),
    "function": (lambda: as_energy(lambda value: value.sum(-1)), (4,)),
    "module": (lambda: as_energy(nn.Sequential(nn.Linear(4, 1), nn.Flatten(-2))), (4,)),
}


@pytest.fixture(params=ENERGIES)
def case(request):
    build, event_shape = ENERGIES[request.param]
    return build(), event_shape


@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (3, 1, 2)])
def test_batch_shape(case, batch):
    energy, event_shape = case
    if isinstance(getattr(energy, "function", None), nn.Sequential) and not batch:
        pytest.skip("nn.Flatten(-2) needs a batch")
    value = torch.randn((*batch, *event_shape))
    result = energy(value)
    assert result.shape == torch.Size(batch)
    # each batch element's energy is that of the element alone
    flat = value.reshape(-1, *event_shape)
    alone = torch.stack([energy(v[None]).reshape(()) for v in flat])
    torch.testing.assert_close(result.flatten(), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_follows_the_value(case, dtype):
    energy, event_shape = case
    value = torch.randn(5, *event_shape, dtype=torch.float64)
    result = energy.to(dtype)(value.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(energy.double()(value), result.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "linear scalar", "quadratic", "scaled", "sum"])
def test_closed_forms_take_double_values_as_they_are(name):
    build, event_shape = ENERGIES[name]
    if name == "sum":
        pytest.skip("networks have one precision")
    value = torch.randn(5, *event_shape, dtype=torch.float64)
    assert build()(value).dtype == torch.float64


def test_gradient_reaches_value_and_parameters(case):
    energy, event_shape = case
    value = torch.randn(5, *event_shape, requires_grad=True)
    energy(value).sum().backward()
    assert value.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in energy.parameters())


def test_state_dict_round_trip(case):
    energy, event_shape = case
    value = torch.randn(5, *event_shape)
    before = energy(value)
    state = {name: tensor.clone() for name, tensor in energy.state_dict().items()}
    with torch.no_grad():
        for tensor in energy.state_dict().values():
            tensor += 1.0
    if state:
        assert not torch.equal(energy(value), before)
    energy.load_state_dict(state)
    torch.testing.assert_close(energy(value), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear scalar", "quadratic scalar", "mlp scalar"])
def test_values_of_discrete_sites(name):
    energy = ENERGIES[name][0]()
    value = torch.tensor([0, 1, 2])
    torch.testing.assert_close(energy(value), energy(value.float()))
    torch.testing.assert_close((0.5 * energy)(value), 0.5 * energy(value.float()))
    vector = torch.tensor([[0, 1, 1], [1, 0, 2]])
    torch.testing.assert_close(LinearEnergy([0.5, 0.25, 2.0])(vector), torch.tensor([-2.25, -4.5]))


def test_closed_form_values():
    value = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(LinearEnergy([3.0, 0.5])(value), torch.tensor([-4.0, 0.5]))
    torch.testing.assert_close(LinearEnergy(2.0)(value), -2 * value)
    torch.testing.assert_close(QuadraticEnergy(0.5)(value), torch.tensor([1.25, 0.25]))
    torch.testing.assert_close(QuadraticEnergy(0.5, event_dim=0)(value), 0.25 * value**2)
    torch.testing.assert_close(QuadraticEnergy(0.5, event_dim=2)(value), torch.tensor(1.5))


@pytest.mark.parametrize("name", ["mlp", "mlp image", "conv", "linear"])
def test_wrong_event_shape(name):
    build, event_shape = ENERGIES[name]
    energy = build()
    for shape in [(5, 7), (7,), (), (*event_shape, 1)]:
        with pytest.raises(ValueError, match=r"built for events of shape .*, got a value of shape"):
            energy(torch.zeros(shape))


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: MLPEnergy(0), "event_dim_size must be positive, got \\(0,\\)"),
        (lambda: ConvEnergy((1, 0, 3)), "event_shape must be positive"),
        (lambda: ConvEnergy((8, 8)), "event_shape must be \\(channels, height, width\\), got \\(8, 8\\)"),
        (lambda: LinearEnergy(torch.zeros(2, 2)), "a must be a number or a vector .* got shape \\(2, 2\\)"),
    ],
)
def test_wrong_constructor_arguments(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_an_energy_without_forward_says_so():
    class Empty(Energy):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define forward"):
        Empty()(torch.zeros(1))


def test_the_argument_is_copied():
    a = torch.ones(2)
    energy, curvature = LinearEnergy(a), QuadraticEnergy(torch.tensor(1.0))
    a += 1
    assert torch.equal(energy.a, torch.ones(2)) and isinstance(curvature.c, nn.Parameter)


# Sums and scalings


def test_sum_is_the_sum_in_any_order():
    e1, e2, e3 = LinearEnergy([1.0, 2.0]), QuadraticEnergy(0.3), MLPEnergy(2, hidden=(4,))
    value = torch.randn(7, 2)
    expected = e1(value) + e2(value) + e3(value)
    torch.testing.assert_close((e1 + e2 + e3)(value), expected)
    torch.testing.assert_close((e3 + (e2 + e1))(value), expected)
    assert torch.equal((e1 + e2)(value), (e2 + e1)(value))
    assert torch.equal((e1 + e1)(value), 2 * e1(value))


def test_nested_sums_flatten_and_share_parameters():
    e1, e2, e3 = LinearEnergy([1.0]), QuadraticEnergy(0.3), MLPEnergy(1, hidden=(4,))
    total = (e1 + e2) + (e3 + e1)
    assert list(total.terms) == [e1, e2, e3, e1]
    expected = {id(p) for e in (e1, e2, e3) for p in e.parameters()}
    assert {id(p) for p in total.parameters()} == expected
    assert len(list(total.parameters())) == len(expected)


@pytest.mark.parametrize("scale", [2, 0.5, -1.0, torch.tensor(0.5)])
def test_scaling_from_both_sides(scale):
    energy, value = MLPEnergy(2, hidden=(4,)), torch.randn(3, 2)
    expected = float(scale) * energy(value)
    torch.testing.assert_close((scale * energy)(value), expected)
    torch.testing.assert_close((energy * scale)(value), expected)
    torch.testing.assert_close((2 * (scale * energy))(value), 2 * expected)
    torch.testing.assert_close((scale * energy + energy)(value), expected + energy(value))
    assert {id(p) for p in (scale * energy).parameters()} == {id(p) for p in energy.parameters()}


def test_scale_is_saved_and_may_learn():
    energy = LinearEnergy([1.0])
    assert "scale" in (0.5 * energy).state_dict()
    beta = nn.Parameter(torch.tensor(0.5))
    learnable = beta * energy
    assert isinstance(learnable, Energy) and any(p is beta for p in learnable.parameters())
    learnable(torch.ones(3, 1)).sum().backward()
    assert float(beta.grad) == -3.0


def test_arithmetic_with_the_wrong_things():
    energy = LinearEnergy([1.0])
    for wrong in ("2", torch.ones(2), energy):
        with pytest.raises(TypeError, match="multiplied by a number"):
            energy * wrong
    with pytest.raises(TypeError, match="unsupported operand"):
        energy + 1.0
    with pytest.raises(TypeError, match="unsupported operand"):
        energy + (lambda value: value)


def test_a_term_of_the_wrong_shape_is_not_broadcast():
    energy = LinearEnergy([1.0, 1.0]) + as_energy(lambda value: value.sum())
    with pytest.raises(ValueError, match=r"terms of a sum .* \[\(4,\), \(\)\] for a value of shape \(4, 2\)"):
        energy(torch.zeros(4, 2))


# Anything callable


def test_as_energy():
    energy, net = LinearEnergy([1.0]), nn.Linear(3, 1)
    assert as_energy(energy) is energy
    assert isinstance(as_energy(torch.sum), FunctionEnergy)
    assert {id(p) for p in as_energy(net).parameters()} == {id(p) for p in net.parameters()}
    method = as_energy(energy.forward)  # a method: its owner's parameters learn too
    assert [id(p) for p in method.parameters()] == [id(energy.a)]
    value = torch.randn(4, 1)
    assert torch.equal((as_energy(energy.forward) + energy)(value), 2 * energy(value))
    with pytest.raises(TypeError, match=r"energies\['z'\] must be an Energy or a callable .* got float"):
        as_energy(1.0, name="energies['z']")


# Closed forms of log Z


@pytest.mark.parametrize("dim", [1, 3])
def test_gaussian_log_normalizer_against_a_grid(dim):
    loc, scale = torch.linspace(-0.5, 0.8, dim).double(), torch.linspace(0.6, 1.3, dim).double()
    grid = torch.linspace(-14, 14, 20001, dtype=torch.float64)[:, None]
    density = torch.distributions.Normal(loc, scale)
    linear, quadratic = LinearEnergy(torch.linspace(0.5, -1.0, dim)), QuadraticEnergy(0.7)
    # both factorise over the dimensions
    tilts = {linear: grid * linear.a.double(), quadratic: -0.5 * quadratic.c.double() * grid**2}
    for energy, log_tilt in tilts.items():
        factors = torch.trapezoid((density.log_prob(grid) + log_tilt).exp(), grid[:, 0], dim=0)
        torch.testing.assert_close(gaussian_log_normalizer(energy, loc, scale), factors.log().sum().double())


def test_gaussian_log_normalizer_standard_cases_and_batches():
    a = torch.tensor([1.0, -2.0])
    zero, one = torch.zeros(2), torch.ones(2)
    torch.testing.assert_close(gaussian_log_normalizer(LinearEnergy(a), zero, one), torch.tensor(2.5))
    expected = torch.tensor(-math.log(1.5))
    torch.testing.assert_close(gaussian_log_normalizer(QuadraticEnergy(0.5), zero, one), expected)
    batch = gaussian_log_normalizer(LinearEnergy(a), torch.randn(3, 1, 2), one)
    assert batch.shape == (3, 1)


def test_gaussian_log_normalizer_errors():
    with pytest.raises(ValueError, match=r"log Z is infinite: .* got c = -1.5"):
        gaussian_log_normalizer(QuadraticEnergy(-1.5), torch.zeros(2), torch.ones(2))
    with pytest.raises(TypeError, match="LinearEnergy or QuadraticEnergy, got MLPEnergy"):
        gaussian_log_normalizer(MLPEnergy(2), torch.zeros(2), torch.ones(2))
