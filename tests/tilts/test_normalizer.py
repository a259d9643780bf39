"""Estimates of log Z against closed forms, exact sums, and their own standard errors."""

from __future__ import annotations

import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    Normalizer,
    QuadraticEnergy,
    TiltedDistribution,
    tilt,
)
from pyro_ebm.energies import as_energy, gaussian_log_normalizer
from pyro_ebm.estimates import importance_estimate, log_mean_exp
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
from pyro_ebm.tilts.listeners import log_z_through, weights_reported_to
from pyro_ebm.tilts.normalizer import (
    base_parameters,
    log_z_key,
    sampled_log_normalizer,
    score_term,
    site_log_normalizer,
    site_log_weights,
)


def assert_within(estimate, truth, *, k=4.0, max_se=0.2):
    """Within k standard errors, and these small enough for the comparison to mean something."""
    value, se = estimate
    truth = torch.as_tensor(truth, dtype=value.dtype)
    assert value.shape == se.shape == truth.shape
    assert (se > 0).all() and (se < max_se).all()
    assert ((value - truth).abs() <= k * se).all(), f"{value} is not within {k} x {se} of {truth}"


def gaussian(dim):
    return torch.linspace(-0.5, 0.6, dim), torch.linspace(0.5, 1.2, dim)


def energies(dim):
    a = torch.linspace(-1.0, 1.0, dim) if dim > 1 else torch.tensor([0.8])
    return {
        "linear": LinearEnergy(a / a.norm()),
        "flatter": QuadraticEnergy(-0.2),
        "sharper": QuadraticEnergy(0.7),
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["linear", "flatter", "sharper"])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("method", ["importance", "qmc"])
def test_gaussian_base(method, dim, kind, seed):
    loc, scale = gaussian(dim)
    energy = energies(dim)[kind]
    base = dist.Normal(loc, scale).to_event(1)
    estimate = log_normalizer(base, energy, method=method, num_samples=4096, seed=seed)
    assert_within(estimate, gaussian_log_normalizer(energy, loc, scale).detach())


def test_scalar_base():
    base = dist.Normal(torch.tensor(0.5), torch.tensor(2.0))
    assert_within(log_normalizer(base, LinearEnergy(0.4), seed=0), 0.4 * 0.5 + 0.5 * 0.8**2)
    assert_within(log_normalizer(base, LinearEnergy(0.4), method="qmc", seed=0), 0.52)


def test_qmc_has_less_noise_in_low_dimension():
    base, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([0.7, 0.7])
    errors = {
        m: log_normalizer(base, energy, method=m, num_samples=4096, seed=0).se for m in ("importance", "qmc")
    }
    assert errors["qmc"] < errors["importance"] / 4


def test_standard_errors_are_calibrated():
    base, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([0.6, 0.0])
    truth, settings = 0.18, Normalizer(num_samples=512)
    estimates = [importance_estimate(site_log_weights(base, energy, settings, seed=s)) for s in range(200)]
    z = torch.stack([(e.value - truth) / e.se for e in estimates]).detach()
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * 200)


def test_one_number_per_datum_where_parameters_differ():
    loc = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]])
    base, energy = dist.Normal(loc, 0.5).to_event(1), LinearEnergy([0.6, -0.8])
    truth = gaussian_log_normalizer(energy, loc, torch.tensor(0.5)).detach()
    for method in ("importance", "qmc"):
        assert_within(log_normalizer(base, energy, method=method, seed=0), truth)


def test_one_number_for_all_where_they_agree():
    energy = LinearEnergy([0.6, -0.8])
    equal_values = dist.Normal(torch.zeros(3, 2), torch.ones(3, 2)).to_event(1)
    expanded = dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([4, 3])
    for base in (equal_values, expanded):
        for method in ("importance", "qmc"):
            assert_within(log_normalizer(base, energy, method=method, seed=0), 0.5)
            settings = Normalizer(method, 100)
            assert site_log_weights(base, energy, settings, seed=0).shape == (100,)


