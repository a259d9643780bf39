"""The method that chooses: what it keeps, what it tries next, and what it says about it."""

from __future__ import annotations

import math
import types

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    InferenceError,
    InferenceWarning,
    InputError,
    LinearEnergy,
    compare,
    importance,
    pyro_nuts,
    sample,
    tilt,
    to_arviz,
)
from pyro_ebm.chain_statistics import ess_bulk, r_hat
from pyro_ebm.deadline import OutOfTime
from pyro_ebm.inference import auto, until
from pyro_ebm.inference.importance import weighed

pytestmark = pytest.mark.filterwarnings("ignore:.*chains disagree:pyro_ebm.InferenceWarning")
QUIET = {"seed": 0, "progress": False}
FAR = torch.full((30,), 6 / 30**0.5)


def prior(dim):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    return model


def tilted(*a):
    return tilt(prior(len(a)), {"z": LinearEnergy(list(a))})


def scores(y, *, noise=0.5):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        pyro.sample("y", dist.Normal(z, noise), obs=y)


@pytest.fixture
def small(monkeypatch):
    """Fewer particles and a shorter warm-up, where only the road taken matters."""
    monkeypatch.setattr(auto, "_PARTICLES", 128)
    monkeypatch.setattr(auto, "_WARMUP", 40)
    monkeypatch.setattr(auto, "_CHAINS", 16)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The clock of auto.py and until.py, which stands still: no road depends on how busy the machine is."""
    now = types.SimpleNamespace(seconds=0.0, pace=0.0)

    def tick():
        now.seconds += now.pace
        return now.seconds

    fake = types.SimpleNamespace(perf_counter=tick)
    monkeypatch.setattr(auto, "time", fake)
    monkeypatch.setattr(until, "time", fake)
    monkeypatch.setattr("pyro_ebm.inference.sample.time", fake)
    monkeypatch.setattr("pyro_ebm.deadline.time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


@pytest.fixture(scope="module")
def far():
    """A target that importance sampling cannot reach, of which everything is known."""
    with torch.random.fork_rng(devices=[]):
        return sample(tilted(*FAR.tolist()), max_seconds=3600.0, **{**QUIET, "seed": 1})


def steps(draws):
    assert all(isinstance(step, str) and "\n" not in step for step in draws.notes["auto"])
    return draws.notes["auto"]


def test_importance_sampling_is_kept_where_it_is_good_enough():
    draws = sample(tilted(0.8, 0.0), ess=500, **QUIET)
    assert draws.method == "snis" and draws.notes["stopped"] == "target"
    assert draws.pareto_k < 0.5 and draws.notes["ess"] >= 500
    (step,) = steps(draws)
    assert step.startswith(f"snis: Pareto k {draws.pareto_k:.2f}, ESS {draws.notes['ess']:.0f} of 2000 draws: kept")
    same = importance(tilted(0.8, 0.0), num_samples=2000, seed=0)
    assert torch.equal(draws.values["z"], same.values["z"])
    assert abs(float(draws.log_z.value) - 0.32) < 4 * float(draws.log_z.se)
    assert sample(tilted(0.8, 0.0), **QUIET).notes["target_ess"] == 1000  # the default


def test_what_comes_after_bad_weights(far):
    assert far.method == "chees" and far.log_weights is None and far.num_chains == 64
    first, second, third = steps(far)
    assert first.startswith("snis: Pareto k ") and first.endswith("not kept (k >= 0.5)")
    assert second.startswith("smc: 4 islands of 512 particles, ") and "log Z 1" in second
    assert third.startswith(f"chees: 64 chains of {far.num_draws} draws from the particles; bulk ESS ")
    assert third.endswith("as asked for") and far.notes["stopped"] == "target" and far.notes["init"] == "given"


def test_the_answer_is_right(far):
    values = far.values["z"].double()
    sizes, hats = torch.as_tensor(ess_bulk(values)), torch.as_tensor(r_hat(values))
    assert sizes.min() >= 1000 and hats.max() <= far.notes["r_hat_limit"] < 1.05  # chains of few draws
    error = (values.flatten(0, 1).mean(0) - FAR) * sizes.sqrt()
    assert error.abs().max() < 4 and error.square().mean() < 2
    variance = values.flatten(0, 1).var(0)
    assert ((variance - 1).abs() < 4 * (2 / sizes.clamp(max=5000)).sqrt()).all()
    assert abs(float(far.log_z.value) - 18.0) < 5 * max(float(far.log_z.se), 0.02)  # |a|^2 / 2; 4 islands


def test_the_result_goes_everywhere(far):
    easy = sample(tilted(*[0.05] * 30), **QUIET)
    assert easy.method == "snis"
    table = compare({"far": far, "easy": easy})
    assert list(table["verdict"]) == ["ok", "ok"]
    assert table.loc["far", "log_z"] == pytest.approx(float(far.log_z.value))
    tree = to_arviz(far)
    assert tree["posterior"]["z"].shape == (64, far.num_draws, 30)
    assert "as asked for" in tree["posterior"].attrs["notes"]


def test_smc_counts(far):
    """Gradients and seconds are those of all that was run."""
    chains = far.num_chains * int(far.stats["n_steps"][0].sum())
    warm_up = 64 * auto._WARMUP
    assert far.num_gradients > chains + warm_up + 13 * 2048
    assert far.seconds > far.sampling_seconds > 0


def test_good_weights_that_are_too_few(small, clock):
    """Their k is fine, and 300 draws are all that is allowed."""
    with pytest.warns(InferenceWarning, match="chees: stopped by num_samples=30 with bulk ESS"):
        draws = sample(tilted(1.0, 0.0), ess=5000, num_samples=30, num_chains=10, **QUIET)
    first, _, third = steps(draws)
    assert " of 300 draws: not kept (ESS < 5000)" in first
    assert third.startswith("chees: 10 chains of 30 draws") and third.endswith("no more draws allowed")
    assert draws.num_draws == 30 and draws.num_chains == 10 and draws.notes["stopped"] == "num_samples"
    with pytest.raises(InferenceError, match="chees: "):
        sample(tilted(1.0, 0.0), ess=5000, num_samples=30, num_chains=10, strict=True, **QUIET)


def test_importance_sampling_has_a_quarter_of_the_time(small, clock, monkeypatch):
    def slowly(*args, num_samples, **kwargs):
        found = weighed(*args, num_samples=num_samples, **kwargs)
        clock.seconds += num_samples / 4000
        return found

    monkeypatch.setattr(until, "weighed", slowly)
    draws = sample(tilted(1.2, 0.0), ess=7000, max_seconds=20.0, num_chains=64, **QUIET)
    assert " of 16000 draws: not kept (ESS < 7000)" in steps(draws)[0] and draws.method == "chees"
    assert clock.seconds == pytest.approx(5.0)


def test_weights_of_middling_quality_are_not_drawn_again_and_again(small, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["num_samples"])
        return weighed(*args, **kwargs)

    monkeypatch.setattr(until, "weighed", counted)
    draws = sample(tilted(2.0, 0.0), ess=4000, **QUIET)
    assert calls == [4000] and draws.method == "chees" and "not kept (k >= 0.5)" in steps(draws)[0]


def test_independent_data(small):
    y = torch.linspace(-2.0, 2.0, 5)
    draws = sample(scores, y, independent="data", ess=300, model_kwargs={"noise": 1.0}, **QUIET)
    assert steps(draws)[0] == "snis: not tried (one set of weights cannot serve all of independent='data')"
    assert draws.stats["acceptance_rate"].shape == (16, draws.num_draws, 5) and draws.log_z.value.shape == (5,)
    exact = dist.Normal(torch.zeros(5), 2.0**0.5).log_prob(y)
    assert ((draws.log_z.value - exact).abs() < 6 * draws.log_z.se.clamp(min=0.02)).all()
    error = (draws.mean("z") - y / 2) * (2 * torch.as_tensor(ess_bulk(draws.values["z"]))).sqrt()
    assert error.abs().max() < 4
    assert compare({"auto": draws}).loc["auto", "chains"] == 16 and "posterior" in to_arviz(draws)


@pytest.mark.parametrize("given, found", [(None, 12), (9, 9)])
def test_chains_each_for_many_data(small, monkeypatch, given, found):
    monkeypatch.setattr(auto, "_POINTS", 36)  # in all
    draws = sample(scores, torch.zeros(3), independent="data", ess=50, num_chains=given, **QUIET)
    assert draws.num_chains == found


def test_vmap(small):
    draws = sample(sums, ess=300, **QUIET)
    assert steps(draws)[0].startswith("snis: Pareto k") and draws.method == "chees"
    assert ((draws.mean("z") - 2.0).abs() < 4 / draws.notes["ess"] ** 0.5).all()


def discrete():
    c = pyro.sample("c", dist.Bernoulli(0.5))
    z = pyro.sample("z", dist.Normal(3 * c, 1.0))
    pyro.sample("y", dist.Normal(z, 0.02), obs=torch.tensor(2.5))


def sums():
    """A sum over chains too, which no error betrays: all weights become equal."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("f", (2 * z).sum())


