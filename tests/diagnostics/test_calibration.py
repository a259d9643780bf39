"""Calibration: exact samplers pass at the nominal rate, wrong ones are caught, and nothing goes by unsaid."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ebm.diagnostics.calibration import calibrate
from pyro_ebm.energies import LinearEnergy
from pyro_ebm.errors import InferenceError, InferenceWarning
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import importance
from pyro_ebm.tilts.tilt import TiltedModel, tilt

Sampler = Callable[..., Draws]
run = functools.partial(calibrate, seed=0, progress=False)


def model(y: Tensor | None = None) -> None:
    """One mean ~ N(0, 1), four data ~ N(mean, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def hard_coded() -> None:
    model(torch.zeros(4))


def data_of(conditioned: Callable[..., Any], *args: Any) -> Tensor:
    return pyro.poutine.trace(conditioned).get_trace(*args).nodes["y"]["value"]


def exact(
    conditioned: Callable[..., Any],
    *args: Any,
    seed: int,
    shift: float = 0.0,
    scale: float = 1.0,
    prior_mean: float = 0.0,
    num: int = 200,
) -> Draws:
    """N((m + sum y) / 5, 1 / 5), equally weighted; or what is asked for instead."""
    y = data_of(conditioned, *args)
    posterior = dist.Normal((prior_mean + y.sum()) / 5 + shift, scale / math.sqrt(5))
    return equally_weighted(mu=posterior.sample((1, num)))


def equally_weighted(**values: Tensor) -> Draws:
    lead = next(iter(values.values())).shape[:2]
    return Draws(values, "exact", log_weights=torch.full(lead, -math.log(lead.numel())))


def ignores_data(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
    return equally_weighted(mu=torch.randn(1, 200))


def from_prior(conditioned: Callable[..., Any], *args: Any, seed: int, forget: bool = False) -> Draws:
    """Weighted draws of the prior."""
    y, mu = data_of(conditioned, *args), torch.randn(1, 2000)
    log_weights = dist.Normal(mu[..., None], 1.0).log_prob(y).sum(-1)
    weights = torch.zeros_like(mu) if forget else log_weights
    return Draws({"mu": mu}, "snis", log_weights=weights - weights.logsumexp(-1, keepdim=True))


def slow_chain(conditioned: Callable[..., Any], *args: Any, seed: int, rho: float = 0.8) -> Draws:
    """Two autocorrelated chains of the exact posterior."""
    y = data_of(conditioned, *args)
    steps = [torch.randn(2)]
    for noise in math.sqrt(1 - rho**2) * torch.randn(499, 2):
        steps.append(rho * steps[-1] + noise)
    return Draws({"mu": y.sum() / 5 + torch.stack(steps, 1) / math.sqrt(5)}, "chain")


def test_an_exact_sampler_is_rejected_at_the_nominal_rate() -> None:
    def many() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(25), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(25))

    def sampler(conditioned: Callable[..., Any], *, seed: int) -> Draws:
        x = pyro.poutine.trace(conditioned).get_trace().nodes["x"]["value"]
        return equally_weighted(z=(x / 2 + math.sqrt(0.5) * torch.randn(1, 100, 25)))

    p = torch.tensor(
        [
            list(run(many, sampler=sampler, num_simulations=40, num_draws=19, seed=seed).p_values.values())
            for seed in range(5)
        ]
    )[:, :25].flatten()
    for level in (0.05, 0.2, 0.5):
        se = math.sqrt(level * (1 - level) / len(p))
        rate = float((p <= level).double().mean())
        assert level - 5 * se < rate < level + 4 * se  # discrete: on the low side


@pytest.mark.parametrize("sampler", [exact, from_prior, slow_chain])
def test_correct_samplers_pass(sampler: Sampler) -> None:
    found = run(model, torch.zeros(4), sampler=sampler, num_simulations=25, num_draws=49)
    assert list(found.ranks) == ["mu", "log_likelihood"]
    assert found.verdict(prob=0.999) == "ok"
    assert found.num_simulations == 25
    assert found.failures == {}
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (functools.partial(exact, shift=0.3), "mu: draws too high"),
        (functools.partial(exact, shift=-0.3), "mu: draws too low"),
        (functools.partial(exact, scale=0.5), "mu: draws too narrow"),
        (functools.partial(exact, scale=2.0), "mu: draws too wide"),
        (ignores_data, "log_likelihood: draws too low"),
        (functools.partial(from_prior, forget=True), "log_likelihood: draws too low"),
    ],
)
def test_wrong_samplers_are_caught(sampler: Sampler, words: str) -> None:
    found = run(model, torch.zeros(4), sampler=sampler, num_simulations=100)
    assert words in found.verdict(prob=0.999)