def test_learning_parameters_are_never_pooled():
    loc = torch.zeros(3, requires_grad=True)
    log_z = site_log_normalizer(dist.Normal(loc, 1.0), LinearEnergy(0.5), Normalizer(), name="z")
    assert log_z.shape == (3,)
    (grad,) = torch.autograd.grad(log_z[1], loc)
    assert grad[1] != 0 and grad[0] == grad[2] == 0


# (distribution whose two elements differ, the same with equal ones): parameters hide in many places
TWO = torch.tensor([0.5, 2.0])
SAME = torch.tensor([0.5, 0.5])
FAMILIES = {
    "normal": lambda p: dist.Normal(0.0, p),
    "lognormal": lambda p: dist.LogNormal(p, 0.3),
    "beta": lambda p: dist.Beta(p, 1.0),
    "gamma": lambda p: dist.Gamma(p, 1.0),
    "inverse gamma": lambda p: dist.InverseGamma(p + 5, 1.0),
    "half normal": lambda p: dist.HalfNormal(p),
    "student": lambda p: dist.StudentT(9.0, p, 0.1),
    "gumbel": lambda p: dist.Gumbel(p, 0.1),
    "poisson": lambda p: dist.Poisson(p),
    "gamma poisson": lambda p: dist.GammaPoisson(p, 2.0),
    "zero-inflated": lambda p: dist.ZeroInflatedPoisson(p, gate=torch.full((2,), 0.2)),
    "expanded": lambda p: dist.GammaPoisson(p, 2.0).expand([2]),
    "transformed": lambda p: dist.TransformedDistribution(
        dist.Normal(p, 1.0), [dist.transforms.SigmoidTransform()]
    ),
    "mixture": lambda p: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, 2)), dist.Normal(torch.stack([p, -p], -1), 0.2)
    ),
    "multivariate": lambda p: dist.MultivariateNormal(p[:, None] * torch.ones(2, 2), torch.eye(2)),
    "dirichlet": lambda p: dist.Dirichlet(p[:, None] * torch.ones(2, 3)),
    "bits": lambda p: dist.Bernoulli(p[:, None] / 3 * torch.ones(2, 3)).to_event(1),
    "one-hot": lambda p: dist.OneHotCategorical(torch.stack([p, torch.ones(2)], -1)),
}


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.InferenceWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_datum_has_its_own_law_whatever_the_family(family):
    energy = as_energy(lambda value: -0.3 * (value if family not in VECTORS else value[..., 0]))
    different = log_normalizer(FAMILIES[family](TWO), energy, seed=0)
    assert different.value.shape == (2,)
    assert different.value[1] != different.value[0]
    for element in (0, 1):  # the same number as the element gets when both have its distribution
        alone = log_normalizer(FAMILIES[family](TWO[element].expand(2).clone()), energy, seed=1)
        alone_value, alone_se = (part.reshape(-1)[0] for part in alone)
        error = (alone_se**2 + different.se[element] ** 2).sqrt()
        assert abs(alone_value - different.value[element]) <= 4 * error
    same = log_normalizer(FAMILIES[family](SAME), energy, seed=0)
    assert same.value.shape == ()  # by their densities where parameters cannot be seen


VECTORS = ("multivariate", "dirichlet", "bits", "one-hot")


def test_base_parameters_know_their_event_dims():
    loc = torch.zeros(3, 2)
    found = base_parameters(dist.Normal(loc, 1.0).to_event(1).mask(True))
    assert [(tuple(t.shape), inner) for t, inner in found] == [((3, 2), 1), ((3, 2), 1)]
    found = dict(
        (inner, tuple(t.shape)) for t, inner in base_parameters(dist.MultivariateNormal(loc, torch.eye(2)))
    )
    assert found == {1: (3, 2), 2: (3, 2, 2)}
    assert base_parameters(dist.ZeroInflatedPoisson(torch.ones(2), gate=torch.full((2,), 0.2))) is None


