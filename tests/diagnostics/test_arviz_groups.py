"""What stands in which group: as for a stock MCMC, named after plates, enough for ArviZ's model criticism."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.streaming import StackStats, StatsOfDict

from pyro_ebm import MCMC as MCMC_of_ours
from pyro_ebm import ChEES, Draws, importance, predictive, sample, to_arviz
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.inference.draws import Source

GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
Y = torch.tensor([1.2, 0.7, 1.1, -0.4, -1.3, 0.1, 2.2, 1.7, 2.9, 2.0])
CHAINS, DRAWS = 2, 40


def hierarchical(y=None):
    """Group means, written as users write them; ``[..., GROUP]`` so that stock Predictive runs it too."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", 3):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    pyro.deterministic("effect", a - mu)
    with pyro.plate("data", len(GROUP)):
        pyro.sample("y", dist.Normal(a[..., GROUP], 0.8), obs=y)


def plain(y=None):
    """Nothing but random sites, in which ArviZ's own converter sees what we see."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("axis", 2):
        w = pyro.sample("w", dist.Normal(mu, 1.0))
    with pyro.plate("data", len(GROUP)):
        pyro.sample("y", dist.Normal(w.sum(-1, keepdim=True), 0.8), obs=y)


def stock(model):
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.multiprocessing.cpu_count", lambda: 1)  # one chain after another, in this process
        torch.manual_seed(1)
        options = {"num_samples": DRAWS, "warmup_steps": 20, "num_chains": CHAINS, "disable_progbar": True}
        with pytest.warns(UserWarning, match="num_chains"):
            run = MCMC(NUTS(model), **options)
        run.run(Y)
    return run


@pytest.fixture(scope="module")
def mcmc():
    return stock(hierarchical)


def groups(tree):
    return {name.strip("/") for name in (tree.groups if arviz_is_1x() else tree.groups()) if name != "/"}


def draws_of(model=hierarchical, lead=(4, 50), **changes):
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([1.0, -0.5, 2.2])
    values = {
        "mu": 0.9 + 0.5 * torch.randn(*lead, generator=generator),
        "a": means + 0.35 * torch.randn(*lead, 3, generator=generator),
    }
    return Draws(values, "nuts", **{"source": Source(model, (Y,)), "observed": {"y": Y}, **changes})


@pytest.mark.skipif(arviz_is_1x(), reason="ArviZ 1.x has no converter for Pyro to compare with")
def test_as_arviz_converts_a_stock_mcmc():
    run = stock(plain)
    dims = {"w": ["axis"], "y": ["data"]}
    given = {
        "posterior_predictive": Predictive(plain, run.get_samples())(),
        "prior": Predictive(plain, num_samples=30)(),
    }
    theirs, ours = quiet_import("arviz").from_pyro(run, dims=dims, **given), to_arviz(run, **given)
    assert groups(ours) == groups(theirs)
    for group in groups(theirs):
        for name, variable in theirs[group].data_vars.items():
            assert ours[group][name].dims == variable.dims, (group, name)
            np.testing.assert_allclose(ours[group][name].values, variable.values, rtol=1e-5, err_msg=f"{group} {name}")
        if group != "sample_stats":  # ours holds more
            assert set(ours[group].data_vars) == set(theirs[group].data_vars)


def test_dimensions_take_the_names_of_plates(mcmc):
    tree = to_arviz(mcmc, coords={"group": ["north", "east", "south"]})
    assert tree["posterior"]["a"].dims == ("chain", "draw", "group")
    assert tree["posterior"]["group"].values.tolist() == ["north", "east", "south"]
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    assert tree["observed_data"]["y"].dims == ("data",)
    other = to_arviz(mcmc, dims={"y": ["row"]})
    assert other["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert other["posterior"]["a"].dims == ("chain", "draw", "group")


def test_event_dimensions_have_no_plate():
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3, 2))

    draws = Draws({"z": torch.zeros(2, 9, 3, 2)}, "nuts", source=Source(model), observed={"x": torch.zeros(3, 2)})
    tree = to_arviz(draws, dims={"x": ["image", "pixel"]})
    assert tree["posterior"]["z"].dims == ("chain", "draw", "rows", "z_dim_1")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "image")
    assert tree["observed_data"]["x"].dims == ("image", "pixel")


def test_a_plate_called_draw():
    def model():
        with pyro.plate("draw", 3), pyro.plate("chain/of", 2, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    tree = to_arviz(Draws({"z": torch.zeros(2, 9, 2, 3)}, "nuts", source=Source(model)))
    assert tree["posterior"]["z"].dims == ("chain", "draw", "chain.of", "draw_")


def test_sites_called_chain_and_draw_get_another_name():
    values = {"draw": torch.ones(2, 9), "draw_": torch.zeros(2, 9), "chain": torch.ones(2, 9, 3)}
    with pytest.warns(UserWarning) as record:
        tree = to_arviz(Draws(values, "nuts"), dims={"chain": ["link"]}, prior={"draw": torch.ones(5)})
    assert sorted(str(each.message)[:40] for each in record) == [
        "the site 'chain' is called 'chain_' here",
        "the site 'draw' is called 'draw__' here:",
    ]
    assert {each.filename for each in record} == {__file__}
    assert set(tree["posterior"].data_vars) == {"chain_", "draw_", "draw__"}
    assert tree["posterior"]["chain_"].dims == ("chain", "draw", "link")
    assert float(tree["posterior"]["draw__"].mean()) == 1.0 and set(tree["prior"].data_vars) == {"draw__"}


def test_two_sizes_of_one_dimension_name_the_group():
    draws = Draws({"z": torch.zeros(1, 9, 3), "w": torch.zeros(1, 9, 4)}, "nuts")
    with pytest.raises(ValueError, match=r"posterior: dimension 'd' of site 'w' has 4 elements, .* another site 3;"):
        to_arviz(draws, dims={"z": ["d"], "w": ["d"]})


# Predictions


def stock_predictions(draws):
    return Predictive(hierarchical, {name: draws.flat(name) for name in draws.values})()


def our_predictions(draws):
    return predictive(hierarchical, draws=draws, seed=0)


@pytest.mark.parametrize("predict", [stock_predictions, our_predictions])
def test_posterior_predictive_belongs_to_the_draws(predict):
    draws = draws_of()
    tree = to_arviz(draws, posterior_predictive=predict(draws))
    found = tree["posterior_predictive"]
    assert set(found.data_vars) == {"y"}  # the posterior's own sites are there already
    assert found["y"].dims == ("chain", "draw", "data") and found["y"].shape == (4, 50, 10)
    # y given a is a plus noise: chain by chain, draw by draw
    noise = found["y"].values - tree["posterior"]["a"].values[..., GROUP.numpy()]
    assert noise.std() == pytest.approx(0.8, rel=0.1)
    assert tree["posterior"]["effect"].shape == (4, 50, 3)


@pytest.mark.parametrize("shape", [(4, 50, 10), (200, 10), (200, 1, 1, 10)])
def test_samples_by_chain_or_in_a_row(shape):
    y = torch.randn(4, 50, 10)
    tree = to_arviz(draws_of(), posterior_predictive={"y": y.reshape(shape)})
    assert np.array_equal(tree["posterior_predictive"]["y"].values, y.numpy())


def test_predictions_for_other_data_stay():
    predicted = {"effect": torch.randn(200, 7), "a": torch.randn(200, 3), "mu": draws_of().flat("mu")}
    found = to_arviz(draws_of(), posterior_predictive=predicted)["posterior_predictive"]
    assert set(found.data_vars) == {"effect", "a"}  # of seven groups; drawn anew


@pytest.mark.parametrize("of", ["stock", "ours"])
def test_prior_draws_lose_dimensions_of_size_one(of):
    prior = Predictive(hierarchical, num_samples=30)() if of == "stock" else predictive(hierarchical, num_samples=30)
    tree = to_arviz(draws_of(), prior=prior)
    assert {name: v.shape for name, v in tree["prior"].data_vars.items()} == {
        "mu": (1, 30),
        "a": (1, 30, 3),
        "effect": (1, 30, 3),
    }
    assert tree["prior_predictive"]["y"].shape == (1, 30, 10)


def test_a_site_of_one_element_keeps_its_dimension():
    def model():
        with pyro.plate("one", 1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    draws = Draws({"z": torch.zeros(2, 9, 1)}, "nuts", source=Source(model))
    assert to_arviz(draws, prior=Predictive(model, num_samples=5)())["prior"]["z"].shape == (1, 5, 1)


# What can be converted


@pytest.mark.parametrize("kind", ["samples", "streaming"])
def test_other_holders_of_draws(kind, mcmc):
    if kind == "samples":
        tree = to_arviz(mcmc.get_samples())
        assert tree["posterior"]["a"].shape == (1, CHAINS * DRAWS, 3)
        assert "do not know their model" in tree["posterior"].attrs["log_likelihood"]
    else:
        run = StreamingMCMC(
            NUTS(hierarchical), 12, warmup_steps=8, disable_progbar=True, statistics=StatsOfDict(default=StackStats)
        )
        run.run(Y)
        tree = to_arviz(run)
        assert tree["log_likelihood"]["y"].shape == (1, 12, 10) and set(tree["posterior"]) == {"mu", "a", "effect"}


def test_a_model_can_be_given_to_draws_without_one():
    draws = draws_of(source=None, observed={})
    assert groups(to_arviz(draws)) == {"posterior"}
    assert "log_likelihood" in groups(to_arviz(draws.with_model(hierarchical, y=Y)))


def test_fewer_chains():
    draws = draws_of(lead=(64, 20), stats={"lp": torch.arange(64.0)[:, None].expand(64, 20)})
    tree = to_arviz(draws, chains=4, posterior_predictive=predictive(hierarchical, draws=draws, seed=0))
    assert tree["sample_stats"]["lp"].values[:, 0].tolist() == [0.0, 16.0, 32.0, 48.0]
    assert np.array_equal(tree["posterior"]["a"].values, draws.values["a"][::16].numpy())
    for group in ("log_likelihood", "posterior_predictive"):
        assert tree[group]["y"].shape == (4, 20, 10)
    noise = tree["posterior_predictive"]["y"].values - tree["posterior"]["a"].values[..., GROUP.numpy()]
    assert noise.std() == pytest.approx(0.8, rel=0.1)
    assert to_arviz(draws_of(), chains=9)["posterior"]["mu"].shape == (4, 50)


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # few draws
def test_our_mcmc_is_paired_as_a_stock_one():
    mcmc = MCMC_of_ours(ChEES(hierarchical), 20, 20, num_chains=8, init="prior", seed=0, progress=False)
    mcmc.run(Y)
    predicted = Predictive(hierarchical, mcmc.get_samples())()
    tree = to_arviz(mcmc, posterior_predictive=predicted, prior=Predictive(hierarchical, num_samples=9)())
    assert tree["posterior_predictive"]["y"].shape == (8, 20, 10)
    assert np.array_equal(tree["posterior_predictive"]["y"].values.reshape(160, 10), predicted["y"].numpy())
    assert tree["prior"]["mu"].shape == (1, 9) and tree["prior_predictive"]["y"].shape == (1, 9, 10)


def test_log_likelihood_can_be_left_out_or_insisted_on():
    assert "log_likelihood" not in groups(to_arviz(draws_of(), log_likelihood=False))
    with pytest.raises(ValueError, match=r"log_likelihood=True: the draws do not know their model; give it by draws\."):
        to_arviz(draws_of(source=None), log_likelihood=True)


# What ArviZ makes of it


def indexed(y):
    """As people write it: no ``...``, so that it does not run in an outer plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", 3):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    pyro.deterministic("effect", a - mu)
    with pyro.plate("data", len(GROUP)):
        pyro.sample("y", dist.Normal(a[GROUP], 0.8), obs=y)