def branches():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0] if z[1] > 0 else z[0] + 0.5, 0.02), obs=torch.tensor(2.5))


SHORT = {"num_samples": 12, "num_chains": 2, "ess": 20, **QUIET}


@pytest.mark.filterwarnings("ignore:nuts. stopped by num_samples:pyro_ebm.InferenceWarning")
@pytest.mark.filterwarnings("ignore:auto. batched chains. not possible:pyro_ebm.InferenceWarning")
def test_models_for_chains_one_by_one(monkeypatch):
    seen = {}

    def short(*args, **kwargs):
        seen.update(kwargs)
        return pyro_nuts(*args, warmup_steps=10, **kwargs)

    monkeypatch.setattr(auto, "pyro_nuts", short)
    draws = sample(branches, **SHORT)
    assert draws.method == "nuts" and draws.num_chains == 2 and draws.num_draws == 12
    told = steps(draws)
    assert told[0].startswith("snis: Pareto k") and "Pyro's NUTS instead" in told[1]
    assert "batched chains: not possible (the model does not broadcast: in an outer" in told[1]
    assert told[2].startswith("nuts: 2 chains of 12 draws from importance starts; bulk ESS ")
    assert draws.notes["stopped"] in ("target", "num_samples") and draws.notes["target_ess"] == 20
    assert seen["seed"] == 0 and not seen["progress"] and seen["guide"] is None