# Bases with finitely many values


def test_categorical_is_summed_exactly():
    probs, tilt = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, -2.0, 0.5])
    estimate = log_normalizer(dist.Categorical(probs), lambda k: tilt[k])
    torch.testing.assert_close(estimate.value, (probs * (-tilt).exp()).sum().log())
    assert estimate.se == 0


def test_bernoulli_per_datum_is_summed_exactly():
    p, b = torch.tensor([0.1, 0.6, 1.0]), 1.3
    estimate = log_normalizer(dist.Bernoulli(p), LinearEnergy(b))
    torch.testing.assert_close(estimate.value, (1 - p + p * math.exp(b)).log())
    assert estimate.se.shape == (3,) and (estimate.se == 0).all()
    settings = Normalizer()
    log_z = site_log_normalizer(dist.Bernoulli(p), LinearEnergy(b), settings, name="z")
    torch.testing.assert_close(log_z, estimate.value)


def test_exact_sums_have_exact_gradients():
    p = torch.tensor([0.1, 0.6], requires_grad=True)
    energy = LinearEnergy(1.3)
    site_log_normalizer(dist.Bernoulli(p), energy, Normalizer(), name="z").sum().backward()
    e = math.exp(1.3)
    z = 1 - p.detach() + p.detach() * e
    torch.testing.assert_close(p.grad, (e - 1) / z)
    torch.testing.assert_close(energy.a.grad, (p.detach() * e / z).sum())


def test_a_mask_does_not_change_the_law():
    base = dist.Bernoulli(torch.tensor([0.3, 0.3]))
    masked = base.mask(torch.tensor([True, False]))
    expected = log_normalizer(base, LinearEnergy(1.0)).value
    torch.testing.assert_close(log_normalizer(masked, LinearEnergy(1.0)).value, expected)


def test_binomials_of_different_size_are_sampled():
    size, p, b = torch.tensor([2.0, 5.0]), torch.tensor(0.4), 0.5
    exact = size * (1 - p + p * math.exp(b)).log()
    assert_within(log_normalizer(dist.Binomial(size, p), LinearEnergy(b), seed=0), exact)
    same = log_normalizer(dist.Binomial(5, p), LinearEnergy(b))
    torch.testing.assert_close(same.value, exact[1])
    assert same.se == 0


# Gradients of log Z: mean over independent streams, with the standard error between them


def gradients(make_base, parameter, energy, *, settings=None, runs=16):
    found = []
    for seed in range(runs):
        learned = parameter.clone().requires_grad_()
        chosen = Normalizer(num_samples=2048, seed=seed) if settings is None else settings(seed)
        log_z = site_log_normalizer(make_base(learned), energy, chosen, name="z")
        found.append(torch.autograd.grad(log_z.sum(), [learned, *energy.parameters()], allow_unused=True))
    columns = [torch.stack(column) for column in zip(*found, strict=True) if column[0] is not None]
    copies = log_z.numel() // max(parameter.numel() if parameter.shape == log_z.shape else 1, 1)
    return [(c.mean(0) / copies, c.std(0) / math.sqrt(runs) / copies) for c in columns]


@pytest.mark.parametrize("method", ["importance", "qmc"])
def test_gradients_with_a_reparametrized_base(method):
    a, loc, scale = torch.tensor([0.8, -0.4]), torch.tensor([0.3, 0.0]), torch.tensor([1.0, 0.5])

    def settings(seed):
        return Normalizer(method, 2048, seed)

    loc_grad, a_grad = gradients(
        lambda p: dist.Normal(p, scale).to_event(1), loc, LinearEnergy(a), settings=settings
    )
    scale_grad, _ = gradients(
        lambda p: dist.Normal(loc, p).to_event(1), scale, LinearEnergy(a), settings=settings
    )
    assert (loc_grad[0] - a).abs().max() < 1e-5  # every draw has gradient a
    for (value, se), truth in ((a_grad, loc + a * scale**2), (scale_grad, a**2 * scale)):
        # the noise is 1 / sqrt(num_samples); self-normalizing adds a bias of order 1 / num_samples
        assert ((value - truth).abs() <= 4 * se + 2 / 2048).all() and (se < 0.05).all()


