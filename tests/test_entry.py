"""What surrounds a call of the library: other threads, a user's handlers, no gradients, inference mode."""

from __future__ import annotations

import inspect
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS

import pyro_ebm
from pyro_ebm import (
    HMC,
    MCMC,
    SMC,
    VAE,
    ChEES,
    InputError,
    LinearEnergy,
    MLPEnergy,
    MomentEnergy,
    TiltedDistribution,
    TiltedModel,
    annealed_importance,
    calibrate,
    fit,
    fit_moments,
    fit_tilt,
    importance,
    log_likelihood,
    log_normalizer,
    posterior_draws,
    predictive,
    pyro_hmc,
    quadrature,
    sample,
    tilt,
    to_arviz,
)
from pyro_ebm.randomness import forked_rng

pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning", "ignore::pyro_ebm.TrainingWarning")
BASE = dist.Normal(torch.zeros(1), 1.0).to_event(1)


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def prior():
    pyro.sample("z", BASE)


def guide(x, y):
    pyro.sample("slope", dist.Normal(0.5, 0.5))


X, Y = torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8) + 0.3
IMAGES = torch.linspace(0, 1, 64).reshape(16, 4).round()
FEW = {"num_samples": 8, "warmup_steps": 8, "seed": 0, "progress": False}
SMALL = {"num_samples": 16, "seed": 0}
SMC_SMALL = {"num_samples": 16, "num_chains": 2, "seed": 0, "progress": False}
AIS = {"chains_per_group": 4, "num_groups": 2, "num_temperatures": 4, "seed": 0, "progress": False}
LEARN = {"batch_size": 8, "seed": 0, "progress": False}
ENERGY, MEAN = LinearEnergy([0.5]), MomentEnergy(lambda z: z)
DRAWS = {}


def made():
    """Models to be trained: with weights, which are no inference tensors if made elsewhere."""
    with forked_rng(0):
        model = VAE((4,), latent_dim=1)
        return model, tilt(model.model, {"z": MLPEnergy((1,))})


def snis(model, *args, seed):
    return importance(model, None, *args, num_samples=64, seed=seed)


def by_hand(x):
    kernel = HMC(regression, step_size=0.1)
    kernel.setup(2, x, Y)
    return kernel.sample(kernel.initial_params)["slope"]


def fitted(x, model):
    fit(model.model, model.guide, IMAGES + 0 * x.sum(), epochs=1, **LEARN)
    return next(model.parameters())


def tilted(x, model, target):
    fit_tilt(target, model.guide, IMAGES + 0 * x.sum(), max_steps=4, **LEARN)
    return next(target.energies["z"].parameters())


def of_base(method):
    return lambda x, *_: log_normalizer(BASE, ENERGY, method=method, num_samples=32, seed=0).value


CALLS = {
    "nuts": lambda x, *_: sample(regression, x, Y, method="nuts", num_chains=1, **FEW).values["slope"],
    "mala": lambda x, *_: sample(regression, x, Y, method="mala", num_chains=4, **FEW).values["slope"],
    "auto": lambda x, *_: sample(regression, x, Y, ess=50, seed=0, progress=False).values["slope"],
    "smc": lambda x, *_: sample(regression, x, Y, method="smc", **SMC_SMALL).values["slope"],
    "pyro_hmc": lambda x, *_: pyro_hmc(regression, x, Y, num_chains=1, **FEW).values["slope"],
    "MCMC": lambda x, *_: MCMC(ChEES(regression), 4, 4, num_chains=4, seed=0, progress=False).run(x, Y).values["slope"],
    "MCMC of Pyro's": lambda x, *_: MCMC(NUTS(regression), 8, 8, seed=0, progress=False).run(x, Y).values["slope"],
    "annealed_importance": lambda x, *_: annealed_importance(regression, x, Y, **AIS).value,
    "importance": lambda x, *_: importance(regression, guide, x, Y, **SMALL).values["slope"],
    "log_likelihood": lambda x, m, _: log_likelihood(m.model, m.guide, IMAGES + 0 * x.sum(), **SMALL).value,
    "posterior_draws": lambda x, m, _: posterior_draws(m.model, m.guide, IMAGES + 0 * x.sum(), **SMALL)[1],
    "predictive": lambda x, *_: predictive(regression, x, Y, **SMALL)["y"],
    "quadrature": lambda x, *_: quadrature(regression, x, Y).values["slope"],
    "log_normalizer by importance": of_base("importance"),
    "log_normalizer by bridge": of_base("bridge"),
    "log_normalizer of a tilt": lambda x, _, t: t.log_normalizer(IMAGES, num_samples=64, seed=0).value,
    "log_prob of a tilt": lambda x, *_: TiltedDistribution(BASE, ENERGY).log_prob(x[:, None]),
    "to_arviz": lambda x, *_: torch.tensor(to_arviz(snis(regression, x, Y, seed=0)).log_likelihood["y"].values),
    "calibrate": lambda x, *_: calibrate(
        regression, x, Y, sampler=snis, num_simulations=3, num_draws=3, seed=0, progress=False
    ).ranks["slope"],
    "fit": lambda x, m, _: fitted(x, m),
    "fit_moments": lambda x, *_: fit_moments(BASE, MEAN, [0.3], num_samples=1024, seed=0).kl.value,
    "fit_tilt": tilted,
    "by hand": lambda x, *_: by_hand(x),
}
UNSEEDED = {"by hand"}


