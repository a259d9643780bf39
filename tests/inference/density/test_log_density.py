"""LogDensity: the log joint by hand, Jacobians included, for every kind of site, plate and model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import nn

from pyro_ebm import VAE, LinearEnergy, LogDensity, TiltedDistribution, tilt
from pyro_ebm.structure import DoesNotBroadcast

Y = torch.tensor([0.3, -1.0, 2.0])


def points(density, chains=5, dtype=torch.float32):
    return torch.randn(chains, *density.batch, density.dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def gaussian_data(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).tanh(), 0.5).to_event(1), obs=x)


class Noisy(nn.Module):
    """A model whose forward pass differs between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.modes = []

    def model(self):
        self.modes.append(self.training)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = self.drop(self.norm(z.reshape(-1, 2))).reshape(z.shape)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(2))


# The seam itself


def test_a_plain_function():
    density = LogDensity(lambda u: -(u**2).sum(-1), 3)
    u = torch.randn(4, 2, 3)
    assert torch.equal(density(u), -(u**2).sum(-1))
    value, grad = density.value_and_grad(u)
    assert torch.equal(value, density(u))
    torch.testing.assert_close(grad, -2 * u)
    assert not value.requires_grad and not u.requires_grad
    assert density.constrain(u)["u"] is u and density.unconstrain({"u": u}) is u


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), ()])
def test_points_of_the_wrong_shape_are_refused(shape):
    density = LogDensity(lambda u: u.sum(-1), 2)
    with pytest.raises(ValueError, match=r"u must have shape \(\*chains, 2\), got"):
        density(torch.zeros(shape))


def test_a_function_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"one number per point, shape \(4,\), got \(4, 2\)"):
        LogDensity(lambda u: u, 2)(torch.zeros(4, 2))


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="log_prob must be callable, got str"):
        LogDensity("normal", 2)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1"):
        LogDensity(lambda u: u.sum(-1), 0)


# Models


def test_several_sites_and_observed_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + w.sum(-1), 0.7), obs=y)

    density = LogDensity.from_model(model, Y)
    u = points(density)
    mu, w = u[:, 0], u[:, 1:]
    expected = dist.Normal(1.0, 2.0).log_prob(mu) + dist.Normal(0.0, 3.0).log_prob(w).sum(-1)
    expected = expected + dist.Normal((mu + w.sum(-1))[:, None], 0.7).log_prob(Y).sum(-1)
    torch.testing.assert_close(density(u), expected)
    assert density.dim == 3 and density.batch == ()


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 3, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("repeats", 4, dim=-1):
            eps = pyro.sample("eps", dist.LogNormal(0.0, 0.5))
            pyro.sample("y", dist.Normal(theta, eps), obs=y)


def test_plates_nested_two_deep():
    y = torch.randn(3, 4)
    density = LogDensity.from_model(hierarchy, y)
    u = points(density)
    mu, log_tau, theta, log_eps = u[:, 0], u[:, 1], u[:, 2:5], u[:, 5:].reshape(-1, 3, 4)
    expected = dist.Normal(0.0, 2.0).log_prob(mu)
    expected = expected + math.log(2 / math.pi) - torch.log1p((2 * log_tau).exp()) + log_tau
    expected = expected + dist.Normal(mu[:, None], log_tau.exp()[:, None]).log_prob(theta).sum(-1)
    expected = expected + dist.Normal(0.0, 0.5).log_prob(log_eps).sum((1, 2))
    expected = expected + dist.Normal(theta[..., None], log_eps.exp()).log_prob(y).sum((1, 2))
    torch.testing.assert_close(density(u), expected)
    shapes = {site: tuple(value.shape) for site, value in density.constrain(u).items()}
    assert shapes == {"mu": (5,), "tau": (5,), "theta": (5, 3, 1), "eps": (5, 3, 4)}


