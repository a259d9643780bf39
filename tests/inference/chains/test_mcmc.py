"""The runner: Pyro's names and results, thinning, warm-up, seeds, interrupts, bad input, nothing left behind."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import nn

from pyro_ebm import Draws, InferenceError, InferenceWarning, LinearEnergy, LogDensity, tilt
from pyro_ebm.inference.chains import loop as chains_module
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.kernels.hmc import HMC, ChEES
from pyro_ebm.inference.kernels.langevin import MALA, ULA

QUIET = {"seed": 0, "progress": False}
GAUSSIAN = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 2)
KERNELS = {"chees": ChEES, "hmc": HMC, "mala": MALA, "ula": ULA}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, s), obs=y)


Y = torch.tensor([0.5, 1.5, 1.0, 2.0])


def run(kernel=HMC, num_samples=30, warmup_steps=20, num_chains=32, **options):
    mcmc = MCMC(kernel(model), num_samples, warmup_steps, num_chains=num_chains, **{**QUIET, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)  # as short as these are, chains may disagree
        mcmc.run(Y)
    return mcmc


# Pyro's names and results


def test_a_program_for_pyro_runs_after_changing_the_imports():
    """The same call, with Pyro's keywords, in both."""
    results = {}
    for library, kernel in ((pyro.infer, pyro.infer.HMC(model, num_steps=3)), (None, HMC(model, num_steps=3))):
        runner = MCMC if library is None else library.MCMC
        given = {"mu": torch.zeros(()), "s": torch.zeros(())}
        mcmc = runner(
            kernel, num_samples=12, warmup_steps=10, initial_params=given, num_chains=1, disable_progbar=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)
            mcmc.run(Y)
        results[library] = mcmc
    ours, theirs = results[None], results[pyro.infer]
    for options in ({}, {"group_by_chain": True}, {"num_samples": 5}, {"num_samples": 5, "group_by_chain": True}):
        a, b = ours.get_samples(**options), theirs.get_samples(**options)
        assert {site: value.shape for site, value in a.items()} == {site: value.shape for site, value in b.items()}
    a, b = ours.diagnostics(), theirs.diagnostics()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
    assert isinstance(a["divergences"]["chain 0"], list) and isinstance(a["acceptance rate"]["chain 0"], float)


def test_get_samples():
    mcmc = run()
    draws = mcmc._draws
    flat, grouped = mcmc.get_samples(), mcmc.get_samples(group_by_chain=True)
    assert flat["mu"].shape == (32 * 30,) and torch.equal(flat["mu"], draws.flat("mu"))
    assert torch.equal(grouped["s"], draws.values["s"])
    some = mcmc.get_samples(num_samples=7)
    assert some["mu"].shape == (7,) and bool(torch.isin(some["mu"], flat["mu"]).all())
    pairs = {(float(m), float(s)) for m, s in zip(flat["mu"], flat["s"], strict=True)}
    assert all((float(m), float(s)) in pairs for m, s in zip(some["mu"], some["s"], strict=True))
    assert mcmc.get_samples(num_samples=7, group_by_chain=True)["s"].shape == (32, 7)


def test_summary_is_printed(capsys):
    run().summary(prob=0.8)
    text = capsys.readouterr().out
    for part in ("mean", "std", "median", "10.0%", "90.0%", "n_eff", "r_hat", "mu", "s", "Number of divergences: 0"):
        assert part in text


def test_diagnostics_of_each_chain():
    density = LogDensity(lambda u: torch.where(u[..., 0] > 0, -torch.inf, -0.5 * (u**2).sum(-1)), 1)
    mcmc = MCMC(HMC(density, step_size=1.0, adapt_step_size=False), 40, 0, num_chains=3, **QUIET)
    with pytest.warns(InferenceWarning, match="transitions diverged"):
        draws = mcmc.run()
    found = mcmc.diagnostics()
    for i in range(3):
        flags = draws.stats["diverging"][i]
        assert found["divergences"][f"chain {i}"] == [j for j in range(40) if flags[j]]
        assert found["acceptance rate"][f"chain {i}"] == pytest.approx(float(draws.stats["acceptance_rate"][i].mean()))
    assert found["u"]["n_eff"].shape == (1,) and found["u"]["r_hat"].shape == (1,)


