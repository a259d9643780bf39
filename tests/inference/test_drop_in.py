"""Programs for Pyro's MCMC, with the imports changed and nothing else, give known answers within Monte Carlo error."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer.autoguide import init_to_median, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample

from pyro_ebm import HMC, MCMC, InferenceWarning, sample
from pyro_ebm import ChEES as NUTS
from pyro_ebm.inference.density.capture import captured
from pyro_ebm.structure import DoesNotBroadcast

OURS = pytest.mark.parametrize("kernel", [HMC, NUTS])


def scores(draws, site, expected):
    """Deviations of the mean from the known one, in standard errors over the independent chains."""
    means = draws.values[site].double().mean(1)
    return (means.mean(0) - torch.as_tensor(expected).double()) / (means.std(0) / len(means) ** 0.5)


def agrees(draws, site, expected):
    return bool((scores(draws, site, expected).abs() < 4.5).all())


def run(kernel, *args, num_samples=100, warmup_steps=100, **options):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


class GaussianChain:
    """loc_i ~ N(loc_{i-1}, 1), and data ~ N(loc_n, 1), all of them ones."""

    def __init__(self, length, num_obs):
        self.length, self.num_obs = length, num_obs

    def model(self, data):
        loc = torch.zeros(3)
        for i in range(self.length):
            loc = pyro.sample(f"loc_{i}", dist.Normal(loc, torch.ones(3)))
        pyro.sample("obs", dist.Normal(loc, torch.ones(3)), obs=data)

    def known(self):
        """Posterior means of the chain: a Gaussian with a tridiagonal precision."""
        n = self.length
        precision = 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
        precision[-1, -1] = 1 + self.num_obs
        target = torch.zeros(n)
        target[-1] = self.num_obs
        return torch.linalg.solve(precision.double(), target.double())


@pytest.mark.parametrize(
    "kernel",
    [lambda m: HMC(m, step_size=0.3, num_steps=5), NUTS, lambda m: NUTS(m, full_mass=True)],
    ids=["hmc", "nuts", "full"],
)
@pytest.mark.parametrize(("length", "num_obs"), [(3, 1), (2, 100)])
def test_conjugate_gaussian_chain(kernel, length, num_obs):
    chain = GaussianChain(length, num_obs)
    draws = run(kernel(chain.model), torch.ones(num_obs, 3)).draws
    for i, mean in enumerate(chain.known()):
        assert agrees(draws, f"loc_{i}", mean.expand(3))


@OURS
def test_logistic_regression_by_a_product(kernel):
    """``x @ beta`` does not broadcast over chains: torch.vmap does it. The known answer is a grid's."""
    x = torch.randn(50, 1)
    y = dist.Bernoulli(logits=1.5 * x[:, 0]).sample()

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(1), torch.ones(1)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    draws = run(kernel(model), x, y).draws
    grid = torch.linspace(-4, 8, 4001).double()
    log = -0.5 * grid**2 + dist.Bernoulli(logits=x.double() * grid).log_prob(y[:, None].double()).sum(0)
    assert draws.notes["vectorize"] == "vmap"
    assert agrees(draws, "beta", (grid * log.softmax(0)).sum()[None])


@OURS
def test_gamma_precision(kernel):
    data = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7])

    def model(data):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor([2.0]), torch.tensor([3.0])))
        pyro.sample("obs", dist.Normal(0.0, precision ** -0.5).expand([5]).to_event(1), obs=data)

    draws = run(kernel(model), data).draws
    assert agrees(draws, "precision", [(2 + 2.5) / (3 + float(data.square().sum()) / 2)])


@OURS
def test_beta_bernoulli(kernel):
    data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])

    def model(data):
        p = pyro.sample("p", dist.Beta(torch.tensor([1.1, 1.1]), torch.tensor([1.1, 1.1])))
        with pyro.plate("data", data.shape[0], dim=-2):
            pyro.sample("obs", dist.Bernoulli(p), obs=data)

    draws = run(kernel(model, max_plate_nesting=2), data).draws
    assert agrees(draws, "p", [(1.1 + 3) / 6.2, (1.1 + 1) / 6.2])


@OURS
def test_dirichlet_categorical(kernel):
    def model(data):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("obs", dist.Categorical(p), obs=data)

    draws = run(kernel(model), torch.tensor([0, 1, 1, 1, 2, 1, 0])).draws
    assert agrees(draws, "p", [0.3, 0.5, 0.2])


