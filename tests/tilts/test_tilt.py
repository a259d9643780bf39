"""tilt(): the factor, its log Z, the null, and stock Pyro inference on what it returns."""

from __future__ import annotations

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_ebm import (
    InferenceWarning,
    LinearEnergy,
    MLPEnergy,
    Normalizer,
    QuadraticEnergy,
    TiltedModel,
    importance,
    log_normalizer,
    tilt,
)
from pyro_ebm.chain_statistics import mcse_mean
from pyro_ebm.energies import as_energy
from pyro_ebm.tilts.tilt import _MAX_STRUCTURES

N, D = 5, 2


def root():
    with pyro.plate("data", N):
        return pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def chain(x=None, *, slope=1.0):
    """Two sites in a plate: z -> x."""
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(slope * z + 0.3, 0.5), obs=x)


def hierarchy(y=None, *, tau=0.7):
    """Every y_i has the one mu as its parent."""
    mu = pyro.sample("mu", dist.Normal(0.0, tau))
    with pyro.plate("data", N):
        return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def covariates(c):
    """p(z | c): a root whose distribution depends on the inputs."""
    with pyro.plate("data", len(c)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5))


def discrete(x=None):
    with pyro.plate("data", N):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.13, 0.29, 0.58])))
        return pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 0.5), obs=x)


def decoder_model(x=None):
    """A VAE in miniature with known W, b: x = W z + b + noise."""
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z @ W.T + B, S).to_event(1), obs=x)


W = torch.tensor([[0.5, 0.0], [0.3, -0.4], [0.0, 0.2]])
B, S = torch.tensor([0.1, -0.2, 0.3]), 0.6

C = torch.tensor([-1.0, 0.0, 2.0])


def log_factor(model, *args, site="z", data=None, **kwargs):
    """Value of one factor, with what is in `data` held."""
    trace = poutine.trace(poutine.condition(model, data=data or {})).get_trace(*args, **kwargs)
    return trace.nodes[f"{site}_tilt"]["fn"].log_factor


def accurate(num_samples=20000):
    return Normalizer(num_samples=num_samples)


def assert_log_z(estimate, truth, *, max_se=0.1):
    value, se = estimate
    truth = torch.as_tensor(truth, dtype=value.dtype)
    assert value.shape == se.shape == truth.shape
    assert (se > 0).all() and (se < max_se).all()
    assert ((value - truth).abs() <= 4 * se).all(), f"{value} is not within 4 x {se} of {truth}"


# The factor


@pytest.mark.parametrize("normalize", [True, "qmc", False, 0.3, Normalizer("qmc", 256)])
def test_factor_is_minus_energy_minus_log_z(normalize):
    energy = LinearEnergy([0.6, -0.8])
    tilted = tilt(root, {"z": energy}, normalize=normalize)
    trace = poutine.trace(tilted).get_trace()
    site = trace.nodes["z_tilt"]
    assert site["is_observed"] and [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    log_z = -energy(trace.nodes["z"]["value"]) - site["fn"].log_factor
    assert log_z.shape == (N,)
    torch.testing.assert_close(log_z, log_z[0].expand(N))  # one number for all elements
    if normalize is False or normalize == 0.3:
        torch.testing.assert_close(log_z[0].detach(), torch.tensor(float(normalize)))
    else:
        se = log_normalizer(dist.Normal(torch.zeros(D), 1.0).to_event(1), energy, num_samples=1024, seed=0).se
        assert abs(log_z[0].detach() - 0.5) < 4 * se
    trace.compute_log_prob()
    assert site["log_prob"].shape == (N,)


def test_the_tilted_model_returns_what_the_model_returns():
    tilted = tilt(chain, {"z": LinearEnergy(1.0)})
    assert torch.equal(tilted(torch.ones(N), slope=2.0), torch.ones(N))
    assert list(inspect_sites(tilted)) == ["data", "z", "z_tilt", "x"]


def inspect_sites(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    return [name for name, site in trace.nodes.items() if site["type"] == "sample"]


# The null: a zero energy is no tilt


def zero(value):
    return value.sum(-1) * 0.0


NULLS = {
    # name -> (model, site, energy, arguments, ways to normalize)
    "root": (root, "z", LinearEnergy([0.0, 0.0]), (), [True, "qmc", False, 0.0]),
    "function": (root, "z", lambda z: torch.zeros(z.shape[:-1]), (), [True, "qmc", False]),
    "random parents": (chain, "x", LinearEnergy(0.0), (), [True, False]),
    "observed": (chain, "x", LinearEnergy(0.0), (torch.ones(N),), [True, False]),
    "one parent for all": (hierarchy, "y", LinearEnergy(0.0), (), [True, False]),
    "inputs": (covariates, "z", LinearEnergy(0.0), (C,), [True, "qmc", False]),
    "inputs and parents": (covariates, "x", LinearEnergy(0.0), (C,), [True, False]),
    "discrete": (discrete, "k", LinearEnergy(0.0), (), [True, False]),
}
NULL_CASES = [(name, how) for name, case in NULLS.items() for how in case[-1]]


@pytest.mark.parametrize("name, normalize", NULL_CASES)
def test_null_traces(name, normalize):
    model, site, energy, args, _ = NULLS[name]
    tilted = tilt(model, {site: energy}, normalize=normalize)
    traces, states = [], []
    for each in (model, tilted, tilted):
        torch.manual_seed(1)
        traces.append(poutine.trace(each).get_trace(*args))
        states.append(torch.get_rng_state())
    plain = {n: s["value"] for n, s in traces[0].nodes.items() if s["type"] == "sample"}
    for trace, state in zip(traces[1:], states[1:], strict=True):
        assert all(
            torch.equal(trace.nodes[n]["value"], value) for n, value in plain.items() if value is not None
        )
        assert torch.equal(trace.log_prob_sum(), traces[0].log_prob_sum())
        assert (trace.nodes[f"{site}_tilt"]["fn"].log_factor == 0).all()
        assert torch.equal(state, states[0])  # the global stream moved as without the tilt


def guide(*args, **kwargs):
    loc = pyro.param("loc", torch.zeros(N))
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(loc, 0.8))


@pytest.mark.uses_param_store
@pytest.mark.parametrize(
    "site, normalize", [("z", True), ("z", "qmc"), ("z", False), ("x", True), ("x", False)]
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_null_losses(site, normalize, vectorize):
    x = torch.linspace(-1, 1, N)
    energy = LinearEnergy(0.0).requires_grad_(False)
    losses = []
    for model in (chain, tilt(chain, {site: energy}, normalize=normalize)):
        with pyro.get_param_store().scope():
            torch.manual_seed(2)
            elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
            svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), elbo)
            steps = [svi.step(x) for _ in range(3)] + [svi.evaluate_loss(x)]
            losses.append((steps, pyro.param("loc").detach().clone(), torch.get_rng_state()))
            assert list(pyro.get_param_store().keys()) == ["loc"]
    (steps, loc, state), (tilted_steps, tilted_loc, tilted_state) = losses
    assert steps == tilted_steps and len(set(steps)) == 4
    assert torch.equal(loc, tilted_loc) and torch.equal(state, tilted_state)


