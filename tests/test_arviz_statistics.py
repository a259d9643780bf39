from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_ebm.arviz_statistics import ess_bulk, ess_tail, importance_ess, mcse_mean, psis, r_hat

CHAINS, DRAWS = 4, 1000


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(rho: float, chains: int, draws: int) -> torch.Tensor:
    """Stationary AR(1) with unit variance: ESS / N = (1 - rho) / (1 + rho)."""
    noise = normal(chains, draws)
    x = noise.clone()
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return x


@pytest.mark.parametrize("rho", [0.5, 0.9, -0.3])
def test_ess_and_mcse_of_an_autoregressive_chain(rho):
    x = autoregressive(rho, 8, 5000)
    exact = x.numel() * (1 - rho) / (1 + rho)
    # Geyer's estimate of the autocorrelation time is good to about 10 % at this length
    assert float(ess_bulk(x)) == pytest.approx(exact, rel=0.2)
    assert float(mcse_mean(x)) == pytest.approx(1 / math.sqrt(exact), rel=0.12)


def test_independent_draws_are_worth_their_number():
    x = normal(CHAINS, DRAWS, 2, 3)
    for statistic in (ess_bulk, ess_tail):
        value = statistic(x)
        assert value.shape == (2, 3)
        assert value.dtype == np.float64
        assert np.all(np.abs(value / x[..., 0, 0].numel() - 1) < 0.25)
    assert np.all(np.abs(r_hat(x) - 1) < 0.005)
    assert mcse_mean(x) == pytest.approx(np.full((2, 3), 1 / math.sqrt(CHAINS * DRAWS)), rel=0.2)


def test_arrays_and_tensors_of_any_kind_agree():
    x = normal(CHAINS, 200, 2)
    assert np.array_equal(ess_bulk(x), ess_bulk(x.numpy()))
    assert np.array_equal(ess_bulk(x.requires_grad_()), ess_bulk(x.detach()))
    assert np.isfinite(ess_bulk((x > 0).int())).all()


def test_r_hat_sees_one_shifted_chain():
    x = normal(CHAINS, DRAWS, 2)
    x[0, :, 1] += 1.0
    first, second = r_hat(x)
    assert first < 1.01 < 1.05 < second


def test_r_hat_sees_chains_of_different_scale():
    x = normal(CHAINS, DRAWS)
    x[0] *= 3.0
    assert float(r_hat(x)) > 1.05  # only the folded half of the statistic sees it


@pytest.mark.parametrize("statistic", [ess_bulk, ess_tail, r_hat, mcse_mean])
def test_hopeless_columns_are_nan_and_leave_the_others_alone(statistic):
    x = normal(CHAINS, 100, 4)
    x[..., 1] = 2.5
    x[0, 3, 2] = math.nan
    x[1, 5, 3] = math.inf
    value = statistic(x)
    assert np.isfinite(value[0])
    assert np.isnan(value[1:]).all()
    assert float(value[0]) == float(statistic(x[..., 0]))


@pytest.mark.parametrize("shape", [(1, 100), (4, 3), (4, 0), (1, 1)])
def test_too_little_for_r_hat_is_nan_and_silent(shape, capfd):
    assert np.isnan(r_hat(normal(*shape, 2))).all()
    assert capfd.readouterr() == ("", "")


def test_x_without_chain_and_draw_is_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(chain, draw, \*shape\), got \(10,\)"):
        ess_bulk(normal(10))


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


def test_importing_statistics_does_not_import_arviz():
    code = "import sys, pyro_ebm.arviz_statistics; print(sorted({'arviz', 'pandas', 'xarray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_arviz_announcements_do_not_leak(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, pyro_ebm.arviz_statistics as s\nprint(float(s.r_hat(torch.randn(2, 50))) > 0)"
    )
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
