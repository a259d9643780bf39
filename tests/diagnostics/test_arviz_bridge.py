from __future__ import annotations

import json
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, Predictive

import pyro_ebm
from pyro_ebm import ChEES, InferenceWarning
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.diagnostics.arviz_bridge import to_arviz
from pyro_ebm.diagnostics.arviz_files import load_arviz, save_arviz
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.draws import Draws

CHAINS, DRAWS, GROUP, OBSERVED = 2, 50, 3, torch.tensor([0.5, 1.5, -0.5, 2.0])


def model(y=OBSERVED):
    """Two parameters and a factor, as a tilted model has it."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    pyro.factor("mu_tilt", -0.1 * mu)
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


@pytest.fixture(scope="module")
def mcmc():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        run = MCMC(NUTS(model), num_samples=DRAWS, warmup_steps=20, disable_progbar=True)
        run.run(OBSERVED)
    return run


def make_draws(**changes):
    generator = torch.Generator().manual_seed(0)
    values = {
        "mu": torch.randn(CHAINS, DRAWS, generator=generator),
        "z": torch.randn(CHAINS, DRAWS, GROUP, 2, generator=generator),
    }
    options = dict(
        stats={"lp": torch.randn(CHAINS, DRAWS), "diverging": torch.zeros(CHAINS, DRAWS, dtype=torch.bool)},
        observed={"x": torch.randn(GROUP, 5), "x_tilt": torch.empty(GROUP, 0)},
        num_gradients=123,
        seconds=1.5,
        notes={"step_size": 0.1, "chosen": ("a", None)},
    )
    return Draws(values, "nuts", **{**options, **changes})


def groups(tree):
    return {name.strip("/") for name in (tree.groups if arviz_is_1x() else tree.groups()) if name != "/"}


def test_draws_become_named_groups():
    draws = make_draws()
    tree = to_arviz(draws, dims={"z": ("person", "axis")}, coords={"person": ["ann", "bob", "cy"]})
    assert type(tree).__name__ == ("DataTree" if arviz_is_1x() else "InferenceData")
    assert groups(tree) == {"posterior", "sample_stats", "observed_data"}
    posterior = tree["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "person", "axis")
    assert posterior["person"].values.tolist() == ["ann", "bob", "cy"]
    assert posterior["axis"].values.tolist() == [0, 1]
    assert np.array_equal(posterior["z"].sel(person="bob").values, draws.values["z"][:, :, 1].numpy())
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert set(tree["observed_data"].data_vars) == {"x"}
    assert tree["observed_data"]["x"].dims == ("x_dim_0", "x_dim_1")
    attrs = posterior.attrs
    assert (attrs["method"], attrs["weighted"], attrs["seconds"], attrs["num_gradients"]) == (
        "nuts",
        0,
        1.5,
        123,
    )
    assert json.loads(attrs["notes"]) == {"step_size": 0.1, "chosen": ["a", None]}
    assert "log_z" not in attrs and "pareto_k" not in attrs


def test_dims_and_coords_of_the_draws_are_used_and_can_be_overridden():
    draws = make_draws(dims={"z": ("person", "axis"), "x": ("person", "pixel")}, coords={"person": [7, 8, 9]})
    tree = to_arviz(draws, coords={"axis": torch.tensor([10, 20])})
    assert tree["posterior"]["person"].values.tolist() == [7, 8, 9]
    assert tree["posterior"]["axis"].values.tolist() == [10, 20]
    assert tree["observed_data"]["x"].dims == ("person", "pixel")


def test_weights_that_are_kept_are_marked():
    logs = torch.randn(1, DRAWS).log_softmax(-1)
    draws = Draws(
        {"z": torch.randn(1, DRAWS, 2)},
        "snis",
        log_weights=logs,
        pareto_k=0.4,
        log_z=Estimate(torch.tensor(-1.5), torch.tensor(0.1)),
    )
    tree = to_arviz(draws, keep_weights=True)
    assert torch.equal(torch.as_tensor(tree["sample_stats"]["log_weight"].values), logs)
    attrs = tree["posterior"].attrs
    assert (attrs["weighted"], attrs["pareto_k"], float(attrs["log_z"])) == (1, 0.4, -1.5)
    assert float(attrs["log_z_se"]) == pytest.approx(0.1)


def by_datum(**changes):
    stats = {
        "lp": torch.randn(CHAINS, DRAWS),
        "diverging": torch.rand(CHAINS, DRAWS, GROUP) < 0.2,
        "acceptance_rate": torch.rand(CHAINS, DRAWS, GROUP),
    }
    warmup = Draws({"z": torch.zeros(CHAINS, 9, GROUP, 2)}, "chees", stats={"energy": torch.rand(CHAINS, 9, GROUP)})
    z = torch.randn(CHAINS, DRAWS, GROUP, 2)
    options = dict(stats=stats, warmup=warmup, log_z=Estimate(torch.zeros(GROUP), torch.ones(GROUP)))
    return Draws({"z": z}, "chees", **{**options, **changes})


@pytest.mark.parametrize(
    ("dims", "name"),
    [
        ({}, "datum"),
        ({"z": ("image", "axis")}, "image"),
        ({"diverging": ("n",), "acceptance_rate": ("n",), "z": ("image", "axis")}, "n"),
    ],
)
def test_statistics_by_datum_share_a_named_dimension(dims, name, tmp_path):
    draws = by_datum()
    tree = load_arviz(save_arviz(to_arviz(draws, dims=dims), tmp_path / "draws.nc"))
    stats = tree["sample_stats"]
    assert stats["lp"].dims == ("chain", "draw")
    assert stats["diverging"].dims == stats["acceptance_rate"].dims == ("chain", "draw", name)
    assert np.array_equal(stats["diverging"].sel({name: 2}).values, draws.stats["diverging"][..., 2].numpy())
    assert tree["posterior"].attrs["log_z"].shape == (GROUP,)


def test_one_datum_can_be_picked_from_all_groups():
    tree = to_arviz(by_datum(), dims={"z": ("image", "axis")}).sel(image=1)
    assert tree["sample_stats"]["diverging"].dims == ("chain", "draw")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "axis")
    assert len(quiet_import("arviz").summary(tree)) == 2


def test_statistics_by_datum_of_two_shapes_keep_names_of_their_own(tmp_path):
    stats = {"lp": torch.zeros(CHAINS, DRAWS, GROUP), "energy": torch.zeros(CHAINS, DRAWS, 2)}
    found = to_arviz(by_datum(stats=stats))["sample_stats"]
    assert (found["lp"].dims[2], found["energy"].dims[2]) == ("lp_dim_0", "energy_dim_0")
    nested = {"lp": torch.zeros(CHAINS, DRAWS, GROUP, 2)}
    draws = by_datum(stats=nested, log_z=Estimate(torch.zeros(GROUP, 2), torch.ones(GROUP, 2)))
    tree = load_arviz(save_arviz(to_arviz(draws), tmp_path / "draws.nc"))
    assert tree["sample_stats"]["lp"].dims[2:] == ("datum_0", "datum_1")
    assert tree["posterior"].attrs["log_z_se"].tolist() == [1.0] * (2 * GROUP)


def test_warm_up_is_kept_apart_and_can_be_left_out():
    warmup = Draws({"z": torch.zeros(CHAINS, 20)}, "nuts", stats={"lp": torch.zeros(CHAINS, 20)})
    draws = Draws({"z": torch.ones(CHAINS, DRAWS)}, "nuts", warmup=warmup)
    tree = to_arviz(draws)
    assert groups(tree) == {"posterior", "warmup_posterior", "warmup_sample_stats"}
    assert tree["warmup_posterior"]["z"].shape == (CHAINS, 20)
    assert float(tree["warmup_posterior"]["z"].max()) == 0.0
    assert groups(to_arviz(draws, keep_warmup=False)) == {"posterior"}


def test_prior_and_predictive_groups_without_factors():
    prior = {"mu": torch.randn(30), "y": torch.randn(30, 4), "mu_tilt": torch.empty(30, 0)}
    predictive = {"y": torch.randn(40, 4), "mu_tilt": torch.empty(40, 0), "w": np.zeros((40, 2))}
    tree = to_arviz(
        make_draws(),
        prior=prior,
        posterior_predictive=predictive,
        observed_data={"y": OBSERVED},
        dims={"y": ["i"]},
    )
    assert set(tree["prior"].data_vars) == {"mu"}
    assert set(tree["prior_predictive"].data_vars) == {"y"}
    assert set(tree["posterior_predictive"].data_vars) == {"y", "w"}
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "i")
    assert tree["posterior_predictive"]["y"].shape == (1, 40, 4)
    assert set(tree["observed_data"].data_vars) == {"x", "y"}


def test_stock_mcmc(mcmc, rng_untouched):
    samples = mcmc.get_samples()
    with rng_untouched():
        tree = to_arviz(mcmc, dims={"y": ["item"]})
    assert groups(tree) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    assert tree["posterior"]["mu"].shape == (1, DRAWS)
    assert np.array_equal(tree["posterior"]["sigma"].values[0], samples["sigma"].numpy())
    assert set(tree["observed_data"].data_vars) == {"y"}  # mu_tilt, the factor, is not among them
    assert tree["observed_data"]["y"].values.tolist() == OBSERVED.tolist()
    stats = tree["sample_stats"]
    assert stats["diverging"].shape == (1, DRAWS) and stats["diverging"].dtype == bool
    assert 0.3 < float(stats["acceptance_rate"].mean()) <= 1.0
    attrs = tree["posterior"].attrs
    assert (attrs["method"], attrs["inference_library"]) == ("nuts", "pyro")


def test_stock_mcmc_with_stock_predictive(mcmc):
    prior = Predictive(model, num_samples=20)(None)
    assert 0 in prior["mu_tilt"].shape  # what Pyro does: an empty entry for each factor
    posterior_predictive = Predictive(model, mcmc.get_samples())(None)
    tree = to_arviz(mcmc, prior=prior, posterior_predictive=posterior_predictive)
    assert set(tree["prior"].data_vars) == {"mu", "sigma"}
    assert set(tree["prior_predictive"].data_vars) == {"y"}
    assert set(tree["posterior_predictive"].data_vars) == {"y"}


@pytest.mark.filterwarnings("ignore:num_chains")
def test_divergences_and_chains_of_stock_mcmc(monkeypatch):
    # more chains than cores: Pyro then runs them in this process, one after another
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: 1)
    torch.manual_seed(0)
    start = {"x": torch.zeros(2)}
    run = MCMC(
        HMC(potential_fn=lambda z: 1e4 * z["x"] ** 4, step_size=0.3, num_steps=3, adapt_step_size=False),
        num_samples=30,
        warmup_steps=0,
        num_chains=2,
        initial_params=start,
        disable_progbar=True,
    )
    run.run()
    tree = to_arviz(run, posterior_predictive={"y": torch.arange(60.0)})
    found = tree["sample_stats"]["diverging"].values
    expected = run.diagnostics()["divergences"]
    assert found.sum() > 0
    for chain in range(2):
        assert np.flatnonzero(found[chain]).tolist() == sorted(set(expected[f"chain {chain}"]))
    assert groups(tree) == {"posterior", "sample_stats", "posterior_predictive"}
    # rows of the predictive belong to the draws, chain after chain
    assert tree["posterior_predictive"]["y"].values[1, 0] == 30.0


@pytest.mark.parametrize("kind", ["draws", "weighted", "mcmc"])
def test_netcdf_round_trip(kind, tmp_path, mcmc):
    warmup = Draws({"mu": torch.zeros(CHAINS, 10)}, "nuts")
    draws = {
        "draws": make_draws(
            warmup=warmup, dims={"z": ("person", "axis")}, coords={"person": ["a", "b", "c"]}
        ),
        "weighted": make_draws(
            log_weights=torch.randn(CHAINS, DRAWS),
            pareto_k=float("inf"),
            log_z=Estimate(torch.zeros(3), torch.ones(3)),
        ),
        "mcmc": mcmc,
    }[kind]
    tree = to_arviz(draws, prior={"mu": torch.randn(20)}, keep_weights=True)
    path = save_arviz(tree, tmp_path / "draws.nc")
    back = load_arviz(path)
    path.unlink()  # what was read is in memory, and the file is free
    assert groups(back) == groups(tree)
    for group in groups(tree):
        for name, variable in tree[group].data_vars.items():
            assert back[group][name].dims == variable.dims
            assert np.array_equal(back[group][name].values, variable.values), (group, name)
            assert back[group][name].dtype == variable.dtype
    old, new = tree["posterior"].attrs, back["posterior"].attrs
    assert set(old) == set(new)
    assert all(np.array_equal(old[key], new[key], equal_nan=False) for key in old if "seconds" not in key)
    save_arviz(back, path)


def test_site_names_with_a_slash_survive(tmp_path):
    tree = to_arviz(Draws({"a/b": torch.zeros(1, 10, 2)}, "nuts"))
    assert tree["posterior"]["a.b"].dims == ("chain", "draw", "a.b_dim_0")
    assert "a.b" in load_arviz(save_arviz(tree, tmp_path / "x.nc"))["posterior"]


def test_arviz_reads_it(mcmc):
    arviz = quiet_import("arviz")
    draws = Draws({"z": torch.randn(4, 100, 2)}, "nuts")
    table = arviz.summary(to_arviz(draws))
    assert table.index.tolist() == ["z[0]", "z[1]"]
    # from 0.23 numbers, from 1.x texts
    assert np.all(np.abs(table["r_hat"].astype(float) - 1) < 0.1)
    assert arviz.summary(to_arviz(mcmc)).index.tolist() == ["mu", "sigma"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": {"z": ["person"]}}, r"dims\['z'\] must name the 2 dimensions of the site's shape \(3, 2\)"),
        ({"dims": {"z": "ab"}}, r"dims\['z'\] must name the 2 dimensions"),
        ({"dims": {"z": ["draw", "axis"]}}, r"'draw' is used twice, or is the name of a site"),
        ({"dims": {"z": ["mu", "axis"]}}, r"'mu' is used twice, or is the name of a site"),
        ({"dims": {"z": ["a", "a"]}}, r"'a' is used twice"),
        ({"dims": {"q": ["a"]}}, r"dims names sites that do not exist: \['q'\]; sites: .*'mu'.*'z'"),
        (
            {"dims": {"z": ["p", "a"]}, "coords": {"p": [1, 2]}},
            r"coords\['p'\] must hold 3 labels \(posterior: site 'z'\), got shape \(2,\)",
        ),
        ({"prior": {"mu": torch.tensor(1.0)}}, r"prior: 'mu' must have shape \(sample, \*site_shape\)"),
        ({"posterior_predictive": torch.zeros(3)}, "posterior_predictive must be a mapping of names to arrays"),
        ({"chains": 0}, "chains must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        to_arviz(make_draws(), **options)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"draws must be a Draws, an MCMC .*, got list"):
        to_arviz([torch.zeros(1, 10)])
    with pytest.raises(ValueError, match=r"this MCMC has no samples; call its run"):
        to_arviz(MCMC(NUTS(model), num_samples=10, disable_progbar=True))
    with pytest.raises(ValueError, match=r"path: the folder .* does not exist"):
        save_arviz(to_arviz(make_draws()), tmp_path / "no" / "x.nc")
    with pytest.raises(ValueError, match=r"path: there is no file"):
        load_arviz(tmp_path / "x.nc")


def test_an_mcmc_of_this_library_is_its_draws():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    mcmc = pyro_ebm.MCMC(ChEES(model), 20, 20, num_chains=8, init="prior", seed=0, disable_progbar=True)
    with pytest.raises(RuntimeError, match=r"no draws yet: call run\(\) first"):
        to_arviz(mcmc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        draws = mcmc.run()
    assert (np.asarray(to_arviz(mcmc)["posterior"]["z"]) == draws.values["z"].numpy()).all()
