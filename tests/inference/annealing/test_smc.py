"""Sequential Monte Carlo: moments and log Z meet exact answers, on islands that tell its errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm.inference.annealing.population as population
from pyro_ebm import (
    MALA,
    ULA,
    Annealing,
    ChEES,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    QuadraticEnergy,
    TiltedDistribution,
    importance,
    quadrature,
    tilt,
)
from pyro_ebm.inference.annealing.population import Pace
from pyro_ebm.inference.annealing.smc import SMC

T_ISLANDS = 5.4  # standard errors that 8 islands tell: beyond it one time in a thousand (Student's t)


def prior():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def bent(z):
    """A skewed tilt."""
    return 2 * torch.tanh(2 * z[..., 0] + z[..., 1]) - 1.5 * torch.tanh(z[..., 1] - z[..., 0] - 1)


def run(target, *args, particles_per_island=256, num_islands=8, seed=0, **options):
    shared = {name: options.pop(name) for name in set(options) & set(Annealing.__dataclass_fields__)}
    smc = SMC(
        target,
        annealing=Annealing(**shared),
        particles_per_island=particles_per_island,
        num_islands=num_islands,
        seed=seed,
        progress=False,
        **options,
    )
    return smc.run(*args)


def assert_mean(draws, site, f, truth, *, max_se=0.2):
    """The weighted mean of ``f``, and its error from what islands differ by."""
    values = f(draws.values[site]).double()
    weights = draws.log_weights.double().exp().reshape(values.shape[0], -1, *[1] * (values.ndim - 2))
    mean = (weights * values).sum((0, 1))
    islands = values.shape[0]
    se = (islands / (islands - 1) * (weights * (values - mean)).sum(1).square().sum(0)).sqrt()
    assert (se < max_se).all(), se
    assert ((mean - truth).abs() < T_ISLANDS * se).all(), ((mean - truth) / se).tolist()


def assert_log_z(draws, truth, *, max_se=0.2):
    value, se = draws.log_z
    assert 0 < se < max_se and abs(value - truth) < T_ISLANDS * se, (value, se, truth)


# Exact answers


@pytest.mark.parametrize("kernel", [None, ChEES, MALA], ids=["HMC", "ChEES", "MALA"])
def test_a_linear_tilt_in_ten_dimensions(kernel):
    a = 3 * torch.linspace(-1, 1, 10) / torch.linspace(-1, 1, 10).norm()

    def model():
        return pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    # Twenty means are judged at once, by errors better known than those of 8 islands
    draws = run(tilt(model, {"z": LinearEnergy(a)}), kernel=kernel, particles_per_island=128, num_islands=16)
    assert_log_z(draws, 4.5)
    assert_mean(draws, "z", lambda z: z, a)
    assert_mean(draws, "z", lambda z: (z - a) ** 2, 1.0)
    assert draws.method == "smc" and draws.values["z"].shape == (16, 128, 10)


@pytest.mark.parametrize("guided", [False, True])
def test_a_skewed_tilt_meets_quadrature(guided):
    def guide():
        pyro.sample("z", dist.Normal(torch.tensor([-0.5, 0.5]), 1.5).to_event(1))

    tilted = tilt(prior, {"z": bent})
    exact = quadrature(tilted)
    draws = run(tilted, guide=guide if guided else None, particles_per_island=512)
    assert_log_z(draws, exact.log_z.value, max_se=0.05)
    for f in (lambda z: z, lambda z: z**2, lambda z: z**3):
        assert_mean(draws, "z", f, (exact.weights[:, None] * f(exact.flat("z"))).sum(0))
    reference = importance(tilted, num_samples=20_000, seed=0).log_z
    assert type(draws.log_z.value) is type(reference.value)
    assert abs(draws.log_z.value - reference.value) < 5 * math.hypot(draws.log_z.se, reference.se)


def modes(u):
    loc = torch.tensor([[-4.0, -4.0], [4.0, 4.0]])
    logs = dist.Normal(loc, 0.5).log_prob(u[..., None, :]).sum(-1)
    return (logs + torch.tensor([0.3, 0.7]).log()).logsumexp(-1) + 2.0


@pytest.mark.parametrize("kernel", [None, ChEES], ids=["HMC", "ChEES"])
def test_modes_far_apart_get_their_weights(kernel):
    base = dist.Normal(torch.zeros(2), 4.0).to_event(1)
    draws = run(LogDensity(modes, 2), base=base, kernel=kernel, particles_per_island=512)
    assert_log_z(draws, 2.0)
    assert_mean(draws, "u", lambda u: (u[..., 0] > 0).double(), 0.7, max_se=0.04)
    assert_mean(draws, "u", lambda u: (u.abs() - 4) ** 2, 0.25, max_se=0.03)


def test_constrained_supports_meet_quadrature():
    def model(y):
        s = pyro.sample("s", dist.HalfCauchy(torch.tensor(1.0)))
        m = pyro.sample("m", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    y = torch.tensor([2.0, 3.0, 1.5, 2.5])
    exact = quadrature(model, y)
    draws = run(model, y, particles_per_island=512)
    assert_log_z(draws, exact.log_z.value)
    for site in ("s", "m"):
        for f in (lambda x: x.log(), lambda x: x.log() ** 2, lambda x: (x > 1).double()):
            assert_mean(draws, site, f, float((exact.weights * f(exact.flat(site))).sum()))
    assert draws.observed.keys() == {"y"}


def test_independent_data_have_temperatures_and_log_z_of_their_own():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.tanh() + 0.5 * z, 0.2).to_event(1), obs=x)

    tilted = tilt(model, {"z": lambda z: 0.8 * torch.sin(2 * z[..., 0])})
    x = torch.tensor([[0.0], [2.0], [-3.5]])
    draws = run(tilted, x, independent="data")
    assert draws.values["z"].shape == (8, 256, 3, 1) and draws.stats["lp"].shape == (8, 256, 3)
    assert draws.log_z.value.shape == draws.log_z.se.shape == (3,)
    for k in range(3):
        exact = quadrature(tilted, x[k : k + 1])
        value, se = draws.log_z.value[k], draws.log_z.se[k]
        assert 0 < se < 0.2 and abs(value - exact.log_z.value) < T_ISLANDS * se
        truth = (exact.weights * exact.flat("z").flatten()).sum()
        assert_mean(draws, "z", lambda z, k=k: z[:, :, k, 0], truth)  # noqa: PLW0108
    ladders = draws.notes["temperatures"]
    assert len(ladders) == 3 and all(ladder[0] == 0 and ladder[-1] == 1 for ladder in ladders)
    assert len(ladders[0]) < len(ladders[2])  # the first datum is near the prior
    assert torch.equal(draws.log_weights, draws.log_weights[:1, :1].expand(8, 256))


def test_a_tilted_distribution():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    draws = run(TiltedDistribution(base, LinearEnergy([2.0, 0.0])))
    assert_log_z(draws, 2.0)
    assert_mean(draws, "z", lambda z: z, torch.tensor([2.0, 0.0]))


def test_hard_walls():
    draws = run(tilt(prior, {"z": lambda z: torch.where(z[..., 0] > 1, 0.0, math.inf)}))
    assert_log_z(draws, math.log(0.15865525))
    assert (draws.values["z"][..., 0] > 1).all()
    assert len(draws.notes["temperatures"]) == 2  # the first step counts living particles only


def test_a_very_narrow_target():
    density = LogDensity(lambda u: -0.5 * ((u - 3) / 1e-3).square().sum(-1), 2)
    draws = run(density)
    assert_log_z(draws, 2 * math.log(1e-3) + math.log(2 * math.pi), max_se=0.3)
    assert_mean(draws, "u", lambda u: (u - 3) * 1e3, 0.0)
    assert_mean(draws, "u", lambda u: ((u - 3) * 1e3) ** 2, 1.0)


@pytest.mark.slow
def test_log_z_is_within_its_standard_error():
    tilted = tilt(prior, {"z": LinearEnergy([2.0, -1.0])})
    found = [run(tilted, particles_per_island=256, seed=seed).log_z for seed in range(60)]
    z = torch.tensor([(value - 2.5) / se for value, se in found])
    # Student's t with 7 degrees of freedom has standard deviation 1.18
    assert abs(float(z.mean())) < 4 * 1.18 / math.sqrt(60) and 0.8 < float(z.std()) < 1.7
    assert (z.abs() < 3).float().mean() >= 0.9


@pytest.mark.slow
def test_log_z_has_no_bias_where_islands_are_small():
    """Were each tuned on its own 32 particles, log Z would come out 0.22 too low."""

    def model():
        return pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))

    tilted = tilt(model, {"z": QuadraticEnergy(8.0)})
    found = [run(tilted, particles_per_island=32, num_islands=16, seed=seed).log_z.value for seed in range(30)]
    error = torch.tensor(found) + 4 * math.log(9.0)
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(30) < 0.12


# The result


def test_weights_notes_and_counts():
    draws = run(tilt(prior, {"z": LinearEnergy([3.0, 0.0])}), particles_per_island=64, num_islands=4)
    assert float(draws.log_weights.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    share = draws.log_weights.double().exp().sum(1)
    torch.testing.assert_close(
        share, torch.tensor(draws.notes["log_z_of_islands"], dtype=torch.float64).softmax(0), rtol=1e-4, atol=0
    )
    notes = draws.notes
    steps = len(notes["temperatures"]) - 1
    assert steps >= 3 and notes["temperatures"][0] == 0 and notes["temperatures"][-1] == 1
    for name in ("acceptance_per_temperature", "ess_per_temperature", "moves_per_temperature"):
        assert len(notes[name]) == steps
    assert all(0.75 < share for share in notes["ess_per_temperature"])
    assert notes["graph"] == "captured"
    assert draws.num_gradients % 256 == 0 and draws.num_gradients > 256 * sum(notes["moves_per_temperature"])
    z = draws.values["z"]
    torch.testing.assert_close(draws.stats["lp"], -0.5 * z.square().sum(-1) - math.log(2 * math.pi) + 3 * z[..., 0])
    assert ((draws.stats["acceptance_rate"] >= 0) & (draws.stats["acceptance_rate"] <= 1)).all()
    assert draws.seconds > 0


def test_particles_are_not_copies():
    draws = run(tilt(prior, {"z": LinearEnergy([3.0, 0.0])}), num_islands=4)
    assert len(draws.flat("z").unique(dim=0)) > 0.95 * 1024


def test_moves_and_temperatures_as_asked_for():
    target = tilt(prior, {"z": LinearEnergy([3.0, 0.0])})
    fixed = run(target, num_moves=3)
    assert set(fixed.notes["moves_per_temperature"]) == {3}
    assert max(run(target, max_moves=2).notes["moves_per_temperature"]) <= 2
    fine, coarse = (run(target, target_ess=share).notes for share in (0.9, 0.3))
    assert len(fine["temperatures"]) > 2 * len(coarse["temperatures"]) - 3
    assert coarse["ess_per_temperature"][0] == pytest.approx(0.3, abs=0.01)
    assert fine["ess_per_temperature"][0] == pytest.approx(0.9, abs=0.01)


def test_kernels_keep_their_own_settings():
    target = tilt(prior, {"z": LinearEnergy([2.0, 0.0])})
    kernel = MALA(target, step_size=0.5, adapt_step_size=False, adapt_mass_matrix=False)
    path_tunings = []
    original = population.Rung

    def spy(*args):
        path_tunings.append(args[1])
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "Rung", spy)
        draws = run(target, kernel=kernel)
    assert_log_z(draws, 2.0)
    assert all((tuning.step_size == 0.5).all() and (tuning.inverse_mass == 1).all() for tuning in path_tunings)
    own = SMC(target, annealing=Annealing(ChEES(target, target_accept_prob=0.9))).kernel
    assert own.target_accept_prob == 0.9 and SMC(target).kernel.name == "batched_hmc"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    zeros = torch.zeros(2, dtype=dtype)
    target = tilt(lambda: pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1)), {"z": QuadraticEnergy(2.0)})
    draws = run(target, particles_per_island=32, num_islands=2)
    assert draws.values["z"].dtype == draws.log_weights.dtype == draws.stats["lp"].dtype == dtype


def test_seeds(rng_untouched):
    density = LogDensity(lambda u: -u.square().sum(-1), 2)
    short = {"particles_per_island": 32, "num_islands": 2}
    with rng_untouched():
        one, two, other = (run(density, seed=seed, **short) for seed in (1, 1, 2))
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        a, b = (run(density, seed=None, generator=g, **short) for g in generators)
    assert torch.equal(one.values["u"], two.values["u"]) and one.log_z == two.log_z and a.log_z == b.log_z
    assert not torch.equal(one.values["u"], other.values["u"])
    first, second = (run(density, seed=None, **short) for _ in range(2))
    assert first.log_z != second.log_z


def test_one_island_has_no_standard_error():
    draws = run(tilt(prior, {"z": LinearEnergy([1.0, 0.0])}), num_islands=1)
    assert math.isnan(draws.log_z.se) and abs(draws.log_z.value - 0.5) < 0.3


def test_zero_energy_is_the_prior():
    draws = run(tilt(prior, {"z": QuadraticEnergy(0.0)}), num_islands=4)
    assert draws.notes["temperatures"] == [0.0, 1.0]
    assert abs(draws.log_z.value) < 1e-6 and draws.log_z.se < 1e-6


# What cannot be trusted, and what is wrong


def test_a_target_that_the_base_never_meets():
    with pytest.raises(InferenceError, match=r"zero \(or NaN\) at all 32 particles of island\(s\) 0, 1: the"):
        run(tilt(prior, {"z": lambda z: z.sum(-1) * 0 + math.inf}), particles_per_island=32, num_islands=2)
    with pytest.raises(InferenceError, match="zero"):
        run(tilt(prior, {"z": lambda z: z.sum(-1) * math.nan}), particles_per_island=32, num_islands=2)
    with pytest.raises(InferenceError, match="is [+]inf at .* particles: the energy is unbounded below"):
        run(tilt(prior, {"z": lambda z: torch.where(z[..., 0] > 0, -math.inf, 0.0)}), num_islands=2)


def test_nan_is_a_weight_of_zero():
    draws = run(tilt(prior, {"z": lambda z: torch.where(z[..., 0] > 0, 0.0, math.nan)}))
    assert_log_z(draws, -math.log(2))
    assert (draws.values["z"][..., 0] > 0).all()


def test_an_improper_target_is_named():
    with pytest.raises(InferenceError, match=r"stuck at inverse temperature 0\.66.*improper"):
        run(tilt(prior, {"z": QuadraticEnergy(-1.5)}), particles_per_island=32, num_islands=2, max_moves=2)


def test_islands_that_disagree_and_particles_that_stay_are_named():
    with pytest.warns(InferenceWarning, match=r"smc: islands disagree \(R-hat .* > 1.05 at u\[\d\]\).*log Z is unc"):
        run(LogDensity(lambda u: modes(u / 3), 2), particles_per_island=100, target_ess=0.02, num_moves=1)
    kernel = MALA(prior, step_size=1e3, adapt_step_size=False)
    with pytest.warns(InferenceWarning, match=r"particles hardly moved at the target \(acceptance 0.000\)"):
        run(prior, kernel=kernel, particles_per_island=32)
    with pytest.raises(InferenceError, match="hardly moved"):
        run(prior, kernel=kernel, particles_per_island=32, strict=True)
    with pytest.warns(InferenceWarning, match="ULA keeps none .* use MALA"):
        run(prior, kernel=ULA, particles_per_island=32)


def test_errors():
    with pytest.raises(ValueError, match="particles_per_island must be a whole number of at least 2, got 1"):
        SMC(prior, particles_per_island=1)
    with pytest.raises(ValueError, match="num_islands"):
        SMC(prior, num_islands=0)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"target_ess must lie between 0 and 1, got {share}"):
            SMC(prior, target_ess=share)
    for name in ("num_moves", "max_moves"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            Pace(**{name: 0})
    with pytest.raises(ValueError, match="seed and generator both given"):
        SMC(prior, seed=0, annealing=Annealing(generator=torch.Generator()))