def answer(name):
    """What a call gives without anything around it."""
    if name not in DRAWS:
        DRAWS[name] = CALLS[name](X, *made()).detach().clone()
    return DRAWS[name]


def same(name, found):
    expected = answer(name)
    return found.shape == expected.shape and (name in UNSEEDED or torch.equal(found, expected))


LONG = {"annealed_importance", "fit_tilt", "log_normalizer by bridge", "pyro_hmc", "MCMC"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CALLS])
def test_two_threads_at_once(name):
    """Two calls in threads, started together: each gives what it gives alone, and validation is as it was."""
    answer(name)
    found, failed, together = [], [], threading.Barrier(2)

    def run():
        models = made()
        together.wait()
        try:
            found.append(CALLS[name](X, *models).detach())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(found) == 2 and all(same(name, each) for each in found)


@pytest.mark.parametrize("name", CALLS)
def test_under_a_trace_and_without_gradients(name):
    """A trace of the user's sees no site of the runs within, and the caller's mode does not matter."""
    models = made()
    with torch.no_grad(), poutine.trace() as tracer:
        found = CALLS[name](X, *models)
        assert not torch.is_grad_enabled()
    assert same(name, found.detach()) and not tracer.trace.nodes


@pytest.mark.parametrize("name", CALLS)
def test_under_inference_mode(name):
    """With data that were made there, too."""
    models = made()
    with torch.inference_mode():
        found = CALLS[name](X.clone(), *models)
        assert torch.is_inference_mode_enabled()
    assert same(name, found.detach())


def test_tensors_of_inference_mode_in_the_model_are_named():
    with torch.inference_mode():
        x = X.clone()
    with pytest.raises(InputError, match=r"made under torch.inference_mode\(\).*clone\(\) them"):
        sample(lambda: regression(x, Y), method="mala", num_chains=4, **FEW)


@pytest.mark.parametrize("name", ["mala", "importance", "predictive", "smc", "MCMC", "fit"])
def test_handlers_that_change_a_model_are_refused_around_the_call(name):
    """Some runs of the model would see them, and others, blocked, would not."""
    told = pytest.raises(InputError, match="called within ConditionMessenger of Pyro's.* put the handler around ")
    with poutine.condition(data={"slope": torch.tensor(0.5)}), told:
        CALLS[name](X, *made())
    assert same(name, CALLS[name](X, *made()).detach())


def test_a_stream_of_its_own_is_closed_to_other_threads():
    drawn = []
    with forked_rng(0):
        first = torch.rand(())
        thread = threading.Thread(target=lambda: drawn.append(forked(1)))
        thread.start()
        thread.join(0.05)
        assert not drawn  # waits
        second = torch.rand(())
    thread.join()
    torch.manual_seed(0)
    with forked_rng(0):
        assert torch.equal(torch.stack([first, second]), torch.stack([torch.rand(()), torch.rand(())]))
    assert torch.equal(drawn[0], forked(1))


def forked(seed):
    with forked_rng(seed):
        return torch.rand(())


# Those that run no model, or only wrap one.
WRAPPERS = {"tilt", "TiltedModel", "centered", "noncentered", "marginal_density", "gaussian_log_normalizer", "compare"}
WRAPPERS |= {"snis_log_likelihood"}  # part of an objective: differentiable, inside of a fit
METHODS = [MCMC.run, SMC.run, HMC.setup, HMC.sample, TiltedModel.log_normalizer]


def test_every_function_that_runs_a_model_is_an_entry():
    named = {name: getattr(pyro_ebm, name) for name in pyro_ebm.__all__}
    functions = {name: each for name, each in named.items() if inspect.isfunction(each) and name not in WRAPPERS}
    first = {name: next(iter(inspect.signature(each).parameters), "") for name, each in functions.items()}
    running = {name for name in functions if first[name] in ("model", "target", "base", "draws", "objective")}
    running = {name for name in running if not name.startswith("plot_")}
    assert {"sample", "fit", "predictive", "log_normalizer", "to_arviz"} <= running
    missing = [name for name in running if not hasattr(functions[name], "entry")]
    assert not missing and all(hasattr(method, "entry") for method in METHODS)
