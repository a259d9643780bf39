"""What holds for every test: a fixed seed, few threads, no window, no change of global state."""

from __future__ import annotations

import os

# Before torch and matplotlib are imported. The KMP names are the ones scikit-learn sets on import.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "True")
os.environ.setdefault("KMP_INIT_AT_FORK", "FALSE")
# Networks here are too small for more; xdist's workers inherit it, and two of them share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import AbstractContextManager, contextmanager, suppress  # noqa: E402
from typing import Any  # noqa: E402

import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from pyro.poutine.runtime import _PYRO_STACK  # noqa: E402

pytest_plugins = ["pytester"]  # tests/test_conftest.py runs small suites under this file
with suppress(ImportError):
    importlib.import_module("rich.style")  # it draws from random's generator when first imported
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))

SEED = 0
# Names that third parties set in the environment while they run.
FOREIGN_ENVIRONMENT = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "JAX_", "TF_CPP_", "TPU_")
# What they draw from while they are imported.
FOREIGN_IMPORTS = {"jax": "numpy global generator"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests of devices run their models: cpu, cuda, cuda:1, mps")


def global_state() -> dict[str, Any]:
    """Everything process-wide that the package must leave alone, by the name a failure message shows."""
    numpy_state = np.random.get_state()
    rc = {key: value for key, value in dict.items(mpl.rcParams) if key != "backend"}
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch number of threads": torch.get_num_threads(),
        "torch grad mode": torch.is_grad_enabled(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        # holds the validation switches of torch.distributions, pyro.distributions, infer and poutine
        "pyro settings": dict(pyro.settings.get()),
        "pyro parameter store": sorted(pyro.get_param_store().keys()),
        "pyro handler stack": list(_PYRO_STACK),
        "numpy global generator": (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
        "random global generator": random.getstate(),
        "matplotlib rcParams": rc,
        # matplotlib writes the backend's name in lower case when it first draws
        "matplotlib backend": str(dict.get(mpl.rcParams, "backend")).lower(),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_ENVIRONMENT)},
        "working directory": os.getcwd(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the entries that differ, for a dictionary with the keys that differ."""
    names = []
    for name, old in before.items():
        new = after[name]
        if old == new:
            continue
        detail = ""
        if isinstance(old, dict):
            keys = [str(k) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
            detail = f" ({', '.join(keys)})"
        elif name == "pyro parameter store":
            detail = f" ({', '.join(sorted(set(old) ^ set(new)))})"
        names.append(name + detail)
    return names


def restore(before: dict[str, Any]) -> None:
    """Undo what would make the next tests fail as well."""
    torch.set_default_dtype(before["torch default dtype"])
    device = before["torch default device"]
    torch.set_default_device(None if device.type == "cpu" else device)
    torch.set_num_threads(before["torch number of threads"])
    torch.set_grad_enabled(before["torch grad mode"])
    if torch.are_deterministic_algorithms_enabled() != before["torch deterministic algorithms"]:
        torch.use_deterministic_algorithms(before["torch deterministic algorithms"])  # imports torch's compiler: 5 s
    pyro.settings.set(**before["pyro settings"])
    store = pyro.get_param_store()
    for name in set(store.keys()) - set(before["pyro parameter store"]):
        del store[name]
    _PYRO_STACK[:] = before["pyro handler stack"]
    dict.update(mpl.rcParams, before["matplotlib rcParams"])
    for name in os.environ.keys() - before["environment"].keys():
        if not name.startswith(FOREIGN_ENVIRONMENT):
            del os.environ[name]
    os.environ.update(before["environment"])
    os.chdir(before["working directory"])


@pytest.fixture(autouse=True)
def no_global_side_effects(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with seeded generators; fail it if it leaves any global state other than it found it."""
    numpy_state, random_state = np.random.get_state(), random.getstate()
    foreigners = FOREIGN_IMPORTS.keys() - sys.modules.keys()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        np.random.seed(SEED)
        random.seed(SEED)
        before = global_state()
        yield
        after = global_state()
    np.random.set_state(numpy_state)
    random.setstate(random_state)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    differing = changed(before, after)
    if differing:
        restore(before)
    allowed = [FOREIGN_IMPORTS[name] for name in foreigners & sys.modules.keys()]
    if request.node.get_closest_marker("uses_param_store"):
        allowed += ["pyro parameter store"]
    if request.node.get_closest_marker("uses_global_rng"):
        allowed += ["numpy global generator", "random global generator"]
    faults = [name for name in differing if not name.startswith(tuple(allowed))]
    if faults:
        pytest.fail("the test left global state changed: " + "; ".join(faults), pytrace=False)


@contextmanager
def _rng_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        pytest.fail("the block drew from, or reseeded, torch's global generator", pytrace=False)


@pytest.fixture
def rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """A context manager that fails unless torch's global generator is bit-identical afterwards."""
    return _rng_untouched