NOT_REPARAMETRIZED = {
    # name -> base of p, p, energy slope b, d log Z / d p for E = -b v
    "poisson": (dist.Poisson, torch.tensor(2.0), 0.3, lambda p, b: torch.tensor(math.exp(b) - 1)),
    "gamma": (
        lambda p: dist.Gamma(p, 2.0).has_rsample_(False),
        torch.tensor(1.5),
        0.5,
        lambda p, b: torch.tensor(math.log(2.0 / (2.0 - b))),
    ),
    "gamma per datum": (
        lambda p: dist.Gamma(p, 2.0).has_rsample_(False),
        torch.tensor([1.5, 3.0]),
        0.5,
        lambda p, b: torch.full((2,), math.log(2.0 / (2.0 - b))),
    ),
    "shared by a plate": (
        lambda p: dist.Poisson(p).expand([4]),
        torch.tensor(2.0),
        0.3,
        lambda p, b: torch.tensor(math.exp(b) - 1),
    ),
    "bits": (
        lambda p: dist.Bernoulli(p).to_event(1),
        torch.tensor([0.2, 0.7]),
        [0.5, -0.5],
        lambda p, b: (torch.tensor(b).exp() - 1) / (1 - p + p * torch.tensor(b).exp()),
    ),
}


@pytest.mark.parametrize("name", NOT_REPARAMETRIZED)
def test_gradients_with_a_base_that_cannot_be_reparametrized(name):
    make_base, parameter, slope, exact = NOT_REPARAMETRIZED[name]
    (value, se), _ = gradients(make_base, parameter, LinearEnergy(slope))
    truth = exact(parameter, slope)
    assert (se < 0.1).all()
    assert ((value - truth).abs() <= 4 * se + 2 / 2048).all()


def test_score_term_changes_gradients_and_nothing_else():
    rate = torch.tensor(2.0, requires_grad=True)
    value = torch.tensor([0.0, 3.0])
    term = score_term(dist.Poisson(rate), value)
    assert torch.equal(term, torch.zeros(2))
    (grad,) = torch.autograd.grad(term.sum(), rate)
    torch.testing.assert_close(grad, (value / 2 - 1).sum())
    assert not score_term(dist.Normal(rate, 1.0), value).requires_grad
    with torch.no_grad():
        assert not score_term(dist.Poisson(rate), value).requires_grad


# The null


@pytest.mark.parametrize("num_samples", [1000, 1024])
@pytest.mark.parametrize("method", ["importance", "qmc"])
def test_zero_energy_has_log_z_exactly_zero(method, num_samples):
    zero = QuadraticEnergy(0.0)
    settings = Normalizer(method, num_samples)
    for base in (
        dist.Normal(torch.ones(3), 2.0).to_event(1),
        dist.Normal(torch.randn(4, 3), 2.0).to_event(1),
    ):
        assert (site_log_normalizer(base, zero, settings, name="z") == 0).all()
        estimate = log_normalizer(base, zero, method=method, num_samples=num_samples)
        assert (estimate.value == 0).all() and (estimate.se == 0).all()
    discrete = dist.Categorical(torch.tensor([0.13, 0.29, 0.58]))
    assert discrete.logits.logsumexp(0) != 0  # else rounding could not show
    assert site_log_normalizer(discrete, LinearEnergy(0.0), settings, name="z") == 0
    assert site_log_normalizer(dist.Poisson(3.0), LinearEnergy(0.0), Normalizer(), name="z") == 0


# Random streams