def test_before_the_first_run():
    mcmc = MCMC(HMC(model), 5)
    for ask in (mcmc.get_samples, mcmc.summary, mcmc.diagnostics):
        with pytest.raises(RuntimeError, match=r"no draws yet: call run\(\) first"):
            ask()


def test_warm_up_defaults_to_the_number_of_draws():
    assert MCMC(HMC(model), 80).warmup_steps == 80 and MCMC(HMC(model), 5000).warmup_steps == 500


# What is kept


def test_shapes_statistics_and_counts(kernel):
    draws = run(kernel)._draws
    assert isinstance(draws, Draws) and draws.method == kernel(model).name
    assert set(draws.stats) == {"lp", "acceptance_rate", "diverging", "energy", "step_size", "n_steps"}
    assert all(stat.shape == (32, 30) for stat in draws.stats.values())
    density = LogDensity.from_model(model, Y)
    u = density.unconstrain(draws.values)
    torch.testing.assert_close(draws.stats["lp"], density(u), rtol=1e-4, atol=1e-4)
    assert draws.observed.keys() == {"y"} and draws.warmup is None
    assert 0 < draws.sampling_seconds < draws.seconds
    assert draws.notes["init"] == "importance" and draws.notes["warmup_steps"] == 20


def test_gradients_are_counted():
    density = LogDensity(lambda u: -0.5 * (u**2).sum(-1), 1)
    options = {"adapt_step_size": False, "step_size": 0.5, "num_steps": 3}
    draws = MCMC(HMC(density, **options), 10, 7, num_chains=5, thin=2, init="uniform", **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        assert draws.run().num_gradients == 5 * (1 + 3 * (7 + 20))


def test_thinned_draws_are_those_of_the_same_chain():
    one, three = run(num_samples=30)._draws, run(num_samples=10, thin=3)._draws
    assert torch.equal(three.values["mu"], one.values["mu"][:, 2::3])
    assert torch.equal(three.stats["lp"], one.stats["lp"][:, 2::3])
    assert three.num_gradients == one.num_gradients


def test_warm_up_is_kept_on_demand():
    with_, without = run(keep_warmup=True)._draws, run()._draws
    assert with_.warmup.values["mu"].shape == (32, 20) and with_.warmup.stats["lp"].shape == (32, 20)
    assert torch.equal(with_.values["mu"], without.values["mu"])
    assert with_.warmup.stats["step_size"].unique().numel() > 5  # it was adapted
    assert with_.stats["step_size"].unique().numel() == 1


def test_memory_follows_what_is_kept():
    def kept(num_samples, thin):
        chains = chains_module.Chains(
            HMC(GAUSSIAN, num_steps=1), GAUSSIAN, torch.randn(16, 2), generator=torch.Generator().manual_seed(0)
        )
        chains.extend(num_samples, thin=thin)
        record = chains.record
        tensors = [*record.u, *record.log_prob, *(each for info in record.infos for each in info)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(storages.values())

    # 16 chains: 2 coordinates, lp, acceptance and energy of 4 bytes, and a flag
    assert [kept(10, 1), kept(20, 1), kept(10, 5)] == [10 * 16 * 21, 20 * 16 * 21, 10 * 16 * 21]


# Randomness


def test_seeds(kernel, rng_untouched):
    with rng_untouched():
        first, again, other = (run(kernel, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.get_samples(num_samples=9)["mu"], again.get_samples(num_samples=9)["mu"])
    first, again, other = first._draws, again._draws, other._draws
    assert all(torch.equal(first.values[site], again.values[site]) for site in first.values)
    assert all(torch.equal(first.stats[name], again.stats[name]) for name in first.stats)
    assert not torch.equal(first.values["mu"], other.values["mu"])
    assert not torch.equal(first.values["mu"][0], first.values["mu"][1])


def test_the_same_object_draws_the_same_twice():
    mcmc = run()
    first = mcmc._draws
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        assert torch.equal(first.values["mu"], mcmc.run(Y).values["mu"])


def test_generators(rng_untouched):
    with rng_untouched():
        generator = torch.Generator().manual_seed(3)
        first = run(seed=None, generator=generator)
        second = run(seed=None, generator=generator)
        again = run(seed=None, generator=torch.Generator().manual_seed(3))
        first.get_samples(num_samples=3)
    first, second, again = (each._draws.values["mu"] for each in (first, second, again))
    assert torch.equal(first, again) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="seed and generator both given"):
        MCMC(HMC(model), 5, seed=0, generator=generator)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(4)
    first, second = run(seed=None), run(seed=None)
    torch.manual_seed(4)
    again = run(seed=None)
    assert torch.equal(first._draws.values["mu"], again._draws.values["mu"])
    assert not torch.equal(first._draws.values["mu"], second._draws.values["mu"])


# Starting points


def first_points(**options):
    """Where chains start: steps of no length leave them there."""
    kernel = HMC(model, step_size=1e-8, adapt_step_size=False, adapt_mass_matrix=False, num_steps=1)
    mcmc = MCMC(kernel, 1, 0, **{"num_chains": 3, **QUIET, **options})
    return {site: value[:, 0] for site, value in mcmc.run(Y).values.items()}


def test_initial_params_are_unconstrained_as_in_pyro():
    mu, log_s = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0])
    found = first_points(initial_params={"mu": mu, "s": log_s})
    torch.testing.assert_close(found, {"mu": mu, "s": log_s.exp()})
    found = first_points(initial_params=torch.stack([mu, log_s], 1))
    torch.testing.assert_close(found, {"mu": mu, "s": log_s.exp()})
    found = first_points(init={"mu": mu, "s": log_s.exp()})
    torch.testing.assert_close(found, {"mu": mu, "s": log_s.exp()})
    for lead in ((), (1,)):
        found = first_points(initial_params={"mu": torch.full(lead, 2.0), "s": torch.zeros(lead)}, num_chains=1)
        torch.testing.assert_close(found, {"mu": torch.tensor([2.0]), "s": torch.ones(1)})


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(3, 3), r"initial_params must be points of shape \(3, 2\), one row a chain, got \(3, 3\)"),
        ({"mu": torch.zeros(3)}, r"initial_params\['s'\] must have shape \(3,\), unconstrained .*, got nothing"),
        ({"mu": torch.zeros(4), "s": torch.zeros(3)}, r"initial_params\['mu'\] must have shape \(3,\), .*got \(4,\)"),
    ],
)
def test_initial_params_of_the_wrong_shape(given, message):
    with pytest.raises(ValueError, match=message):
        first_points(initial_params=given)


