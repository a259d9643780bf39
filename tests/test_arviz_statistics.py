from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from pyro_ebm.arviz_statistics import importance_ess, psis


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9])
def test_psis_recovers_the_shape_of_a_pareto_tail(k):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smoothed, estimate = psis(-k * uniform.log())
    assert isinstance(estimate, float)
    # M = 3 sqrt(S) tail draws: se of k is about (1 + k) / sqrt(M)
    assert abs(estimate - k) < 4 * (1 + k) / math.sqrt(3 * math.sqrt(20_000))
    assert float(smoothed.exp().sum()) == pytest.approx(1.0)


def test_psis_takes_log_weights_and_not_their_negatives():
    logs = normal(2000) * 0.8
    smoothed, _ = psis(logs)
    assert torch.equal(smoothed.argsort()[:1000], logs.argsort()[:1000])
    body = logs < logs.quantile(0.5)
    difference = (smoothed - logs)[body]
    assert float(difference.std()) < 1e-10  # outside the tail only the normalization changes
    assert smoothed.shape == logs.shape and smoothed.dtype == logs.dtype


def test_psis_does_not_depend_on_scale_or_type():
    logs = normal(500)
    _, k = psis(logs)
    assert psis(logs + 1000)[1] == pytest.approx(k, abs=1e-6)
    assert psis(logs.numpy())[1] == k
    single, _ = psis(logs.float())
    assert single.dtype == torch.float32


def test_psis_of_zero_weights():
    logs = normal(2000)
    logs[::2] = -math.inf
    smoothed, k = psis(logs)
    assert math.isfinite(k)
    assert bool((smoothed[::2] == -math.inf).all())
    assert float(smoothed.exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("far", [-1e3, -1e8, -1e12, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_judged_by_the_tail(dtype, far):
    """A log weight far below all others says nothing of how precisely the largest are known."""
    logs = (20 * normal(4000)).to(dtype)
    k = psis(logs)[1]
    assert k > 5 and psis(torch.cat([logs, logs.new_tensor([far])]))[1] == pytest.approx(k, rel=1e-3)


def test_a_tail_that_is_all_rounding_is_flat():
    assert psis((1e8 + normal(4000) * 1e-3).float())[1] == 0.0


@pytest.mark.parametrize("num", [1, 10, 1000])
def test_psis_of_equal_weights_is_a_bounded_tail(num):
    smoothed, k = psis(torch.full((num,), 7.0))
    assert k == 0.0
    assert smoothed.tolist() == pytest.approx([-math.log(num)] * num)


def test_psis_of_one_dominating_weight_cannot_be_trusted():
    logs = torch.zeros(200)
    logs[0] = 1000.0
    assert psis(logs)[1] == math.inf
    assert psis(normal(20))[1] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_psis_of_broken_weights_is_nan(bad):
    logs = normal(100)
    logs[3] = bad
    smoothed, k = psis(logs)
    assert math.isnan(k) and bool(smoothed.isnan().all())
    assert math.isnan(psis(torch.full((100,), -math.inf))[1])


def test_psis_wants_one_axis():
    with pytest.raises(ValueError, match=r"log_weights must have shape \(draw,\)"):
        psis(normal(3, 10))


def test_importance_ess():
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert torch.allclose(importance_ess(weights.log()), torch.tensor([1 / 0.375, 1.0]))
    assert torch.allclose(importance_ess(weights.log() + 50), torch.tensor([1 / 0.375, 1.0]))
    assert torch.equal(importance_ess(torch.full((64,), -2.0**22)), torch.tensor(64.0))  # no digits of e-fold lost


def test_arviz_announcements_do_not_leak(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, pyro_ebm.arviz_statistics as s\nprint(s.psis(torch.randn(50))[1] < 9)"
    )
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