@pytest.mark.slow
def test_discrete_sites_are_summed_out_of_batched_chains(small):
    draws = sample(discrete, ess=300, **QUIET)
    assert steps(draws)[0].startswith("snis: Pareto k") and draws.method == "chees" and list(draws.values) == ["z"]
    assert abs(float(draws.mean("z")) - 2.5) < 0.01  # the datum's error is .02


def test_nuts_that_falls_short_says_so(monkeypatch):
    monkeypatch.setattr(auto, "pyro_nuts", lambda *args, **kwargs: pyro_nuts(*args, warmup_steps=10, **kwargs))
    with (
        pytest.warns(InferenceWarning, match="nuts: stopped by num_samples=12 with bulk ESS"),
        pytest.warns(InferenceWarning, match="auto: batched chains: not possible .*; Pyro's NUTS draws one "),
    ):
        sample(branches, **{**SHORT, "ess": 1e6})
    with pytest.raises(InferenceError, match="nuts: "), pytest.warns(InferenceWarning, match="Pyro's NUTS"):
        sample(branches, strict=True, **{**SHORT, "ess": 1e6})


def test_discrete_sites_and_good_weights():
    """Importance sampling needs no gradient."""

    def model():
        c = pyro.sample("c", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(c, 2.0), obs=torch.tensor(2.5))

    draws = sample(model, ess=100, **QUIET)
    assert draws.method == "snis" and set(draws.values) == {"c"}


@pytest.mark.parametrize("trouble", [InferenceError("stuck at inverse temperature 0.1"), None])
def test_smc_that_fails(small, monkeypatch, trouble):
    """The chains start as chains without SMC do; doubts of an SMC that does not fail are told."""

    def failing(self, *args, **kwargs):
        raise trouble

    if trouble:
        monkeypatch.setattr(auto.SMC, "run", failing)
    else:
        monkeypatch.setattr("pyro_ebm.inference.annealing.smc._MAX_SE", 0.0)
    draws = sample(tilted(2.5, 0.0), ess=200, **QUIET)
    _, second, third = steps(draws)
    if trouble:
        assert second == "smc: failed (stuck at inverse temperature 0.1)"
        assert "from importance starts" in third and draws.log_z is None
    else:
        assert second.startswith("smc: 4 islands") and "; but log Z is uncertain by" in second
        assert "from the particles" in third
    assert draws.method == "chees" and draws.notes["stopped"] == "target"


@pytest.mark.parametrize("pace, step", [(0.2, "smc: 4 islands of "), (10.0, "smc: not tried (about ")])
def test_an_smc_that_would_take_too_long(small, clock, monkeypatch, pace, step):
    """One evaluation of all particles tells: with 0.2 s there is time for some, with 10 s for none."""
    value_and_grad = auto.LogDensity.value_and_grad

    def slowly(self, u):
        clock.seconds += pace * len(u) / 512
        return value_and_grad(self, u)

    monkeypatch.setattr(auto.LogDensity, "value_and_grad", slowly)
    draws = sample(tilted(2.5, 0.0), ess=100, num_chains=16, max_seconds=100.0, **QUIET)
    second = steps(draws)[1]
    assert second.startswith(step)
    if pace < 1:
        assert 64 <= int(second.split()[4]) < 128


