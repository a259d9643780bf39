"""Sites that need care: angles, masked entries, flat priors, what has no density. Each is served right, or named."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm import HMC, MCMC, InferenceWarning, LogDensity, importance, predictive, pyro_nuts, sample
from tests.zoo.cases import CASES

BY_NAME = {case.name: case for case in CASES}
Y = torch.tensor([0.4, -1.1, 0.8, 1.5])
MASK = torch.tensor([True, True, True, False])
QUICK = {"seed": 0, "progress": False}
STOCK = pytest.param("stock", marks=pytest.mark.slow)
METHODS = ["chees", "mala", "smc", "snis", pytest.param("nuts", marks=pytest.mark.slow), STOCK]
BATCHED = {"chees": {"num_samples": 150, "warmup_steps": 150}, "mala": {"num_samples": 300, "warmup_steps": 150}}
BATCHED |= {"smc": {"num_samples": 500, "num_chains": 4}, "snis": {"num_samples": 4000, "num_chains": 1}}


def draw(method, model, *args):
    """Draws by one of the methods, as few as tell; what is said of few draws does not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        if method == "nuts":
            return pyro_nuts(model, *args, num_samples=60, warmup_steps=60, num_chains=2, **QUICK)
        if method == "stock":
            kernel = pyro.infer.NUTS(model)
            return MCMC(kernel, num_samples=60, warmup_steps=60, num_chains=2, **QUICK).run(*args)
        options = {} if method == "snis" else QUICK
        return sample(model, *args, method=method, **BATCHED[method], **{"seed": 0, **options})


def near(draws, site, mean, sd, width=0.35):
    mean, sd = torch.as_tensor(mean), torch.as_tensor(sd)
    assert ((draws.mean(site) - mean).abs() < width * sd).all(), draws.mean(site)
    assert ((draws.std(site) / sd).log().abs() < width).all(), draws.std(site)


# Partly observed data


def partly_observed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=MASK)


def padded(y):
    with pyro.plate("steps", 3), poutine.mask(mask=MASK[1:]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y[0])


@pytest.mark.parametrize("method", METHODS)
def test_data_that_are_there_are_drawn_from_their_prior(method):
    """Mu given three data; what stands in for data that are there, or not, follows normal(mu, 1)."""
    draws = draw(method, partly_observed, Y)
    mean = float(Y[:3].sum()) / 4
    near(draws, "mu", mean, 0.5)
    near(draws, "y_unobserved", mean, math.sqrt(1.25))


@pytest.mark.parametrize("method", ["chees", "smc", "snis"])
def test_padding_follows_its_prior(method):
    near(draw(method, padded, Y), "z", [0.2, 0.0, 0.0], [0.5**0.5, 1.0, 1.0])


def test_a_flat_prior_that_data_depend_on_stays_flat():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    density = LogDensity.from_model(model, Y)
    u = torch.linspace(-1, 1, 5)[:, None]
    torch.testing.assert_close(density(u) - density(u)[0], (d := dist.Normal(u, 1.0).log_prob(Y).sum(-1)) - d[0])
    assert density.target.filled == []


def test_discrete_models_are_filled_too():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k, 1.0), obs=y, obs_mask=MASK)

    density = LogDensity.from_model(model, Y)
    assert density.target.filled == ["y_unobserved"]
    assert (density.value_and_grad(torch.randn(3, 4))[1] != 0).all()


# Angles


@pytest.mark.parametrize("method", METHODS)
def test_an_angle_stays_on_its_circle(method):
    case = BY_NAME["von_mises"]
    draws = draw(method, case.model, *case.args)
    near(draws, "z", *case.answers["z"])
    assert draws.values["z"].abs().max() <= math.pi + 1e-5


@pytest.mark.parametrize("method", ["chees", "smc"])
def test_an_angle_at_the_cut(method):
    """Concentrated at pi, half of the draws lie on either side of it; judged on the circle they are narrow."""

    def model():
        with pyro.plate("angles", 2):
            pyro.sample("z", dist.VonMises(torch.tensor([math.pi, 0.0]), 20.0))

    z = draw(method, model).values["z"]
    resultant = torch.stack([z.cos().mean((0, 1)), z.sin().mean((0, 1))])
    mean_length = float(torch.special.i1(torch.tensor(20.0)) / torch.special.i0(torch.tensor(20.0)))
    torch.testing.assert_close(resultant, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) * mean_length, rtol=0.02, atol=0.03)
    assert 0.3 < float((z[..., 0] > 0).float().mean()) < 0.7


