"""fit_tilt against the maximum likelihood estimate that a linear Gaussian model has in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import (
    VAE,
    Checkpoint,
    CheckpointError,
    InferenceWarning,
    LinearEnergy,
    MLPEnergy,
    Normalizer,
    QuadraticEnergy,
    TrainingWarning,
    fit_tilt,
    log_normalizer,
    tilt,
)
from pyro_ebm.objectives.likelihood import TiltLikelihood

W = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.6]])
NOISE = 0.5
# z | x ~ N(x @ GAIN, SPREAD) under the base z ~ N(0, I), x ~ N(z W, NOISE^2 I)
SPREAD = torch.linalg.inv(torch.eye(2) + W @ W.T / NOISE**2)
GAIN = W.T @ SPREAD / NOISE**2
QMC = Normalizer("qmc", 512)


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.MultivariateNormal(x @ GAIN, SPREAD))


def data(num, loc=(0.0, 0.0), scale=1.0):
    generator = torch.Generator().manual_seed(1)
    z = torch.tensor(loc) + scale * torch.randn(num, 2, generator=generator)
    return z @ W + NOISE * torch.randn(num, 3, generator=generator)


def log_prob(x, loc=0.0, variance=1.0):
    """Log p(x) for z ~ N(loc, variance I)."""
    covariance = variance * W.T @ W + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal((loc + torch.zeros(2)) @ W, covariance).log_prob(x)


def fitted(energy, x, **options):
    settings = {"seed": 0, "progress": False, "folds": 0, "tolerance": None, "learning_rate": 0.05}
    steps = options.pop("epochs", 30) * -(-len(x) // 128)
    return fit_tilt(tilt(model, {"z": energy}, normalize=QMC), guide, x, max_steps=steps, **{**settings, **options})


def weights(module):
    return [value.clone() for value in module.state_dict().values()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_linear_tilt_is_the_maximum_likelihood_estimate():
    true, energy = torch.tensor([0.8, -0.6]), LinearEnergy([0.0, 0.0])
    x = data(600, loc=(0.8, -0.6))
    result = fitted(energy, x)
    # log p_a(x) - log p_0(x) = a.m - a'(I - S)a / 2, for m, S the posterior's moments under the base
    information = torch.eye(2) - SPREAD
    a = torch.linalg.solve(information, (x @ GAIN).mean(0))
    found = energy.a.detach()
    se = torch.linalg.inv(len(x) * information).diagonal().sqrt()
    assert ((found - true).abs() < 4 * se).all()
    assert ((found - a).abs() < 0.5 * se).all()  # the data are the same: only the fit's own noise is left
    # Minus the loss is the log likelihood ratio: here of the weights found, with the error of 32 particles.
    exact = (log_prob(x, found) - log_prob(x)).mean()
    error = (found @ SPREAD @ found / 32 / len(x)).sqrt()
    assert 0.2 < exact and abs(result.train_loss[-1] + exact) < 4 * error + 1e-3


def test_a_quadratic_tilt_is_the_maximum_likelihood_estimate():
    energy, x = QuadraticEnergy(0.0), data(600, scale=0.5)
    # A tilt this strong needs more particles: the log of a mean of few is too small on average.
    result = fitted(energy, x, learning_rate=0.2, num_particles=300)
    grid = torch.arange(0.5, 8.0, 0.01)
    curve = torch.stack([log_prob(x, variance=1 / (1 + c)).sum() for c in grid])
    best = int(curve.argmax())
    curvature = (curve[best + 30] - 2 * curve[best] + curve[best - 30]) / 0.3**2
    se = 1 / math.sqrt(-curvature)
    assert abs(energy.c.item() - 3) < 4 * se  # z ~ N(0, I / 4)
    assert abs(energy.c.item() - grid[best].item()) < 0.5 * se
    exact = (log_prob(x, variance=1 / (1 + energy.c.item())) - log_prob(x)).mean()
    assert 0.1 < exact and abs(result.train_loss[-1] + exact) < 0.02


def test_a_network_finds_the_tilted_prior_s_mean():
    torch.manual_seed(0)
    true, energy = torch.tensor([0.8, -0.6]), MLPEnergy(2, hidden=(16,))
    x = data(600, loc=(0.8, -0.6))
    fitted(energy, x, learning_rate=0.02)
    z = torch.randn(50_000, 2)
    mean = (-energy(z)).softmax(0).detach() @ z
    se = torch.linalg.inv(480 * (torch.eye(2) - SPREAD)).diagonal().sqrt()
    assert ((mean - true).abs() < 4 * se).all() and (se < 0.1).all()


def test_a_tilt_beyond_the_reach_of_log_z_is_told():
    """No draw of the base lies where the reference is: the loss falls without end, and means nothing."""
    stopped = pytest.warns(TrainingWarning, match=r"log Z rests on [12]\.\d of 512 draws")
    with stopped, pytest.warns(InferenceWarning, match="the estimate of log Z is not reliable"):
        result = fitted(LinearEnergy([0.0, 0.0]), data(200, loc=(0.0, 9.0)), learning_rate=0.5)
    assert result.stopped == "degenerate weights"


def small_vae():
    torch.manual_seed(0)
    return VAE((4,), 2, hidden=(5,))


def vae_fit(vae, energy, **options):
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    settings = {"num_particles": 4, "batch_size": 16, "seed": 0, "folds": 0, "tolerance": None, "progress": False}
    settings |= options
    steps = settings.pop("epochs", 4) * -(-50 // settings["batch_size"])
    return fit_tilt(tilt(vae.model, {"z": energy}), vae.guide, x, max_steps=steps, **settings)


def test_the_base_is_left_bit_identical():
    vae, energy = small_vae(), MLPEnergy(2, hidden=(4,))
    vae.decoder.requires_grad_(False)
    vae.encoder.eval()
    before, modes = weights(vae), [module.training for module in vae.modules()]
    flags, before_energy = [p.requires_grad for p in vae.parameters()], weights(energy)
    vae_fit(vae, energy)
    assert same(weights(vae), before) and not same(weights(energy), before_energy)
    assert [p.requires_grad for p in vae.parameters()] == flags
    assert [module.training for module in vae.modules()] == modes
    assert all(p.grad is None for p in vae.parameters())


def test_encoder_and_decoder_run_before_training_only(monkeypatch):
    vae, calls, steps = small_vae(), [], []
    vae.decoder.register_forward_hook(lambda *_: calls.append(len(steps)))
    vae.encoder.register_forward_hook(lambda *_: calls.append(len(steps)))
    loss = TiltLikelihood.__call__
    monkeypatch.setattr(TiltLikelihood, "__call__", lambda *args: steps.append(1) or loss(*args))
    vae_fit(vae, MLPEnergy(2, hidden=(4,)))
    assert len(steps) >= 4 * 4 and calls and set(calls) == {0}


def test_the_learning_rate_falls_to_zero_along_a_cosine(monkeypatch):
    rates = []

    class Recorded(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    vae_fit(small_vae(), MLPEnergy(2, hidden=(4,)), batch_size=50, learning_rate=0.2)
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])


def test_the_seed_decides_everything(rng_untouched):
    vae, energies = small_vae(), []
    for seed in (3, 3, 4):
        torch.manual_seed(1)
        energies.append(MLPEnergy(2, hidden=(4,)))
        with rng_untouched():
            assert vae_fit(vae, energies[-1], seed=seed).seed == seed
    first, again, other = map(weights, energies)
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("at_call", [2, 10])
def test_a_resumed_fit_is_the_same_fit(tmp_path, monkeypatch, seed, at_call):
    vae, loss, calls = small_vae(), TiltLikelihood.__call__, []
    torch.manual_seed(1)
    stopped, fresh, whole = (MLPEnergy(2, hidden=(4,)) for _ in range(3))
    for other in (fresh, whole):
        other.load_state_dict(stopped.state_dict())

    def stop(self, *args):
        calls.extend([1] if torch.is_grad_enabled() else [])
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return loss(self, *args)

    path = tmp_path / "tilt.pt"
    with monkeypatch.context() as patch, pytest.warns(TrainingWarning, match="interrupted in epoch"):
        patch.setattr(TiltLikelihood, "__call__", stop)
        first = vae_fit(vae, stopped, checkpoint=path, seed=seed)
    assert first.stopped == "interrupted" and first.epochs < 4
    resumed = vae_fit(vae, fresh, checkpoint=Checkpoint(path, resume=True), seed=seed)
    expected = vae_fit(vae, whole, seed=first.seed)
    assert resumed.train_loss == expected.train_loss and len(resumed.train_loss) == 4
    assert same(weights(fresh), weights(whole))


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    vae, energy = small_vae(), MLPEnergy(2, hidden=(4,))
    vae_fit(vae, energy, checkpoint=tmp_path / "tilt.pt", epochs=1)
    with pytest.raises(CheckpointError, match="its seed is 0, here it is 1"):
        vae_fit(vae, energy, checkpoint=Checkpoint(tmp_path / "tilt.pt", resume=True), seed=1)
    nn.init.constant_(next(vae.encoder.parameters()), 0.3)  # another guide, other posterior draws
    with pytest.raises(CheckpointError, match="its data is"):
        vae_fit(vae, energy, checkpoint=Checkpoint(tmp_path / "tilt.pt", resume=True))


def refused(target, match, error=ValueError, use=guide, x=None):
    with pytest.raises(error, match=match):
        fit_tilt(target, use, data(8) if x is None else x, max_steps=1, num_particles=2, progress=False)


def test_targets_it_is_not_for():
    energy = LinearEnergy([0.0, 0.0])
    refused(model, "model must be a TiltedModel, got function", TypeError)
    for normalize in (False, 0.3):
        refused(tilt(model, {"z": energy}, normalize=normalize), "must estimate its log Z: without it")
    both = {"z": energy, "x": LinearEnergy([0.0, 0.0, 0.0])}
    refused(tilt(model, both), r"must have one tilted site, got \['x', 'z'\]; use fit\(\) with an ELBO")
    refused(tilt(model, {"x": both["x"]}), "fit_tilt needs a latent site, but 'x' is observed")


def test_priors_that_differ_between_data_are_refused():
    energy = LinearEnergy([0.0, 0.0])

    def covariate(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)

    def nested(x):
        with pyro.plate("data", len(x), dim=-1):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)

    for target in (covariate, nested):
        refused(tilt(target, {"z": energy}), "'z' has random parents or depends on inputs; use fit")


def test_a_latent_outside_the_plate_is_refused():
    def shared(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal((z @ W)[..., None, :], NOISE).to_event(1), obs=x)

    def guide_of_shared(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    target = tilt(shared, {"z": LinearEnergy([0.0, 0.0])})
    refused(target, r"latent site\(s\) \['z'\] lie outside the plate", use=guide_of_shared)


def test_the_elbo_of_a_linear_tilt_is_maximal_at_the_mean_of_the_posterior_means():
    """E_q[a.z] - |a|^2 / 2 summed over data: the spread of the posteriors plays no part, unlike in the likelihood."""
    energy, x = LinearEnergy([0.0, 0.0]), data(600, loc=(0.8, -0.6))
    fitted(energy, x, bound="elbo", epochs=60)
    spread = SPREAD.diagonal().sqrt() / math.sqrt(len(x))  # of one pass of the guide's draws
    assert ((energy.a.detach() - (x @ GAIN).mean(0)).abs() < 4 * spread).all()
    exact = LinearEnergy([0.0, 0.0])
    fitted(exact, x, bound="exact")
    assert ((energy.a - exact.a).abs() > 4 * spread).any()


def wide_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.MultivariateNormal(x @ GAIN, 25 * SPREAD))


@pytest.mark.parametrize("proposal, chosen", [(guide, "exact"), (wide_guide, "elbo")])
def test_auto_takes_the_elbo_where_weights_rest_on_few_draws(proposal, chosen):
    x, found = data(250, loc=(0.8, -0.6)), {}
    options = {"max_steps": 4, "seed": 0, "progress": False, "folds": 0, "tolerance": None}
    for bound in ("auto", "exact", "elbo"):
        energy = LinearEnergy([0.0, 0.0])
        fit_tilt(tilt(model, {"z": energy}, normalize=QMC), proposal, x, bound=bound, **options)
        found[bound] = energy.a.detach()
    assert torch.equal(found["auto"], found[chosen]) and not torch.equal(found["exact"], found["elbo"])


def test_auto_takes_the_elbo_in_many_dimensions():
    vae, x, found = VAE((4,), latent_dim=5, hidden=(8,)), torch.rand(40, 4), {}
    for bound in ("auto", "elbo"):
        energy = LinearEnergy(torch.zeros(5))
        options = {"max_steps": 2, "tolerance": None, "folds": 0, "seed": 0, "progress": False}
        fit_tilt(tilt(vae.model, {"z": energy}), vae.guide, x, bound=bound, **options)
        found[bound] = energy.a.detach()
    assert torch.equal(found["auto"], found["elbo"])


def test_unknown_bounds_are_named():
    with pytest.raises(ValueError, match=r"bound must be one of \('auto', 'exact', 'elbo'\), got 'iwae'"):
        fitted(LinearEnergy([0.0, 0.0]), data(20), bound="iwae")


@pytest.mark.parametrize("bound", ["exact", "elbo"])
def test_running_control_makes_up_for_few_draws(bound):
    """16 draws make the tilt too sharp; with a running average of Z it comes nearer to what 512 Sobol points find."""
    x, found = data(400, loc=(1.0, -0.5)), {}
    for name, normalize, control in (("many", QMC, None), ("few", Normalizer(num_samples=16), None),
                                     ("control", Normalizer(num_samples=16), 0.9)):  # fmt: skip
        energy = LinearEnergy([0.0, 0.0])
        fit_tilt(
            tilt(model, {"z": energy}, normalize=normalize), guide, x, bound=bound, control=control, max_steps=240,
            batch_size=100, learning_rate=0.05, tolerance=None, folds=0, seed=0, progress=False,
        )  # fmt: skip
        found[name] = energy.a.detach()
    few, controlled = ((found[name] - found["many"]).norm() for name in ("few", "control"))
    assert few > 0.1
    assert controlled < 0.7 * few  # what is left is the noise of the last steps


@pytest.mark.parametrize("bound", ["exact", "elbo"])
def test_log_z_of_the_fitted_tilt_comes_with_the_result(bound):
    vae, energy = small_vae(), MLPEnergy(2, hidden=(4,))
    result = vae_fit(vae, energy, bound=bound)
    expected = log_normalizer(vae.prior, energy, seed=result.seed)
    assert result.log_z is not None and torch.equal(result.log_z.value, expected.value)
    assert torch.equal(result.log_z.se, expected.se) and 0 < float(result.log_z.se) < 0.1
    assert f"log Z {float(expected.value):.3f} ± " in result._repr_html_()
    other = log_normalizer(vae.prior, energy, method="qmc", seed=1)
    assert abs(float(result.log_z.value - other.value)) < 4 * float((expected.se**2 + other.se**2).sqrt())
    tilt(vae.model, {"z": energy}, normalize=float(result.log_z.value))


# How many steps, and what was gained


def maximum_likelihood(x):
    return torch.linalg.solve(torch.eye(2) - SPREAD, (x @ GAIN).mean(0))


def true_gain(a, loc):
    x = data(50_000, loc=loc)
    return float((log_prob(x, a) - log_prob(x)).mean())


@pytest.mark.parametrize("bound", ["exact", pytest.param("elbo", marks=pytest.mark.slow)])
def test_by_default_few_data_get_as_many_steps_as_they_need(bound):
    """A hundred data make a step an epoch: epochs once ended the run a quarter of the way."""
    x, energy = data(100, loc=(1.0, -0.5)), LinearEnergy([0.0, 0.0])
    result = fit_tilt(
        tilt(model, {"z": energy}, normalize=QMC), guide, x, bound=bound, folds=3, seed=0, progress=False
    )
    expected = maximum_likelihood(x) if bound == "exact" else (x @ GAIN).mean(0)
    se = torch.linalg.inv(100 * (torch.eye(2) - SPREAD)).diagonal().sqrt()
    assert ((energy.a.detach() - expected).abs() < 0.7 * se).all()
    assert result.stopped in ("flat", "epochs") and 200 <= result.epochs < 2000
    # The gain is that on other data, within its error, and that error is one over the data.
    assert result.gain is not None and 0.03 < float(result.gain.se) < 0.25
    if bound == "exact":
        assert abs(float(result.gain.value) - true_gain(energy.a.detach(), (1.0, -0.5))) < 3 * float(result.gain.se)
    assert f"gain on data not seen {float(result.gain.value):.3f}" in result._repr_html_()


def test_too_few_steps_are_told():
    with pytest.warns(TrainingWarning, match="the gain was still growing by .* nats per datum .* max_steps=60 came to"):
        result = fitted(LinearEnergy([0.0, 0.0]), data(100, loc=(1.0, -0.5)), tolerance=0.1, epochs=60,
                        learning_rate=5e-3)  # fmt: skip
    assert result.stopped == "epochs" and result.epochs == 60 and result.gain is None


def test_a_network_that_learns_by_heart_is_stopped_or_told():
    """Of 40 data from the base itself there is nothing to learn: what training gains, other data lose."""
    torch.manual_seed(0)
    x, energy = data(40), MLPEnergy(2, hidden=(64, 64))
    result = fit_tilt(
        tilt(model, {"z": energy}, normalize=QMC), guide, x, learning_rate=0.02, max_steps=400, folds=2, seed=0,
        progress=False,
    )  # fmt: skip
    assert result.epochs < 150  # of 400: cross-fitting saw that the first were the best
    assert result.gain is not None and abs(float(result.gain.value)) < 0.1 + 3 * float(result.gain.se)


def test_a_gain_below_nothing_is_told():
    with pytest.warns(TrainingWarning, match="on data it has not seen the tilt gains -.* it learns the reference data"):
        fitted(LinearEnergy([1.0, -1.0]), data(60), learning_rate=1e-6, epochs=3, folds=2)


def test_cross_fitting_leaves_the_last_fit_alone():
    """Its fits start from the weights that were given, and the last one does too."""
    x, energies = data(60, loc=(1.0, -0.5)), [LinearEnergy([0.1, 0.2]) for _ in range(2)]
    for energy, folds in zip(energies, (0, 3), strict=True):
        fitted(energy, x, folds=folds, epochs=10)
    assert torch.equal(energies[0].a, energies[1].a)


def test_a_single_datum_has_no_parts():
    assert fitted(LinearEnergy([0.0, 0.0]), data(1), folds=5, epochs=2).gain is None


def test_a_finished_run_goes_no_further(tmp_path):
    x, results = data(100, loc=(1.0, -0.5)), []
    for _ in range(2):
        energy = LinearEnergy([0.0, 0.0])
        checkpoint = Checkpoint(tmp_path / "tilt.pt", every=1000, resume="auto")
        results.append(fitted(energy, x, tolerance=0.5, epochs=2000, checkpoint=checkpoint))
    assert results[0].stopped == "flat" and results[1].train_loss == results[0].train_loss


def test_energies_without_parameters_in_sight_are_refused():
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="the energy of 'z' shows no parameters that can learn: give tilt"):
        fitted(lambda z: net(z).squeeze(-1), data(10))


@pytest.mark.parametrize("options, match", [
    ({"max_steps": 0}, "max_steps must be"), ({"folds": -1}, "folds must be"), ({"tolerance": -1.0}, "tolerance must"),
])  # fmt: skip
def test_numbers_out_of_range_are_named(options, match):
    target = tilt(model, {"z": LinearEnergy([0.0, 0.0])})
    with pytest.raises(ValueError, match=match):
        fit_tilt(target, guide, data(10), **options)