def test_the_time_allowed_ends_the_chains(small, clock, monkeypatch):
    extend = until.Chains.extend

    def slowly(self, num_draws, *, thin=1):
        extend(self, num_draws, thin=thin)
        clock.seconds += num_draws
        self.sampling_seconds = float(len(self.record))

    monkeypatch.setattr(until.Chains, "extend", slowly)
    with pytest.warns(InferenceWarning, match="chees: stopped by max_seconds=70 with bulk ESS"):
        draws = sample(tilted(2.5, 0.0), ess=1e6, max_seconds=70.0, **QUIET)
    assert steps(draws)[-1].endswith(": no time left") and draws.num_draws == 70 == draws.seconds


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    pyro.factor("modes", torch.stack([-((z - 6) ** 2).sum(-1) / 2, -((z + 6) ** 2).sum(-1) / 2 + 1]).logsumexp(0))


@pytest.mark.parametrize("doubts", [False, True])
def test_chains_that_stay_apart_give_way_to_the_particles(monkeypatch, doubts):
    """No chain leaves its mode: what the particles know of the shares, with more of them, is the answer."""
    monkeypatch.setattr(auto, "_CHAINS", 16)
    monkeypatch.setattr(auto, "_MORE", 2)
    monkeypatch.setattr("pyro_ebm.inference.annealing.smc._MAX_SE", 0.0 if doubts else 0.5)
    if doubts:
        with pytest.warns(InferenceWarning, match="chees: stopped by num_samples=300 with bulk ESS"):
            draws = sample(two_modes, num_samples=300, **QUIET)
        assert draws.method == "chees" and steps(draws)[-1].endswith("no more draws allowed")
        return
    draws = sample(two_modes, strict=True, **QUIET)
    assert draws.method == "smc" and draws.notes["stopped"] == "apart" and draws.notes["ess"] >= 1000
    _, smc, chees, particles = steps(draws)
    assert "4 islands of 512 particles" in smc and chees.endswith(": apart") and "4 islands of 1024" in particles
    share = float(draws.weights[draws.flat("z")[:, 0] < 0].sum())
    assert abs(share - 1 / (1 + math.exp(-1))) < 0.1  # 4,096 particles, those of an island not independent
    assert float(draws.log_z.se) < 0.2


def test_ctrl_c(small, monkeypatch):
    count = until.Chains._count

    def interrupting(self, info, phase):
        count(self, info, phase)
        if phase == "draws" and len(self.record) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(until.Chains, "_count", interrupting)
    with pytest.warns(InferenceWarning, match="interrupted: kept 16"):
        draws = sample(tilted(2.5, 0.0), ess=1e5, **QUIET)
    assert draws.num_draws == 20 and steps(draws)[-1].endswith(": interrupted") and draws.log_z is not None


def test_seeds(small, rng_untouched):
    with rng_untouched():
        first, again, other = (
            sample(tilted(2.5), ess=50, progress=False, seed=seed) for seed in (1, 1, 2)
        )
    assert torch.equal(first.values["z"], again.values["z"]) and not torch.equal(first.values["z"], other.values["z"])
    assert first.notes["auto"] == again.notes["auto"]


def test_without_a_seed(small):
    first, second = (sample(tilted(0.5), ess=100, progress=False) for _ in range(2))
    assert not torch.equal(first.values["z"], second.values["z"])


def test_a_guide_helps_everywhere(small):
    def near():
        pyro.sample("z", dist.Normal(torch.tensor([4.0, 0.0]), 1.1).to_event(1))

    draws = sample(tilted(4.0, 0.0), guide=near, ess=1000, **QUIET)
    assert draws.method == "snis" and draws.notes["proposal"] == "guide"

    def useless():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide does not propose"):
        sample(tilted(4.0, 0.0), guide=useless, **QUIET)


def test_mistakes_of_the_model_are_its_own(small):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        sample(scores, **QUIET)
    with pytest.raises(ValueError, match="independent='rows' is not a plate"):
        sample(scores, torch.zeros(3), independent="rows", **QUIET)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("snis", ZeroDivisionError),
        ("smc", torch.linalg.LinAlgError),
        ("chees", NotImplementedError),
        ("chees", RuntimeError),
    ],
)
@pytest.mark.filterwarnings("ignore:auto. chees. failed:pyro_ebm.InferenceWarning")
@pytest.mark.filterwarnings("ignore:(nuts|chees). :pyro_ebm.InferenceWarning")
def test_no_exception_of_a_method_escapes(small, monkeypatch, method, error):
    def failing(*args, **kwargs):
        raise error("no luck today")

    where = {"snis": "importance_until", "smc": "SMC.run", "chees": "run_until"}[method]
    monkeypatch.setattr(f"pyro_ebm.inference.auto.{where}", failing)
    monkeypatch.setattr(auto, "pyro_nuts", lambda *args, **kwargs: pyro_nuts(*args, warmup_steps=10, **kwargs))
    draws = sample(tilted(2.5, 0.0), num_samples=20, num_chains=4, ess=10, **QUIET)
    assert any(f"{error.__name__}: no luck today" in step for step in steps(draws))
    assert draws.method == {"snis": "chees", "smc": "chees", "chees": "nuts"}[method]