# Which Z: closed forms of the global tilt


def test_random_parents_linear_gaussian():
    a = 0.7
    tilted = tilt(chain, {"x": LinearEnergy(a)}, normalize=accurate())
    truth = 0.3 * a + 0.5 * a**2 * (1 + 0.5**2)
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    x = torch.linspace(-1, 1, N)
    factor = log_factor(tilted, x, site="x").detach()
    assert factor.shape == (N,)
    assert ((a * x - factor - truth).abs() <= 4 * estimate.se).all()


def test_data_space_tilt_of_a_decoder():
    a = torch.tensor([0.5, -0.6, 0.4])
    truth = a @ B + 0.5 * (W.T @ a).square().sum() + 0.5 * S**2 * a.square().sum()
    tilted = tilt(decoder_model, {"x": LinearEnergy(a)}, normalize=accurate())
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    x = torch.randn(N, 3)
    factor = log_factor(tilted, x, site="x").detach()
    assert ((x @ a - factor - truth).abs() <= 4 * estimate.se).all()


@pytest.mark.parametrize("observed", [False, True])
def test_one_log_z_for_all_elements_that_share_a_parent(observed):
    a, tau = 0.3, 0.7
    truth = 0.5 * (a * N * tau) ** 2 + 0.5 * N * a**2  # of exp(a sum_i y_i), not N times that of one
    tilted = tilt(hierarchy, {"y": LinearEnergy(a)}, normalize=accurate())
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    y = torch.linspace(-1, 1, N) if observed else None
    trace = poutine.trace(tilted).get_trace(y)
    factor, value = trace.nodes["y_tilt"]["fn"].log_factor.detach(), trace.nodes["y"]["value"]
    assert abs((a * value - factor).sum() - truth) <= 4 * estimate.se


def test_independent_sites_have_the_product_of_their_zs():
    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(u + v, 1.0), obs=torch.tensor(0.0))

    tilted = tilt(model, {"v": LinearEnergy(0.3), "u": LinearEnergy(-0.5)}, normalize=accurate())
    assert_log_z(tilted.log_normalizer(seed=0), 0.125 + 0.3 + 0.18)
    zero_value = {"u": torch.tensor(0.0), "v": torch.tensor(0.0)}
    assert abs(log_factor(tilted, site="u", data=zero_value) + 0.125) < 0.04
    assert abs(log_factor(tilted, site="v", data=zero_value) + 0.48) < 0.03


def test_errors_of_independent_sites_are_independent():
    def model():
        for name in ("u", "v"):
            pyro.sample(name, dist.Normal(0.0, 1.0))

    tilted = tilt(model, {"u": LinearEnergy(0.5), "v": LinearEnergy(0.5)})
    z = []
    for seed in range(100):
        value, se = tilted.log_normalizer(num_samples=256, seed=seed)
        z.append((value - 0.25) / se)
    assert abs(float(torch.stack(z).std()) - 1) < 4 / math.sqrt(200)  # common draws would give 1.41


