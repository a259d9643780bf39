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
