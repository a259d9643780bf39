from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch

from pyro_ebm import chain_statistics as module
from pyro_ebm.arviz_statistics import arviz_is_1x, quiet_import
from pyro_ebm.chain_statistics import chain_statistics, ess_bulk, ess_tail, mcse_mean, r_hat

CHAINS, DRAWS = 4, 1000
ARVIZ = {
    "ess_bulk": ("ess", {"method": "bulk"}),
    "ess_tail": ("ess", {"method": "tail", "prob": (0.05, 0.95)}),
    "r_hat": ("rhat", {"method": "rank"}),
    "mcse_mean": ("mcse", {"method": "mean"}),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_arviz(name: str, x: np.ndarray) -> np.ndarray:
    """One column at a time, by ArviZ itself."""
    function, options = ARVIZ[name]
    if arviz_is_1x():
        where = {"chain_axis": 0, "draw_axis": 1}
        statistic = functools.partial(getattr(quiet_import("arviz_stats.base").array_stats, function), **where)
    else:
        statistic = getattr(quiet_import("arviz"), function)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.array([float(statistic(x[..., i], **options)) for i in range(x.shape[-1])])


def autoregressive(rho: float, chains: int, draws: int) -> torch.Tensor:
    """Stationary AR(1) with unit variance: ESS / N = (1 - rho) / (1 + rho)."""
    noise = normal(chains, draws)
    x = noise.clone()
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return x


def columns(chains: int, draws: int) -> np.ndarray:
    """Every kind of column that has statistics, side by side."""
    z, rng = normal(chains, draws).numpy(), np.random.default_rng(1)
    drifting = z + np.arange(chains)[:, None]
    middle = np.where(np.arange(draws) == draws // 2, z, 0.0)  # halves of an odd number of draws leave it out
    kinds = [
        *(z, *(autoregressive(rho, chains, draws).numpy() for rho in (0.5, 0.99, -0.3, -0.95)), drifting),
        *(rng.standard_cauchy((chains, draws)), z * 1e150, z * 1e-16, 1e8 + z, middle),
        *(rng.poisson(1.0, (chains, draws)), z > 0, z > 1.5, np.sign(z), np.round(z, 1)),
        *(np.repeat(z, 3, axis=1)[:, :draws], np.broadcast_to((-1.0) ** np.arange(draws), z.shape)),
    ]
    return np.stack([np.asarray(each, dtype=float) for each in kinds], axis=-1)


@pytest.mark.parametrize("draws", [4, 5, 6, 7, 10, 11, 100, 203])
@pytest.mark.parametrize("chains", [1, 2, 7])
def test_all_columns_at_once_are_arviz_s_one_by_one(chains, draws, monkeypatch):
    x = columns(chains, draws)
    x = x[..., np.ptp(x, axis=(0, 1)) > 0]
    monkeypatch.setattr(module, "_BLOCK", 3 * chains * draws)  # several blocks of columns, the last one smaller
    names = [name for name in ARVIZ if chains > 1 or name != "r_hat"]
    found = chain_statistics(x, *names)
    for name in names:
        # R-hat of chains that stand still is infinite, up to rounding: 1e16
        ours, theirs = (np.minimum(values, 1e12) for values in (found[name], by_arviz(name, x)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, err_msg=name)


def test_several_statistics_are_those_of_the_functions():
    x = normal(CHAINS, 50, 2, 3)
    found = chain_statistics(x, *ARVIZ)
    for function in (ess_bulk, ess_tail, r_hat, mcse_mean):
        assert np.array_equal(found[function.__name__], function(x))
    assert chain_statistics(x) == {}
    assert ess_bulk(x[..., :0]).shape == (2, 0)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match=r"names must be of \['ess_bulk', .*\], got \['rhat'\]"):
        chain_statistics(normal(2, 10), "rhat")


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