@pytest.mark.parametrize("order", [("z", "x"), ("x", "z")])
def test_dependent_sites_have_a_joint_z(order):
    slopes, w, b, s = {"z": 0.6, "x": -0.8}, 1.5, 0.3, 0.5
    truth = slopes["x"] * b + 0.5 * (slopes["z"] + slopes["x"] * w) ** 2 + 0.5 * (slopes["x"] * s) ** 2
    model = functools.partial(chain, slope=w)
    tilted = tilt(model, {site: LinearEnergy(slopes[site]) for site in order}, normalize=accurate())
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    trace = poutine.trace(tilted).get_trace()
    total = sum(
        trace.nodes[f"{v}_tilt"]["fn"].log_factor - slopes[v] * trace.nodes[v]["value"] for v in slopes
    )
    assert ((total.detach() + truth).abs() <= 4 * estimate.se).all()


def test_sites_of_different_plates_that_share_a_parent():
    a, b = 0.2, -0.3

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
        with pyro.plate("first", 3):
            pyro.sample("u", dist.Normal(mu, 1.0))
        with pyro.plate("second", 4):
            pyro.sample("v", dist.Normal(mu, 1.0))

    truth = 0.5 * (0.5 * (3 * a + 4 * b)) ** 2 + 0.5 * (3 * a**2 + 4 * b**2)
    tilted = tilt(model, {"u": LinearEnergy(a), "v": LinearEnergy(b)}, normalize=accurate())
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    trace = poutine.trace(tilted).get_trace()
    log_z = sum(
        (slope * trace.nodes[v]["value"] - trace.nodes[f"{v}_tilt"]["fn"].log_factor).sum()
        for v, slope in (("u", a), ("v", b))
    )
    assert abs(log_z.detach() - truth) <= 4 * estimate.se


def test_nested_plates_of_which_one_is_free():
    a = 0.3

    def model():
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 4, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0))

    truth = 0.5 * (4 * a) ** 2 + 0.5 * 4 * a**2  # for each datum
    tilted = tilt(model, {"x": LinearEnergy(a)}, normalize=accurate())
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    trace = poutine.trace(tilted).get_trace()
    log_z = (a * trace.nodes["x"]["value"] - trace.nodes["x_tilt"]["fn"].log_factor).sum(0).detach()
    assert log_z.shape == (3,) and ((log_z - truth).abs() <= 4 * estimate.se).all()


def test_one_log_z_per_datum_where_inputs_matter():
    a = 0.6
    at_root = tilt(covariates, {"z": LinearEnergy(a)}, normalize=accurate())
    truth = a * C + 0.5 * a**2
    estimate = at_root.log_normalizer(C, seed=0)
    assert_log_z(estimate, truth)
    factor = log_factor(at_root, C, data={"z": torch.zeros(3)}).detach()
    assert ((factor + truth).abs() <= 4 * estimate.se).all()

    further = tilt(covariates, {"x": LinearEnergy(a)}, normalize=accurate())
    truth = a * C + 0.5 * a**2 * (1 + 0.5**2)
    estimate = further.log_normalizer(C, seed=0)
    assert_log_z(estimate, truth)
    factor = log_factor(further, C, site="x", data={"x": torch.zeros(3)}).detach()
    assert factor.shape == (3,) and ((factor + truth).abs() <= 4 * estimate.se).all()


def test_inputs_that_reach_the_model_through_a_closure():
    slopes = torch.tensor([0.2, 0.6, 1.2])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slopes * z, 1.0))

    a = 0.6
    tilted = tilt(model, {"x": LinearEnergy(a)}, normalize=accurate())
    assert_log_z(tilted.log_normalizer(seed=0), 0.5 * a**2 * (1 + slopes**2))


def test_deterministic_sites_can_be_tilted():
    a, gains = 0.4, torch.tensor([0.5, 1.0, 2.0])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("gain", gains * z)
            pyro.deterministic("twice", 2 * z, event_dim=0)

    tilted = tilt(model, {"gain": LinearEnergy(a)}, normalize=accurate())
    truth = 0.5 * (a * gains) ** 2
    estimate = tilted.log_normalizer(seed=0)
    assert_log_z(estimate, truth)
    trace = poutine.trace(tilted).get_trace()
    log_z = (a * trace.nodes["gain"]["value"] - trace.nodes["gain_tilt"]["fn"].log_factor).detach()
    assert ((log_z - truth).abs() <= 4 * estimate.se).all()
    assert_log_z(tilt(model, {"twice": LinearEnergy(a)}).log_normalizer(seed=0), 0.5 * (2 * a) ** 2)
    # it is the same tilt as that of the site it is a function of
    same = tilt(model, {"z": LinearEnergy(2 * a)}, normalize=False)
    other = tilt(model, {"twice": LinearEnergy(a)}, normalize=False)
    z = {"z": torch.randn(3)}
    torch.testing.assert_close(log_factor(same, site="z", data=z), log_factor(other, site="twice", data=z))

    def outer():
        with pyro.plate("chains", 7, dim=-2):
            tilted()

    assert poutine.trace(outer).get_trace().nodes["gain_tilt"]["fn"].log_factor.shape == (7, 3)