def pooled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(GROUP)):
        pyro.sample("y", dist.Normal(mu, 0.8), obs=y)


@pytest.fixture(scope="module")
def tree():
    draws = sample(
        indexed, Y, method="chees", num_samples=100, num_chains=8, warmup_steps=100, vectorize="auto", seed=0,
        progress=False,
    )  # fmt: skip
    return to_arviz(draws, posterior_predictive=predictive(indexed, Y, draws=draws, seed=0))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")  # up to .8, as below
def test_leave_one_out_agrees_with_the_closed_form(tree):
    """Conditional on the groups' data: y_i given the others is normal, with moments of linear algebra."""
    loo = quiet_import("arviz").loo(tree, pointwise=True)
    same = (GROUP[:, None] == GROUP).double()
    covariance = 4.0 + same + 0.64 * torch.eye(len(Y), dtype=torch.float64)
    exact = 0.0
    for i in range(len(Y)):
        rest = [j for j in range(len(Y)) if j != i]
        gain = torch.linalg.solve(covariance[rest][:, rest], covariance[rest, i])
        variance = covariance[i, i] - covariance[i, rest] @ gain
        exact += float(dist.Normal(gain @ Y[rest].double(), variance.sqrt()).log_prob(Y[i].double()))
    found = float(loo.elpd if arviz_is_1x() else loo.elpd_loo)
    assert found == pytest.approx(exact, abs=0.4)  # 800 draws, Pareto k up to .5
    assert float(loo.pareto_k.max()) < 0.8


