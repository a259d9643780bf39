"""positives(): draws of the tilted site given the data, its distribution before the tilt, and refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import VAE, LinearEnergy, MLPEnergy, Normalizer, TiltELBO, tilt
from pyro_ebm.objectives.positives import base_draws, base_log_prob, draws_of, positives, tilt_loss

X = torch.linspace(-1, 1, 10).reshape(5, 2)


def normal(shift=0.0):
    return dist.Normal(torch.zeros(2) + shift, 1.0).to_event(1)


def observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(), obs=x)


def latent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)


def with_parents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z + 2.0, 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1).to_event(1))


def no_guide(x):
    raise AssertionError("an observed site needs no guide")


def linear():
    return LinearEnergy([0.5, -0.3])


def test_an_observed_site_gives_the_data_and_draws_nothing(rng_untouched):
    tilted = tilt(observed, {"z": linear()})
    with rng_untouched():
        site, values, base = positives(tilted, no_guide, (X,))
    assert site == "z" and torch.equal(values, X)
    torch.testing.assert_close(base_log_prob(base, X), normal().log_prob(X))


def test_a_latent_site_gives_the_guide_s_draws_without_gradients():
    vae = VAE((4,), latent_dim=2, hidden=(8,))
    tilted, x = tilt(vae.model, {"z": MLPEnergy(2, hidden=(4,))}), torch.rand(5, 4)
    torch.manual_seed(1)
    expected = poutine.trace(vae.guide).get_trace(x).nodes["z"]["value"]
    torch.manual_seed(1)
    site, values, base = positives(tilted, vae.guide, (x,))
    assert site == "z" and torch.equal(values, expected) and expected.requires_grad
    assert not values.requires_grad
    torch.testing.assert_close(base_log_prob(base, values), vae.prior.log_prob(values))


def test_masked_data_are_left_out():
    mask = torch.tensor([True, False, True, True, False])

    def masked(x):
        with poutine.mask(mask=mask):
            observed(x)

    _, values, base = positives(tilt(masked, {"z": linear()}), no_guide, (X,))
    assert torch.equal(values, X[mask])
    assert base_log_prob(base, values).shape == (3,)


def test_all_plates_become_one_batch_dimension():
    value = torch.arange(24.0).reshape(3, 4, 2)

    def nested(x):
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", normal(), obs=x)

    _, values, base = positives(tilt(nested, {"z": linear()}), no_guide, (value,))
    assert torch.equal(values, value.reshape(12, 2))
    for num in (1, 12, 17):  # fewer than, as many as, more than the elements of the plates
        some = torch.randn(num, 2)
        torch.testing.assert_close(base_log_prob(base, some), normal().log_prob(some))
        assert draws_of(base, num).shape == (num, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1), obs=x)

    _, values, base = positives(tilt(model, {"z": linear()}), no_guide, (X.to(dtype),))
    assert values.dtype == draws_of(base, 3).dtype == dtype


def test_draws_of_a_site_with_parents_come_from_running_the_model():
    """X ~ N(2, 1 + 0.5^2) once z is summed out."""
    tilted = tilt(with_parents, {"x": linear()})
    x = X.repeat(100, 1)
    found = positives(tilted, no_guide, (x,), need_base=False)
    assert found.base is None and torch.equal(found.values, x)
    n = 4001  # no multiple of the batch
    draws = base_draws(tilted, (x,), found, n)
    assert draws.shape == (n, 2)
    sd = math.sqrt(1.25)
    assert ((draws.mean(0) - 2.0).abs() < 4 * sd / math.sqrt(n)).all()
    assert ((draws.var(0) - sd**2).abs() < 4 * sd**2 * math.sqrt(2 / n)).all()


def test_draws_of_a_root_site_are_independent_of_the_data():
    tilted = tilt(latent, {"z": linear()})
    found = positives(tilted, guide, (X,))
    draws = base_draws(tilted, (X,), found, 4001)
    assert draws.shape == (4001, 2)
    assert (draws.mean(0).abs() < 4 / math.sqrt(4001)).all()


# The measure of fit


def test_tilt_loss_of_an_observed_site_in_closed_form():
    energy = linear()
    loss = tilt_loss(tilt(observed, {"z": energy}, normalize=Normalizer("qmc", 4096)), no_guide, X)
    expected = -(X @ energy.a).sum() + len(X) * 0.5 * energy.a.square().sum()
    assert loss.ndim == 0
    torch.testing.assert_close(loss, expected, rtol=0, atol=5 * 0.01)


def test_tilt_loss_of_a_latent_site_is_tilt_elbo():
    tilted = tilt(latent, {"z": MLPEnergy(2, hidden=(4,))})
    torch.manual_seed(3)
    ours = tilt_loss(tilted, guide, X)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, TiltELBO()(tilted, guide, X))


def test_tilt_loss_of_a_site_with_parents():
    """E_{N(2, 1.25)}[exp(a x)] = exp(2 a + 1.25 a^2 / 2), by running the model forward."""
    energy = linear()
    num = 20_000
    loss = tilt_loss(tilt(with_parents, {"x": energy}, normalize=Normalizer(num_samples=num)), no_guide, X)
    log_z = (2 * energy.a + 0.625 * energy.a.square()).sum()
    relative = math.sqrt((math.exp(1.25 * float(energy.a.detach().square().sum())) - 1) / num)  # of a log-normal mean
    assert abs(loss + (X @ energy.a).sum() - 5 * log_z) < 5 * 4 * relative


def test_tilt_loss_estimates_log_z_where_the_model_leaves_it_out():
    energy = linear()
    values = [tilt_loss(tilt(observed, {"z": energy}, normalize=n), no_guide, X) for n in (False, True, 7.0)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])


# Refusals


def test_errors():
    with pytest.raises(TypeError, match=r"model must be what tilt\(\) returns, got function"):
        positives(observed, guide, (X,))
    several = tilt(latent, {"z": linear(), "x": linear()}, normalize=False)
    with pytest.raises(ValueError, match=r"one tilted site, got \['x', 'z'\]"):
        positives(several, guide, (X,))
    with pytest.raises(ValueError, match="the guide does not draw the tilted site 'z'; it draws"):
        positives(tilt(latent, {"z": linear()}), lambda x: pyro.sample("y", normal()), (X,))
    with pytest.raises(ValueError, match="'x' has random parents; use NoiseContrastive or FirstOrder"):
        positives(tilt(with_parents, {"x": linear()}), guide, (X,))


@pytest.mark.parametrize("need_base", [True, False])
def test_a_law_that_depends_on_inputs_is_refused(need_base):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="'z' depends on inputs; use an ELBO such as"):
        positives(tilt(model, {"z": linear()}), guide, (X,), need_base=need_base)


def test_weights_of_single_data_are_refused():
    def weighted(x):
        with poutine.scale(scale=torch.arange(1.0, 6.0)):
            observed(x)

    with pytest.raises(ValueError, match=r"weights of their own \(poutine.scale of shape \(5,\)\)"):
        positives(tilt(weighted, {"z": linear()}), no_guide, (X,))