def test_initial_params_of_a_function():
    with pytest.raises(ValueError, match="this target has no sites; give points"):
        MCMC(HMC(GAUSSIAN), 2, 2, initial_params={"z": torch.zeros(3, 2)}, num_chains=3, **QUIET).run()


def test_bad_starts_are_told_before_anything_runs():
    given = torch.zeros(3, 2)
    given[1] = torch.nan
    with pytest.raises(ValueError, match=r'chain\(s\) 1, as given; start elsewhere: init="importance" or init="prior"'):
        first_points(initial_params=given)
    with pytest.raises(ValueError, match=r"init must be one of \('importance', 'prior', 'guide', 'uniform'\)"):
        first_points(init="map")


# Each datum on its own

NOISE = torch.logspace(-2, 2, 50)


def conjugate(x):
    """The posterior of z is normal with precision 1 + 1 / noise^2."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE[: len(x)]), obs=x)


@pytest.mark.parametrize("kernel", [ChEES, HMC, MALA])
def test_each_datum_has_its_own_posterior(kernel):
    x = 2 * torch.randn(50)
    draws = MCMC(kernel(conjugate, independent="data"), 300, 200, num_chains=64, init="prior", **QUIET).run(x)
    assert all(draws.stats[name].shape == (64, 300, 50) for name in ("lp", "acceptance_rate", "diverging", "energy"))
    variance = 1 / (1 + NOISE**-2)
    mean = x * variance / NOISE**2
    z = draws.values["z"].double()
    chain_means, chain_squares = z.mean(1), (z - mean).square().mean(1)
    for per_chain, exact in ((chain_means, mean), (chain_squares, variance)):
        scores = (per_chain.mean(0) - exact) / (per_chain.std(0) / 8)
        assert (scores.abs() < 4.5).all()  # of a hundred
    rates = draws.stats["acceptance_rate"].mean((0, 1))
    assert float(rates.std()) < 0.1 and draws.stats["step_size"][0, 0].shape == (50,)


@pytest.mark.parametrize("kernel", [ChEES, HMC, MALA])
def test_one_bad_datum_does_not_spoil_the_others(kernel):
    """The gradient of datum 2 is NaN: its chains cannot move, the others do not care, and it is named."""

    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            bad = torch.arange(len(x)) == 2
            pyro.factor("f", 0 * torch.where(bad, z * 0, torch.ones(())).sqrt())

    options = {"max_steps": 30} if kernel is not MALA else {}
    mcmc = MCMC(kernel(broken, independent="data", **options), 200, 150, num_chains=64, init="prior", **QUIET)
    with pytest.warns(InferenceWarning, match=r"chain\(s\) 0, 1, .* \(64 in all\) of data 2 accepted nothing"):
        draws = mcmc.run(torch.zeros(8))
    rates = draws.stats["acceptance_rate"].mean((0, 1))
    others = [0, 1, 3, 4, 5, 6, 7]
    assert rates[2] == 0 and (rates[others] > 0.4).all()
    assert draws.std("z")[others].tolist() == pytest.approx([0.5**0.5] * 7, rel=0.06)
    assert (draws.values["z"][:, :, 2] == draws.values["z"][:, :1, 2]).all()
    assert (draws.stats["n_steps"].float().mean()) < 10
    found = mcmc.diagnostics()
    assert found["divergences"]["chain 0"] == list(range(200))


# Trouble


def test_chains_that_reject_everything_are_named():
    def log_prob(u):  # beyond 50 the gradient is NaN
        return (-0.5 * u**2 + 0 * torch.where(u > 50, u * 0, 1.0).sqrt()).sum(-1)

    u = torch.zeros(20, 1)
    u[[4, 11]] = 60.0
    mcmc = MCMC(HMC(LogDensity(log_prob, 1)), 20, 20, initial_params=u, num_chains=20, **QUIET)
    with pytest.warns(InferenceWarning, match=r"chain\(s\) 4, 11 accepted nothing: the step size is too large") as seen:
        mcmc.run()
    assert seen[0].filename == __file__
    with pytest.raises(InferenceError, match=r"chain\(s\) 4, 11 accepted nothing"):
        MCMC(HMC(LogDensity(log_prob, 1)), 20, 20, initial_params=u, num_chains=20, strict=True, **QUIET).run()


def test_chains_that_disagree():
    density = LogDensity(lambda u: torch.logaddexp(-50 * (u - 3) ** 2, -50 * (u + 3) ** 2).sum(-1), 1)
    with pytest.warns(InferenceWarning, match=r"chains disagree \(R-hat .* > 1\.\d+ at u\[0\]\): run longer"):
        MCMC(HMC(density), 50, 50, num_chains=16, **QUIET).run()


def test_an_improper_density():
    with pytest.warns(InferenceWarning):
        kernel = HMC(LogDensity(lambda u: (u**2).sum(-1), 1), step_size=0.1, num_steps=3, adapt_step_size=False)
        draws = MCMC(kernel, 200, 50, num_chains=4, **QUIET).run()
    assert not math.isnan(draws.seconds)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_chains": 0}, "num_chains must be a whole number of at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
        ({"thin": 0}, "thin must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_counts(options, message):
    with pytest.raises(ValueError, match=message):
        MCMC(HMC(model), **{"num_samples": 5, **options})


def test_what_is_no_kernel_is_refused():
    with pytest.raises(TypeError, match="kernel must be one of ChEES, HMC, MALA, ULA of pyro_ebm, or a kernel of Pyro"):
        MCMC(model, 5)


def test_subsampled_plates_are_refused():
    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ValueError, match=r"plate 'data' is subsampled \(2 of 4\): the density would change"):
        MCMC(HMC(subsampled), 5, **QUIET).run(Y)


def test_arguments_for_a_function_are_refused():
    with pytest.raises(ValueError, match="a LogDensity, which takes no arguments"):
        MCMC(HMC(GAUSSIAN), 5, **QUIET).run(Y)


def for_one_chain(y):
    """Indexes from the left: with chains in front, means something else."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0] + 2 * z[1], 1.0), obs=y)


