"""Every energy: shapes, precision, errors; sums, scalings, closed forms."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    VAE,
    Checkpoint,
    ConvEnergy,
    Energy,
    LinearEnergy,
    LogDensity,
    MLPEnergy,
    QuadraticEnergy,
    TiltedDistribution,
    TiltELBO,
    fit,
    load_weights,
    log_normalizer,
    predictive,
    sample,
    save_weights,
    tilt,
)
from pyro_ebm.energies import FunctionEnergy, as_energy, gaussian_log_normalizer
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.modules import evaluation_mode

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
        (lambda: MLPEnergy(0), "event_shape must be positive, got \\(0,\\)"),
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
    # both factorize over the dimensions
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
    with pytest.raises(TypeError, match="LinearEnergy or a QuadraticEnergy, got MLPEnergy"):
        gaussian_log_normalizer(MLPEnergy(2), torch.zeros(2), torch.ones(2))


# Spectral norms

SPECTRAL = {
    "mlp": (lambda: MLPEnergy(3, hidden=(8, 8), spectral_norm=True), (3,)),
    "conv": (lambda: ConvEnergy((1, 8, 6), channels=(2, 3), spectral_norm=True), (1, 8, 6)),
}


@pytest.fixture(params=SPECTRAL)
def spectral(request):
    build, event_shape = SPECTRAL[request.param]
    return build(), torch.randn(5, *event_shape)


def layers_of(energy):
    return [module for module in energy.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def norms_of(energy):
    return torch.stack([torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) for layer in layers_of(energy)])


def stretch(energy, factor):
    """What an optimizer does: change the weights in place."""
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(factor)


def test_spectral_norms_are_one(spectral):
    energy, value = spectral
    stretch(energy, 10.0)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    for _ in range(200):  # one iteration for each change
        stretch(energy, 1.0)
        energy(value)
    torch.testing.assert_close(norms_of(energy.eval()), torch.ones(len(layers_of(energy))), rtol=1e-3, atol=0)


def test_spectral_norms_bound_the_slope():
    energy = SPECTRAL["mlp"][0]().eval()
    value = (3 * torch.randn(500, 3)).requires_grad_()
    (slope,) = torch.autograd.grad(energy(value).sum(), value)
    # the slope of SiLU is at most 1.1, and 15 iterations at the start come close to the norm
    assert float(slope.norm(dim=-1).max()) <= 1.1**2 * float(norms_of(energy).prod()) * (1 + 1e-5)
    assert float(norms_of(energy).max()) < 1.2


def test_calls_between_two_changes_are_of_one_function(spectral):
    energy, value = spectral
    energy.train()
    for _ in range(3):
        stretch(energy, 1.5)
        with torch.no_grad():
            layers_of(energy)[0].parametrizations.weight.original[0] += 1.0  # another largest singular vector
        first = energy(value)
        state = {name: tensor.clone() for name, tensor in energy.state_dict().items()}
        assert torch.equal(first, energy(value))
        assert torch.equal(first, energy.eval()(value))
        energy.train()
        assert all(torch.equal(state[name], tensor) for name, tensor in energy.state_dict().items())


def test_power_iteration_moves_in_training_mode_only(spectral):
    energy, value = spectral
    name = next(name for name in energy.state_dict() if name.endswith("_u"))
    with torch.no_grad():
        layers_of(energy)[0].parametrizations.weight.original.copy_(
            torch.randn_like(layers_of(energy)[0].parametrizations.weight.original)
        )
    before = energy.state_dict()[name].clone()
    energy.eval()(value)
    assert torch.equal(before, energy.state_dict()[name])
    with evaluation_mode(energy.train()):
        energy(value)
    assert torch.equal(before, energy.state_dict()[name])
    energy(value)
    assert not torch.equal(before, energy.state_dict()[name])


def test_spectral_norms_in_state_dicts_files_and_copies(spectral, tmp_path):
    energy, value = spectral
    stretch(energy, 2.0)
    expected = energy.train()(value)
    save_weights(energy, tmp_path / "energy.pt")
    other = SPECTRAL["mlp" if isinstance(energy, MLPEnergy) else "conv"][0]()
    load_weights(other, tmp_path / "energy.pt")
    twin = copy.deepcopy(energy)
    assert torch.equal(other.eval()(value), expected) and torch.equal(twin.eval()(value), expected)
    stretch(twin.train(), 3.0)
    with torch.no_grad():
        layers_of(twin)[0].parametrizations.weight.original[0] += 1.0
    assert not torch.equal(twin(value), expected) and torch.equal(energy(value), expected)


def test_spectral_norms_let_gradients_through(spectral):
    energy, value = spectral
    (energy(value).sum() - energy(value + 1).square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in energy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_norms_in_both_precisions(spectral, dtype):
    energy, value = spectral
    assert energy.to(dtype)(value.to(dtype)).dtype == dtype


def test_log_z_of_a_spectral_energy_is_kept_while_the_weights_are():
    energy = SPECTRAL["mlp"][0]()
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1)
    tilted, value = TiltedDistribution(base, energy.eval()), torch.zeros(3)
    with torch.no_grad():
        first = tilted.log_prob(value)
        assert torch.equal(tilted.log_prob(value), first)
        stretch(energy.train(), 1.0)
        layers_of(energy)[0].parametrizations.weight.original[0] += 5.0
        energy(value)
        assert not torch.equal(TiltedDistribution(base, energy.eval()).log_prob(value), first)
        assert not torch.equal(tilted.log_prob(value), first)


def test_a_captured_graph_of_a_spectral_energy():
    energy = SPECTRAL["mlp"][0]().eval()
    density = LogDensity(lambda u: -energy(u), 3)
    u = torch.randn(4, 3)
    graph = captured(density.value_and_grad, u)
    assert graph.kind == "captured"
    for ours, theirs in zip(graph(u + 1), density.value_and_grad(u + 1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_resumed_run_with_spectral_norms(tmp_path):
    """The vectors of the power iteration are part of the state."""
    x, vae = (torch.rand(20, 4) > 0.5).float(), VAE((4,), latent_dim=3, hidden=(4,))
    initial = SPECTRAL["mlp"][0]().state_dict()
    found = []
    for stops in ([4], [2, 4]):
        for epochs in stops:
            energy = SPECTRAL["mlp"][0]()
            energy.load_state_dict(initial)
            tilted = tilt(vae.model, {"z": energy})
            fit(
                tilted, vae.guide, x, objective=TiltELBO(), train=energy, epochs=epochs, batch_size=8, seed=0,
                progress=False, checkpoint=Checkpoint(tmp_path / f"{len(stops)}.pt", resume=epochs != stops[0]),
            )  # fmt: skip
        found.append(energy.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    moved = "net.0.parametrizations.weight.0._u"
    assert not torch.equal(found[0][moved], initial[moved])


def test_without_spectral_norms_nothing_changes():
    names = list(MLPEnergy(3, hidden=(8,)).state_dict())
    assert names == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert not list(MLPEnergy(3).buffers())


PRECISIONS = {
    "log_normalizer": lambda model, base, energy: log_normalizer(base, energy, num_samples=50),
    "distribution": lambda model, base, energy: TiltedDistribution(base, energy).sample((3,)),
    "snis": lambda model, base, energy: sample(tilt(model, {"z": energy}), method="snis", num_samples=50),
    "chees": lambda model, base, energy: sample(tilt(model, {"z": energy}), method="chees", progress=False),
    "smc": lambda model, base, energy: sample(tilt(model, {"z": energy}), method="smc", progress=False),
    "predictive": lambda model, base, energy: predictive(tilt(model, {"z": energy}), num_samples=5),
}


@pytest.mark.parametrize("call", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("kind", ["network", "function", "convolution"])
def test_an_energy_of_another_precision_is_named(call, kind):
    shape = (1, 4, 4) if kind == "convolution" else (2,)
    base = dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(len(shape))
    matrix = torch.ones(2, 2)
    energy = {
        "network": MLPEnergy((2,), hidden=(3,)),
        "function": lambda z: (z @ matrix).sum(-1),
        "convolution": ConvEnergy((1, 4, 4), channels=(2, 2)),
    }[kind]

    def model():
        pyro.sample("z", base)

    with pytest.raises(TypeError, match=r"the energy \w+ computes in .* and the values of its site are float64"):
        call(model, base, energy)