def test_a_latent_site_alone_does_not_expose_a_sampler_that_ignores_the_data() -> None:
    found = run(model, torch.zeros(4), sampler=ignores_data, num_simulations=100)
    assert found.p_values["mu"] > 0.01


def test_autocorrelated_draws_are_thinned() -> None:
    found = run(model, torch.zeros(4), sampler=slow_chain, num_simulations=10, num_draws=99)
    assert int(found.kept.min()) < 99  # 1,000 draws worth about 110
    assert int(found.kept.min()) > 50


class TestData:
    """How simulated data get into the model, whichever way the model is written."""

    def simulated(self, given: Callable[..., None], *args: Any, **options: Any) -> list[Tensor]:
        seen = []

        def sampler(conditioned: Callable[..., Any], *args: Any, seed: int, **kwargs: Any) -> Draws:
            seen.append((data_of(conditioned, *args, **kwargs) if not kwargs else None, args, kwargs))
            return ignores_data(conditioned, seed=seed)

        run(given, *args, sampler=sampler, num_simulations=3, num_draws=9, **options)
        return seen

    @pytest.mark.parametrize(
        ("given", "args", "options"),
        [(model, (torch.zeros(4),), {}), (model, (), {"observed": ["y"]}), (hard_coded, (), {})],
    )
    def test_all_ways_give_the_same_calibration(
        self, given: Callable[..., None], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        reference = run(model, torch.ones(4), sampler=exact, num_simulations=10)
        found = run(given, *args, sampler=exact, num_simulations=10, **options)
        assert all(torch.equal(found.ranks[name], ranks) for name, ranks in reference.ranks.items())

    def test_an_argument_that_is_observed_is_replaced(self) -> None:
        seen = self.simulated(model, torch.zeros(4))
        for value, args, _ in seen:
            assert torch.equal(args[0], value)
            assert not torch.equal(value, torch.zeros(4))
        assert not torch.equal(seen[0][0], seen[1][0])

    def test_a_keyword_argument_is_replaced_and_others_are_kept(self) -> None:
        covariate = torch.zeros(4)  # equal to the data in value, but no data

        def regression(x: Tensor, y: Tensor | None = None) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 4):
                pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)

        for _, args, kwargs in self.simulated(regression, covariate, y=torch.zeros(4)):
            assert args[0] is covariate
            assert not torch.equal(kwargs["y"], torch.zeros(4))

    def test_a_guide_sees_the_simulated_data(self) -> None:
        def guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(y.sum() / 5, 1.3 / math.sqrt(5)))

        def sampler(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            return importance(conditioned, guide, *args, num_samples=400, seed=seed)

        found = run(model, torch.zeros(4), sampler=sampler, num_simulations=30)
        assert found.verdict(0.999) == "ok"
        assert int(found.kept.min()) == 99  # near the posterior of the simulated data, so the weights are too

    def test_without_data_the_prior_is_tested(self) -> None:
        def prior() -> None:
            pyro.sample("mu", dist.Normal(0.0, 1.0))

        right = run(prior, sampler=ignores_data, num_simulations=60)
        assert list(right.ranks) == ["mu"]
        assert right.verdict(0.999) == "ok"

        def wide(conditioned: Callable[..., Any], *, seed: int) -> Draws:
            return equally_weighted(mu=2 * torch.randn(1, 200))

        assert run(prior, sampler=wide, num_simulations=60).verdict() == "mu: draws too wide"


class TestTilt:
    tilted = staticmethod(tilt(model, {"mu": LinearEnergy(torch.tensor(1.5))}))

    def test_data_are_simulated_from_the_tilt(self) -> None:
        sampler = functools.partial(exact, prior_mean=1.5)
        found = run(self.tilted, torch.zeros(4), sampler=sampler, num_simulations=100)
        assert found.verdict(0.999) == "ok"

    def test_a_sampler_of_the_untilted_posterior_is_caught(self) -> None:
        found = run(self.tilted, torch.zeros(4), sampler=exact, num_simulations=100)
        assert "mu: draws too low" in found.verdict(0.999)

    def test_simulated_data_do_not_repeat(self) -> None:
        seen = []

        def sampler(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            seen.append(tuple(args[0].tolist()))
            return ignores_data(conditioned, seed=seed)

        run(self.tilted, torch.zeros(4), sampler=sampler, num_simulations=100, num_draws=9)
        assert len(set(seen)) >= 97

    def test_the_sampler_gets_a_tilted_model(self) -> None:
        def wide_guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(1.0, 2.0))

        def sampler(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            assert isinstance(conditioned, TiltedModel)
            return importance(conditioned, wide_guide, *args, num_samples=2000, seed=seed)

        found = run(self.tilted, torch.zeros(4), sampler=sampler, num_simulations=60, num_draws=49)
        assert found.verdict(0.999) == "ok"


class TestQuantities:
    def test_log_likelihood_is_that_of_the_data_given_the_draws(self) -> None:
        def own(values: dict[str, Tensor]) -> Tensor:
            return dist.Normal(values["mu"][:, None], 1.0).log_prob(values["y"]).sum(-1)

        found = run(
            model, torch.zeros(4), sampler=exact, num_simulations=20, quantities={"own": own}
        )
        same = (found.ranks["own"] - found.ranks["log_likelihood"]).abs()
        assert int(same.max()) <= 1  # rounding, and ties of draws that were resampled twice

    def test_components_are_named_and_constant_ones_left_out(self) -> None:
        def correlated() -> None:
            pyro.sample("L", dist.LKJCholesky(2, 1.0))

        def sampler(conditioned: Callable[..., Any], *, seed: int) -> Draws:
            return equally_weighted(L=dist.LKJCholesky(2, 1.0).sample((1, 50)))

        found = run(correlated, sampler=sampler, num_simulations=5, num_draws=9)
        assert list(found.ranks) == ["L[1, 0]", "L[1, 1]"]

    def test_sites_that_the_sampler_sums_out_are_left_out(self) -> None:
        def mixture() -> None:
            k = pyro.sample("k", dist.Bernoulli(0.5))
            mu = pyro.sample("mu", dist.Normal(k, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(()))

        found = run(mixture, sampler=ignores_data, num_simulations=3, num_draws=9)
        assert list(found.ranks) == ["mu"]

    def test_ties_are_broken_at_random(self) -> None:
        def coin() -> None:
            pyro.sample("k", dist.Bernoulli(0.3))

        def sampler(conditioned: Callable[..., Any], *, seed: int) -> Draws:
            return equally_weighted(k=dist.Bernoulli(0.3).sample((1, 200)))

        found = run(coin, sampler=sampler, num_simulations=150)
        assert found.verdict(0.999) == "ok"
        assert len(found.ranks["k"].unique()) > 40

    @pytest.mark.parametrize(
        "quantities", [{"q": lambda v: v["mu"].sum()}, {"mu": lambda v: v["mu"]}, {"q": lambda v: v["y"]}]
    )
    def test_bad_quantities(self, quantities: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"must have a name of its own and return one number per draw"):
            run(model, torch.zeros(4), sampler=exact, num_simulations=2, quantities=quantities)


class TestDrawsKept:
    def test_few_draws_give_coarse_ranks_on_the_same_scale(self) -> None:
        few = functools.partial(exact, num=10)
        with pytest.warns(InferenceWarning, match=r"ranked among 10 draws in the median and not 99"):
            found = run(model, torch.zeros(4), sampler=few, num_simulations=100)
        assert set(found.kept.tolist()) == {10}
        assert int(found.ranks["mu"].max()) > 90
        assert found.verdict(0.999) == "ok"

    def test_weights_on_one_draw_keep_one(self) -> None:
        def collapsed(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            weights = torch.full((1, 100), -math.inf)
            weights[0, 7] = 0.0
            return Draws({"mu": torch.randn(1, 100)}, "snis", log_weights=weights)

        with pytest.warns(InferenceWarning, match="ranked among 1 draws"):
            found = run(model, torch.zeros(4), sampler=collapsed, num_simulations=4, num_draws=9)
        assert set(found.kept.tolist()) == {1}

    def test_a_stuck_sampler_is_caught(self) -> None:
        def stuck(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            return Draws({"mu": torch.full((4, 50), 0.3)}, "stuck")

        with pytest.warns(InferenceWarning, match="ranked among 4 draws"):
            found = run(model, torch.zeros(4), sampler=stuck, num_simulations=100)
        assert "mu: draws too narrow" in found.verdict(0.999)


class TestSeeds:
    def test_a_seed_gives_the_same_ranks_twice_and_leaves_the_global_generator(
        self, rng_untouched: Callable[[], Any]
    ) -> None:
        with rng_untouched():
            first, second, other = (
                run(model, torch.zeros(4), sampler=exact, num_simulations=8, seed=seed) for seed in (1, 1, 2)
            )
        assert torch.equal(first.ranks["mu"], second.ranks["mu"])
        assert not torch.equal(first.ranks["mu"], other.ranks["mu"])

    def test_without_a_seed_runs_differ_and_follow_the_global_generator(self) -> None:
        def ranks() -> Tensor:
            return run(model, torch.zeros(4), sampler=exact, num_simulations=8, seed=None).ranks["mu"]

        state = torch.get_rng_state()
        first, second = ranks(), ranks()
        torch.set_rng_state(state)
        assert torch.equal(first, ranks())
        assert not torch.equal(first, second)

    def test_samplers_get_a_seed_of_their_own_each_time(self) -> None:
        seeds = []

        def sampler(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
            seeds.append(seed)
            return exact(conditioned, *args, seed=seed)

        run(model, torch.zeros(4), sampler=sampler, num_simulations=6, num_draws=9)
        assert len(set(seeds)) == 6
        assert all(0 <= seed < 2**31 for seed in seeds)


def on_call(number: int, action: Callable[[], Draws | None]) -> Sampler:
    """The exact sampler, but for one call."""
    calls = []

    def sampler(conditioned: Callable[..., Any], *args: Any, seed: int) -> Draws:
        calls.append(seed)
        special = action() if len(calls) == number else None
        return exact(conditioned, *args, seed=seed) if special is None else special

    return sampler


def fail() -> None:
    raise RuntimeError("singular matrix")


def interrupt() -> None:
    raise KeyboardInterrupt


class TestTrouble:
    def test_a_failure_is_recorded_and_said(self) -> None:
        with pytest.warns(InferenceWarning, match=r"1 simulations failed .* \(simulation 2: RuntimeError: singular"):
            found = run(model, torch.zeros(4), sampler=on_call(3, fail), num_simulations=5, num_draws=9)
        assert found.failures == {2: "RuntimeError: singular matrix"}
        assert found.num_simulations == 4

    def test_the_other_simulations_are_what_they_would_have_been(self) -> None:
        whole = run(model, torch.zeros(4), sampler=exact, num_simulations=5)
        with pytest.warns(InferenceWarning, match="failed"):
            partial = run(model, torch.zeros(4), sampler=on_call(3, fail), num_simulations=5)
        assert torch.equal(partial.ranks["mu"], whole.ranks["mu"][[0, 1, 3, 4]])

    @pytest.mark.parametrize(
        ("draws", "message"),
        [
            (Draws({"mu": torch.full((1, 50), math.nan)}, "bad"), "values of mu, log_likelihood are not finite"),
            (
                Draws({"mu": torch.zeros(1, 50)}, "bad", log_weights=torch.full((1, 50), math.nan)),
                "the weights are not finite",
            ),
        ],
    )
    def test_draws_that_are_not_finite_are_a_failure(self, draws: Draws, message: str) -> None:
        with pytest.warns(InferenceWarning, match="1 simulations failed"):
            found = run(model, torch.zeros(4), sampler=on_call(2, lambda: draws), num_simulations=4, num_draws=9)
        assert found.failures == {1: message}

    def test_a_sampler_that_never_works_is_an_error(self) -> None:
        calls = []

        def broken(conditioned: Callable[..., Any], *args: Any) -> Draws:
            calls.append(1)
            return exact(conditioned, seed=0)

        with pytest.raises(InferenceError, match=r"each of the first 5 simulations; simulation 0: TypeError.*seed"):
            run(model, torch.zeros(4), sampler=broken, num_simulations=100)
        with pytest.raises(InferenceError, match=r"each of the first 2 simulations"):
            run(model, torch.zeros(4), sampler=broken, num_simulations=2)

    def test_warnings_of_the_sampler_are_collected(self) -> None:
        def worried(number: int) -> Sampler:
            return on_call(number, lambda: warnings.warn("k = 0.9 > 0.7", InferenceWarning, stacklevel=1))

        with pytest.warns(InferenceWarning) as caught:
            found = run(model, torch.zeros(4), sampler=worried(2), num_simulations=4, num_draws=9)
        assert len(caught) == 1
        assert "the sampler warned in 1 simulations (simulation 1: k = 0.9 > 0.7)" in str(caught[0].message)
        assert found.warned == {1: "k = 0.9 > 0.7"}

    def test_other_warnings_pass(self) -> None:
        sampler = on_call(2, lambda: warnings.warn("something else", DeprecationWarning, stacklevel=1))
        with pytest.warns(DeprecationWarning, match="something else"):
            run(model, torch.zeros(4), sampler=sampler, num_simulations=3, num_draws=9)

    def test_an_interruption_returns_the_simulations_so_far(self) -> None:
        with pytest.warns(InferenceWarning, match="interrupted after 3 simulations"):
            found = run(model, torch.zeros(4), sampler=on_call(4, interrupt), num_simulations=50)
        assert found.interrupted
        assert found.num_simulations == 3
        whole = run(model, torch.zeros(4), sampler=exact, num_simulations=50)
        assert torch.equal(found.ranks["mu"], whole.ranks["mu"][:3])

    def test_an_interruption_before_the_first_is_passed_on(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(model, torch.zeros(4), sampler=on_call(1, interrupt), num_simulations=5)

    def test_an_interruption_that_the_sampler_answers_ends_the_run_too(self) -> None:
        stopped = Draws({"mu": torch.randn(4, 100)}, "nuts", notes={"interrupted": True})
        with pytest.warns(InferenceWarning, match="interrupted after 2 simulations"):
            found = run(
                model, torch.zeros(4), sampler=on_call(2, lambda: stopped), num_simulations=50, num_draws=9
            )
        assert found.num_simulations == 2


class TestBadInput:
    @pytest.mark.parametrize("option", ["num_simulations", "num_draws"])
    def test_counts(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1, got 0"):
            run(model, torch.zeros(4), sampler=exact, **{option: 0})

    def test_sampler(self) -> None:
        with pytest.raises(TypeError, match=r"sampler must be callable as sampler\(model"):
            run(model, torch.zeros(4), sampler="nuts")
        with pytest.raises(TypeError, match="sampler must return Draws, got dict"):
            run(model, torch.zeros(4), sampler=lambda m, *a, seed: {"mu": torch.zeros(5)})

    @pytest.mark.parametrize("values", [{"z": torch.zeros(1, 9)}, {"mu": torch.zeros(1, 9, 2)}])
    def test_draws_that_do_not_fit_the_model(self, values: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=r"draws of the model's latent sites \{'mu': \(\)\}, got Draws"):
            run(model, torch.zeros(4), sampler=lambda m, *a, seed: Draws(values, "x"))

    @pytest.mark.parametrize("observed", [["x"], "y"])
    def test_observed(self, observed: Any) -> None:
        match = r"observed must be a (list of the model's sites \['mu', 'y'\]|sequence of names, got 'y')"
        with pytest.raises((ValueError, TypeError), match=match):
            run(model, sampler=exact, observed=observed)

    def test_nothing_latent(self) -> None:
        with pytest.raises(ValueError, match="no latent sample sites: there is nothing to rank"):
            run(model, torch.zeros(4), sampler=exact, observed=["mu"])

    def test_quantities(self) -> None:
        with pytest.raises(TypeError, match="quantities must be a mapping"):
            run(model, torch.zeros(4), sampler=exact, quantities=[len])
