"""Every ELBO of Pyro: trained and validated by fit, or refused by name; guides that make their parameters late."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm import CheckpointError, fit, load_weights, log_likelihood, save_weights

WIDE = {"vectorize_particles": True, "max_plate_nesting": 1}
ELBOS = {
    "Trace_ELBO": {}, "TraceGraph_ELBO": {}, "TraceMeanField_ELBO": {}, "RenyiELBO": {"num_particles": 2},
    "TraceEnum_ELBO": {"max_plate_nesting": 1}, "TraceTMC_ELBO": {"max_plate_nesting": 1},
    "EnergyDistance": {"num_particles": 2},
    "ReweightedWakeSleep": {"num_particles": 2, **WIDE},
}  # fmt: skip


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.shift = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def model(self, x, observations=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, observations=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.7))


@pytest.mark.filterwarnings("ignore:.*ound no sample sites configured for enumeration")
@pytest.mark.parametrize("name", ELBOS)
def test_trained_and_validated(name):
    pair, x = Pair(), 1.0 + torch.randn(40)
    objective = getattr(pyro.infer, name)(**ELBOS[name])
    result = fit(pair.model, pair.guide, x, objective=objective, epochs=2, seed=0, progress=False)
    assert len(result.validation_loss) == len(result.train_loss) == 2
    assert float(pair.loc.detach()) != 0 or float(pair.shift.detach()) != 0  # some train one of the two only


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["JitTrace_ELBO", "JitTraceEnum_ELBO", "JitTraceGraph_ELBO"])
def test_what_torch_jit_compiles_is_refused(name):
    pair = Pair()
    with pytest.raises(TypeError, match=f"objective is a {name}, which compiles with torch.jit .* use Trace"):
        fit(pair.model, pair.guide, torch.randn(5), objective=getattr(pyro.infer, name)(), progress=False)


def test_an_enumerated_model_without_gradients():
    """Its differentiable loss is no tensor where nothing asks for gradients; validation asks for none."""
    locs = nn.Parameter(torch.tensor([-1.0, 1.0]))
    owner = nn.Module()
    owner.locs = locs

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(owner.locs[k], 1.0), obs=x)

    objective = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    options = {"objective": objective, "train": owner, "epochs": 2, "seed": 0, "progress": False}
    result = fit(model, lambda x: None, torch.randn(40), **options)
    assert len(result.validation_loss) == 2


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@pytest.mark.uses_param_store
def test_weights_of_a_guide_that_was_not_called_yet(tmp_path):
    x = torch.randn(20)
    guide, other = AutoNormal(regression), AutoNormal(regression)
    fit(regression, guide, (x, x), epochs=2, seed=0, progress=False)
    save_weights(guide, tmp_path / "guide.pt")
    with pytest.raises(CheckpointError, match="this AutoNormal makes its parameters at its first call .* call it once"):
        load_weights(other, tmp_path / "guide.pt")
    other(x, x)
    load_weights(other, tmp_path / "guide.pt")
    assert torch.equal(other.median()["slope"], guide.median()["slope"])


def test_the_likelihood_of_a_model_without_latent_sites_is_exact():
    x = torch.randn(7)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.3, 1.0), obs=x)

    found = log_likelihood(model, lambda x: None, x, num_samples=4, batch_size=3)
    torch.testing.assert_close(found.value, dist.Normal(0.3, 1.0).log_prob(x))
    assert bool((found.se == 0).all())