def test_chains_may_have_any_shape():
    density = LogDensity.from_model(hierarchy, torch.randn(3, 4))
    u = points(density, 6)
    torch.testing.assert_close(density(u.reshape(2, 3, -1)), density(u).reshape(2, 3))
    torch.testing.assert_close(density(u[0]), density(u)[0])
    assert density.constrain(u.reshape(2, 3, -1))["eps"].shape == (2, 3, 3, 4)
    assert density.constrain(u[0])["eps"].shape == (3, 4)


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(0.3, 2.0),
        dist.LogNormal(0.5, 0.7),
        dist.HalfCauchy(2.0),
        dist.Beta(2.0, 3.0),
        dist.Uniform(-1.0, 4.0),
        dist.Normal(torch.zeros(3), 2.0).to_event(1),
    ],
    ids=lambda law: type(law).__name__,
)
def test_jacobian_by_differentiation(law):
    density = LogDensity.from_distribution(law)
    for u in points(density, 3).double():
        z = density.constrain(u)["z"]
        matrix = torch.autograd.functional.jacobian(lambda v: density.constrain(v)["z"].reshape(-1), u)
        expected = law.log_prob(z).sum() + torch.linalg.slogdet(matrix).logabsdet
        torch.testing.assert_close(density(u), expected)


@pytest.mark.parametrize(
    "law, free",
    [
        (dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0, 0.5])), lambda z: z[:-1]),
        (dist.LKJCholesky(3, 1.7), lambda z: torch.stack([z[1, 0], z[2, 0], z[2, 1]])),
    ],
    ids=["Dirichlet", "LKJCholesky"],
)
def test_jacobian_by_differentiation_on_a_manifold(law, free):
    density = LogDensity.from_distribution(law)
    for u in points(density, 3).double():
        z = density.constrain(u)["z"]
        matrix = torch.autograd.functional.jacobian(lambda v: free(density.constrain(v)["z"]), u)
        expected = law.log_prob(z) + torch.linalg.slogdet(matrix).logabsdet
        torch.testing.assert_close(density(u), expected)


def test_ordered_values_through_a_transform():
    law = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), OrderedTransform())
    density = LogDensity.from_distribution(law, site="cuts")
    u = points(density)
    cuts = density.constrain(u)["cuts"]
    assert (cuts.diff(dim=-1) > 0).all()
    torch.testing.assert_close(density(u), dist.Normal(0.0, 1.0).log_prob(u).sum(-1))


def test_several_constrained_sites_in_a_plate():
    def model():
        with pyro.plate("rows", 3):
            pyro.sample("p", dist.Dirichlet(torch.ones(4)))
            pyro.sample("s", dist.LogNormal(0.0, 1.0))

    density = LogDensity.from_model(model)
    assert density.dim == 3 * 3 + 3
    single = LogDensity.from_distribution(dist.Dirichlet(torch.ones(4)))
    u = points(density)
    expected = single(u[:, :9].reshape(5, 3, 3)).sum(-1) + dist.Normal(0.0, 1.0).log_prob(u[:, 9:]).sum(-1)
    torch.testing.assert_close(density(u), expected)


def test_a_tilt_enters_without_its_log_z():
    a = torch.tensor([1.0, -2.0])
    tilted = tilt(gaussian_data, {"z": LinearEnergy(a)})
    x = Y[:, None]
    density, base = LogDensity.from_model(tilted, x), LogDensity.from_model(gaussian_data, x)
    u = points(density)
    torch.testing.assert_close(density(u), base(u) + (u.reshape(5, 3, 2) @ a).sum(-1))


def test_a_tilted_distribution_enters_without_its_log_z(recwarn):
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = LogDensity.from_distribution(TiltedDistribution(base, LinearEnergy([9.0, 9.0])))
    u = points(density)
    torch.testing.assert_close(density(u), base.log_prob(u) + 9 * u.sum(-1))
    assert not recwarn.list  # far from its base, which is of no concern here


def test_a_factor_counts_once_a_chain():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("bonus", 3 * z)

    density = LogDensity.from_model(model)
    u = points(density)
    torch.testing.assert_close(density(u), dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + 3 * u[:, 0])


# Independent data