def test_discrete_site_is_exact():
    tilts = torch.tensor([0.5, -1.0, 2.0])
    tilted = tilt(discrete, {"k": lambda k: tilts[k]})
    log_z = (torch.tensor([0.13, 0.29, 0.58]).log() - tilts).logsumexp(0)
    k = torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(log_factor(tilted, site="k", data={"k": k}), -tilts[k] - log_z)
    assert torch.equal(tilted.log_normalizer().se, torch.tensor(0.0))


@pytest.mark.parametrize("way", ["plate", "vmap"])
def test_log_z_learns_the_base_too(way):
    """Gradient of the forward log Z with respect to the model: reparametrized and by score."""
    shift = nn.Parameter(torch.tensor(0.5))
    rate = nn.Parameter(torch.tensor(2.0))

    def model():
        with pyro.plate("data", N):
            k = pyro.sample("k", dist.Poisson(rate))
            assert way == "plate" or k.shape == (N,)
            pyro.sample("x", dist.Normal(k + shift, 1.0))

    a, found = 0.3, []
    for seed in range(16):
        tilted = tilt(model, {"x": LinearEnergy(a)}, normalize=Normalizer(num_samples=2000, seed=seed))
        assert tilted.structure().way == way
        factor = log_factor(tilted, site="x", data={"x": torch.zeros(N)})
        found.append(torch.stack(torch.autograd.grad(-factor[0], [shift, rate])))
    mean, se = torch.stack(found).mean(0), torch.stack(found).std(0) / 4
    assert ((mean - torch.tensor([a, math.exp(a) - 1])).abs() <= 4 * se + 1e-3).all() and (se < 0.02).all()


# Subsampling


def subsampled(coupled):
    def model(size=3):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5)) if coupled else torch.tensor(0.0)
        with pyro.plate("data", 12, subsample_size=size):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


def test_a_coupled_plate_may_not_be_subsampled():
    tilted = tilt(subsampled(coupled=True), {"x": LinearEnergy(0.5)})
    with pytest.raises(ValueError, match=r"couples all elements of plate\(s\) \['data'\].*normalize=False"):
        tilted()
    tilted.unnormalized()()
    tilted(12)  # all elements
    with pytest.raises(ValueError, match="which this model subsamples"):
        tilted.log_normalizer()


@pytest.mark.parametrize("site", ["z", "x"])
def test_independent_elements_may_be_subsampled(site):
    tilted = tilt(subsampled(coupled=False), {site: LinearEnergy(0.5)}, normalize=accurate())
    truth = 0.125 if site == "z" else 0.25
    trace = poutine.trace(tilted).get_trace()
    trace.compute_log_prob()
    node = trace.nodes[f"{site}_tilt"]
    assert node["scale"] == 4.0 and node["log_prob"].shape == (3,)
    expected = 4 * (0.5 * trace.nodes[site]["value"] - truth)
    assert ((node["log_prob"] - expected).detach().abs() < 4 * 0.02).all()
    assert_log_z(tilted.log_normalizer(seed=0), truth)