def test_the_same_weights_give_the_same_number_and_new_weights_new_draws(rng_untouched):
    base, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([0.5, 0.5])
    for method in ("importance", "qmc"):
        with rng_untouched():
            first = site_log_normalizer(base, energy, Normalizer(method), name="z").item()
            again = site_log_normalizer(base, energy, Normalizer(method), name="z").item()
            other_seed = site_log_normalizer(base, energy, Normalizer(method, seed=1), name="z").item()
            other_site = site_log_normalizer(base, energy, Normalizer(method), name="y").item()
        assert first == again and len({first, other_seed, other_site}) == 3
    errors = []
    for scale in torch.linspace(0.5, 0.6, 8):  # common draws would give errors that move together
        with torch.no_grad():
            energy.a.copy_(scale * torch.tensor([1.0, 0.0]))
            log_z = site_log_normalizer(base, energy, Normalizer(), name="z")
        errors.append(float(log_z - 0.5 * scale**2))
    assert max(errors) > 0 > min(errors)


def test_log_normalizer_and_its_seed(rng_untouched):
    base, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([0.5, 0.5])
    for method in ("importance", "qmc"):
        with rng_untouched():
            first, second = (log_normalizer(base, energy, method=method, seed=3).value for _ in range(2))
        assert first == second
        first, second = (log_normalizer(base, energy, method=method).value for _ in range(2))
        assert first != second and not first.requires_grad


# What cannot be trusted, and what is wrong


@pytest.mark.parametrize("dim", [1, 3])
def test_an_energy_unbounded_below_is_named(dim):
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    with pytest.warns(
        InferenceWarning, match=r"Pareto k = \d.* > 0.7.*unbounded below.*QuadraticEnergy\(c\)"
    ):
        log_normalizer(base, QuadraticEnergy(-1.5), seed=0)
    with pytest.raises(InferenceError, match="Pareto k"):
        log_normalizer(base, QuadraticEnergy(-1.5), seed=0, strict=True)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "base", [dist.Normal(torch.zeros(3), 1.0), dist.Bernoulli(torch.tensor([0.1, 0.5])), dist.Poisson(1.0)]
)
def test_a_log_z_that_is_not_finite_is_named(base, bad):
    def energy(value):
        return torch.where(value > 0, bad, 0.0)

    with pytest.warns(InferenceWarning, match="log Z is not finite"):
        log_normalizer(base, energy, seed=0)
    with pytest.raises(InferenceError, match="log Z is not finite"):
        log_normalizer(base, energy, seed=0, strict=True)


def test_hard_walls_are_fine():
    base = dist.Normal(torch.tensor(0.0), 1.0)
    estimate = log_normalizer(base, lambda value: torch.where(value > 0, 0.0, math.inf), seed=0)
    assert_within(estimate, -math.log(2))


def test_errors():
    base, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), LinearEnergy([0.5, 0.5])
    with pytest.raises(ValueError, match=r"method must be one of \('importance', 'qmc', 'smc', .*\), got 'mcmc'"):
        log_normalizer(base, energy, method="mcmc")
    with pytest.raises(ValueError, match=r"method must be one of \('importance', 'qmc'\), got 'smc'"):
        Normalizer("smc")
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 2, got 1"):
        Normalizer(num_samples=1)
    with pytest.raises(TypeError, match="energy must be an Energy or callable"):
        log_normalizer(base, 3.0)
    shape = (
        r"one number per batch element, shape \(64,\) for a value of shape \(64, 2\) with event_dim 1, got "
    )
    for wrong, got in (
        (lambda v: v, r"\(64, 2\)"),
        (lambda v: v.sum(), r"\(\)"),
        (lambda v: v.sum(-1, keepdim=True), r"\(64, 1\)"),
        (lambda v: 1.0, "float"),
    ):
        with pytest.raises(ValueError, match=shape + got):
            log_normalizer(base, wrong, num_samples=64)


@pytest.mark.parametrize(
    "base",
    [
        dist.Gamma(2.0, 2.0),
        dist.Dirichlet(torch.ones(3)),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ],
)
def test_qmc_needs_an_inverse_cdf(base):
    with pytest.raises(
        ValueError, match=r'method="qmc" needs a base with an inverse cdf .* use method="importance"'
    ):
        log_normalizer(base, lambda v: v.sum(-1) if base.event_shape else v, method="qmc")