@pytest.mark.filterwarnings("ignore")  # ArviZ's own
def test_comparison_prefers_the_groups(tree):
    draws = importance(pooled, None, Y, num_samples=4000, seed=0).equally_weighted(800)
    table = quiet_import("arviz").compare({"groups": tree, "pooled": to_arviz(draws)})
    assert table.index[0] == "groups"


def draw_figures(tree):
    """Each of ArviZ's plots that people make first, by the names of this version."""
    az = quiet_import("arviz")
    return {
        "ppc": az.plot_ppc_dist(tree) if arviz_is_1x() else az.plot_ppc(tree, num_pp_samples=50),
        "forest": az.plot_forest(tree, var_names=["effect", "mu"]),
        "loo_pit": az.plot_loo_pit(tree) if arviz_is_1x() else az.plot_loo_pit(tree, y="y"),
        "rank": az.plot_rank(tree, var_names=["mu"]),
    }


@pytest.mark.uses_global_rng  # which draws to show
@pytest.mark.filterwarnings("ignore")  # ArviZ's own
def test_figures(tree):
    assert all(figure is not None for figure in draw_figures(tree).values())


def test_log_likelihood_is_normal_where_nothing_is_known_of_the_values(tree):
    values = tree["log_likelihood"]["y"].values
    assert np.isfinite(values).all() and values.max() <= -math.log(0.8 * math.sqrt(2 * math.pi)) + 1e-5
