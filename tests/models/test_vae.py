from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import VAE

LIKELIHOODS = ["bernoulli", "continuous_bernoulli", "gaussian", "gaussian_shared"]


def small(likelihood="bernoulli", **options):
    return VAE((4,), 2, likelihood, **{"hidden": (5,), **options})


def elbo(vae, x, z):
    """Log joint minus log q at a given z."""
    model = pyro.condition(vae.model, {"z": z})
    guide = pyro.condition(vae.guide, {"z": z})
    traces = [pyro.poutine.trace(part).get_trace(x) for part in (model, guide)]
    return traces[0].log_prob_sum() - traces[1].log_prob_sum()


class LinearEncoder(nn.Module):
    """q(z | x) = N(a x, s^2) for scalar x and z."""

    def __init__(self, slope, scale):
        super().__init__()
        self.slope, self.scale = slope, scale

    def forward(self, x):
        return self.slope * x, torch.full_like(x, self.scale)


class LinearDecoder(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, z):
        return self.slope * z


@pytest.fixture
def linear():
    """X = 2 z + noise of scale 1.5, with the guide at the exact posterior; and log p(x)."""
    slope, noise = 2.0, 1.5
    variance = slope**2 + noise**2
    encoder = LinearEncoder(slope / variance, math.sqrt(1 - slope**2 / variance))
    vae = VAE((1,), 1, "gaussian_shared", encoder=encoder, decoder=LinearDecoder(slope)).double()
    with torch.no_grad():
        vae.raw_scale.fill_(math.log(math.expm1(noise - 1e-3)))
    x = torch.linspace(-3, 4, 7, dtype=torch.double).unsqueeze(-1)
    return vae, x, dist.Normal(torch.zeros(1).double(), math.sqrt(variance)).log_prob(x).sum()


def test_with_the_exact_posterior_the_elbo_is_the_evidence(linear):
    vae, x, evidence = linear
    # Log joint minus log posterior is log p(x) at EVERY z: no Monte Carlo error at all.
    for z in (torch.zeros(7, 1).double(), torch.randn(7, 1).double()):
        torch.testing.assert_close(elbo(vae, x, z), evidence)
    torch.testing.assert_close(Trace_ELBO().loss(vae.model, vae.guide, x), -float(evidence))


