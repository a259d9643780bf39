"""`import pyro_ebm` loads pyro, torch and its own modules; what else it needs comes when it is used.

Counted in modules, not in seconds, so that a busy machine changes nothing.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARVIZ = ["arviz", "arviz_base", "arviz_stats", "arviz_plots"]
LATE = [*ARVIZ, "matplotlib", "pandas", "sklearn", "torchvision", "xarray"]
EVERYDAY = "from pyro_ebm import tilt, VAE, fit, importance, pyro_nuts, Draws, LogDensity, MLPEnergy"


@functools.cache
def modules_after(statements: str) -> frozenset[str]:
    """Names in `sys.modules` of a fresh interpreter once it has run the statements."""
    code = f"{statements}\nimport sys\nprint(' '.join(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.split())


def test_heavy_libraries_are_not_loaded():
    loaded = modules_after(EVERYDAY)
    assert "pyro_ebm.arviz_statistics" in loaded and loaded.isdisjoint(LATE)


def test_import_adds_little_to_pyro_and_torch():
    base = modules_after("import torch, pyro, pyro.infer.mcmc, pyro.optim, tqdm.auto")
    added = {m for m in modules_after(EVERYDAY) - base if m.split(".")[0] != "pyro_ebm"}
    assert len(added) <= 0.1 * len(base), sorted(added)


def test_every_name_is_listed_without_loading_its_module():
    assert "torch" not in modules_after("import pyro_ebm; dir(pyro_ebm); pyro_ebm.__version__")