def test_models_for_one_chain_are_named_and_run_under_vmap():
    with pytest.raises(ValueError, match=r"after site 'z'|site 'y' gives other log probabilities"):
        MCMC(HMC(for_one_chain, vectorize="plate"), 5, **QUIET).run(torch.tensor(3.0))
    kernel = ChEES(for_one_chain)
    draws = MCMC(kernel, 200, 100, num_chains=64, **QUIET).run(torch.tensor(3.0))
    # y = z0 + 2 z1 + noise: variance 6, and covariances 1 and 2
    means = draws.values["z"].double().mean(1)
    scores = (means.mean(0) - torch.tensor([0.5, 1.0])) / (means.std(0) / 8)
    assert (scores.abs() < 4).all() and (draws.notes["graph"], draws.notes["vectorize"]) == ("captured", "vmap")
    assert draws.std("z").tolist() == pytest.approx([(5 / 6) ** 0.5, (2 / 6) ** 0.5], rel=0.05)


# Ctrl-C


class Interrupting:
    """A density that is interrupted after some calls."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, u):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return -0.5 * (u**2).sum(-1)


def interrupted(calls, **options):
    kernel = HMC(LogDensity(Interrupting(calls), 1), step_size=1.0, num_steps=1)
    return MCMC(kernel, 100, 20, num_chains=8, capture=False, **QUIET, **options).run()


def test_interrupted_while_drawing_keeps_the_draws():
    with pytest.warns(InferenceWarning, match=r"interrupted: kept 8 chain\(s\) of \d+ draws"):
        draws = interrupted(70)
    assert 20 < draws.num_draws < 60 and draws.notes["interrupted"]
    assert all(stat.shape[:2] == (8, draws.num_draws) for stat in draws.stats.values())


def test_interrupted_in_the_middle_of_keeping_a_draw():
    record = chains_module.Record()
    chains = chains_module.Chains(HMC(GAUSSIAN), GAUSSIAN, torch.randn(4, 2), generator=torch.Generator())
    chains.extend(5)
    record = chains.record
    record.u.append(record.u[0])
    record.log_prob.append(record.log_prob[0])
    record.infos.append(record.infos[0])
    draws = chains.draws(seconds=1.0, notes={})
    assert draws.values["u"].shape == (4, 5, 2) and draws.stats["energy"].shape == (4, 5)


def test_interrupted_during_the_warm_up():
    with pytest.raises(KeyboardInterrupt, match="interrupted during the warm-up: there are no draws yet"):
        interrupted(10)


# Nothing left behind


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)
        self.layer.bias.requires_grad_(False)

    def model(self):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", self.drop(self.layer(z)).sum(-1))


@pytest.mark.parametrize("interrupt", [False, True])
def test_modules_are_as_they_were(interrupt, monkeypatch):
    network, energy = Network(), LinearEnergy([0.5, 0.5])
    network.drop.eval()
    mcmc = MCMC(HMC(tilt(network.model, {"z": energy})), 60, 20, num_chains=32, **QUIET)
    if interrupt:
        monkeypatch.setattr(chains_module.Adaptation, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mcmc.run()
    else:
        draws = mcmc.run()
        assert not any(value.requires_grad for value in [*draws.values.values(), *draws.stats.values()])
    assert network.training and network.layer.training and not network.drop.training
    assert network.layer.weight.requires_grad and not network.layer.bias.requires_grad and energy.a.requires_grad
    assert network.layer.weight.grad is None and energy.a.grad is None
    assert torch.is_grad_enabled()


def test_bounds_that_are_learned_leave_no_graph_in_the_draws():
    high = nn.Parameter(torch.tensor(2.0))

    def bounded():
        pyro.sample("z", dist.Uniform(0.0, high))

    draws = MCMC(HMC(bounded), 60, 50, num_chains=32, **QUIET).run()
    assert not draws.values["z"].requires_grad and high.requires_grad


def test_the_progress_bar_shows_what_happens(capsys):
    MCMC(HMC(GAUSSIAN), 50, 50, num_chains=16, seed=0).run()
    text = capsys.readouterr().err
    assert "batched_hmc" in text and "100/100" in text
    MCMC(HMC(GAUSSIAN), 50, 50, num_chains=16, **QUIET).run()
    assert capsys.readouterr().err == ""