def test_with_another_guide_the_elbo_is_lower_by_its_divergence(linear):
    vae, x, evidence = linear
    right = vae.encode(x)
    vae.encoder.scale *= 1.5
    gap = torch.distributions.kl_divergence(vae.encode(x).base_dist, right.base_dist).sum()
    losses = torch.tensor([Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(300)])
    error = losses.mean() + float(evidence) - float(gap)
    assert abs(error) < 4 * losses.std() / math.sqrt(300)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_density_of_a_datum_by_hand(likelihood):
    vae, z, x = small(likelihood).double(), torch.randn(3, 2).double(), torch.rand(3, 4).double()
    output = vae.decoder(z)
    if likelihood == "bernoulli":
        expected = -F.binary_cross_entropy(output.sigmoid(), x, reduction="none")
    elif likelihood == "continuous_bernoulli":
        p = output.sigmoid()
        log_constant = (2 * torch.atanh(1 - 2 * p) / (1 - 2 * p)).log()
        expected = log_constant - F.binary_cross_entropy(p, x, reduction="none")
    else:
        mean, raw = output if likelihood == "gaussian" else (output, vae.raw_scale)
        scale = F.softplus(raw) + 1e-3
        expected = -(((x - mean) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(vae.decode(z).log_prob(x), expected.sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("network", "shape"), [("mlp", (6,)), ("mlp", (2, 3)), ("conv", (1, 5, 6))])
def test_sites_shapes_and_mean(likelihood, network, shape):
    vae = VAE(shape, 3, likelihood, network=network, hidden=(4,))
    trace = pyro.poutine.trace(vae.model).get_trace(num_data=5)
    assert {"data", "z", "x"} <= set(trace.nodes)
    assert trace.nodes["z"]["value"].shape == (5, 3)
    assert trace.nodes["x"]["value"].shape == (5, *shape)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (5,)
    assert vae.decode(torch.randn(2, 5, 3)).mean.shape == (2, 5, *shape)
    assert vae.encode(torch.rand(2, 5, *shape)).event_shape == (3,)
    assert vae.guide(num_data=5).shape == (5, 3)
    assert Trace_ELBO().loss(vae.model, vae.guide, torch.rand(5, *shape)) == pytest.approx(0, abs=1e4)


def test_the_scale_of_a_gaussian_is_bounded_below():
    vae = small("gaussian_shared")
    with torch.no_grad():
        vae.raw_scale.fill_(-1e4)
    assert vae.decode(torch.zeros(2)).base_dist.scale.min().item() == pytest.approx(1e-3)


def test_the_prior_takes_no_memory():
    fn = pyro.poutine.trace(VAE((4,), 2, hidden=(5,)).model).get_trace(num_data=7).nodes["z"]["fn"]
    assert fn.base_dist.loc.shape == (7, 2)
    assert fn.base_dist.loc.stride() == (0, 0)
    torch.testing.assert_close(VAE(4, 3, hidden=()).prior.log_prob(torch.zeros(3)), torch.tensor(-2.756816))


def test_chains_are_an_outer_plate():
    vae, x, z = small().double(), torch.rand(5, 4).double(), torch.randn(3, 5, 2).double()

    def chains():
        with pyro.plate("chains", 3, dim=-2):
            return vae.model(x)

    trace = pyro.poutine.trace(pyro.condition(chains, {"z": z})).get_trace()
    trace.compute_log_prob()
    for chain in range(3):
        single = pyro.poutine.trace(pyro.condition(vae.model, {"z": z[chain]})).get_trace(x)
        single.compute_log_prob()
        for site in ("z", "x"):
            torch.testing.assert_close(trace.nodes[site]["log_prob"][chain], single.nodes[site]["log_prob"])
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss
    assert math.isfinite(loss(vae.model, vae.guide, x))


def test_beta_weighs_the_divergence_in_train_mode_only():
    plain, x, z = small(), torch.rand(5, 4), torch.randn(5, 2)
    weighted = small(beta=3.0)
    weighted.load_state_dict(plain.state_dict())
    log_likelihood = plain.decode(z).log_prob(x).sum()
    divergence = log_likelihood - elbo(plain, x, z)
    torch.testing.assert_close(elbo(weighted, x, z), log_likelihood - 3 * divergence)
    assert torch.equal(elbo(weighted.eval(), x, z), elbo(plain, x, z))


@pytest.mark.uses_param_store
def test_two_vaes_train_side_by_side_in_stock_svi():
    torch.manual_seed(0)
    x = (torch.rand(32, 4) < torch.tensor([0.1, 0.9, 0.1, 0.9])).float()
    vaes = [small(), small()]
    untouched = copy.deepcopy(vaes[1].state_dict())
    pyro.clear_param_store()
    svi = SVI(vaes[0].model, vaes[0].guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(torch.equal(value, untouched[name]) for name, value in vaes[1].state_dict().items())
    svi = SVI(vaes[1].model, vaes[1].guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    assert svi.step(x) > losses[-1]
    assert len(pyro.get_param_store()) == 2 * len(list(vaes[0].parameters()))


def test_outside_svi_the_parameter_store_stays_empty():
    vae = small()
    Trace_ELBO().loss(vae.model, vae.guide, torch.rand(5, 4))
    assert not [name for name in pyro.get_param_store() if name.startswith("VAE")]


def test_double_precision_and_copies():
    vae, x = small("gaussian").double(), torch.randn(5, 4).double()
    vae.model(x)
    assert vae.guide(x).dtype == torch.double
    for copied in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        torch.manual_seed(1)
        first = copied.guide(x)
        torch.manual_seed(1)
        assert torch.equal(first, vae.guide(x))


def test_values_are_checked_once_per_tensor_and_again_after_a_write(monkeypatch):
    vae, x, seen = small(), torch.rand(5, 4), []
    check = VAE._check_values
    monkeypatch.setattr(VAE, "_check_values", lambda self, x: seen.append(1) or check(self, x))
    for _ in range(3):
        vae.model(x)
        vae.guide(x)
    assert len(seen) == 1
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite values of 20"):
        vae.guide(x)
    with torch.inference_mode():
        y = torch.rand(5, 4)
        vae.model(y)
        y[0] = 2.0
        with pytest.raises(ValueError, match="from .* to 2"):
            vae.model(y)


def test_the_check_does_not_stop_graph_capture():
    vae = small()

    def log_joint(z, x):
        trace = pyro.poutine.trace(pyro.condition(vae.model, {"z": z})).get_trace(x)
        return sum(trace.nodes[site]["fn"].log_prob(trace.nodes[site]["value"]).sum() for site in ("z", "x"))

    z, x = torch.randn(5, 2), torch.rand(5, 4)
    captured = make_fx(lambda z: log_joint(z, x))(z)
    torch.testing.assert_close(captured(2 * z), log_joint(2 * z, x))
    captured = make_fx(log_joint)(z, x)
    torch.testing.assert_close(captured(2 * z, 1 - x), log_joint(2 * z, 1 - x))
    batched = torch.func.vmap(log_joint)(torch.stack([z, 2 * z]), torch.stack([x, 1 - x]))
    torch.testing.assert_close(batched[1], log_joint(2 * z, 1 - x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"likelihood": "poisson"}, r"likelihood must be one of \['bernoulli', .*got 'poisson'"),
        ({"beta": 0.0}, "beta must be a finite number above zero, got 0.0"),
        ({"beta": math.inf}, "beta must be a finite number above zero"),
        ({"network": "transformer"}, r"network must be one of \['conv', 'mlp'\]"),
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1"),
        ({"network": "conv"}, r"event_shape must be \(channels, height, width\)"),
        (
            {"decoder": nn.Linear(2, 3)},
            r"decoder must turn .* into \(1, 4\), it returned \(1, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        VAE(**{"event_shape": (4,), "latent_dim": 2, **options}).model()


@pytest.mark.parametrize(
    ("x", "likelihood", "match"),
    [
        ([[0.0] * 4], "gaussian", r"x must be a torch tensor, got list"),
        (torch.zeros(5, 3), "gaussian", r"x must have shape \(num_data, 4\) .*got \(5, 3\)"),
        (torch.zeros(4), "gaussian", r"x must have shape .*got \(4,\)"),
        (torch.zeros(0, 4), "gaussian", r"x must have shape .*got \(0, 4\)"),
        (
            torch.zeros(5, 4, dtype=torch.long),
            "bernoulli",
            r"dtype of the VAE, .* got torch.int64",
        ),
        (torch.zeros(5, 4).double(), "gaussian", r"dtype of the VAE, torch.float32, got torch.float64"),
        (torch.full((5, 4), math.inf), "gaussian", "x must be finite, got 20 NaN or infinite values"),
        (torch.full((5, 4), 255.0), "bernoulli", r"x must lie in \[0, 1\] .* 255; rescale x"),
        (torch.full((5, 4), -0.1), "continuous_bernoulli", r"x must lie in \[0, 1\]"),
    ],
)
def test_bad_data_are_named(x, likelihood, match):
    vae = small(likelihood)
    for call in (vae.model, vae.guide):
        with pytest.raises(ValueError, match=match):
            call(x)


def test_the_number_of_data_is_checked():
    with pytest.raises(ValueError, match="num_data must be a whole number of at least 1, got 0"):
        small().model(num_data=0)
