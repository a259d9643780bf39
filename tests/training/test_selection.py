"""Which epoch is kept: not the luckiest one."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm import (
    VAE,
    Average,
    Checkpoint,
    CheckpointError,
    LinearEnergy,
    MLPEnergy,
    TiltedDistribution,
    TiltELBO,
    Validation,
    fit,
    tilt,
)
from pyro_ebm.training.selection import within_error

N = 100
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, generator=GENERATOR)
Y = X + 0.2 * torch.randn(N, generator=GENERATOR)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.2), obs=y)


def posterior(num):
    precision = 1 + (X[:num] ** 2).sum() / 0.04
    return float((X[:num] * Y[:num]).sum() / 0.04 / precision), float(precision.rsqrt())


def learned(**options):
    guide = AutoNormal(regression, init_scale=0.1)
    settings = {"epochs": 120, "batch_size": N, "patience": None, "seed": 0, "progress": False, **options}
    settings.setdefault("optimizer", functools.partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.95)))
    result = fit(regression, guide, (X, Y), **settings)
    return guide.locs.w.item(), guide.scales.w.item(), result


@pytest.mark.parametrize(
    ("validation", "batch_size"), [(None, N), (0.1, N), ("data", N), (None, 25)]
)
def test_a_regression_keeps_its_posterior_and_no_lucky_epoch(validation, batch_size):
    epochs = 120 * batch_size // N
    validation = (X, Y) if validation == "data" else validation
    loc, scale, result = learned(validation=validation, batch_size=batch_size, epochs=epochs)
    mean, sd = posterior(N)
    assert abs(loc - mean) < 4 * sd
    assert 0.5 * sd < scale < 2 * sd
    assert result.kept_epoch > 0.9 * epochs


@pytest.mark.slow
def test_three_thousand_epochs_find_the_posterior():
    loc, scale, _ = learned(validation=None, epochs=3000, optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    mean, sd = posterior(N)
    assert abs(loc - mean) < 2 * sd and abs(scale / sd - 1) < 0.25


def test_the_last_wins_where_noise_decides():
    noise = [0.3, -0.2, 0.1, -0.4, 0.2, 0.3, -0.1, 0.0]
    best = [0.0] * 8
    small, large = [n + 0.05 for n in noise], [0.5 + n / 10 for n in noise]
    assert within_error(0.05, small, 0.0, best, nats=None)
    assert not within_error(0.5, large, 0.0, best, nats=None)
    assert not within_error(9.0, [0.01, 0.02, 0.01, 0.05, 0.01, 0.03, 0.01, 71.9], 0.0, best, nats=None)  # all agree
    assert within_error(-0.1, large, 0.0, best, nats=None)
    # Without noise the lower one is better, but for what is no difference between fits.
    assert not within_error(0.1, [0.1, 0.1], 0.0, [0.0, 0.0], nats=None)
    assert within_error(0.1, [0.1, 0.1], 0.0, [0.0, 0.0], nats=10)
    assert not within_error(0.3, [0.3, 0.3], 0.0, [0.0, 0.0], nats=10)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.level, 1.0), obs=y)

    def guide(self, y):
        pass


def run(module, **options):
    settings = {"epochs": 6, "batch_size": N, "seed": 0, "progress": False, "validation": None, **options}
    settings.setdefault("optimizer", functools.partial(torch.optim.SGD, lr=0.1))
    return fit(module.model, module.guide, Y + 3, **settings)


def test_an_objective_is_told_the_epoch_and_the_last_is_kept():
    """A weight that grows: the first epochs have the lowest losses, and mean nothing."""
    told = []

    def growing(model, guide, y, *, epoch):
        told.append(epoch)
        return epoch * Trace_ELBO().differentiable_loss(model, guide, y)

    result = run(Sum(), objective=growing, validation=0.5)
    assert sorted(set(told)) == [1, 2, 3, 4, 5, 6]
    assert (result.kept_epoch, result.epochs, result.stopped) == (6, 6, "epochs")
    with pytest.raises(ValueError, match='keep="best" has nothing to choose by: the objective changes with the epoch'):
        run(Sum(), objective=growing, validation=0.5, keep="best")
    with pytest.raises(ValueError, match="patience=3 has nothing to go by: the objective changes with the epoch"):
        run(Sum(), objective=growing, validation=0.5, patience=3)
    growing.validation = lambda model, guide, y: Trace_ELBO().differentiable_loss(model, guide, y)
    assert run(Sum(), objective=growing, validation=0.5, keep="best").kept_epoch == 6


@pytest.mark.parametrize("where", ["module", "objective"])
def test_a_weight_that_a_callback_lets_grow_makes_earlier_losses_mean_nothing(where):
    class Grown(Sum):
        def __init__(self):
            super().__init__()
            self.weight = 1.0

        def model(self, y):
            with pyro.poutine.scale(scale=self.weight):
                super().model(y)

    class Weighted:
        def __init__(self, weight=1.0):
            self.weight = weight

        def __call__(self, model, guide, y):
            return self.weight * Trace_ELBO().differentiable_loss(model, guide, y)

    module, objective = Grown(), Weighted()
    owner = module if where == "module" else objective

    def grow(state):
        owner.weight = min(8.0, 2.0 * owner.weight)

    # Only the last three epochs have one weight.
    result = run(module, objective=objective, validation=0.5, callbacks=[grow], optimizer=small, keep="best")
    assert result.validation_loss.index(min(result.validation_loss)) == 0
    assert result.kept_epoch == 6 and result.best_epoch >= 4


small = functools.partial(torch.optim.SGD, lr=0.01)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keep": "first"}, ValueError, r"keep must be one of \('best', 'last', 'average'\)"),
        ({"keep": "best"}, ValueError, 'keep="best" has nothing to choose by: a train loss is of weights that moved'),
        ({"patience": 3}, ValueError, "patience=3 has nothing to go by: there is no validation loss"),
        ({"patience": "long"}, ValueError, "patience must be"),
    ],
)
def test_what_cannot_be_kept_is_named(options, error, match):
    with pytest.raises(error, match=match):
        run(Sum(), **options)


def test_the_last_epoch_is_kept_if_asked_for():
    diverging = functools.partial(torch.optim.SGD, lr=2.2)
    kept, last = Sum(), Sum()
    assert run(kept, validation=0.5, optimizer=diverging).kept_epoch < 6
    assert run(last, validation=0.5, optimizer=diverging, keep="last").kept_epoch == 6
    assert abs(kept.level - 3) < abs(last.level - 3)


@pytest.mark.parametrize("bad", [0, 1.0, True, "long", None])
def test_decays_that_cannot_be(bad):
    with pytest.raises((ValueError, TypeError), match="decay must be a number"):
        Average(bad)


def test_the_average_is_kept_validated_and_resumed(tmp_path):
    module, levels = Sum(), []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            levels.append(module.level.item())

    told = []
    result = run(
        module, optimizer=functools.partial(Noted, lr=0.1), keep=Average(0.5), validation=(Y + 3,),
        callbacks=[lambda state: told.append(module.level.item())],
    )  # fmt: skip
    average = 0.0
    for step, level in enumerate(levels):
        stays = min(0.5, (1 + step) / (10 + step))
        average = stays * average + (1 - stays) * level
    assert module.level.item() == told[-1] == pytest.approx(average, rel=1e-5) != levels[-1]
    loss = -dist.Normal(average, 1.0).log_prob(Y + 3).mean()
    assert result.validation_loss[-1] == pytest.approx(float(loss), rel=1e-5)
    path = tmp_path / "run.pt"
    run(Sum(), keep=Average(0.5), epochs=2, checkpoint=path)
    again = Sum()
    run(again, keep=Average(0.5), checkpoint=Checkpoint(path, resume=True))
    assert again.level.item() == module.level.item()
    with pytest.raises(CheckpointError, match="its keep is"):
        run(Sum(), keep="last", checkpoint=Checkpoint(path, resume=True))
    assert run(Sum(), keep="average").kept_epoch == 6


# ------------------------------------------------------------------------------- noise that stands still


def tilts():
    """A model for each way in which log Z is estimated."""
    torch.manual_seed(3)
    vae = VAE((4,), 2, hidden=(5,))
    energy, data_energy = MLPEnergy(2, hidden=(4,)), MLPEnergy(4, hidden=(4,))

    def inside(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", TiltedDistribution(vae.prior, energy))
            pyro.sample("x", vae.decode(z), obs=x)

    return {
        "site": (tilt(vae.model, {"z": energy}), vae.guide, energy),
        "site with inputs": (tilt(vae.model, {"z": lambda z: energy(z)}), vae.guide, energy),
        "forward": (tilt(vae.model, {"x": data_energy}), vae.guide, data_energy),
        "distribution": (inside, vae.guide, energy),
    }


@pytest.mark.parametrize("objective", [Trace_ELBO(), TiltELBO()])
@pytest.mark.parametrize("way", ["site", "site with inputs", "forward", "distribution"])
def test_validation_moves_with_the_weights_and_not_with_the_draws(way, objective):
    """A step of 1e-6 changes the loss by about as much: log Z too keeps its draws."""
    if isinstance(objective, TiltELBO) and way in ("forward", "distribution"):
        pytest.skip("TiltELBO is for tilts of what the guide draws")
    model, guide, energy = tilts()[way]
    x = (torch.rand(40, 4) < 0.5).float()
    tiny = functools.partial(torch.optim.SGD, lr=1e-6)
    result = fit(
        model, guide, x, train=energy, objective=objective, optimizer=tiny, epochs=3, validation=0.5, seed=0,
        progress=False,
    )  # fmt: skip
    losses = torch.tensor(result.validation_loss)
    assert float(losses.max() - losses.min()) < 1e-4


def test_the_noise_of_training_stays_new_at_each_step():
    model, guide, energy = tilts()["site"]
    x = (torch.rand(40, 4) < 0.5).float()
    tiny = functools.partial(torch.optim.SGD, lr=1e-6)
    result = fit(model, guide, x, train=energy, objective=TiltELBO(), optimizer=tiny, epochs=3, validation=None, seed=0,
                 progress=False)  # fmt: skip
    assert len(set(result.train_loss)) == 3


def test_draws_of_validation_are_as_many_as_asked_for():
    energy = LinearEnergy(torch.zeros(2))
    vae, counts = VAE((4,), 2, hidden=(5,)), []

    def objective(model, guide, x):
        counts.extend([] if torch.is_grad_enabled() else [len(x)])
        return Trace_ELBO().differentiable_loss(model, guide, x)

    for num, wanted in ((32, [4] * 8), (6, [6] * 8), (400, [50] * 8)):
        counts.clear()
        fit(tilt(vae.model, {"z": energy}), vae.guide, torch.rand(40, 4), train=energy, objective=objective, epochs=1,
            validation=Validation(torch.rand(num, 4)), seed=0, progress=False)  # fmt: skip
        assert counts[-8:] == wanted
