"""Priors that learn, of every kind that people give a VAE: objectives take them, log Z of their tilts is right."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import nn

from pyro_ebm import (
    ContrastiveDivergence,
    FirstOrder,
    LinearEnergy,
    NoiseContrastive,
    Normalizer,
    TiltELBO,
    fit,
    fit_tilt,
    log_likelihood,
    log_normalizer,
    predictive,
    sample,
    tilt,
)
from pyro_ebm.tilts.normalizer import is_exchangeable, site_log_normalizer

K = 4


class Learned(nn.Module):
    """A small VAE with a prior of some kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.loc = nn.Parameter(torch.randn(K, 2))
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 4)
        self.pseudo_inputs = nn.Parameter(torch.randn(K, 3))
        flows = {"spline": lambda: transforms.spline_coupling(2, count_bins=3), "affine": transforms.affine_coupling}
        self.flow = flows["spline"]() if kind == "spline flow" else flows["affine"](2, hidden_dims=[4])

    def normal(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, scale.exp()).to_event(1)

    def prior(self):
        even = dist.Categorical(logits=torch.zeros(K))
        if self.kind == "mixture":
            return dist.MixtureSameFamily(even, dist.Normal(self.loc, 1.0).to_event(1))
        if self.kind == "diagonal mixture":
            return dist.MixtureOfDiagNormals(self.loc, torch.ones(K, 2), torch.zeros(K))
        if self.kind == "VampPrior":
            return dist.MixtureSameFamily(even, self.normal(self.pseudo_inputs))
        return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [self.flow])

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.normal(x))


KINDS = ["mixture", "diagonal mixture", "VampPrior", "affine flow"]
KINDS += [pytest.param("spline flow", marks=pytest.mark.slow)]


def made(kind):
    torch.manual_seed(0)
    return Learned(kind), torch.randn(20, 3)


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # of the tail of a spline flow
@pytest.mark.parametrize("kind", KINDS)
def test_all_data_share_one_prior_and_one_log_z(kind):
    vae, x = made(kind)
    energy, base = LinearEnergy([0.4, -0.3]), vae.prior()
    wide = base.expand([len(x)])
    assert is_exchangeable(wide)
    log_z = site_log_normalizer(wide, energy, Normalizer(num_samples=4000), name="z")
    expected = log_normalizer(base, energy, num_samples=100_000, seed=1)
    assert log_z.ndim == 0 and abs(float(log_z.detach() - expected.value)) < 6 * float(expected.se) * math.sqrt(25)
    log_z.backward()  # and its gradient reaches the energy
    assert energy.a.grad.isfinite().all()


def test_a_prior_for_each_datum_is_none_for_all():
    comps = dist.Normal(torch.randn(20, K, 2), 1.0).to_event(1)
    assert not is_exchangeable(dist.MixtureSameFamily(dist.Categorical(torch.ones(20, K)), comps))
    locs, scales = torch.randn(20, K, 2), torch.ones(20, K, 2)
    assert not is_exchangeable(dist.MixtureOfDiagNormals(locs, scales, torch.zeros(20, K)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [TiltELBO, ContrastiveDivergence, NoiseContrastive, FirstOrder])
def test_objectives_take_them(objective, kind):
    vae, x = made(kind)
    energy = LinearEnergy([0.0, 0.0])
    options = {"epochs": 2, "seed": 0, "progress": False}
    result = fit(tilt(vae.model, {"z": energy}), vae.guide, x, objective=objective(), train=energy, **options)
    assert len(result.train_loss) == 2 and bool((energy.a != 0).all())


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # of guides that have hardly learned
@pytest.mark.parametrize("kind", KINDS)
def test_entry_points_take_them(kind):
    vae, x = made(kind)
    fit(vae.model, vae.guide, x, epochs=1, seed=0, progress=False)
    energy = LinearEnergy([0.0, 0.0])
    tilted = tilt(vae.model, {"z": energy})
    result = fit_tilt(tilted, vae.guide, x, max_steps=3, tolerance=None, folds=2, seed=0, progress=False)
    assert result.gain is not None and bool((energy.a != 0).all())
    assert log_likelihood(tilted, vae.guide, x, num_samples=200, seed=0).value.isfinite().all()
    assert predictive(tilted, x, num_samples=5, seed=0)["z"].shape == (5, 20, 2)


@pytest.mark.parametrize("method", ["smc", pytest.param("chees", marks=pytest.mark.slow)])
def test_a_mixture_is_sampled(method):
    """Two normals at -1.5 and 2, seen through y ~ N(z, 1) at 0.5: a mixture again."""
    loc, y = torch.tensor([-1.5, 2.0]), torch.tensor(0.5)

    def model():
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, 1.0)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    weights = dist.Normal(loc, math.sqrt(2)).log_prob(y).softmax(0)
    mean = float(weights @ ((loc + y) / 2))
    options = {"warmup_steps": 200, "num_chains": 32} if method == "chees" else {}
    draws = sample(model, method=method, num_samples=400, seed=0, progress=False, **options)
    z = draws.resample(2000)["z"] if draws.log_weights is not None else draws.values["z"]
    assert abs(float(z.mean()) - mean) < 0.15


def test_a_mixture_with_a_support_for_each_component_is_refused_by_name():
    def model():
        bounds = torch.tensor([0.0, 1.0])
        pyro.sample("u", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Uniform(bounds, bounds + 2)))

    with pytest.raises(ValueError, match=r"site 'u' \(MixtureSameFamily\) has a support that no transform"):
        sample(model, method="chees", num_samples=5, progress=False)