@OURS
def test_mixture_whose_assignments_are_summed_out(kernel):
    """The weight of two known components, against a grid; assignments are enumerated as in Pyro."""
    data = torch.tensor([-1.0, 0.2, 3.1, 2.0, 0.4, -0.3, 4.2])
    locs = torch.tensor([0.0, 3.0])

    def model(data):
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(torch.stack([1 - weight, weight], -1)))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=data)

    draws = run(kernel(model, max_plate_nesting=1), data).draws
    grid = torch.linspace(0.0005, 0.9995, 2000).double()
    each = dist.Normal(locs.double()[:, None], 1.0).log_prob(data.double()).exp()
    log = grid.log() + (1 - grid).log() + ((1 - grid)[:, None] * each[0] + grid[:, None] * each[1]).log().sum(1)
    assert set(draws.values) == {"weight"}
    assert agrees(draws, "weight", (grid * log.softmax(0)).sum())


def test_hidden_markov_model():
    """Two states, one unknown probability of staying: against a grid over the forward algorithm."""
    data = torch.tensor([0.1, -0.4, 2.2, 1.8, 2.5, 0.3, 2.1])

    def model(data):
        stay = pyro.sample("stay", dist.Beta(1.0, 1.0))
        table = torch.stack([torch.stack([stay, 1 - stay], -1), torch.stack([1 - stay, stay], -1)], -2)
        x = torch.tensor(0)
        for t in pyro.markov(range(len(data))):
            x = pyro.sample(f"x_{t}", dist.Categorical(table[x]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(2.0 * x, 1.0), obs=data[t])

    draws = run(HMC(model, max_plate_nesting=0), data).draws
    grid = torch.linspace(0.0005, 0.9995, 1000).double()
    table = torch.stack([torch.stack([grid, 1 - grid], -1), torch.stack([1 - grid, grid], -1)], -2)
    state = torch.tensor([1.0, 0.0]).double().expand(len(grid), 2)
    for y in data.double():
        emission = dist.Normal(torch.tensor([0.0, 2.0]).double(), 1.0).log_prob(y).exp()
        state = torch.einsum("gi,gij->gj", state, table) * emission
    weights = state.sum(1) / state.sum()
    assert agrees(draws, "stay", (grid * weights).sum())


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)
        return mean


@OURS
def test_regression_by_a_pyro_module(kernel):
    x = torch.linspace(-1, 1, 20)[:, None]
    y = 2 * x[:, 0] + 0.3 * torch.randn(20)
    draws = run(kernel(Regression()), x, y).draws
    design = torch.cat([x, torch.ones(20, 1)], 1).double()
    precision = design.T @ design / 0.25 + torch.diag(torch.tensor([1.0, 0.01]).double())
    mean = torch.linalg.solve(precision, design.T @ y.double() / 0.25)
    assert draws.notes["graph"] == "captured"
    assert agrees(draws, "linear.weight", mean[:1, None]) and agrees(draws, "linear.bias", mean[1:])


@pytest.mark.parametrize("num_chains", [None, 1, 16])
@OURS
def test_potential_fn(kernel, num_chains):
    """A potential of one chain's values; without a word on chains there is one, as in Pyro."""

    def potential(params):
        return 0.5 * ((params["z"] - 5.0) ** 2).sum() + 0.5 * ((params["w"] / 3) ** 2).sum()

    lead = () if num_chains in (None, 1) else (num_chains,)
    start = {"z": torch.randn(*lead, 2), "w": torch.randn(lead)}
    made = kernel(potential_fn=potential)
    mcmc = run(made, num_samples=300, initial_params=start, num_chains=num_chains)
    assert mcmc.get_samples(group_by_chain=True)["z"].shape == (num_chains or 1, 300, 2)
    assert set(made.inverse_mass_matrix) == {("w", "z")}
    if lead:
        assert agrees(mcmc.draws, "z", [5.0, 5.0]) and agrees(mcmc.draws, "w", 0.0)


def test_potential_of_a_model_with_its_transforms():
    def model(data):
        pyro.sample("obs", dist.Poisson(pyro.sample("rate", dist.Gamma(2.0, 1.0))), obs=data)

    data = torch.tensor([3.0, 4.0])
    initial, potential, transforms, _ = initialize_model(model, model_args=(data,), num_chains=16)
    mcmc = run(HMC(potential_fn=potential, transforms=transforms), initial_params=initial, num_chains=16)
    assert agrees(mcmc.draws, "rate", (2 + 7) / (1 + 2)) and mcmc.transforms is not None