def test_a_sum_over_a_subsampled_plate_may_not_be_tilted():
    def model():
        with pyro.plate("data", 12, subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    with pytest.raises(ValueError, match=r"couples all elements of plate\(s\) \['data'\]"):
        tilt(model, {"y": LinearEnergy(0.5)})()


@pytest.mark.parametrize("how, way", [("index", "vmap"), ("shape", "vmap"), ("silently", "vmap"), ("branch", "loop")])
def test_log_z_of_a_model_that_does_not_broadcast(how, way):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if how == "silently":
            loc = z[0]  # the first draw where many run at once
            pyro.sample(
                "x",
                dist.Normal(loc, 1.0).expand(z.shape[:-1] or [1]).to_event(0)
                if z.ndim > 1
                else dist.Normal(loc, 1.0),
            )
        elif how == "branch":
            pyro.sample("x", dist.Normal(z[0] if z[1] > 0 else z[1].abs(), 1.0))
        else:
            loc = z[1, None] if how == "index" else z.reshape(2, 1)[0]
            pyro.sample("x", dist.Normal(loc.reshape(()), 1.0))

    tilted = tilt(model, {"x": LinearEnergy(0.5)}, normalize=Normalizer(num_samples=1000))
    assert tilted.structure().way == way
    found = tilted.log_normalizer(num_samples=1000, seed=0)
    if how != "branch":  # which has no such simple log Z
        assert abs(float(found.value) - 0.25) < 4 * float(found.se)
    trace = poutine.trace(tilted).get_trace()
    assert trace.nodes["x_tilt"]["fn"].log_factor.isfinite()


# Composition


def test_tilting_a_tilted_model_adds_energies():
    e1, e2, e3 = LinearEnergy([0.3, 0.1]), QuadraticEnergy(0.2), LinearEnergy([0.2, -0.5])
    nested = tilt(tilt(root, {"z": e1}), {"z": e2}, normalize=False)
    together = tilt(root, {"z": e1 + e2}, normalize=False)
    assert nested.base_model is root
    z = {"z": torch.randn(N, D)}
    assert torch.equal(log_factor(nested, data=z), log_factor(together, data=z))
    thrice = tilt(tilt(tilt(root, {"z": e1}), {"z": e3}, normalize=False), {"z": e1})
    assert thrice.normalize == Normalizer()  # the outermost call decides
    assert_log_z(thrice.log_normalizer(seed=0), 0.5 * torch.tensor([0.8, -0.3]).square().sum())
    assert len(list(thrice.parameters())) == 2
    linear = tilt(tilt(root, {"z": e1}), {"z": e3}, normalize=accurate())
    assert abs(-log_factor(linear, data={"z": torch.zeros(N, D)})[0] - 0.5 * (0.25 + 0.16)) < 0.03


def test_tilting_another_site_of_a_tilted_model_keeps_both():
    both = tilt(tilt(chain, {"z": LinearEnergy(0.2)}), {"x": LinearEnergy(0.3)}, normalize=False)
    assert set(both.energies) == {"z", "x"}
    assert {"z_tilt", "x_tilt"} <= set(inspect_sites(both))


def test_unnormalized_shares_everything_but_log_z():
    energy = LinearEnergy([0.6, -0.8])
    tilted = tilt(root, {"z": energy})
    bare = tilted.unnormalized()
    z = {"z": torch.randn(N, D)}
    torch.testing.assert_close(log_factor(bare, data=z), -energy(z["z"]))
    assert bare.energies["z"] is energy and bare.unnormalized() is bare
    assert tilted.normalize == Normalizer()


# log Z and the weights


def test_log_z_is_a_function_of_the_weights(rng_untouched):
    for model, site in ((root, "z"), (decoder_model, "x")):
        energy = MLPEnergy(D if site == "z" else 3, hidden=(4,))
        tilted = tilt(model, {site: energy})
        zero_value = {"z": torch.zeros(N, D), "x": torch.zeros(N, 3)}
        values = {}
        for when in ("before", "after"):
            with rng_untouched():
                first = log_factor(tilted, site=site, data=zero_value).detach()
                again = log_factor(tilted, site=site, data=zero_value).detach()
                with torch.no_grad():
                    held = log_factor(tilted, site=site, data=zero_value)
            assert torch.equal(first, again) and torch.equal(first, held)
            values[when] = (first + energy(zero_value[site])).detach()
            # writes to .data, which no version counter sees
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(energy.parameters()) * 1.5, energy.parameters()
            )
        assert not torch.equal(values["before"], values["after"])


def parametrized_energies():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(-2))

    def write(tensor):
        def change():
            with torch.no_grad():
                tensor.mul_(2.0)

        return change

    linear, scaled, hidden = LinearEnergy([0.3]), 0.5 * LinearEnergy([0.6]), torch.tensor(0.3)
    with torch.no_grad():
        net[0].weight.fill_(-0.3)
    return {
        "parameter": (linear, write(linear.a)),
        "buffer": (scaled, write(scaled.scale)),
        "module": (net, write(net[0].weight)),
        "method": (linear.forward, write(linear.a)),
        "closure": (lambda z: -(z * hidden).sum(-1), write(hidden)),
        "sum": (QuadraticEnergy(0.0) + as_energy(lambda z: -(z * hidden).sum(-1)), write(hidden)),
    }


@pytest.mark.parametrize("kind", list(parametrized_energies()))
def test_a_kept_constant_is_never_stale(kind):
    energy, change = parametrized_energies()[kind]

    def model():
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    tilted = tilt(model, {"z": energy}, normalize="qmc")
    zero_value = {"z": torch.zeros(N, 1)}
    with torch.no_grad():
        before = log_factor(tilted, data=zero_value)
        change()
        after = log_factor(tilted, data=zero_value)
        fresh = log_factor(tilt(model, {"z": energy}, normalize="qmc"), data=zero_value)
    assert torch.equal(after, fresh) and not torch.equal(after, before)
    assert abs(before[0] + 0.045) < 0.05 and abs(after[0] + 0.18) < 0.05


def test_a_kept_constant_follows_the_inputs():
    tilted = tilt(covariates, {"z": LinearEnergy(0.6)}, normalize="qmc")
    with torch.no_grad():
        for c in (C, C.flip(0), -C, C + 1e-3, C[:2]):  # among them: same values in another order
            factor = log_factor(tilted, c, data={"z": torch.zeros(len(c))})
            fresh = tilt(covariates, {"z": LinearEnergy(0.6)}, normalize="qmc")
            assert torch.equal(factor, log_factor(fresh, c, data={"z": torch.zeros(len(c))}))
            assert (factor + 0.6 * c + 0.18).abs().max() < 0.05


def test_a_kept_constant_is_kept():
    calls = []

    class Counted(LinearEnergy):
        def forward(self, value):
            calls.append(value.shape)
            return super().forward(value)

    tilted = tilt(root, {"z": Counted([0.3, 0.4])})
    with torch.no_grad():
        for _ in range(3):
            tilted()
    values, draws = torch.Size([5, 2]), torch.Size([1024, 2])
    assert calls.count(values) == 3 and calls.count(draws) == 1  # once for log Z


