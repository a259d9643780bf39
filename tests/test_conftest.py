"""The fixtures of conftest.py must be able to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

FAULTS = {
    "pyro parameter store (w)": "pyro.param('w', torch.zeros(1))",
    "torch default dtype": "torch.set_default_dtype(torch.float64)",
    "torch number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch grad mode": "torch.set_grad_enabled(False)",
    "pyro settings": "pyro.enable_validation(not pyro.settings.get('validate_infer'))",
    "pyro handler stack": "pyro.poutine.mask(mask=True).__enter__()",
    "numpy global generator": "np.random.rand()",
    "random global generator": "random.random()",
    "matplotlib rcParams (figure.dpi)": "matplotlib.rcParams['figure.dpi'] = 33",
    "matplotlib backend": "matplotlib.rcParams['backend'] = 'svg'",
    "environment (PYRO_EBM_TEST)": "os.environ['PYRO_EBM_TEST'] = '1'",
    "working directory": "os.chdir('..')",
}
ALLOWED = """
@pytest.mark.uses_param_store
def test_store(): pyro.param('w', torch.zeros(1))
def test_store_was_restored(): assert not pyro.get_param_store().keys()
@pytest.mark.uses_global_rng
def test_generators(): np.random.rand(); random.random()
def test_seeded(): assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
def test_draws(): torch.rand(3); matplotlib.pyplot.figure()
def test_foreigner(): import jax
def test_untouched(rng_untouched):
    with rng_untouched(): torch.rand(1, generator=torch.Generator().manual_seed(0))
def test_touched(rng_untouched):
    with pytest.raises(pytest.fail.Exception, match="global generator"), rng_untouched(): torch.rand(1)
"""
FOREIGNER = "import os, numpy\nnumpy.random.rand()\nos.environ['TF_CPP_MIN_LOG_LEVEL'] = '1'\n"
HEADER = "import os, random\nimport matplotlib.pyplot, numpy as np, pyro, pytest, torch\n"


@pytest.mark.slow
def test_side_effects_fail_the_test_that_has_them(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n  uses_param_store\n  uses_global_rng\n")
    bad = "".join(f"def test_bad_{i}(): {code}\n" for i, code in enumerate(FAULTS.values()))
    pytester.makepyfile(HEADER + bad + ALLOWED)
    pytester.makepyfile(jax=FOREIGNER)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=len(FAULTS) + ALLOWED.count("def "), errors=len(FAULTS))
    for name in FAULTS:
        result.stdout.fnmatch_lines([f"*global state changed: {name}*"])