def test_potential_that_cannot_be_vectorized_runs_one_chain_after_another():
    def potential(params):
        return 0.5 * params["z"] ** 2 if params["z"].item() > -100 else params["z"] * math.inf

    mcmc = run(HMC(potential_fn=potential), num_samples=3, initial_params={"z": torch.randn(4)}, num_chains=4)
    assert mcmc.draws.notes["vectorize"] == "loop"


def linear(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_data_of_another_dtype_than_the_prior(kernel):
    x = np.linspace(-1.0, 1.0, 30)
    y = 2 * x + np.sin(7 * x)
    draws = run(kernel(linear), torch.from_numpy(x), torch.from_numpy(y)).draws
    assert draws.values["slope"].dtype == draws.stats["lp"].dtype == torch.float32
    assert agrees(draws, "slope", (x @ y) / (x @ x + 1))


def test_the_length_stays_while_the_step_size_adapts():
    draws = run(HMC(GaussianChain(9, 1).model, step_size=0.2, num_steps=15), torch.ones(1, 3), num_samples=3).draws
    assert draws.notes["trajectory_length"] == pytest.approx(3.0)
    assert float(draws.stats["n_steps"][0, 0] * draws.stats["step_size"][0, 0]) == pytest.approx(3.0, rel=0.25)
    fixed = HMC(GaussianChain(2, 1).model, step_size=0.2, num_steps=7, adapt_step_size=False)
    draws = run(fixed, torch.ones(1, 3), num_samples=3).draws
    assert draws.stats["n_steps"].eq(7).all() and draws.notes["step_size"] == pytest.approx(0.2)


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("kernel", [HMC, NUTS, infer.HMC])
def test_a_model_without_sites_runs(kernel, num_chains, capsys):
    """As in Pyro: nothing moves, the hook is called, there are no samples."""
    start, potential, transforms, _ = initialize_model(lambda: torch.tensor(1), num_chains=num_chains)
    seen = []

    def hook(kernel, params, stage, index):
        assert params == {}
        seen.append((stage, index))

    made = kernel(potential_fn=potential, transforms=transforms)
    mcmc = run(made, num_samples=4, warmup_steps=2, initial_params=start, num_chains=num_chains, hook_fn=hook)
    assert mcmc.get_samples() == mcmc.get_samples(2) == {}
    assert (mcmc.draws.num_chains, mcmc.draws.num_draws) == (num_chains, 4)
    steps = [("Warmup", 0), ("Warmup", 1), *(("Sample", index) for index in range(4))]
    assert seen == steps or (num_chains, len(seen)) == (2, 12)
    mcmc.summary()
    assert f"= {4 * num_chains} draws by" in capsys.readouterr().out
    assert repr(mcmc.draws).endswith("draws, {})") and mcmc.draws._repr_html_()


@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_a_model_whose_sites_are_all_observed_runs(kernel):
    """What collapse_conjugate leaves, say; sample() has nothing to return of it."""

    def model(data):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)

    mcmc = run(kernel(model), torch.tensor(0.5), num_samples=4, warmup_steps=2)
    assert mcmc.get_samples() == {} and mcmc.draws.num_draws == 4
    assert torch.allclose(mcmc.draws.stats["lp"], dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
    with pytest.raises(ValueError, match="no latent sample sites"):
        sample(model, torch.tensor(0.5), method="chees", progress=False)


# Pyro's own kernels, as they are


def branching(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z.item() > -50 else 2.0
    pyro.sample("obs", dist.Normal(z, scale), obs=data)


def test_pyros_own_kernel_serves_what_cannot_be_batched():
    data = torch.tensor(2.0)
    with pytest.raises(DoesNotBroadcast) as caught:
        run(HMC(branching), data)
    assert "MCMC(pyro.infer.NUTS(model)" in "".join(caught.value.__notes__) and "method=" not in str(caught.value)
    mcmc = run(infer.NUTS(branching), data, num_samples=200, seed=0, num_chains=2)
    draws = mcmc.draws
    assert (draws.method, draws.num_chains, draws.num_draws) == ("nuts", 2, 200)
    assert draws.mean("z").item() == pytest.approx(1.0, abs=5 * 0.5**0.5 / 100**0.5)
    assert set(mcmc.diagnostics()) == {"z", "divergences", "acceptance rate"}
    assert float(draws.stats["n_steps"].float().mean()) > 1 and draws.observed["obs"] == 2.0


def test_pyros_own_kernel_has_one_chain_and_draws_again():
    kernel = infer.HMC(linear, step_size=0.5, num_steps=3)
    x = torch.ones(3)
    first, again = (run(kernel, x, x, num_samples=12, warmup_steps=5, seed=1).draws for _ in range(2))
    assert first.num_chains == 1 and torch.equal(first.values["slope"], again.values["slope"])
    with pytest.raises(ValueError, match="init=, thin= are for the batched kernels"):
        MCMC(kernel, 5, init="prior", thin=2)


# Pyro's keywords


def eight_sites(data):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        y = pyro.sample("y", dist.LogNormal(x, 1.0))
        pyro.sample("obs", dist.Normal(y, 1.0), obs=data)


DATA = torch.ones(2)


FEW = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # after a few steps chains disagree


@FEW
@pytest.mark.parametrize("kernel", [HMC, NUTS, infer.NUTS])
def test_hook_and_saved_sites(kernel):
    seen = []

    def hook(kernel, params, stage, i):
        seen.append((stage, i, {name: tuple(value.shape) for name, value in params.items()}))

    mcmc = run(kernel(eight_sites), DATA, num_samples=3, warmup_steps=2, num_chains=1, hook_fn=hook, save_params=["y"])
    assert [entry[:2] for entry in seen] == [("Warmup", 0), ("Warmup", 1), ("Sample", 0), ("Sample", 1), ("Sample", 2)]
    assert seen[-1][2] == {"x": (), "y": (2,)}
    assert set(mcmc.get_samples()) == {"y"} and mcmc.get_samples()["y"].shape == (3, 2)


@FEW
def test_hook_of_many_chains():
    shapes = []
    options = {"num_samples": 2, "warmup_steps": 1, "num_chains": 5}
    run(HMC(eight_sites), DATA, hook_fn=lambda k, params, stage, i: shapes.append(params["y"].shape), **options)
    assert shapes == [(5, 2)] * 3
    with pytest.raises(ValueError, match=r"save_params names the site\(s\) \['z'\]; the latent sites are \['x', 'y'\]"):
        run(HMC(eight_sites), DATA, save_params=["z"])


@OURS
def test_what_a_run_leaves_on_its_kernel(kernel):
    made = kernel(eight_sites, target_accept_prob=0.9)
    mcmc = run(made, DATA, num_samples=3, seed=0)
    assert made.model is eight_sites and isinstance(made.step_size, float) and made.given_step_size is None
    assert {names: value.shape for names, value in made.inverse_mass_matrix.items()} == {("x", "y"): (3,)}
    assert mcmc.transforms["y"](torch.ones(2)).tolist() == [0.0, 0.0]
    assert made.initial_params["y"].shape == (64, 2)
    again = run(made, DATA, num_samples=3, seed=0)  # begins from what was given, not from what was found
    assert torch.equal(again.draws.values["x"], mcmc.draws.values["x"])


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")  # three draws from one point
def test_starting_points_by_strategy():
    made = HMC(eight_sites, init_strategy=init_to_value(values={"x": torch.tensor(0.7), "y": torch.full((2,), 2.0)}))
    run(made, DATA, num_samples=3, warmup_steps=2)
    assert made.initial_params["x"].eq(0.7).all()
    torch.testing.assert_close(made.initial_params["y"], torch.full((64, 2), math.log(2.0)))
    assert run(HMC(eight_sites), DATA, num_samples=3, init=init_to_median).draws.notes["init"]


def test_transforms_of_the_users():
    """Another way to the positive numbers moves the chains; the answer is the same."""
    softplus = torch.distributions.transforms.SoftplusTransform().inv
    mcmc = run(HMC(eight_sites), DATA, transforms={"y": softplus}, num_chains=16, num_samples=3)
    start = mcmc.kernel.initial_params["y"]
    torch.testing.assert_close(mcmc.transforms["y"].inv(start), torch.nn.functional.softplus(start))

    def model():
        pyro.sample("y", dist.Gamma(3.0, 1.0))

    assert agrees(run(HMC(model, transforms={"y": softplus})).draws, "y", 3.0)


@pytest.mark.parametrize(
    "options", [{"jit_compile": True}, {"max_tree_depth": 5}, {"use_multinomial_sampling": False, "jit_options": {}}]
)
def test_what_means_nothing_in_a_batch_warns_once(options):
    with pytest.warns(UserWarning, match=f"NUTS|ChEES ignores {', '.join(sorted(options)[:1])}") as caught:
        NUTS(eight_sites, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    NUTS(eight_sites, ignore_jit_warnings=False, max_tree_depth=10)


def test_arguments_of_the_runner_that_mean_nothing():
    with pytest.warns(UserWarning, match=r"MCMC ignores mp_context='spawn' .*, disable_validation=False"):
        MCMC(HMC(eight_sites), 5, mp_context="spawn", disable_validation=False)


@pytest.mark.parametrize(
    ("name", "ours"), [("num_warmup", "warmup_steps="), ("progress_bar", "progress="), ("thinning", "thin=")]
)
def test_arguments_of_numpyro_are_named(name, ours):
    with pytest.raises(TypeError, match=f"argument '{name}'; NumPyro's {name} is {ours} here"):
        MCMC(HMC(eight_sites), num_samples=5, **{name: 1})
    with pytest.raises(TypeError, match="argument 'num_sample'$"):
        MCMC(HMC(eight_sites), num_samples=5, num_sample=1)


def test_initial_params_of_unknown_sites():
    with pytest.raises(ValueError, match=r"initial_params has the unknown site\(s\) \['typo'\]; the latent sites are"):
        run(HMC(eight_sites), DATA, initial_params={"x": torch.tensor(0.0), "y": torch.zeros(2), "typo": DATA})
    single = run(HMC(eight_sites), DATA, num_samples=3, initial_params={"x": torch.tensor(0.0), "y": torch.zeros(2)})
    assert single.num_chains == 1


@FEW
def test_summary_says_how_many_and_agrees_with_diagnostics(capsys):
    mcmc = run(HMC(eight_sites), DATA, num_samples=30)
    mcmc.summary()
    lines = capsys.readouterr().out.splitlines()
    expected = "64 chains x 30 draws = 1,920 draws by batched_hmc (chains as an outer plate, graph captured)"
    assert lines[0] == expected and lines[2].split() == "mean std median 5.0% 95.0% n_eff r_hat".split()
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in lines[3:6]}
    found = mcmc.diagnostics()
    assert set(rows) == {"x", "y[0]", "y[1]"}
    assert rows["y[1]"][-2:] == pytest.approx([float(found["y"]["n_eff"][1]), float(found["y"]["r_hat"][1])], abs=0.006)
    assert rows["x"][0] == pytest.approx(float(mcmc.draws.mean("x")), abs=0.006)
    assert mcmc.get_samples(500)["y"].shape == (500, 2)


# A single chain moved by hand


@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_one_chain_by_hand(kernel):
    made = kernel(potential_fn=lambda params: 0.5 * ((params["z"] - 5.0) ** 2).sum())
    params = made.initial_params = {"z": torch.tensor(0.0)}
    made.setup(100)
    draws = []
    for index in range(500):
        params = made(params)
        if index >= 100:
            draws.append(params["z"])
        if index == 300:
            made.clear_cache()
    assert torch.stack(draws).mean().item() == pytest.approx(5.0, abs=0.5)
    assert made.step_size > 0


@pytest.mark.parametrize("made", [torch.linalg.cholesky, torch.inverse])
def test_a_singular_matrix_is_not_accepted(made):
    """As in Pyro: what torch cannot factorize has no density, and the other chains go on."""
    hmc = HMC(potential_fn=lambda z: made(z["cov"]).sum(), adapt_step_size=False, num_steps=2, step_size=1e-3)
    hmc.initial_params = {"cov": torch.eye(3)}
    hmc.setup(warmup_steps=0)
    moved = hmc.sample(hmc.initial_params)
    assert not torch.equal(moved["cov"], torch.eye(3))
    assert torch.equal(hmc.sample({"cov": torch.ones(3, 3)})["cov"], torch.ones(3, 3))
    function = captured(lambda u: (made(u.reshape(-1, 2, 2)).sum((1, 2)), u), torch.eye(2).expand(3, 2, 2).flatten(1))
    good = torch.eye(2).expand(3, 2, 2).flatten(1)
    bad = torch.where(torch.tensor([False, True, False])[:, None], torch.ones(4), good)
    assert function(good)[0].tolist() == [2.0, 2.0, 2.0]
    assert function(bad)[0].isnan().tolist() == [False, True, False]


def test_a_single_chain_starts_where_the_strategy_says():
    strategy = init_to_value(values={"x": torch.tensor(math.e)})
    made = NUTS(lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)), init_strategy=strategy)
    made.setup(warmup_steps=10)
    assert float(made.initial_params["x"]) == pytest.approx(1.0)


def test_warnings_of_a_short_run_are_those_of_the_chains():
    with pytest.warns(InferenceWarning, match="chains disagree"):
        run(HMC(GaussianChain(9, 1).model, step_size=1e-3, num_steps=1, adapt_step_size=False), torch.ones(1, 3))
