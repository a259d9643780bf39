"""A density with a value and no gradient, by every method that moves by gradients: refused at once, with the site."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine

from pyro_ebm import (
    HMC,
    MCMC,
    ULA,
    ChEES,
    InferenceError,
    LogDensity,
    annealed_importance,
    noncentered,
    pyro_hmc,
    pyro_nuts,
    sample,
)

Y = torch.tensor([1.0, 1.5, torch.nan, 1.5])
SEEN = ~Y.isnan()


def under_a_handler():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def on_the_distribution():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(SEEN), obs=Y)


def by_obs_mask():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=SEEN)


def in_a_branch():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(mu > 100, (mu - 101).sqrt(), -(mu**2)))


def root_at_zero():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", -(0 * mu).square().sqrt())


MODELS = {
    under_a_handler: r"observed site\(s\) \['y'\] hold NaN",
    on_the_distribution: r"observed site\(s\) \['y'\] hold NaN",
    by_obs_mask: r"observed site\(s\) \['y_observed'\] hold NaN",
    in_a_branch: r"site\(s\) \['mu'\]: look for a torch.where",
    root_at_zero: r"site\(s\) \['mu'\]: look for .*sqrt\(\) or norm\(\) at 0",
}


def by_hand(model):
    HMC(model).setup(10)


def by_stock(model):
    MCMC(infer.NUTS(model), 10, 10, progress=False).run()


METHODS = {
    **{name: lambda model, name=name: sample(model, method=name, progress=False) for name in (
        "chees", "mala", "ula", "nuts", "hmc", "smc")},
    "batched hmc": lambda model: MCMC(HMC(model), 10, 10, progress=False).run(),
    "ais": lambda model: annealed_importance(model, progress=False),
    "pyro_nuts": lambda model: pyro_nuts(model, progress=False),
    "pyro_hmc": lambda model: pyro_hmc(model, progress=False),
    "by hand": by_hand,
    "stock": by_stock,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_needs_the_gradient_names_where_it_is_none(method):
    for model in MODELS if method in ("chees", "stock") else (under_a_handler, in_a_branch):
        said = MODELS[model].replace(r"site\(s\) \['mu'\]: ", "") if method == "stock" else MODELS[model]
        with pytest.raises(ValueError, match=said):
            METHODS[method](model)


def test_the_site_is_named_of_a_noncentered_model_too():
    with pytest.raises(ValueError, match=MODELS[under_a_handler]):
        sample(noncentered(under_a_handler), method="chees", progress=False)


def test_what_needs_no_gradient_gives_the_answer():
    draws = sample(under_a_handler, method="snis", progress=False, seed=0)
    assert float(draws.mean("mu")) == pytest.approx(1.0, abs=4 * 0.5 / 400**0.5)


def test_a_few_chains_that_start_where_numbers_overflow_do_not_stop_the_others():
    def softplus(u):  # by hand: beyond 88 the branch that is not chosen overflows
        return -(0.5 * u.square() + 0 * torch.where(u > 20, u, u.exp().log1p())).sum(-1)

    starts = torch.randn(64, 1)
    starts[3] = 100.0
    draws = MCMC(ChEES(LogDensity(softplus, 1)), 50, 60, initial_params=starts, num_chains=64, progress=False).run()
    assert draws.notes["rescued"] == 1 and float(draws.values["u"].abs().max()) < 10


@pytest.mark.parametrize("kernel", [ChEES, ULA])
@pytest.mark.parametrize("cause", ["jumps", "is lost in the rounding"])
def test_a_step_size_that_falls_to_nothing_ends_the_warm_up_with_its_cause(kernel, cause):
    def jumps(u):
        return 1e3 * (1e9 * u).sin().detach().sum(-1) - 0.5 * u.square().sum(-1)

    def rounded(u):
        return -1e9 - 1e3 * u.square().sum(-1)

    density, said = (jumps, "it jumps") if cause == "jumps" else (rounded, "lost in the rounding of float32")
    options = {"max_steps": 50} if kernel is ChEES else {}
    mcmc = MCMC(kernel(LogDensity(density, 2), **options), 10, 500, num_chains=16, progress=False)
    with pytest.raises(InferenceError, match=rf"the step size fell to .* ended: .*{said}"):
        mcmc.run()
