"""The log likelihood of single data and deterministic sites, against closed forms, however the model is written."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from pyro_ebm import Draws, LinearEnergy, tilt
from pyro_ebm.inference import pointwise as module
from pyro_ebm.inference.draws import Source
from pyro_ebm.inference.pointwise import model_sites, pointwise

Y = torch.tensor([0.5, 1.5, -0.5, 2.0])
GROUP = torch.tensor([0, 2, 2, 1])
X = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.0, 2.0], [1.0, 1.0]])
LEAD = (2, 5)
SEEN = torch.tensor([True, False, True, True])
HOLES = torch.where(SEEN, Y, torch.tensor(math.nan))


def normal(value, loc, scale=1.0):
    return dist.Normal(loc, scale).log_prob(value)


def plain(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def without_plate():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def indexed():
    with pyro.plate("group", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.deterministic("spread", a.max() - a.min())
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(a[GROUP], 1.0), obs=Y)


def regression():
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = pyro.deterministic("mean", X @ b)
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def branching():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    loc = mu if mu.item() > 0 else -mu
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(pyro.deterministic("size", loc), 1.0), obs=Y)


def events():
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=X)


def crossed():
    with pyro.plate("row", 4, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("column", 2, dim=-1), pyro.plate("row_again", 4, dim=-2):
        pyro.deterministic("table", u + torch.zeros(2))
        pyro.sample("x", dist.Normal(u, 1.0), obs=X)


def two_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)
    with pyro.plate("more", 2):
        pyro.sample("n", dist.Poisson(mu.exp()), obs=torch.tensor([0.0, 3.0]))


def masked():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=HOLES)


def masked_distribution():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(SEEN), obs=torch.where(SEEN, Y, torch.zeros(())))


def partly_observed():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.where(SEEN, Y, torch.zeros(())), obs_mask=SEEN)


def scaled():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.1), pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def with_factor():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("by_hand", -0.1 * mu)
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


@poutine.reparam(config={"mu": LocScaleReparam(0.0)})
def reparametrized():
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def _of_mu(v):
    return {"y": normal(Y, v["mu"][..., None])}


def _masked(v):
    return {"y": torch.where(SEEN, _of_mu(v)["y"], torch.zeros(()))}


CASES = {
    "plate": (plain, {"mu": ()}, _of_mu, lambda v: {"twice": 2 * v["mu"]}),
    "no plate": (without_plate, {"mu": ()}, _of_mu, None),
    "a[group]": (
        indexed,
        {"a": (3,)},
        lambda v: {"y": normal(Y, v["a"][..., GROUP])},
        lambda v: {"spread": v["a"].amax(-1) - v["a"].amin(-1)},
    ),
    "X @ b": (
        regression,
        {"b": (2,)},
        lambda v: {"y": normal(Y, v["b"] @ X.T)},
        lambda v: {"mean": v["b"] @ X.T},
    ),
    "branches": (
        branching,
        {"mu": ()},
        lambda v: {"y": normal(Y, v["mu"].abs()[..., None])},
        lambda v: {"size": v["mu"].abs()},
    ),
    "event": (events, {"b": (2,)}, lambda v: {"x": normal(X, v["b"][..., None, :]).sum(-1)}, None),
    "crossed plates": (
        crossed,
        {"u": (4, 1)},
        lambda v: {"x": normal(X, v["u"])},
        lambda v: {"table": v["u"].expand(*LEAD, 4, 2)},
    ),
    "two sites": (
        two_sites,
        {"mu": ()},
        lambda v: {**_of_mu(v), "n": dist.Poisson(v["mu"].exp()[..., None]).log_prob(torch.tensor([0.0, 3.0]))},
        None,
    ),
    "NaN under a mask": (masked, {"mu": ()}, _masked, None),
    "masked distribution": (masked_distribution, {"mu": ()}, _masked, None),
    "obs_mask": (
        partly_observed,
        {"mu": (), "y_unobserved": (4,)},
        lambda v: {"y_observed": _masked(v)["y"]},
        lambda v: {"y": torch.where(SEEN, Y, v["y_unobserved"])},
    ),
    "scaled": (scaled, {"mu": ()}, _of_mu, None),
    "factor": (with_factor, {"mu": ()}, _of_mu, None),
    "tilted": (tilt(plain, {"mu": LinearEnergy(0.5)}), {"mu": ()}, _of_mu, lambda v: {"twice": 2 * v["mu"]}),
    "reparametrized": (
        reparametrized,
        {"mu_decentered": ()},
        lambda v: {"y": normal(Y, 1 + 2 * v["mu_decentered"][..., None])},
        lambda v: {"mu": 1 + 2 * v["mu_decentered"]},
    ),
}


def draws_of(model, shapes, *args, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(*LEAD, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return Draws(values, "nuts", source=Source(model, args), **changes)


def run(draws, **options):
    return pointwise(draws, model_sites(draws.source), **{"log_likelihood": None, **options})


@pytest.mark.parametrize("chunk", [4096, 3])
@pytest.mark.parametrize("name", CASES)
def test_against_closed_form(name, chunk, monkeypatch, rng_untouched):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model, shapes, expected, deterministic = CASES[name]
    draws = draws_of(model, shapes)
    with rng_untouched():
        found = run(draws)
    assert found.left_out == ""
    for ours, theirs in ((found.log_likelihood, expected), (found.deterministic, deterministic or (lambda v: {}))):
        theirs = theirs(draws.values)
        assert ours.keys() == theirs.keys()
        for site, value in theirs.items():
            torch.testing.assert_close(ours[site], value)


def test_double_precision_stays():
    draws = draws_of(plain, {"mu": ()}, Y.double(), dtype=torch.float64)
    found = run(draws).log_likelihood["y"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, normal(Y.double(), draws.values["mu"][..., None]))


def test_without_log_likelihood_the_deterministic_sites_are_there():
    found = run(draws_of(plain, {"mu": ()}), log_likelihood=False)
    assert found.log_likelihood == {} and set(found.deterministic) == {"twice"}
    assert found.left_out == "not asked for"


def enumerated():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.deterministic("shifted", mu + k)
    pyro.sample("y", dist.Normal(mu + k, 1.0), obs=Y[0])


def unobserved():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)


def subsampled():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[index])


LEFT_OUT = {
    "not among the draws": (enumerated, r"latent site\(s\) \['k'\] of the model are not among the draws", {"shifted"}),
    "no data": (unobserved, "the model has no observed site", {"twice"}),
    "tilted data": (
        tilt(plain, {"y": LinearEnergy(0.1)}, normalize=False),
        r"the observed site\(s\) \['y'\] are tilted, and log Z",
        {"twice"},
    ),
    "subsampled": (subsampled, r"the site\(s\) \['y'\] are subsampled: other data in each run", set()),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_where_there_is_none_it_is_left_out_and_the_reason_kept(name):
    model, text, deterministic = LEFT_OUT[name]
    draws = draws_of(model, {"mu": ()})
    found = run(draws)
    assert found.log_likelihood == {} and set(found.deterministic) == deterministic
    with pytest.raises(ValueError, match="log_likelihood=True: .*" + text):
        run(draws, log_likelihood=True)


def test_deterministic_sites_follow_the_posterior_of_what_was_summed_out(rng_untouched):
    """Given mu = 0 and y = .5 the site k is a fair coin, given mu = 1 one with odds exp(-1)."""
    lead = (2, 2000)
    mu = torch.tensor([[0.0], [1.0]]).expand(lead)
    with rng_untouched():
        found = run(Draws({"mu": mu}, "nuts", source=Source(enumerated)))
    shares = (found.deterministic["shifted"] - mu).mean(1)
    expected = torch.tensor([0.5, 1 / (1 + math.e)])
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / lead[1]).sqrt()).all()


def test_a_continuous_site_that_is_missing_is_told():
    with pytest.warns(UserWarning, match=r"site\(s\) \['mu'\].*deterministic sites are left out"):
        found = run(Draws({"k": torch.zeros(LEAD)}, "nuts", source=Source(enumerated)))
    assert found.deterministic == {} and "mu" in found.left_out


def test_weighted_draws_wait_to_be_asked():
    logs = torch.randn(*LEAD).flatten().log_softmax(0).reshape(LEAD)
    draws = draws_of(plain, {"mu": ()}, log_weights=logs)
    found = run(draws)
    assert found.log_likelihood == {} and set(found.deterministic) == {"twice"}
    assert "leave keep_weights=False, or ask by log_likelihood=True" in found.left_out
    assert set(run(draws, log_likelihood=True).log_likelihood) == {"y"}
    even = draws_of(plain, {"mu": ()}, log_weights=torch.full(LEAD, -math.log(10)))
    assert set(run(even).log_likelihood) == {"y"}


def test_large_data_wait_to_be_asked(monkeypatch):
    monkeypatch.setattr(module, "_MOST_NUMBERS", 39)
    draws = draws_of(plain, {"mu": ()})
    found = run(draws)
    assert found.log_likelihood == {} and found.left_out.startswith("40 numbers would be looked at")
    assert set(run(draws, log_likelihood=True).log_likelihood) == {"y"}


def test_other_data_than_those_of_the_draws():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    draws = draws_of(model, {"z": (3,)}, Y)
    with pytest.warns(UserWarning, match=r"could not be run at the draws: ValueError: .*'z'.*draws\.with_model\(model"):
        found = run(draws)
    assert found.log_likelihood == {} and "could not be run" in found.left_out
    with pytest.raises(ValueError, match="'z'"):
        run(draws, log_likelihood=True)


def test_sites_of_a_model():
    sites = model_sites(Source(crossed))
    assert sites.plates["x"] == ("row_again", "column") and sites.plates["u"] == ("row", None)
    assert sites.plates["table"] == ("row_again", "column")
    assert sites.latent == ("u",) and sites.deterministic == ("table",)
    assert model_sites(Source(events)).plates["x"] == ("rows", None)