@pytest.mark.parametrize("tilted", [False, True])
def test_independent_data_have_densities_of_their_own(tilted):
    model = tilt(gaussian_data, {"z": LinearEnergy([1.0, 0.5])}) if tilted else gaussian_data
    x = Y[:, None]
    density = LogDensity.from_model(model, x, independent="data")
    assert density.dim == 2 and density.batch == (3,)
    u = points(density)
    assert density(u).shape == (5, 3)
    for i in range(3):
        torch.testing.assert_close(density(u)[:, i], LogDensity.from_model(model, x[i : i + 1])(u[:, i]))
    joint = LogDensity.from_model(model, x)
    torch.testing.assert_close(density(u).sum(-1), joint(u.flatten(1)))


def test_independent_outer_plate_with_an_inner_one():
    def model(y):
        with pyro.plate("groups", len(y), dim=-2):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("repeats", 2, dim=-1):
                s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
                pyro.sample("y", dist.Normal(p[..., 0], s), obs=y)

    y = torch.randn(4, 2)
    density = LogDensity.from_model(model, y, independent="groups")
    assert density.dim == 2 + 2 and density.batch == (4,)
    u = points(density)
    for i in range(4):
        torch.testing.assert_close(density(u)[:, i], LogDensity.from_model(model, y[i : i + 1])(u[:, i]))
    values = density.constrain(u)
    assert values["p"].shape == (5, 4, 1, 3) and values["s"].shape == (5, 4, 2)
    torch.testing.assert_close(density.unconstrain(values), u, atol=1e-4, rtol=1e-4)


def test_independent_inner_plate():
    y = torch.randn(2, 3)

    def model(y):
        with pyro.plate("data", y.shape[1], dim=-1), pyro.plate("repeats", 2, dim=-2):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(p[..., 0], s), obs=y)

    density = LogDensity.from_model(model, y, independent="data")
    assert density.dim == 2 * 2 + 2 and density.batch == (3,)
    u = points(density)
    for i in range(3):
        torch.testing.assert_close(density(u)[:, i], LogDensity.from_model(model, y[:, i : i + 1])(u[:, i]))
    values = density.constrain(u)
    assert values["p"].shape == (5, 2, 3, 3) and values["s"].shape == (5, 2, 3)
    torch.testing.assert_close(density.unconstrain(values), u, atol=1e-4, rtol=1e-4)


def test_independent_images_of_a_vae():
    torch.manual_seed(0)
    vae = VAE((6,), 2, hidden=(8,))
    x = torch.rand(3, 6)
    density = LogDensity.from_model(vae.model, x, independent="data")
    u = points(density)
    expected = vae.prior.log_prob(u) + vae.decode(u).log_prob(x)
    torch.testing.assert_close(density(u), expected)


def test_independent_plate_must_hold_every_latent_site():
    with pytest.raises(ValueError, match=r"every latent site inside that plate, but \['mu', 'tau'\] lie outside"):
        LogDensity.from_model(hierarchy, torch.randn(3, 4), independent="groups")


def test_unknown_independent_plate_lists_the_plates():
    with pytest.raises(ValueError, match=r"'rows' is not a plate of the model's latent sites; plates: \['data'\]"):
        LogDensity.from_model(gaussian_data, Y[:, None], independent="rows")


def test_independent_plate_whose_elements_are_coupled():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("sum", -(z.sum(-1, keepdim=True) ** 2))

    with pytest.raises(ValueError, match="depend on each other through site 'sum'"):
        LogDensity.from_model(model, independent="data")


# Gradients and the way back


@pytest.mark.parametrize("independent", [None, "data"])
def test_gradient_against_finite_differences(independent):
    torch.manual_seed(0)
    vae = VAE((6,), 2, hidden=(8,)).double()
    model = tilt(vae.model, {"z": lambda z: torch.tanh(z[..., 0] * z[..., 1])})
    density = LogDensity.from_model(model, torch.rand(3, 6).double(), independent=independent)
    u = points(density, 2, torch.float64)
    assert torch.autograd.gradcheck(density, (u.requires_grad_(),))
    value, grad = density.value_and_grad(u)
    (expected,) = torch.autograd.grad(density(u).sum(), u)
    assert torch.equal(grad, expected) and torch.equal(value, density(u).detach())
    assert all(p.grad is None for p in vae.parameters())