def mean_of(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2 if len(y) == 4 else None) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def rate_of(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def elsewhere(y):
    pyro.sample("nu", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "y", "options", "message"),
    [
        (mean_of, torch.zeros(4), {}, "plate 'data' is subsampled"),
        (mean_of, torch.tensor([0.0, math.nan, 1.0]), {}, "the data of site 'y' hold NaN in 1 of 3 numbers"),
        (rate_of, torch.tensor([1.0, -1.0, 2.0]), {}, "1 of 3 data of site 'y' lie outside the support of Exponential"),
        (mean_of, torch.zeros(3), {"guide": elsewhere}, r"guide does not propose the latent site\(s\) \['mu'\]"),
    ],
)
def test_what_is_wrong_with_the_call_is_no_reason_to_try_another_method(monkeypatch, model, y, options, message):
    monkeypatch.setattr("pyro_ebm.inference.auto.SMC", None)
    with pytest.raises(InputError, match=message):
        sample(model, y, **options, **QUIET)


def share_of(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Beta(a, 2.0), obs=y)


@pytest.mark.parametrize("method", ["auto", "snis", "chees", "smc", "nuts"])
@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (mean_of, torch.tensor([0.0, math.nan, 1.0]), "the data of site 'y' hold NaN in 1 of 3 numbers"),
        (rate_of, torch.tensor([1.0, -1.0, 2.0]), "1 of 3 data of site 'y' lie outside the support of Exponential"),
        (share_of, torch.tensor([0.0, 0.3, 1.0]), "2 of 3 data of site 'y' lie outside the support of Beta, 0 < y < 1"),
    ],
)
def test_data_without_density_are_named_by_every_method(method, model, y, message):
    with pytest.raises(InputError, match=message):
        sample(model, y, method=method, **QUIET)


@pytest.mark.parametrize("model, y", [(mean_of, torch.zeros(4)), (rate_of, torch.tensor([1.0, -1.0, 2.0]))])
def test_pyros_own_kernels_are_no_way_around(model, y):
    with pytest.raises(InputError, match="is subsampled|lie outside the support"):
        MCMC(pyro.infer.NUTS(model), 5, 5, num_chains=1, progress=False).run(y)


def test_data_at_which_a_model_may_have_density_pass():
    """Masked ones, gray images as Bernoulli's, and numbers outside of a support that moves."""

    def model(y):
        top = pyro.sample("top", dist.LogNormal(1.0, 0.3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top).mask(False), obs=y)
            pyro.sample("gray", dist.Bernoulli(0.4, validate_args=False), obs=y.clamp(0, 1))
            pyro.sample("seen", dist.Exponential(1.0).mask(y > 0), obs=y)

    draws = sample(model, torch.tensor([-1.0, 0.5, 9.0]), ess=100, **QUIET)
    assert draws.method == "snis"


def test_weights_are_returned_where_nothing_else_can_run():
    def counts():
        rate = pyro.sample("rate", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(rate, 0.1), obs=torch.tensor(9.0))

    told = "auto: chains: not possible .*'rate' is discrete.* importance sampling alone gave draws"
    with pytest.warns(InferenceWarning, match=told):
        draws = sample(counts, ess=1e7, num_samples=100, **QUIET)
    assert draws.method == "snis" and float(draws.mean("rate")) == 9.0


@pytest.mark.parametrize("where", ["LogDensity.from_model", "_smc", "run_until"])
def test_weights_are_returned_where_there_is_no_time_for_more(small, monkeypatch, where):
    def late(*args, **kwargs):
        raise OutOfTime("on 3 steps of warm-up")

    monkeypatch.setattr(f"pyro_ebm.inference.auto.{where}", late)
    told = r"auto: chains: no time left for draws \(on 3 steps of warm-up\); importance sampling alone gave draws"
    with pytest.warns(InferenceWarning, match=told):
        draws = sample(tilted(2.5, 0.0), **QUIET)
    assert draws.method == "snis" and steps(draws)[-1].endswith("the weighted draws are all there is")