# Stock Pyro


@pytest.mark.uses_param_store
def test_stock_svi_trains_the_energy():
    """Maximum likelihood of a tilt of N(0, I) for data from N(target, I): a -> target."""
    target = torch.tensor([0.8, -0.5])
    data = target + torch.randn(200, D)

    def model(z):
        with pyro.plate("data", len(z)):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1), obs=z)

    first, second = LinearEnergy([0.0, 0.0]), LinearEnergy([0.0, 0.0])
    for energy in (first, second):
        tilted = tilt(model, {"z": energy})
        svi = SVI(tilted, lambda z: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(data) for _ in range(60)]
        assert losses[-1] < losses[0] - 0.25 * len(data) * float(target.square().sum())
        assert (energy.a.detach() - data.mean(0)).abs().max() < 0.15
    names = list(pyro.get_param_store().keys())
    assert len(names) == 2 and all(name.startswith("tilt_") for name in names)
    assert not torch.equal(first.a, second.a) or first.a is not second.a


@pytest.mark.uses_param_store
def test_stock_svi_without_log_z_runs_away_and_with_it_does_not():
    def model(z):
        with pyro.plate("data", len(z)):
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=z)

    sizes = {}
    for normalize in (True, False):
        energy = LinearEnergy(0.0)
        svi = SVI(
            tilt(model, {"z": energy}, normalize=normalize),
            lambda z: None,
            pyro.optim.Adam({"lr": 0.1}),
            Trace_ELBO(),
        )
        for _ in range(40):
            svi.step(torch.tensor([0.2, 0.4]))
        sizes[normalize] = energy.a.item()
    assert abs(sizes[True] - 0.3) < 0.2 and sizes[False] > 2


@pytest.mark.parametrize("normalize", [False, True])
def test_stock_nuts_samples_the_tilted_law(normalize):
    a = torch.tensor([1.0, -0.5])

    def model():
        return pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    energy = LinearEnergy(a)
    kernel = NUTS(tilt(model, {"z": energy}, normalize=normalize and 0.625), max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples(group_by_chain=True)["z"].detach()
    se = torch.as_tensor(mcse_mean(z))
    assert (se < 0.3).all()
    assert ((z.mean((0, 1)) - a).abs() <= 4 * se).all()
    assert ((z - a).square().mean((0, 1)) - 1).abs().max() <= 4 * math.sqrt(2) * se.max()


def test_log_z_under_nuts_is_constant():
    tilted = tilt(root, {"z": MLPEnergy(D, hidden=(4,))})
    energy = tilted.energies["z"]
    z = torch.randn(3, N, D)
    log_z = [-log_factor(tilted, data={"z": v}) - energy(v) for v in z]
    torch.testing.assert_close(log_z[0], log_z[1])
    torch.testing.assert_close(log_z[0], log_z[2])


def test_condition_gives_the_density_of_the_tilted_law():
    a = torch.tensor([1.0, -0.5])
    tilted = tilt(root, {"z": LinearEnergy(a)}, normalize=0.625)
    z = torch.randn(N, D)
    trace = poutine.trace(poutine.condition(tilted, data={"z": z})).get_trace()
    expected = dist.Normal(a, 1.0).to_event(1).log_prob(z).sum()
    torch.testing.assert_close(trace.log_prob_sum().detach(), expected)


@pytest.mark.parametrize("site", ["z", "x"])
def test_vectorized_particles(site):
    """ELBO of the tilted model minus that of the model: E_q[-E] - log Z, per particle."""
    a, x = 0.5, torch.linspace(-1, 1, N)
    tilted = tilt(chain, {site: LinearEnergy(a)}, normalize=accurate(4096))

    def fixed_guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(x, 0.5))

    differences, log_z = [], None
    for vectorize in (False, True):
        elbo = Trace_ELBO(num_particles=30, vectorize_particles=vectorize, max_plate_nesting=1)
        losses = []
        for model in (chain, tilted):
            torch.manual_seed(0)
            losses.append(elbo.loss(model, fixed_guide, x))
        differences.append(losses[0] - losses[1])
    log_z = 0.125 if site == "z" else 0.3 * a + 0.5 * a**2 * 1.25
    tolerance = N * 4 * tilted.log_normalizer(num_samples=4096, seed=0).se
    if site == "z":
        tolerance = tolerance + a * 4 * 0.5 * math.sqrt(N / 30)
    for difference in differences:
        assert abs(difference - (a * x.sum() - N * log_z)) <= tolerance