def test_gradients_under_no_grad():
    density = LogDensity(lambda u: -(u**2).sum(-1), 1)
    with torch.no_grad():
        _, grad = density.value_and_grad(torch.ones(1))
    assert grad.tolist() == [-2.0]


def test_round_trip():
    density = LogDensity.from_model(hierarchy, torch.randn(3, 4))
    u = points(density).reshape(5, -1)
    values = density.constrain(u)
    assert (values["tau"] > 0).all() and (values["eps"] > 0).all()
    torch.testing.assert_close(density.unconstrain(values), u, atol=1e-5, rtol=1e-5)
    single = {site: value[0] for site, value in values.items()}
    torch.testing.assert_close(density.unconstrain(single), u[0], atol=1e-5, rtol=1e-5)


def test_the_way_back_checks_its_values():
    density = LogDensity.from_model(gaussian_data, Y[:, None])
    with pytest.raises(ValueError, match=r"values lacks the site\(s\) \['z'\]"):
        density.unconstrain({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"values\['z'\] must have shape \(\*chains, 3, 2\), got \(4, 2\)"):
        density.unconstrain({"z": torch.zeros(4, 2)})


# Modules, state, errors


def test_modules_are_evaluated_and_left_as_they_were(rng_untouched):
    noisy = Noisy()
    before = {name: value.clone() for name, value in noisy.state_dict().items()}
    with rng_untouched():
        density = LogDensity.from_model(noisy.model)
        u = points(density)
        first, second = density(u), density(u)
    torch.testing.assert_close(first, second)
    loc = u / (1 + noisy.norm.eps) ** 0.5
    expected = dist.Normal(0.0, 1.0).log_prob(u).sum(-1) + dist.Normal(loc, 1.0).log_prob(torch.tensor(1.0)).sum(-1)
    torch.testing.assert_close(first, expected)
    assert noisy.training and noisy.drop.training and noisy.norm.training and not any(noisy.modes)
    assert all(torch.equal(value, before[name]) for name, value in noisy.state_dict().items())


def test_double_precision():
    def model():
        pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))

    density = LogDensity.from_model(model)
    u = points(density, dtype=torch.float64)
    assert density.like.dtype == density(u).dtype == density.constrain(u)["z"].dtype == torch.float64


def test_no_latent_sites():
    with pytest.raises(ValueError, match="no continuous latent sample sites"):
        LogDensity.from_model(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))


def test_discrete_sites_without_a_list_of_values_are_refused():
    def model():
        pyro.sample("rate", dist.Gamma(1.0, 1.0))
        pyro.sample("k", dist.Poisson(3.0))

    with pytest.raises(ValueError, match="site 'k' is discrete .Poisson. and has no finite list of values"):
        LogDensity.from_model(model)


def test_subsampled_plates_are_refused():
    def model():
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"plate 'data' is subsampled \(3 of 10\)"):
        LogDensity.from_model(model)


def test_a_model_that_indexes_from_the_left_names_the_site():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[0].sum(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(DoesNotBroadcast, match="site 'x' gives other log probabilities for several runs") as caught:
        LogDensity.from_model(model, vectorize="plate")
    assert [(failure.way, failure.site) for failure in caught.value.failures] == [("plate", "x")]
    assert LogDensity.from_model(model).target.vectorize == "vmap"


def test_a_model_that_breaks_on_chains_says_so():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.eye(2) @ z, 1.0).to_event(1), obs=torch.ones(2))
        pyro.factor("f", float(z.sum()) * torch.ones(()) if z.ndim == 1 else z.reshape(2, 1).sum(-1))

    with pytest.raises(ValueError, match=r"broadcast: in an outer plate \(an extra batch dimension at -1\), .*; under"):
        LogDensity.from_model(model)


