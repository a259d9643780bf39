"""NUTS and HMC: Pyro's own numbers, put on record; moments meet quadrature; trouble is said aloud."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import nn

import pyro_ebm.inference.chains.pyro_kernels as module
from pyro_ebm import (
    VAE,
    Draws,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    QuadraticEnergy,
    pyro_hmc,
    pyro_nuts,
    quadrature,
    tilt,
)
from pyro_ebm.chain_statistics import ess_bulk, mcse_mean
from pyro_ebm.inference.chains.report import report_chains

# Runs as short as most of these often have an R-hat above 1.05.
pytestmark = pytest.mark.filterwarnings("ignore:.*chains disagree:pyro_ebm.InferenceWarning")

SAMPLERS = {"nuts": pyro_nuts, "hmc": pyro_hmc}
STATS = {"lp", "acceptance_rate", "step_size", "n_steps", "diverging"}
quiet = {"progress": False, "seed": 0}
short = {"num_samples": 12, "warmup_steps": 10, "num_chains": 2, **quiet}


@pytest.fixture(params=SAMPLERS)
def method(request):
    return request.param


def prior():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def bent(z):
    """Skewed, with two bumps, as a small network would tilt."""
    return 2 * torch.tanh(2 * z[..., 0] + z[..., 1]) - 1.5 * torch.tanh(z[..., 1] - z[..., 0] - 1)


def two_islands(z):
    return -torch.logaddexp(-50 * (z[..., 0] - 3) ** 2, -50 * (z[..., 0] + 3) ** 2)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()).to_event(1))


def small_vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = VAE((6,), 2, hidden=(8,))
        for parameter in vae.decoder.parameters():
            parameter.data *= 3
        return vae, torch.rand(1, 6)


long = {"num_samples": 200, "warmup_steps": 100, "num_chains": 2, "keep_warmup": True, **quiet}


@functools.cache
def long_run(method):
    """One run for several tests."""
    return SAMPLERS[method](tilt(prior, {"z": bent}), **long)


def agree(draws, exact):
    values, truth = draws.values["z"].reshape(*draws.values["z"].shape[:2], -1), exact.flat("z").reshape(-1, 2)
    for f in (lambda z: z, lambda z: z**2, lambda z: z.prod(-1, keepdim=True)):
        se, expected = mcse_mean(f(values)), (exact.weights[:, None] * f(truth)).sum(0)
        scores = (f(values).mean((0, 1)) - expected).numpy() / se
        assert (np.abs(scores) < 4).all(), scores
    assert (ess_bulk(values) > 50).all()


# The numbers


@pytest.mark.slow
def test_tilted_prior_meets_quadrature(method):
    agree(long_run(method), quadrature(tilt(prior, {"z": bent})))


@pytest.mark.slow
def test_tilted_posterior_of_an_image_meets_quadrature(method):
    vae, image = small_vae()
    draws = SAMPLERS[method](tilt(vae.model, {"z": bent}), image, **long)
    agree(draws, quadrature(tilt(vae.model, {"z": bent}), image))
    assert draws.values["z"].shape == (2, 200, 1, 2)
    assert draws.observed.keys() == {"x"} and torch.equal(draws.observed["x"], image)


def test_every_draw_has_its_statistics(method):
    draws = long_run(method)
    assert set(draws.stats) == STATS | ({"tree_depth"} if method == "nuts" else set())
    assert all(stat.shape == (2, 200) for stat in draws.stats.values())
    rate = draws.stats["acceptance_rate"]
    assert ((rate >= 0) & (rate <= 1)).all() and 0.6 < float(rate.mean()) < 0.98
    assert rate.unique().numel() > 150  # one a draw, and not a running mean
    assert (draws.stats["step_size"] == draws.stats["step_size"][:, :1]).all()
    assert draws.stats["diverging"].dtype == torch.bool and not draws.stats["diverging"].any()


def test_lp_is_the_density_of_the_draw(method):
    vae, image = small_vae()
    draws = SAMPLERS[method](tilt(vae.model, {"z": bent}), image, **short)
    density = LogDensity.from_model(tilt(vae.model, {"z": bent}), image)
    torch.testing.assert_close(draws.stats["lp"], density(draws.values["z"].flatten(2)), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_steps_and_the_set_up(method):
    draws = long_run(method)
    counted = int(draws.stats["n_steps"].sum() + draws.warmup.stats["n_steps"].sum())
    # a start and a set-up for each chain: the latter looks for a first step size by doubling
    assert 2 * 3 <= draws.num_gradients - counted <= 2 * 20


def test_steps_of_nuts_are_those_of_its_trees():
    steps, depth = long_run("nuts").stats["n_steps"], long_run("nuts").stats["tree_depth"]
    assert (steps >= 2 ** (depth - 1)).all() and (steps <= 2**depth - 1).all()
    assert depth.dtype == torch.int64 and depth.max() > 1


def test_steps_of_hmc_make_up_its_trajectory():
    draws = pyro_hmc(prior, trajectory_length=1.7, **short)
    assert torch.equal(draws.stats["n_steps"], (1.7 / draws.stats["step_size"].double()).long().clamp(min=1))
    assert draws.stats["n_steps"].max() > 1


def test_the_set_up_is_no_step_of_the_first_draw():
    draws = pyro_nuts(prior, num_samples=6, warmup_steps=0, num_chains=2, max_tree_depth=1, **quiet)
    assert torch.equal(draws.stats["n_steps"], torch.ones(2, 6, dtype=torch.int64))
    assert torch.equal(draws.stats["tree_depth"], torch.ones(2, 6, dtype=torch.int64))


def test_a_linear_tilt_shifts_the_mean(method):
    draws = SAMPLERS[method](
        tilt(prior, {"z": LinearEnergy([3.0, -1.0])}), num_samples=150, warmup_steps=60, num_chains=1, **quiet
    )
    assert draws.num_chains == 1
    scores = (draws.mean("z") - torch.tensor([3.0, -1.0])).numpy() / mcse_mean(draws.values["z"])
    assert (np.abs(scores) < 4).all()


def test_constants_of_the_tilt_do_not_matter(method):
    free = SAMPLERS[method](tilt(prior, {"z": bent}, normalize=False), **short)
    normalized = SAMPLERS[method](tilt(prior, {"z": bent}), **short)
    assert torch.equal(free.values["z"], normalized.values["z"])


def test_zero_energy_draws_what_the_untilted_model_draws(method):
    tilted = SAMPLERS[method](tilt(prior, {"z": LinearEnergy([0.0, 0.0])}), **short)
    assert torch.equal(tilted.values["z"], SAMPLERS[method](prior, **short).values["z"])


def test_same_numbers_as_pyro(method):
    model = tilt(prior, {"z": bent}, normalize=False)
    start = torch.tensor([[0.5, -0.5]])
    options = {"trajectory_length": 1.7} if method == "hmc" else {"max_tree_depth": 5}
    options["target_accept_prob"] = 0.85
    ours = SAMPLERS[method](model, num_samples=20, warmup_steps=40, num_chains=1, init={"z": start}, **options, **quiet)
    calls, means = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, potential, transforms, _ = initialize_model(model, initial_params={})

        def counted(params):
            calls.append(1)
            return potential(params)

        kernel = (HMC if method == "hmc" else NUTS)(potential_fn=counted, **options)
        mcmc = MCMC(
            kernel,
            num_samples=20,
            warmup_steps=40,
            initial_params={"z": start[0]},
            transforms=transforms,
            hook_fn=lambda kernel, *_: means.append(kernel._mean_accept_prob),
            disable_progbar=True,
        )
        mcmc.run()
    assert torch.equal(ours.values["z"], mcmc.get_samples(group_by_chain=True)["z"])
    assert ours.num_gradients == len(calls) + 1  # and one to see that the start is valid
    totals = np.arange(1, 21) * means[-20:]  # Pyro keeps a running mean
    expected = torch.tensor(np.diff(totals, prepend=0.0), dtype=torch.float32)
    torch.testing.assert_close(ours.stats["acceptance_rate"][0], expected, atol=1e-5, rtol=1e-5)


def test_compiled_draws_are_the_same(method):
    plain = SAMPLERS[method](tilt(prior, {"z": bent}), **short)
    compiled = SAMPLERS[method](tilt(prior, {"z": bent}), jit_compile=True, **short)
    torch.testing.assert_close(plain.values["z"], compiled.values["z"], atol=1e-3, rtol=1e-3)


# Sites of other kinds


def test_constrained_sites_come_out_constrained(method):
    y = torch.tensor([0.1, 0.7, 1.9])

    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("chol", dist.LKJCholesky(2, 1.0))
        s = pyro.sample("s", dist.HalfNormal(2.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    draws = SAMPLERS[method](model, num_samples=60, warmup_steps=40, num_chains=1, **quiet)
    assert draws.values["p"].shape == (1, 60, 3) and draws.values["chol"].shape == (1, 60, 2, 2)
    torch.testing.assert_close(draws.values["p"].sum(-1), torch.ones(1, 60))
    assert (draws.values["s"] > 0).all() and (draws.values["p"] >= 0).all()

    def alone():
        s = pyro.sample("s", dist.HalfNormal(2.0))
        pyro.factor("y", dist.Normal(0.0, s[..., None]).log_prob(y).sum(-1))

    assert abs(float(draws.mean("s") - quadrature(alone).mean("s"))) < 4 * mcse_mean(draws.values["s"])
    thirds = np.abs((draws.mean("p") - 1 / 3).numpy())
    assert (thirds < 4 * mcse_mean(draws.values["p"])).all()


def mixture(y):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z + 3 * k, 1.0), obs=y)


def test_discrete_sites_are_summed_out(method):
    y = torch.tensor([0.2, 3.4, -0.5, 0.4])

    def log_prob(u):
        parts = [dist.Normal(u + 3 * k, 1.0).log_prob(y) + math.log(p) for k, p in ((0, 0.7), (1, 0.3))]
        return dist.Normal(0.0, 2.0).log_prob(u[..., 0]) + torch.logaddexp(*parts).sum(-1)

    exact = quadrature(LogDensity(log_prob, 1))
    draws = SAMPLERS[method](mixture, y, num_samples=120, warmup_steps=60, num_chains=1, **quiet)
    assert set(draws.values) == {"z"} and draws.notes["init"] == "importance"
    assert abs(float(draws.mean("z") - exact.mean("u"))) < 4 * mcse_mean(draws.values["z"])
    density = LogDensity(log_prob, 1)
    torch.testing.assert_close(draws.stats["lp"], density(draws.values["z"][..., None]), atol=1e-4, rtol=1e-4)


def test_all_sites_discrete():
    with pytest.raises(ValueError, match="no continuous latent sites"):
        pyro_nuts(lambda: pyro.sample("k", dist.Bernoulli(0.5)), **short)


def test_double_precision_and_model_kwargs(method):
    def model(*, loc):
        pyro.sample("z", dist.Normal(loc, 1.0))

    loc = torch.tensor(100.0, dtype=torch.float64)
    draws = SAMPLERS[method](model, model_kwargs={"loc": loc}, **short)
    assert draws.values["z"].dtype == torch.float64
    assert 90 < float(draws.mean("z")) < 110


# Starting points


def first_states(model, **options):
    draws = pyro_nuts(model, **{**short, "num_samples": 1, "warmup_steps": 0, "max_tree_depth": 1, **options})
    return draws


def test_importance_starts_lie_where_the_mass_is():
    far = tilt(prior, {"z": lambda z: 200 * ((z[..., 0].abs() - 2) ** 2 + z[..., 1] ** 2)})
    draws = first_states(far, num_chains=12)
    assert draws.notes["init"] == "importance"
    assert ((draws.flat("z")[:, 0].abs() - 2).abs() < 1).all()
    assert 1 <= int((draws.flat("z")[:, 0] > 0).sum()) <= 11  # both modes


def test_a_guide_proposes_the_starts():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.01), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(y, 0.01))

    y = torch.tensor(3.0)
    draws = pyro_nuts(model, y, guide=guide, **{**short, "num_samples": 1, "warmup_steps": 0, "max_tree_depth": 1})
    assert ((draws.flat("z") - 3.0).abs() < 0.1).all()


def test_a_guide_that_fails_is_no_reason_to_fall_back():
    def guide():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide does not propose"):
        pyro_nuts(prior, guide=guide, **short)


def test_uniform_starts(method):
    draws = SAMPLERS[method](prior, init="uniform", **short)
    assert draws.notes["init"] == "uniform" and draws.values["z"].shape == (2, 12, 2)


@pytest.mark.parametrize("kind", ["indexing from the left", "python numbers"])
def test_importance_starts_of_models_that_do_not_broadcast(kind):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if kind == "indexing from the left":
            pyro.factor("f", -(z.reshape(2) ** 2).sum())
        else:
            pyro.factor("f", -float(z.detach()[0]) * torch.zeros(()))

    assert pyro_nuts(model, **short).notes["init"] == "importance"


def test_importance_starts_fall_back_to_uniform():
    def model():
        z = pyro.sample("z", dist.Normal(50.0, 1.0))
        pyro.factor("f", torch.where(z.abs() < 2, 0.0, -math.inf))  # where no draw of the prior lies

    assert first_states(model, num_chains=2).notes["init"] == "uniform"


def test_given_starts():
    start = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [-3.0, 0.5]])
    draws = first_states(tilt(prior, {"z": two_islands}), init={"z": start}, num_chains=3)
    assert draws.notes["init"] == "given"
    assert torch.equal(draws.values["z"][:, 0, 0].sign(), start[:, 0].sign())


def test_given_starts_are_on_the_constrained_scale_and_need_no_valid_uniform_ones():
    def model():
        s = pyro.sample("s", dist.HalfNormal(2000.0))
        pyro.factor("box", torch.where((s - 1000).abs() < 1, 0.0, -math.inf))

    draws = first_states(model, init={"s": torch.full((2,), 1000.0)})
    assert ((draws.flat("s") - 1000).abs() < 1).all()


@pytest.mark.parametrize(
    "init, message",
    [
        ("prior", r"init must be one of \('importance', 'uniform'\) or a mapping of values, got 'prior'"),
        ({}, r"init\['z'\] must have shape \(2, 2\), one row a chain, got nothing"),
        ({"z": torch.zeros(2)}, r"must have shape \(2, 2\), one row a chain, got \(2,\)"),
        ({"z": torch.zeros(2, 3)}, r"must have shape \(2, 2\), one row a chain, got \(2, 3\)"),
        ({"z": torch.zeros(3, 2)}, r"must have shape \(2, 2\), one row a chain, got \(3, 2\)"),
        ({"z": torch.tensor([[0.0, 0.0], [math.nan, 0.0]])}, "density at the values for chain 1 is zero or not finite"),
    ],
)
def test_bad_starts(init, message):
    with pytest.raises(ValueError, match=message):
        pyro_nuts(prior, init=init, **short)


def test_starts_outside_the_support():
    with pytest.raises(ValueError, match="chain 0 is zero or not finite; give values inside the support"):
        pyro_nuts(lambda: pyro.sample("s", dist.LogNormal(0.0, 1.0)), init={"s": -torch.ones(2)}, **short)


# Warm-up, interruption, counts


def test_warm_up_is_kept_on_request(method):
    kept = SAMPLERS[method](prior, keep_warmup=True, **short)
    dropped = SAMPLERS[method](prior, **short)
    assert isinstance(kept.warmup, Draws) and dropped.warmup is None
    assert kept.warmup.values["z"].shape == (2, 10, 2) and kept.warmup.stats["lp"].shape == (2, 10)
    assert torch.equal(kept.values["z"], dropped.values["z"])
    assert kept.warmup.stats["step_size"][0].unique().numel() > 3
    assert kept.num_gradients == dropped.num_gradients


def interrupt_at(monkeypatch, count):
    call = module.CountedPotential.__call__

    def interrupted(self, params):
        if self.count >= count:
            raise KeyboardInterrupt
        return call(self, params)

    monkeypatch.setattr(module.CountedPotential, "__call__", interrupted)


def test_interrupting_the_first_chain_keeps_its_draws(method, monkeypatch):
    options = {"num_samples": 30, "warmup_steps": 10, "num_chains": 1, **quiet}
    whole = SAMPLERS[method](prior, **options)
    interrupt_at(monkeypatch, whole.num_gradients - int(whole.stats["n_steps"][0, -10:].sum()))
    with pytest.warns(InferenceWarning, match=r"interrupted: kept 1 chain\(s\) of 20 draws"):
        part = SAMPLERS[method](prior, **options)
    assert part.notes["interrupted"] and not whole.notes["interrupted"]
    assert torch.equal(part.values["z"], whole.values["z"][:, :20])
    assert all(torch.equal(stat, whole.stats[name][:, :20]) for name, stat in part.stats.items())


def test_interrupting_the_second_chain_keeps_the_first(method, monkeypatch):
    options = {"num_samples": 30, "warmup_steps": 10, "num_chains": 3, **quiet}
    whole = SAMPLERS[method](prior, **options)
    last = int(whole.stats["n_steps"][2].sum() + whole.stats["n_steps"][1, -5:].sum())
    interrupt_at(monkeypatch, whole.num_gradients - last - 60)
    with pytest.warns(InferenceWarning, match=r"interrupted: kept 1 chain\(s\) of 30 draws"):
        part = SAMPLERS[method](prior, **options)
    assert torch.equal(part.values["z"], whole.values["z"][:1])


def test_time_cuts_the_draws(method, monkeypatch):
    """A clock that strikes one with each look: one a gradient and a step; each chain has its share of the time."""
    clock = SimpleNamespace(perf_counter=functools.partial(next, itertools.count()))
    monkeypatch.setattr("pyro_ebm.deadline.time", clock)
    whole = SAMPLERS[method](prior, **{**short, "num_samples": 40}, max_seconds=10**6)
    limit = int(0.7 * clock.perf_counter())
    with pytest.warns(InferenceWarning, match=rf"{method}: stopped by max_seconds={limit:g}: kept 2 chain"):
        part = SAMPLERS[method](prior, **{**short, "num_samples": 40}, max_seconds=limit)
    assert 4 < part.num_draws < 40 and part.num_chains == 2 and not part.notes["interrupted"]
    assert [draws.notes["stopped"] for draws in (whole, part)] == ["num_samples", "max_seconds"]
    # The second chain draws from where the first left the stream.
    assert torch.equal(part.values["z"][0], whole.values["z"][0, : part.num_draws])


def test_time_cuts_the_warm_up(method, monkeypatch):
    """The draws begin with what was learned, and chains whose warm-ups differ in length are one array."""
    clock = SimpleNamespace(perf_counter=functools.partial(next, itertools.count()))
    monkeypatch.setattr("pyro_ebm.deadline.time", clock)
    with pytest.warns(InferenceWarning, match=r"the limit of time ended the warm-up after \d+ of 5000 steps"):
        draws = SAMPLERS[method](prior, **{**short, "warmup_steps": 5000, "keep_warmup": True}, max_seconds=900)
    assert draws.num_chains == 2 and draws.num_draws >= 4 and draws.notes["warmup_cut"] == draws.warmup.num_draws < 5000
    assert not torch.equal(draws.values["z"][:, :-1], draws.values["z"][:, 1:])
    with pytest.raises(InferenceError, match=r"max_seconds=9 was spent .*there are no draws yet"):
        SAMPLERS[method](prior, **{**short, "warmup_steps": 5000}, max_seconds=9)


def test_interrupting_the_warm_up_leaves_nothing_to_return(monkeypatch):
    interrupt_at(monkeypatch, 15)
    validating = pyro.settings.get()
    with pytest.raises(KeyboardInterrupt, match="during the warm-up of the first chain"):
        pyro_nuts(prior, **short)
    assert pyro.settings.get() == validating


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_chains": 0}, "num_chains must be a whole number of at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
        ({"max_seconds": 0}, "max_seconds must be positive, got 0"),
    ],
)
def test_impossible_counts(method, options, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[method](prior, **{**short, **options})


# What goes wrong is said


def test_divergences_in_the_funnel():
    options = {"num_samples": 60, "warmup_steps": 30, "num_chains": 2, **quiet}
    options |= {"target_accept_prob": 0.3, "max_tree_depth": 5, "seed": 1}
    with pytest.warns(InferenceWarning, match=r"nuts: \d+ of 120 transitions diverged: raise target_accept_prob"):
        draws = pyro_nuts(funnel, **options)
    count = int(draws.stats["diverging"].sum())
    assert 0 < count < 120
    with pytest.raises(InferenceError, match=f"{count} of 120 transitions diverged"):
        pyro_nuts(funnel, strict=True, **options)


def test_chains_that_disagree(method):
    start = {"z": torch.tensor([[3.0, 0.0], [-3.0, 0.0]])}
    options = {"num_samples": 20, "warmup_steps": 20, "num_chains": 2, "init": start, **quiet}
    with pytest.warns(InferenceWarning, match=r"chains disagree \(R-hat .* > 1\.05\d* at .*\): run longer"):
        SAMPLERS[method](tilt(prior, {"z": two_islands}), **options)
    with pytest.raises(InferenceError, match="chains disagree"):
        SAMPLERS[method](tilt(prior, {"z": two_islands}), strict=True, **options)


def test_disagreement_shows_beside_entries_that_never_vary():
    def model():  # the Cholesky factor has entries that are always 0 and 1, whose R-hat is undefined
        pyro.sample("a", dist.LKJCholesky(2, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("islands", -two_islands(z))

    start = {"a": torch.eye(2).expand(2, 2, 2), "z": torch.tensor([[3.0, 0.0], [-3.0, 0.0]])}
    with pytest.warns(InferenceWarning, match="chains disagree"):
        pyro_nuts(model, num_samples=20, warmup_steps=20, num_chains=2, init=start, max_tree_depth=4, **quiet)


def test_chains_that_are_each_stuck():
    draws = Draws(
        values={"z": torch.tensor([1.0, 2.0])[:, None].expand(2, 20)},
        method="nuts",
        stats={"diverging": torch.zeros(2, 20, dtype=torch.bool), "acceptance_rate": torch.ones(2, 20)},
    )
    with pytest.warns(InferenceWarning, match="chains disagree"):
        report_chains(draws, strict=False)


def test_good_draws_are_silent(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMPLERS[method](prior, num_samples=150, warmup_steps=60, num_chains=2, strict=True, **quiet)


def test_entries_that_never_vary_are_no_disagreement():
    values = {"chol": torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 100, 2, 2), "z": torch.randn(2, 100)}
    stats = {"diverging": torch.zeros(2, 100, dtype=torch.bool), "acceptance_rate": torch.ones(2, 100)}
    report_chains(Draws(values=values, method="nuts", stats=stats), strict=True)


def test_draws_that_run_away():
    with pytest.warns(InferenceWarning, match="not finite|chains disagree|diverged"):
        pyro_nuts(tilt(prior, {"z": QuadraticEnergy(-1.5)}), num_samples=20, warmup_steps=20, num_chains=2, **quiet)


def test_errors_of_the_model_reach_the_user():
    vae, image = small_vae()
    with pytest.raises(ValueError, match="x must lie in"):
        pyro_nuts(vae.model, image + 5, **short)
    with pytest.raises(ValueError, match="1 of 1 data of site 'y' lie outside the support of Gamma"):
        pyro_nuts(
            lambda: pyro.sample("y", dist.Gamma(pyro.sample("a", dist.HalfNormal(1.0)), 1.0), obs=-torch.ones(())),
            **short,
        )


# State


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(2))
        self.modes = []

    def model(self):
        self.modes.append(self.drop.training)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.drop(z) * self.weight, 1.0).to_event(1), obs=torch.ones(2))


def test_modules_are_evaluated_and_left_as_they_were(method):
    network = Dropping()
    draws = SAMPLERS[method](tilt(network.model, {"z": bent}), **short)
    assert network.modes and not any(network.modes)
    assert network.training and network.drop.training
    assert network.weight.requires_grad and network.weight.grad is None
    z = draws.values["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z, 1.0).log_prob(torch.tensor(1.0)).sum(-1)
    torch.testing.assert_close(draws.stats["lp"], expected - bent(z), atol=1e-4, rtol=1e-4)


def test_modules_are_restored_after_an_interruption(monkeypatch):
    network = Dropping()
    interrupt_at(monkeypatch, 15)
    with pytest.raises(KeyboardInterrupt):
        pyro_nuts(network.model, **short)
    assert network.training and network.drop.training and network.weight.requires_grad


def test_times_and_settings_are_on_record(method):
    draws = SAMPLERS[method](prior, **short)
    assert 0 < draws.sampling_seconds < draws.seconds < 60
    assert draws.notes["num_samples"] == 12 and draws.notes["warmup_steps"] == 10
    assert draws.method == method and draws.log_weights is None


def test_progress_bar_counts_all_chains(capsys):
    pyro_nuts(prior, **{**short, "progress": True})
    assert "nuts: 100%" in (text := capsys.readouterr().err) and "44/44" in text
    pyro_nuts(prior, **short)
    assert capsys.readouterr().err == ""