@pytest.mark.parametrize(
    "fn",
    [
        dist.VonMises(torch.zeros(2), 2.0).to_event(1),
        dist.SineBivariateVonMises(0.0, 0.0, 2.0, 2.0, 0.5),
        dist.SineSkewed(dist.VonMises(torch.zeros(1), torch.ones(1)).to_event(1), torch.tensor([0.3])),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([0.0, 3.0]), 1.0)),
        dist.VonMises(0.0, 2.0).mask(True),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_every_angle_is_wrapped_and_counts_once(fn):
    density = LogDensity.from_model(lambda: pyro.sample("z", fn))
    assert density.target.periodic.all()
    u = torch.randn(6, density.dim)
    torch.testing.assert_close(density(u), density(u + 2 * math.pi), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density(u), fn.log_prob(u.reshape(6, *fn.event_shape)))
    far = density.constrain(u + 20 * math.pi)["z"]
    assert (far.abs() <= math.pi + 1e-5).all()
    torch.testing.assert_close(density.target.rewound(u + 20 * math.pi).sin(), u.sin(), rtol=0, atol=1e-4)


def test_chains_of_an_angle_do_not_wander_off():
    def flat():
        pyro.sample("z", dist.VonMises(0.0, 1e-3))

    warmups = []
    mcmc = MCMC(HMC(flat), 20, 40, num_chains=32, hook_fn=lambda k, u, stage, i: warmups.append(u["z"]), **QUICK)
    mcmc.run()
    assert max(float(u.abs().max()) for u in warmups) <= math.pi + 1e-5


# Flat priors


@pytest.mark.parametrize("method", ["chees", "mala", "nuts", STOCK])
def test_chains_start_where_a_prior_has_no_draws(method):
    case = BY_NAME["improper_uniform"]
    near(draw(method, case.model, *case.args), "z", *case.answers["z"], width=0.5)


@pytest.mark.parametrize("call", ["smc", "snis", "importance", "predictive"])
def test_what_begins_with_draws_of_a_flat_prior_names_it(call):
    case = BY_NAME["improper_uniform"]
    functions = {"importance": lambda m, y: importance(m, None, y), "predictive": predictive}
    function = functions.get(call) or (lambda m, y: sample(m, y, method=call, seed=0))
    with pytest.raises(ValueError, match=r"latent site\(s\) \['z'\] have a flat prior .* no draws for .* to begin"):
        function(case.model, *case.args)


@pytest.mark.parametrize("method", ["chees", "nuts", "stock"])
def test_a_flat_prior_that_nothing_depends_on_is_refused(method):
    def model(y):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), (3,)))
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y[0])

    with pytest.raises(ValueError, match=r"site 'z' has 2 of 3 entries with a flat prior"):
        draw(method, model, Y)


def test_a_flat_prior_on_a_bounded_support_is_proper():
    density = LogDensity.from_model(lambda: pyro.sample("p", dist.ImproperUniform(constraints.simplex, (), (3,))))
    assert density.dim == 2


# What has no density


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (dist.Wishart(torch.tensor(5.0), torch.eye(2)), "LKJCholesky"),
        (dist.ProjectedNormal(torch.ones(3)), "divided by their norm"),
        (dist.VonMises3D(torch.tensor([0.0, 0.0, 2.0])), "drawn by no method"),
        (dist.ImproperUniform(constraints.sphere, (), (3,)), "divided by their norm"),
        (dist.Delta(torch.tensor(1.0)), "pyro.deterministic"),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.AbsTransform()]), "not one to one"),
        (
            dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [dist.transforms.AffineTransform(0.0, 2.0)]),
            "transform of an angle",
        ),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Uniform(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 5.0]))
            ),
            "components that share one support",
        ),
        (dist.MaskedMixture(MASK[2:], dist.Normal(torch.zeros(2), 1.0), dist.Gamma(1.0, 1.0)), "biject_to knows"),
        (dist.CoalescentTimes(torch.tensor([0.0, 0.0, 0.1])), "biject_to knows"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("method", ["chees", "nuts", "smc"])
def test_what_no_chain_can_sample_is_refused_by_name(fn, told, method):
    with pytest.raises(ValueError, match=f"site 'z' .*{told}"):
        draw(method, lambda: pyro.sample("z", fn))