def test_log_mean_exp():
    x = torch.tensor([[0.0, -math.inf, math.inf, 800.0], [1.0, -math.inf, 0.0, -800.0]])
    expected = torch.tensor([math.log((1 + math.e) / 2), -math.inf, math.inf, 800 - math.log(2)])
    torch.testing.assert_close(log_mean_exp(x), expected)
    assert log_mean_exp(torch.tensor([0.0, math.nan])).isnan()
    y = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(log_mean_exp(y, 1), y.logsumexp(1) - math.log(3))
    torch.testing.assert_close(log_mean_exp(y, (0, 1)), y.flatten().logsumexp(0) - math.log(15))
    (grad,) = torch.autograd.grad(log_mean_exp(y).sum(), y)
    torch.testing.assert_close(grad, y.softmax(0))


def test_precision_of_the_base_is_kept():
    for dtype in (torch.float32, torch.float64):
        base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
        for method in ("importance", "qmc"):
            assert log_normalizer(base, LinearEnergy([0.5, 0.5]), method=method, seed=0).value.dtype == dtype


def test_module_energies():
    net = nn.Sequential(nn.Linear(2, 1), nn.Flatten(-2))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    weight, bias = net[0].weight.detach()[0], net[0].bias.detach()[0]
    assert_within(log_normalizer(base, net, seed=0), 0.5 * weight.square().sum() - bias)


def test_what_watches_log_z_does_so_in_its_block_and_thread_only():
    base, settings = dist.Normal(torch.zeros(2), 1.0).to_event(1), Normalizer(num_samples=64)
    heard, energy = [], LinearEnergy([0.5, 0.0])

    def log_z():
        return float(site_log_normalizer(base, energy, settings, name="z").detach())

    plain, other = log_z(), []
    with pytest.raises(KeyError), weights_reported_to(heard.append), log_z_through(lambda value: value + 1.0):
        assert log_z() == pytest.approx(plain + 1.0, abs=1e-6)
        thread = threading.Thread(target=lambda: other.append(log_z()))
        thread.start()
        thread.join()
        with log_z_through(lambda value: value - 1.0):  # the inner one in place of the outer one
            assert log_z() == pytest.approx(plain - 1.0, abs=1e-6)
        # for their own sake: not a part of any loss
        sampled_log_normalizer(base, energy, num_samples=64, seed=0)
        raise KeyError
    assert other == [plain] and len(heard) == 2
    assert log_z() == plain and len(heard) == 2


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def test_a_number_is_kept_for_one_device_and_precision():
    energy = torch.nn.Module()
    energy.register_buffer("a", torch.zeros(2))
    energy.forward = lambda value: (value * 0).sum(-1)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    keys = {log_z_key(base, as_energy(energy), "z")}
    energy.a = energy.a.as_subclass(Elsewhere)
    keys.add(log_z_key(base, as_energy(energy), "z"))
    energy.a = torch.zeros(1, dtype=torch.float64)  # the same bits
    keys.add(log_z_key(base, as_energy(energy), "z"))
    assert len(keys) == 3 and None not in keys


@pytest.mark.parametrize("kind", ["tilt", "TiltedDistribution"])
def test_log_z_has_the_precision_of_its_inputs(kind):
    """One object, asked in single and in double precision by turns."""
    energy = LinearEnergy([0.5, -0.5])

    def model(x):
        return pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    tilted = tilt(model, {"z": energy})
    single, double = (torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for x in (single, double, single):
        distribution = TiltedDistribution(dist.Normal(x, 1.0).to_event(1), energy)
        with torch.no_grad():
            if kind == "tilt":
                found = pyro.poutine.trace(tilted).get_trace(x).nodes["z_tilt"]["fn"].log_factor
            else:
                found = distribution.log_prob(x)
        assert found.dtype == x.dtype
