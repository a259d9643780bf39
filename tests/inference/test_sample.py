"""sample(): each method is the function or class of its name, and misspelt things are refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MALA,
    MCMC,
    SMC,
    ULA,
    Annealing,
    ChEES,
    InferenceError,
    InferenceWarning,
    LinearEnergy,
    LogDensity,
    TiltedDistribution,
    importance,
    pyro_hmc,
    pyro_nuts,
    sample,
    tilt,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*chains disagree:pyro_ebm.InferenceWarning", "ignore:smc. islands disagree:pyro_ebm.InferenceWarning"
)
FAST = {"num_samples": 6, "num_chains": 2, "seed": 0}
KERNELS = {"chees": ChEES, "mala": MALA, "ula": ULA}
METHODS = ["auto", "snis", "nuts", "hmc", "chees", "mala", "ula", "smc"]


def model(loc=0.0, *, scale=1.0):
    pyro.sample("z", dist.Normal(torch.full((2,), loc), scale).to_event(1))


def guide(loc=0.0, *, scale=1.0):
    pyro.sample("z", dist.Normal(torch.ones(2), 2.0).to_event(1))


def elsewhere(*args, **kwargs):
    pyro.sample("w", dist.Normal(0.0, 1.0))


TILTED = tilt(model, {"z": LinearEnergy([1.0, 0.0])})


def same(found, expected):
    assert found.method == expected.method and found.values["z"].shape == expected.values["z"].shape
    assert torch.equal(found.values["z"], expected.values["z"])
    assert found.stats.keys() == expected.stats.keys()
    assert all(torch.equal(found.stats[name], expected.stats[name]) for name in found.stats)


@pytest.mark.parametrize("method, function", [("nuts", pyro_nuts), ("hmc", pyro_hmc)])
def test_chains_one_by_one(method, function):
    options = {"warmup_steps": 5, "progress": False, "init": "uniform", "model_kwargs": {"scale": 2.0}, **FAST}
    found, expected = sample(TILTED, 0.5, method=method, **options), function(TILTED, 0.5, **options)
    assert found.method == method and found.num_chains == 2 and found.num_draws == 6
    same(found, expected)


@pytest.mark.parametrize("method", KERNELS)
def test_batched_chains(method):
    """Options of the kernel and of the runner, each to its own."""
    kernel = KERNELS[method](TILTED, step_size=0.3, target_accept_prob=0.7)
    options = {"warmup_steps": 5, "thin": 2, "keep_warmup": True, **FAST}
    expected = MCMC(kernel, guide=guide, progress=False, **options).run(0.5, scale=2.0)
    found = sample(
        TILTED, 0.5, method=method, guide=guide, progress=False, model_kwargs={"scale": 2.0}, step_size=0.3,
        target_accept_prob=0.7, **options,
    )  # fmt: skip
    assert found.method == method and found.num_draws == 6 and found.warmup.num_draws == 5
    assert found.notes["thin"] == 2 and "stopped" not in found.notes
    same(found, expected)


@pytest.mark.parametrize("kernel", [None, MALA])
def test_smc(kernel):
    options = {} if kernel is None else {"kernel": kernel}
    annealing = Annealing(guide=guide, **options)
    shared = {"target_ess": 0.6, "seed": 0, "progress": False}
    smc = SMC(TILTED, annealing=annealing, particles_per_island=40, num_islands=3, **shared)
    found = sample(
        TILTED, 0.5, method="smc", guide=guide, num_samples=40, num_chains=3, model_kwargs={"scale": 2.0},
        **shared, **options,
    )  # fmt: skip
    expected = smc.run(0.5, scale=2.0)
    assert found.method == "smc" and (found.num_chains, found.num_draws) == (3, 40)
    same(found, expected)
    assert float(found.log_z.value) == float(expected.log_z.value)


@pytest.mark.filterwarnings("ignore:importance weights are not reliable:pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("proposal", [None, guide], ids=["prior", "guide"])
def test_importance(proposal):
    options = {"guide": proposal, "strict": False, "model_kwargs": {"scale": 2.0}, "progress": False}
    found = sample(TILTED, 0.5, method="snis", num_samples=800, num_chains=3, seed=0, **options)
    expected = importance(TILTED, proposal, 0.5, num_samples=2400, seed=0, scale=2.0)
    assert found.method == "snis" and found.num_chains == 1 and found.num_draws == 2400
    same(found, expected)
    assert torch.equal(found.log_weights, expected.log_weights)


@pytest.mark.parametrize("method, shape", [("snis", (1, 4000)), ("chees", (64, 5)), ("smc", (8, 20)), ("nuts", (4, 5))])
def test_counts_by_default(method, shape):
    counts = {} if method == "snis" else {"num_samples": shape[1]}
    warm = {"warmup_steps": 3} if method in ("chees", "nuts") else {}
    draws = sample(model, method=method, seed=0, progress=False, **counts, **warm)
    assert (draws.num_chains, draws.num_draws) == shape


def test_a_thousand_draws_by_default(monkeypatch):
    seen = {}
    monkeypatch.setattr("pyro_ebm.inference.sample.pyro_nuts", lambda *args, **kwargs: seen.update(kwargs))
    sample(model, method="nuts")
    assert seen["num_samples"] == 1000 and seen["num_chains"] == 4


def test_the_method_is_auto_by_default(rng_untouched):
    with rng_untouched():
        draws = sample(model, seed=0, progress=False)
    assert draws.method == "snis" and draws.notes["auto"]


@pytest.mark.parametrize("method", METHODS)
def test_seeds_leave_the_global_generator_alone(method, rng_untouched):
    options = {"progress": False, **FAST, "num_samples": 200 if method in ("auto", "snis") else 6}
    if method in (*KERNELS, "nuts", "hmc"):
        options["warmup_steps"] = 4
    if method == "auto":
        options["ess"] = 50
    with rng_untouched():
        first, again = (sample(TILTED, method=method, **options) for _ in range(2))
    same(first, again)


@pytest.mark.parametrize("method", METHODS)
def test_the_guide_reaches_them_all(method):
    with pytest.raises(ValueError, match="guide does not propose"):
        sample(model, method=method, guide=elsewhere, progress=False, **FAST)


@pytest.mark.parametrize("method", [*KERNELS, "snis"])
def test_ess_instead_of_a_number_of_draws(method):
    draws = sample(TILTED, 0.5, method=method, ess=100, seed=0, progress=False, model_kwargs={"scale": 0.5})
    assert draws.notes["stopped"] == "target" and draws.notes["ess"] >= 100 and draws.notes["target_ess"] == 100
    if method != "ula":  # biased
        error = draws.mean("z") - torch.tensor([0.75, 0.5])
        assert error.abs().max() < 4.5 * 0.5 / draws.notes["ess"] ** 0.5


@pytest.mark.parametrize("method, allowed", [("chees", 30), ("snis", 120)])
def test_ess_and_a_number_of_draws(method, allowed):
    options = {"ess": 1e6, "num_samples": 30, "num_chains": 4, "seed": 0, "progress": False}
    with pytest.warns(InferenceWarning, match=f"{method}: stopped by num_samples={allowed} with ") as record:
        draws = sample(TILTED, method=method, **options)
    assert draws.num_draws == allowed and draws.notes["stopped"] == "num_samples"
    assert all(warning.filename == __file__ for warning in record)
    with pytest.raises(InferenceError, match=f"{method}: "):
        sample(TILTED, method=method, strict=True, **options)


@pytest.mark.parametrize("method", ["nuts", "hmc", "smc"])
def test_methods_that_cannot_go_on(method):
    with pytest.raises(ValueError, match=f"ess= needs a method that can go on.*got method='{method}'; give num_"):
        sample(model, method=method, ess=100)


@pytest.mark.parametrize("method", ["NUTS", "mcmc", ""])
def test_unknown_method(method):
    expected = r"method must be one of \('auto', 'snis', 'nuts', 'hmc', 'chees', 'mala', 'ula', 'smc'\), got "
    with pytest.raises(ValueError, match=expected + repr(method)):
        sample(model, method=method, warmup=3, **FAST)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_option(method):
    """Before anything runs, with all that would do."""
    with pytest.raises(TypeError, match=rf"""method="{method}" has no option \['warmup_step'\]; it takes """) as caught:
        sample(elsewhere, method=method, warmup_step=3, **FAST)
    options = str(caught.value)
    assert "'progress'" in options and "'model_kwargs'" in options and "'strict'" in options
    assert not any(word in options for word in ("'args'", "'target'", "'kwargs'", "'steps'", "'began'"))
    assert ("'warmup_steps'" in options) == (method not in ("auto", "snis", "smc"))
    assert ("'vectorize'" in options) == (method not in ("nuts", "hmc"))


@pytest.mark.parametrize("method", METHODS)
def test_progress_has_one_name(method):
    with pytest.raises(TypeError, match=r"no option \['disable_progbar'\]"):
        sample(model, method=method, disable_progbar=True, **FAST)


def test_options_of_chains_are_none_of_importance_sampling():
    with pytest.raises(TypeError, match=r"no option \['init'\]; it takes .*'strict', 'vectorize'\], and the model has"):
        sample(model, method="snis", progress=False, init="uniform", **FAST)


@pytest.mark.parametrize("method", METHODS)
def test_no_chains(method):
    with pytest.raises(ValueError, match="num_chains must be a whole number of at least 1, got 0"):
        sample(model, method=method, num_chains=0)


@pytest.mark.parametrize("settings", [{"ess": 0}, {"ess": -1.0}, {"ess": math.nan}, {"ess": 10, "max_seconds": 0}])
def test_impossible_targets(settings):
    with pytest.raises(ValueError, match=r"(ess|max_seconds) must be (positive|a number), got"):
        sample(model, **settings)


@pytest.mark.parametrize("method", ["chees", "smc", "auto", "snis", "nuts"])
def test_targets_that_are_no_models(method):
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = LogDensity(normal.log_prob, 2)
    for target in (density, TiltedDistribution(normal, LinearEnergy([1.0, 0.0]))):
        if method in ("chees", "smc"):
            assert sample(target, method=method, progress=False, **FAST).num_chains == 2
        else:
            with pytest.raises(TypeError, match=f'model must be a Pyro model for method="{method}", got'):
                sample(target, method=method, progress=False, **FAST)


@pytest.mark.parametrize("method, bars", [("nuts", 1), ("chees", 1), ("smc", 1), ("auto", 2), ("snis", 0)])
@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
def test_progress(method, bars, progress, capsys):
    target = tilt(model, {"z": LinearEnergy([4.0, 0.0])}) if method == "auto" else model
    options = {"num_samples": 6, "seed": 0, **({} if progress else {"progress": False})}
    if method in ("nuts", "chees"):
        options["warmup_steps"] = 2
    sample(target, method=method, num_chains=2, **options)
    shown = capsys.readouterr().err
    names = [name for name in ("nuts", "chees", "smc") if f"{name}:" in shown]
    assert len(names) == (bars if progress else 0)
    assert progress or not shown


@pytest.mark.parametrize(
    "option", [{"kernel": MALA}, {"base": None}, {"compile": False}, {"generator": None}, {"num_moves": 2}], ids=repr
)
def test_smc_takes_the_options_of_its_way_by_name(option):
    found = sample(TILTED, method="smc", num_samples=8, num_chains=2, seed=0, progress=False, **option)
    assert found.values["z"].shape[:2] == (2, 8)


@pytest.mark.parametrize("name", ["kernal", "annealing", "particles_per_island", "num_islands", "trajectory_length"])
def test_smc_refuses_others(name):
    with pytest.raises(TypeError, match=name):
        sample(TILTED, method="smc", num_samples=8, num_chains=2, seed=0, progress=False, **{name: 1})


@pytest.mark.parametrize("method", ["auto", "snis", "chees", "hmc", "mala", "smc", "nuts"])
def test_a_subsampled_plate_has_no_posterior(method):
    """One minibatch's posterior would come out, another one in each run."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ValueError, match=r"plate 'data' is subsampled \(2 of 10\).*run the model on all its data"):
        sample(model, torch.zeros(10), method=method, seed=0, progress=False)
