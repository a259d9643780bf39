"""What MCMC says of arguments that cannot be, before anything runs."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch.distributions import transforms

from pyro_ebm import HMC, MCMC, ChEES
from pyro_ebm.structure import DoesNotBroadcast

FEW = {"num_samples": 3, "warmup_steps": 3, "progress": False}
EITHER = pytest.mark.parametrize("kernel", [HMC, infer.NUTS])


def model():
    pyro.sample("m", dist.Normal(0.0, 1.0))


@EITHER
@pytest.mark.parametrize("start", [0.5, 1, np.float64(0.5), np.full((), 0.5), torch.tensor(0.5)])
@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
def test_starts_may_be_numbers_and_arrays(kernel, start):
    mcmc = MCMC(kernel(model), initial_params={"m": start}, **FEW)
    assert mcmc.run().values["m"].shape == (1, 3)


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("start", [{"m": np.zeros(2)}, {"m": [0.0, 0.0]}, np.zeros((2, 1))])
def test_an_array_has_a_row_for_each_chain(start):
    assert MCMC(HMC(model), initial_params=start, **FEW).run().num_chains == 2


@EITHER
@pytest.mark.parametrize("start", ["a", None, object()])
def test_other_starts_are_refused_by_name(kernel, start):
    said = rf"initial_params\['m'\] must be a tensor, an array or a number, got {type(start).__name__}"
    with pytest.raises(TypeError, match=said):
        MCMC(kernel(model), initial_params={"m": start}, **FEW)


@EITHER
@pytest.mark.parametrize(
    ("option", "value"), [("initial_params", torch.tensor(0.0)), ("transforms", transforms.identity_transform)]
)
def test_unknown_sites_are_named(kernel, option, value):
    said = rf"{option} (names|has) the (unknown )?site\(s\) \['zz'\]; the latent sites are \['m'\]"
    with pytest.raises(ValueError, match=said):
        MCMC(kernel(model), **{option: {"zz": value}}, **FEW).run()


def test_a_class_is_no_kernel():
    for kernel in (HMC, ChEES, infer.NUTS):
        with pytest.raises(TypeError, match=rf"kernel is the class {kernel.__name__}: call it"):
            MCMC(kernel, **FEW)


@pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
@pytest.mark.parametrize("kernel", [lambda: ChEES(model, step_size=0.1, full_mass=True), lambda: infer.NUTS(model)])
def test_a_run_in_one_line(kernel):
    mcmc = MCMC(kernel(), num_chains=2, seed=0, **FEW)
    name = type(mcmc.kernel).__name__
    assert repr(mcmc) == f"MCMC({name}, 2 chains x 3 samples, not run)"
    before = repr(mcmc.kernel)
    mcmc.run()
    assert repr(mcmc) == f"MCMC({name}, 2 chains x 3 samples, ran)"
    if name == "ChEES":
        assert repr(mcmc.kernel) == before == "ChEES(model, step_size=0.1, full_mass=True)"


def test_settings_of_a_kernel_in_one_line():
    kernel = HMC(
        dist.Normal(0.0, 1.0).expand((3,)).to_event(1),
        num_steps=4,
        transforms={"z": transforms.ComposeTransform([transforms.ExpTransform(), transforms.ExpTransform()])},
        init_strategy=infer.autoguide.init_to_median,
    )
    said = "HMC(Independent, transforms={z: ComposeTransform}, init_strategy=init_to_median, num_steps=4)"
    assert repr(kernel) == said
    assert repr(HMC(potential_fn=model)) == "HMC(model)"


def test_of_what_vmap_says_the_first_sentence_is_kept():
    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 if z > 0 else 2.0), obs=torch.tensor(0.0))

    with pytest.raises(DoesNotBroadcast, match=r"data-dependent control flow \(after site 'z'\); index") as told:
        MCMC(HMC(branching), **FEW).run()
    assert "please" not in str(told.value)