@pytest.mark.parametrize("model, site", [(chain, "z"), (chain, "x"), (hierarchy, "y"), (discrete, "k")])
def test_an_outer_plate_of_chains(model, site):
    tilted = tilt(model, {site: LinearEnergy(0.4)})

    def chains():
        with pyro.plate("chains", 7, dim=-2):
            tilted()

    trace = poutine.trace(chains).get_trace()
    trace.compute_log_prob()
    value, factor = trace.nodes[site]["value"], trace.nodes[f"{site}_tilt"]["log_prob"]
    assert factor.shape == (7, N)
    log_z = (0.4 * value - factor).detach()
    torch.testing.assert_close(log_z, log_z[0, 0].expand(7, N))
    alone = 0.4 * (value := poutine.trace(tilted).get_trace()).nodes[site]["value"]
    assert abs((alone - value.nodes[f"{site}_tilt"]["fn"].log_factor)[0].detach() - log_z[0, 0]) < 0.2


def test_scale_and_mask_apply_to_the_whole_factor():
    tilted = tilt(root, {"z": LinearEnergy([0.6, -0.8])})
    z = {"z": torch.randn(N, D)}
    plain = log_factor(tilted, data=z)
    trace = poutine.trace(poutine.scale(poutine.condition(tilted, data=z), scale=3.0)).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z_tilt"]["log_prob"], 3 * plain)
    keep = torch.tensor([True, False, True, True, False])
    trace = poutine.trace(poutine.mask(poutine.condition(tilted, data=z), mask=keep)).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z_tilt"]["log_prob"], plain * keep)


@pytest.mark.parametrize("normalize", [True, False, 0.3])
@pytest.mark.parametrize("mask", [False, torch.tensor(False)])
def test_a_mask_inside_the_model_that_would_take_the_tilt_out(mask, normalize):
    def model():
        with poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"flat prior|site 'z' lies under poutine.mask"):
        tilt(model, {"z": QuadraticEnergy(1.0)}, normalize=normalize)()
    with pytest.raises(ValueError, match="site 'z' lies under poutine.mask"):
        importance(tilt(model, {"z": QuadraticEnergy(1.0)}, normalize=False), num_samples=10)
    around = poutine.mask(tilt(model, {"y": QuadraticEnergy(1.0)}, normalize=0.3), mask=mask)  # as Predictive does
    assert poutine.trace(around).get_trace().log_prob_sum() == 0


def test_enumerated_discrete_site():
    """TraceEnum_ELBO with nothing left to guide is the exact log likelihood of the tilted mixture."""
    x, tilts = torch.linspace(-1, 1, N), torch.tensor([0.5, -1.0, 2.0])
    model = tilt(discrete, {"k": lambda k: tilts[k]})
    enumerated = pyro.infer.config_enumerate(model, default="parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(enumerated, lambda x: None, x)
    log_p = torch.tensor([0.13, 0.29, 0.58]).log() - tilts
    log_p = log_p - log_p.logsumexp(0)
    log_lik = dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 0.5).log_prob(x[:, None])
    assert abs(loss + float((log_p + log_lik).logsumexp(-1).sum())) < 1e-4


