"""The benchmarks' own parts, in small: targets against exact answers, measures, tables; peers where installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import agree, case, contenders, entry_points, measure, reading, references, report, targets, weights
from benchmarks.measure import Reference, Run, measures
from pyro_ebm import LogDensity
from tests.zoo.cases import CASES

SMALL = ("gaussian_10d", "eight_schools", "logistic_25")
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs the bench extra")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    weights.trained(2, folder=folder, quick=True)
    return folder


@pytest.fixture
def small_networks(cache, monkeypatch):
    monkeypatch.setattr(targets, "trained", lambda dim: weights.trained(dim, folder=cache, quick=True))


def without_jax(monkeypatch):
    monkeypatch.setattr(agree, "has_jax", lambda: False)


class TestTargets:
    @pytest.mark.parametrize("name", SMALL)
    def test_pyro_model_and_plain_density_agree(self, name, monkeypatch):
        without_jax(monkeypatch)
        assert agree.disagreement(targets.load(name)) < agree.TOLERANCE

    @pytest.mark.parametrize("name", ["tilted_prior_2d", "posterior_1", "posterior_3"])
    def test_tilted_ones_agree(self, name, small_networks, monkeypatch):
        without_jax(monkeypatch)
        assert agree.disagreement(targets.load(name)) < agree.TOLERANCE

    @needs_jax
    @pytest.mark.parametrize("name", ["gaussian_10d", "eight_schools"])
    def test_jax_agrees(self, name):
        assert agree.disagreement(targets.load(name)) < agree.TOLERANCE

    def test_another_density_is_refused(self, monkeypatch):
        without_jax(monkeypatch)
        target = targets.gaussian(3)
        wrong = targets.Target(**{**vars(target), "log_prob": lambda u: 1.01 * target.log_prob(u)})
        with pytest.raises(ValueError, match="gaussian_3d: the pyro density differs"):
            agree.disagreement(wrong)

    def test_gaussian_has_the_covariance_it_says(self):
        target = targets.gaussian(4)
        covariance = target.arrays["covariance"]
        assert np.linalg.cond(covariance) == pytest.approx(100.0, rel=1e-6)
        exact = torch.distributions.MultivariateNormal(torch.zeros(4), torch.tensor(covariance, dtype=torch.float32))
        u = torch.randn(20, 4)
        torch.testing.assert_close(target.log_prob(u), exact.log_prob(u), rtol=1e-4, atol=1e-4)

    def test_posterior_of_several_images_is_the_product_of_single_ones(self, small_networks):
        joint, u = targets.posterior(3), torch.randn(5, 6)
        singles = sum(targets.posterior(1, first=i).log_prob(u[:, 2 * i : 2 * i + 2]) for i in range(3))
        torch.testing.assert_close(joint.log_prob(u), singles)

    def test_independent_images_are_what_the_joint_density_sums(self, small_networks):
        target, u = targets.posterior(3), torch.randn(5, 3, 2)
        each = LogDensity.from_model(target.model, *target.args, independent=target.independent[0])
        torch.testing.assert_close(each(u).sum(-1), target.log_prob(u.flatten(1)), rtol=1e-4, atol=1e-3)

    def test_constrain_is_the_model_s_own(self):
        target = targets.eight_schools()
        u = target.start(7, np.random.default_rng(0))
        sites = LogDensity.from_model(target.model, *target.args).constrain(torch.from_numpy(u))
        assert list(sites) == list(target.sites)
        values = torch.cat([v.reshape(7, -1) for v in sites.values()], 1)
        np.testing.assert_allclose(target.constrain(u), values.numpy(), rtol=1e-5)

    def test_unknown_target(self):
        with pytest.raises(ValueError, match="name must be one of"):
            targets.load("funnel")


class TestWeights:
    def test_are_kept_and_read_back(self, cache):
        before = weights.trained(2, folder=cache, quick=True)
        assert weights.checksum(before) == weights.checksum(weights.trained(2, folder=cache, quick=True))
        before["energy.net.0.bias"][0] += 1
        assert weights.checksum(before) != weights.checksum(weights.trained(2, folder=cache, quick=True))


class TestReferences:
    def test_gaussian_is_exact_and_kept(self, tmp_path):
        found = [references.reference(targets.gaussian(4), folder=tmp_path) for _ in range(2)]
        assert found[0].kind == found[1].kind == "exact"
        np.testing.assert_allclose(found[1].variance, np.diag(targets.gaussian(4).arrays["covariance"]))

    def test_image_by_quadrature(self, small_networks, tmp_path):
        found = references.reference(targets.posterior(2), folder=tmp_path)
        assert found.kind == "quadrature"
        assert found.mean.shape == found.variance.shape == (4,)
        assert (found.variance > 0).all()


def normal_run(*, shift=0.0, planned=None, chains=8, draws=400):
    values = np.random.default_rng(0).standard_normal((chains, draws, 2)) + shift
    return Run(values, seconds=4.0, sampling_seconds=2.0, gradients=float(chains * draws), planned=planned)


STANDARD = Reference("exact", np.zeros(2), np.ones(2), np.zeros(2), np.zeros(2))


class TestMeasures:
    def test_of_independent_draws(self):
        row = measures(normal_run(), STANDARD)
        assert 0.8 < row["ess"] / 3200 < 1.3
        assert row["ess_per_second"] == pytest.approx(row["ess"] / 4)
        assert row["ess_per_second_draws"] == pytest.approx(row["ess"] / 2)
        assert row["r_hat"] < 1.01
        assert row["error"] < 4
        assert row["compared"] == 4
        json.dumps(row)

    def test_a_bias_of_a_tenth_is_seen(self):
        assert measures(normal_run(shift=0.1), STANDARD)["error"] > 4

    def test_a_run_cut_short_is_carried_on(self):
        row = measures(normal_run(planned=1200), STANDARD)
        assert row["extrapolated"]
        assert row["ess_per_second"] == pytest.approx(3 * row["ess"] / (2 + 3 * 2))

    def test_weights_correct_another_proposal(self):
        values = 1.5 * np.random.default_rng(1).standard_normal((1, 20_000, 1))
        logs = (-0.5 * values**2 + 0.5 * (values / 1.5) ** 2)[..., 0]
        one = Reference("exact", np.zeros(1), np.ones(1), np.zeros(1), np.zeros(1))
        row = measures(Run(values, 1.0, 1.0, log_weights=logs), one)
        assert row["error"] < 4
        assert row["r_hat"] is None
        assert 10_000 < row["ess"] < 20_000

    def test_islands_of_copies_are_worth_one_draw_each(self):
        copies = np.repeat(np.random.default_rng(2).standard_normal((200, 1, 1)), 50, axis=1)
        row = measures(Run(copies, 1.0, 1.0, islands=True), None)
        assert 130 < row["ess"] < 280

    def test_expected_largest_error(self):
        assert measure.expected_largest(1) == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)


class TestReport:
    def results(self, folder):
        ours = {**measures(normal_run(), STANDARD), "threads": 1}
        slow = {**ours, "ess_per_second": ours["ess_per_second"] / 7, "extrapolated": True}
        rows = {"ours-chees": ours, "pyro-nuts": slow, "torchebm-hmc": {"failed": "out | of memory"}}
        content = {"target": "tilted_prior_2d", "disagreement": 1e-7, "rows": rows}
        (folder / "tilted_prior_2d.json").write_text(json.dumps(content))
        image = {"name": "ours, all at once", "seconds": 2.0, "done": 100, "images": 100, "draws": 500, "warmup": 200}
        nuts = {**image, "name": "Pyro", "seconds": 50.0, "done": 99}
        (folder / "images.json").write_text(json.dumps({"rows": [image, nuts]}))

    def test_table_and_reading(self, tmp_path):
        self.results(tmp_path)
        report.write_report(tmp_path, tmp_path / "RESULTS.md")
        text = (tmp_path / "RESULTS.md").read_text()
        assert "7.0 times stock Pyro NUTS" in text
        assert "| torchebm HMC, hand-tuned | - |" in text
        assert "out / of memory" in text
        assert "8 x 400*" in text
        assert "25 times as long (50 s at least: only 99 of 100" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {len(report.COLUMNS) + 1, 6}

    def test_best_leaves_failures_out(self):
        rows = {"a": {"failed": "x"}, "b": {"ess_per_second": 2.0}, "c": {"ess_per_second": 3.0}}
        assert reading.best(rows, ("a", "b", "c")) == 3.0
        assert reading.best(rows, ("a",)) is None


class TestContenders:
    def test_same_settings_for_those_that_compete(self):
        chosen = [contenders.settings(n, "tilted_prior_2d") for n in ("ours-chees", "blackjax-chees")]
        assert chosen[0] == chosen[1]
        assert contenders.settings("pyro-nuts", "posterior_100") is None

    def test_one_of_ours_runs(self, monkeypatch):
        monkeypatch.setattr(case, "load", lambda name: targets.gaussian(3))
        monkeypatch.setattr(case, "reference", lambda target: None)
        monkeypatch.setattr(case, "settings", lambda *_, **__: {"chains": 32, "warmup": 40, "draws": 40})
        row = case.run("ours-chees", "gaussian_10d")
        assert row["chains"] == 32
        assert row["draws"] == 40
        assert row["ess"] > 100
        assert row["gradients"] >= 32 * 40


class TestEntryPoints:
    """The table of users' models: a cell says what came of it, and a number that is off does not pass."""

    CASES = {case.name: case for case in CASES}

    @pytest.mark.parametrize(
        ("model", "entry", "expected"),
        [
            ("one_plate", "snis", "right"), ("one_plate", "log_normalizer", "right"), ("one_plate", "tilt", "right"),
            ("subsampled_plate", "auto", "refused"), ("subsampled_plate", "predictive", "refused"),
            ("earnings_on_height", "snis", "warned"),
        ],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")
    @pytest.mark.uses_global_rng
    @pytest.mark.uses_param_store
    def test_cells(self, model, entry, expected):
        assert entry_points.cell(self.CASES[model], entry)["result"].split(", ")[-1] == expected

    @pytest.mark.uses_global_rng
    @pytest.mark.uses_param_store
    def test_a_wrong_answer_is_seen(self):
        wrong = dataclasses.replace(self.CASES["one_plate"], answers={"z": (9.0, 1.0)})
        assert entry_points.cell(wrong, "snis")["result"] == "wrong"
        rows = [{"model": "one_plate", "entry": "snis"} | entry_points.cell(wrong, "snis")]
        assert "| one_plate | **wrong** |" in entry_points.report(rows)