def test_a_distribution_with_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch_shape \(\), got \(3,\); use to_event"):
        LogDensity.from_distribution(dist.Normal(torch.zeros(3), 1.0))


# Models that only work for one chain


def for_one_chain(y):
    """Indexes from the left, and a scalar inside a matrix."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y), dim=-1):
        x = pyro.sample("x", dist.Normal(z[0], 1.0))
        pyro.sample("y", dist.Normal(x + z[1], s), obs=y)


def test_vmap_serves_a_model_that_does_not_broadcast():
    with pytest.raises(ValueError, match=r'at site x .*\(after site \'s\'\); index from the right .* vectorize="vmap"'):
        LogDensity.from_model(for_one_chain, Y, vectorize="plate")
    density = LogDensity.from_model(for_one_chain, Y)
    assert density.target.vectorize == "vmap"
    u = points(density)
    z, log_s, x = u[:, :2], u[:, 2], u[:, 3:]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Gamma(2.0, 1.0).log_prob(log_s.exp()) + log_s
    expected = expected + dist.Normal(z[:, :1], 1.0).log_prob(x).sum(-1)
    expected = expected + dist.Normal(x + z[:, 1:], log_s.exp()[:, None]).log_prob(Y).sum(-1)
    torch.testing.assert_close(density(u), expected)
    moved = torch.tensor([1e-2, 0, 0, 0, 0, 0])
    slope = (density(u + moved) - density(u - moved)) / 2e-2
    torch.testing.assert_close(density.value_and_grad(u)[1][:, 0], slope, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("independent", [None, "data"])
def test_vmap_is_the_plate(independent):
    x = Y[:, None]
    plate = LogDensity.from_model(gaussian_data, x, independent=independent)
    vmap = LogDensity.from_model(gaussian_data, x, independent=independent, vectorize="vmap")
    u = points(plate)
    torch.testing.assert_close(vmap(u), plate(u))
    for a, b in zip(vmap.value_and_grad(u), plate.value_and_grad(u), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(vmap.constrain(u)["z"], plate.constrain(u)["z"])


def test_vmap_cannot_serve_every_model():
    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.factor("f", z)

    with pytest.raises(DoesNotBroadcast, match="under torch.vmap, .*run the model for one value after another"):
        LogDensity.from_model(branching, vectorize="vmap")
    with pytest.raises(DoesNotBroadcast, match="in an outer plate .*; under torch.vmap, ") as caught:
        LogDensity.from_model(branching)
    assert caught.value.ways == ("plate", "vmap")
    with pytest.raises(ValueError, match=r"vectorize must be one of \('auto', 'plate', 'vmap'\), got 'loop'"):
        LogDensity.from_model(branching, vectorize="loop")


def test_a_model_that_broadcasts_to_something_else_is_found_out():
    """A column of a matrix for one chain, a row of it for several: shapes fit, numbers differ."""

    def column():
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        pyro.factor("f", -w[:, 0].pow(2).sum(-1))

    with pytest.raises(ValueError, match="site 'f' gives other log probabilities for several runs at once than for"):
        LogDensity.from_model(column, vectorize="plate")
    density = LogDensity.from_model(column)
    assert density.target.vectorize == "vmap"
    u = points(density)
    expected = dist.Normal(0.0, 1.0).log_prob(u).sum(-1) - u.reshape(5, 3, 3)[:, :, 0].pow(2).sum(-1)
    torch.testing.assert_close(density(u), expected)


def test_chains_that_are_mixed_are_found_out():
    def centered():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z - z.mean())

    with pytest.raises(ValueError, match="site 'f' gives other log probabilities"):
        LogDensity.from_model(centered, vectorize="plate")


def test_a_support_that_moves_is_refused():
    """A fixed transform would cut the values of a chain at the bound another run happened to have."""

    def bounded():
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(0.0, b))

    for vectorize in ("plate", "vmap"):
        with pytest.raises(ValueError, match=r"support of site 'z' \(Uniform\) depends on other latent sites"):
            LogDensity.from_model(bounded, vectorize=vectorize)


# The prior and guides as proposals


def guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.expand(-1, 2), torch.tensor([0.5, 2.0])).to_event(1))


@pytest.mark.parametrize("independent", [None, "data"])
@pytest.mark.parametrize("vectorize", ["plate", "vmap"])
def test_proposals_are_densities_at_the_same_points(independent, vectorize):
    x = Y[:, None]
    tilted = tilt(gaussian_data, {"z": LinearEnergy([1.0, 0.5])})
    density = LogDensity.from_model(tilted, x, independent=independent, vectorize=vectorize)
    u = points(density)
    z = u.reshape(5, 3, 2)
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    proposed = dist.Normal(x, torch.tensor([0.5, 2.0])).log_prob(z).sum(-1)
    for proposal, expected in ((density.proposal(), prior), (density.proposal(guide), proposed)):
        torch.testing.assert_close(proposal(u), expected if independent else expected.sum(-1))


@pytest.mark.parametrize("independent", [None, "data"])
@pytest.mark.parametrize("vectorize", ["plate", "vmap"])
def test_proposals_draw_from_their_law(independent, vectorize):
    x = Y[:, None]
    density = LogDensity.from_model(gaussian_data, x, independent=independent, vectorize=vectorize)
    for proposal, loc, scale in ((None, torch.zeros(3, 1), torch.ones(2)), (guide, x, torch.tensor([0.5, 2.0]))):
        u = density.proposal(proposal).draw(1000)
        assert u.shape == (1000, *density.batch, density.dim)
        z = u.reshape(1000, 3, 2)
        assert ((z.mean(0) - loc).abs() < 4.5 * scale / 1000**0.5).all()
        torch.testing.assert_close(z.std(0), scale.expand(3, 2), rtol=0.1, atol=0.0)


def test_proposals_of_constrained_sites():
    """Draws and density belong together: both with the Jacobian."""

    def model():
        pyro.sample("s", dist.Gamma(3.0, 2.0))
        pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0])))

    for vectorize in ("plate", "vmap"):
        density = LogDensity.from_model(model, vectorize=vectorize)
        proposal = density.proposal()
        u = proposal.draw(2000)
        torch.testing.assert_close(proposal(u), density(u))
        moments = torch.stack([density.constrain(u)["s"], density.constrain(u)["p"][:, 0]]).double()
        exact, sd = torch.tensor([1.5, 0.4]), torch.tensor([0.75**0.5, 0.2])
        assert ((moments.mean(1) - exact).abs() < 4.5 * sd / 2000**0.5).all()


def test_what_cannot_be_drawn_from():
    density = LogDensity.from_model(gaussian_data, Y[:, None])
    with pytest.raises(ValueError, match="only a proposal .a prior or a guide. can be drawn from; use a sampler"):
        density.draw(3)
    with pytest.raises(ValueError, match=r"guide does not propose the latent site\(s\) \['z'\] \(it has \['w'\]\)"):
        density.proposal(lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="made from a function: it has no prior and no guide"):
        LogDensity(lambda u: u.sum(-1), 1).proposal()


@pytest.mark.parametrize("independent", [None, "groups"])
def test_unconstrained_values_are_packed_into_points(independent):
    def model(y):
        with pyro.plate("groups", len(y), dim=-2):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("repeats", 2, dim=-1):
                pyro.sample("s", dist.LogNormal(0.0, 1.0))

    density = LogDensity.from_model(model, torch.randn(4, 2), independent=independent)
    flat = {"p": torch.randn(5, 4, 1, 2), "s": torch.randn(5, 4, 2)}
    u = density.target.pack(flat)
    assert u.shape == (5, *density.batch, density.dim)
    values = density.constrain(u)
    torch.testing.assert_close(values["s"], flat["s"].exp())
    torch.testing.assert_close(values["p"], torch.distributions.biject_to(dist.Dirichlet.support)(flat["p"]))