# Models of every kind


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(D, 3)

    def forward(self, x=None):
        with pyro.plate("data", N if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    model = forward


KINDS = {
    "module": lambda net: net,
    "bound method": lambda net: net.model,
    "partial": lambda net: functools.partial(net.model, x=None),
    "partial of module": lambda net: functools.partial(net),
}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_part_of_the_tilted_model(kind):
    net, energy = Net(), MLPEnergy(D, hidden=(4,))
    tilted = tilt(KINDS[kind](net), {"z": energy})
    assert isinstance(tilted, TiltedModel)
    assert {id(p) for p in tilted.parameters()} == {id(p) for p in [*net.parameters(), *energy.parameters()]}
    tilted.eval()
    assert not net.training and not energy.training
    assert tilted().shape == (N, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_deepcopy(kind):
    def build():
        return tilt(KINDS[kind](Net()), {"z": MLPEnergy(D, hidden=(4,)), "x": LinearEnergy(torch.randn(3))})

    original, other = build(), build()
    values = {"z": torch.randn(N, D), "x": torch.randn(N, 3)}

    def density(model):
        return poutine.trace(poutine.condition(model, data=values)).get_trace().log_prob_sum().detach()

    expected = density(original)
    assert not torch.equal(density(other), expected)
    other.load_state_dict(original.state_dict())
    assert torch.equal(density(other), expected)
    duplicate = copy.deepcopy(original)
    assert torch.equal(density(duplicate), expected)
    assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in original.parameters()}
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
    assert not torch.equal(density(duplicate), expected)
    assert torch.equal(density(original), expected)


def test_site_names_with_dots():
    def model():
        pyro.sample("net.weight", dist.Normal(0.0, 1.0))

    tilted = tilt(model, {"net.weight": LinearEnergy(0.5)})
    assert "net.weight_tilt" in inspect_sites(tilted)
    assert list(tilted.energies) == ["net.weight"]


def test_two_tilted_models_side_by_side():
    net = Net()
    first, second = (tilt(net.model, {"z": LinearEnergy([a, 0.0])}) for a in (0.0, 2.0))
    z = {"z": torch.ones(N, D)}
    assert abs(log_factor(first, data=z)[0]) < 1e-6
    assert abs(log_factor(second, data=z)[0]) < 1.0
    assert not pyro.get_param_store().keys()


# Errors


@pytest.mark.parametrize("normalize", [True, False, 0.0])
def test_a_site_that_does_not_exist(normalize):
    tilted = tilt(chain, {"y": LinearEnergy(0.5)}, normalize=normalize)
    for _ in range(2):  # the second time as well
        with pytest.raises(
            ValueError, match=r"no sample site 'y' to tilt; its sample sites are \['x', 'z'\]"
        ):
            tilted()


def test_subsampling_sites_and_factors_cannot_be_tilted():
    def model():
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.factor("penalty", torch.zeros(2))

    for site in ("data", "penalty"):
        with pytest.raises(
            ValueError, match=rf"no sample site '{site}' to tilt; its sample sites are \['z'\]"
        ):
            tilt(model, {site: LinearEnergy(0.5)}, normalize=False)()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("model, site", [(root, "z"), (decoder_model, "x")])
def test_an_energy_of_the_wrong_shape(model, site, normalize):
    tilted = tilt(model, {site: lambda value: value}, normalize=normalize)
    with pytest.raises(
        ValueError, match=rf"energy of site '{site}' must return one number per batch element"
    ):
        tilted()


def test_wrong_event_shape_names_both_shapes():
    with pytest.raises(ValueError, match=r"built for events of shape \(3,\), got a value of shape \(5, 2\)"):
        tilt(root, {"z": MLPEnergy(3)}, normalize=False)()


@pytest.mark.parametrize(
    "normalize, error, match",
    [
        ("sobol", TypeError, r"normalize must be .* 'importance', 'qmc' or a Normalizer, got 'sobol'"),
        (math.nan, ValueError, "must be one finite log Z, got nan"),
        (math.inf, ValueError, "must be one finite log Z"),
        (torch.zeros(2), ValueError, "must be one finite log Z"),
        (
            None,
            TypeError,
            "normalize must be True, False, a number, 'importance', 'qmc' or a Normalizer, got None",
        ),
        ([1.0], TypeError, "normalize must be"),
    ],
)
def test_wrong_normalize(normalize, error, match):
    with pytest.raises(error, match=match):
        tilt(root, {"z": LinearEnergy([0.0, 0.0])}, normalize=normalize)


def test_one_number_for_two_sites_is_ambiguous():
    with pytest.raises(ValueError, match=r"normalize=0.5 is ambiguous for 2 tilted sites \['z', 'x'\]"):
        tilt(chain, {"z": LinearEnergy(0.1), "x": LinearEnergy(0.1)}, normalize=0.5)


def test_qmc_cannot_run_a_model_forward():
    with pytest.raises(ValueError, match=r"log Z of \['x'\] .* only method='importance' can do, got 'qmc'"):
        tilt(chain, {"x": LinearEnergy(0.1)}, normalize="qmc")()


@pytest.mark.parametrize("energies", [{}, None, [("z", LinearEnergy(1.0))]])
def test_energies_must_be_a_mapping(energies):
    with pytest.raises((ValueError, TypeError), match="energies must be a (non-empty )?mapping"):
        tilt(root, energies)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"energies\['z'\] must be an Energy or a callable .* got float"):
        tilt(root, {"z": 1.0})
    with pytest.raises(TypeError, match="model must be callable, got str"):
        tilt("root", {"z": LinearEnergy(1.0)})


@pytest.mark.parametrize("site", ["z", "x"])
def test_log_normalizer_warns_of_heavy_tails(site):
    tilted = tilt(chain, {site: QuadraticEnergy(-1.5, event_dim=0)})
    with pytest.warns(InferenceWarning, match="Pareto k"):
        tilted.log_normalizer(seed=0)
    broken = tilt(chain, {site: lambda value: value * math.nan})
    with pytest.warns(InferenceWarning, match="log Z is not finite"):
        broken.log_normalizer(seed=0)


def test_log_normalizer_and_its_seed(rng_untouched):
    for site in ("z", "x"):
        tilted = tilt(chain, {site: LinearEnergy(0.5)})
        with rng_untouched():
            first, second = (tilted.log_normalizer(num_samples=500, seed=1) for _ in range(2))
        assert first.value == second.value and not first.value.requires_grad
        first, second = (tilted.log_normalizer(num_samples=500) for _ in range(2))
        assert first.value != second.value


def test_an_argument_that_changes_with_each_step_fills_no_memory():
    """Its value may decide what the model does, so each has a structure; the ones not used for long are found anew."""

    def model(scale):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("w" if scale > 50 else "v", dist.Normal(z.sum(), scale))

    tilted = tilt(model, {"z": LinearEnergy([1.0, 0.0])}, normalize=Normalizer(num_samples=4))
    first = tilted.structure(1.0)
    for step in range(2, 101):
        assert ("w" if step > 50 else "v") in tilted.structure(float(step)).order
        assert tilted.structure(1.0) is first  # used all the time: never forgotten
    assert len(tilted._structures) == _MAX_STRUCTURES
    forgotten = tilted.structure(2.0)
    assert forgotten.order == first.order and tilted.structure(2.0) is forgotten
    assert len(tilted._structures) == _MAX_STRUCTURES
