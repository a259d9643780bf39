"""The benchmarks of learning in small: scripts on the bundled digits or on exact answers, rows kept, and the report."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from benchmarks import density, learning, learning_report, log_normalizers, outliers
from pyro_ebm import VAE, QuadraticEnergy, digits
from pyro_ebm.datasets import ImageSet
from pyro_ebm.inference.annealing.log_normalizer import METHODS

TINY = {"epochs": 2, "latent_dim": 3, "hidden": (16,), "energy_hidden": (8,), "num_proposals": 16}
OUTLIERS = outliers.Settings(**TINY, num_samples=3, mode_steps=2, num_bootstrap=4)
DENSITY = density.Settings(**TINY, num_train=300, num_test=40, num_samples=10)


@pytest.fixture(scope="module")
def sets():
    found = digits()
    return [ImageSet(found.images[rows], found.labels[rows]) for rows in (slice(0, 400), slice(400, 600))]


@pytest.fixture(scope="module")
def results(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    outliers.run(learning.Rows("outliers", folder=folder), OUTLIERS, 1, *sets)
    density.run(learning.Rows("density", folder=folder), DENSITY, *sets)
    return folder


@pytest.fixture(scope="module")
def log_z(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log_z")
    settings = log_normalizers.Settings(seeds=1, dims=(), far_dim=2, far_kl=1.0, num_samples=128)
    log_normalizers.run(learning.Rows("log_normalizers", folder=folder), settings)
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


class TestOutliers:
    def test_every_score_of_both_models(self, results):
        rows = read(results, "outliers")
        assert list(rows) == ["1 vae", "1 tilted"]
        assert set(rows["1 tilted"]["auprc"]) == set(learning_report.SCORES)
        assert set(learning_report.SCORES) - set(rows["1 vae"]["auprc"]) == {"energy", "excess_energy"}
        for row in rows.values():
            assert all(0 < value <= 1 for value in row["auprc"].values())
            assert all(math.isfinite(value) for value in [*row["se"].values(), row["train_loss"]])
            assert row["steps"] == 2 * 2

    def test_left_out_digit_is_not_trained_on(self, sets, monkeypatch, tmp_path):
        seen = []

        def train(model, guide, x, modules, **settings):
            seen.append(x)
            return {"train_seconds": 0.0}

        monkeypatch.setattr(outliers, "train", train)
        outliers.run(learning.Rows("outliers", folder=tmp_path), OUTLIERS, 1, *sets, models=["vae"])
        torch.testing.assert_close(seen[0], sets[0].images[sets[0].labels != 1])

    def test_zero_energy_changes_no_score(self, sets):
        vae = learning.seeded(0, lambda: VAE((1, 8, 8), 3, hidden=(16,)))
        settings = {"num_samples": 4, "mode_steps": 3, "seed": 5}
        plain = outliers.scores(vae, None, sets[1].images[:20], **settings)
        null = outliers.scores(vae, QuadraticEnergy(0.0), sets[1].images[:20], **settings)
        for name, values in plain.items():
            torch.testing.assert_close(null[name], values)

    def test_scores_by_their_definitions(self, sets):
        x = sets[1].images[:20]
        vae = learning.seeded(0, lambda: VAE((1, 8, 8), 3, hidden=(16,)))
        found = outliers.scores(vae, QuadraticEnergy(1.0), x, num_samples=4, mode_steps=3, seed=5)
        torch.testing.assert_close(found["elbo"], found["reconstruction"] + found["rate"])
        torch.testing.assert_close(found["excess_rate"], found["excess"] + found["rate"])
        with torch.no_grad():
            z = vae.encode(x).mean
            joint = vae.decode(z).log_prob(x) + vae.prior.log_prob(z) - 0.5 * z.square().sum(-1)
        torch.testing.assert_close(found["joint_mean"], -joint)
        assert (found["log_p"] <= found["elbo"] + 1e-4).all()
        assert found["joint_mode"].mean() < found["joint_mean"].mean()

    def test_excess_of_images_drawn_from_the_decoder_is_zero(self):
        vae = learning.seeded(0, lambda: VAE((1, 8, 8), 3, hidden=(16,)))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            vae.encoder = _Same()
            images = vae.decode(torch.zeros(2000, 3)).sample()
        excess = outliers.scores(vae, None, images, num_samples=2, mode_steps=1, seed=0)["excess"]
        assert abs(float(excess.mean())) < 4.5 * float(excess.std()) / math.sqrt(2000) + 1e-3

    def test_precision(self):
        outlier = np.arange(100) < 20
        found = {"log_p": -torch.arange(100.0), "elbo": torch.arange(100.0)}
        row = outliers.precision(found, outlier, repeats=5, seed=0)
        assert row["auprc"]["log_p"] == pytest.approx(1.0)
        assert row["auprc"]["elbo"] < 0.2
        assert row["se"]["log_p"] < 1e-6 < row["se"]["elbo"]


class _Same(torch.nn.Module):
    """An encoder that knows where the images came from."""

    def forward(self, x):
        return torch.zeros(len(x), 3), torch.full((len(x), 3), 1e-6)


class TestDensity:
    def test_both_models(self, results):
        rows = read(results, "density")
        assert list(rows) == ["gaussian", "snis"]
        for row in rows.values():
            assert len(row["bounds"]) == 40
            assert row["mean"] == pytest.approx(np.mean(row["bounds"]), abs=1e-3)
            assert math.isfinite(row["mean"] + row["se"] + row["train_loss"])
            assert row["steps"] == 2 * 3
        assert math.isfinite(rows["snis"]["tilted"] + rows["snis"]["log_z"] + rows["snis"]["log_z_se"])

    def test_gain_is_paired(self):
        first = [-100.0, -80.0, -90.0]
        second = [x + d for x, d in zip(first, (1.0, 2.0, 3.0), strict=True)]
        rows = {"gaussian": {"bounds": first}, "snis": {"bounds": second}}
        value, error = learning_report.gain(rows)
        assert (value, error) == pytest.approx((2.0, 1 / math.sqrt(3)))

    def test_static_images(self):
        gray = torch.full((500, 1, 8, 8), 0.3)
        found = density.static(gray, seed=1)
        assert set(found.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(found, density.static(gray, seed=1))
        assert float(found.mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / found.numel()))


class TestLogNormalizers:
    def test_every_method_on_every_target(self, log_z):
        rows = read(log_z, "log_normalizers")
        assert list(rows) == [f"{energy} 2-D 1 {method}" for energy in ("linear", "quadratic") for method in METHODS]
        for row in rows.values():
            assert 0 < row["rms"] < 1 and 0 < row["mean_se"] < 1 and row["seconds"] > 0
            assert row["beyond_two"] in (0, 1) and row["warned"] in (0, 1)
            assert ("held" in row) == (row["settings"]["method"] == "ais")

    def test_some_methods(self, monkeypatch, tmp_path):
        monkeypatch.setattr(log_normalizers, "_row", lambda *_: {"rms": 0.0, "mean_z2": 1.0, "seconds": 0.0})
        rows = learning.Rows("log_normalizers", folder=tmp_path)
        log_normalizers.run(rows, log_normalizers.Settings(dims=()), ["smc", "ais"])
        assert [name.split()[-1] for name in rows.rows] == ["smc", "ais"] * 2

    def test_targets(self):
        found = list(log_normalizers.targets(log_normalizers.Settings()))
        assert len(found) == len(set(found)) == 2 * 4 + 2
        assert {dim for _, dim, _ in found} == {2, 8, 32, 64} and ("linear", 64, 2.0) in found

    @pytest.mark.parametrize("dim", [1, 64])
    def test_tilts_lie_as_far_as_asked_for(self, dim):
        base = dist.Normal(torch.zeros(dim), 1.0)
        shift = log_normalizers.tilt_of("linear", dim, 2.0).a.detach()
        shrunk = (1 + log_normalizers.tilt_of("quadratic", dim, 2.0).c.detach()) ** -0.5
        for loc, scale in ((shift, 1.0), (0.0, shrunk)):
            found = kl_divergence(dist.Normal(loc + torch.zeros(dim), scale + torch.zeros(dim)), base).sum()
            assert float(found) == pytest.approx(2.0, abs=1e-4)

    def test_summary(self):
        error, se = torch.tensor([3.0, -5.0, 5.0, 1.0]), torch.ones(4)
        found = log_normalizers.summary(error, se, torch.tensor([False, True, False, False]))
        assert found["rms"] ** 2 == pytest.approx(15) and found["mean_z2"] == pytest.approx(15)
        assert (found["beyond_two"], found["beyond_four"], found["beyond_four_silently"]) == (3, 2, 1)
        assert (found["largest_z"], found["mean_se"], found["warned"]) == (5.0, 1.0, 1)


class TestRows:
    def test_run_again_only_with_other_settings(self, tmp_path):
        made = []

        def make():
            made.append(1)
            return {"value": len(made)}

        settings = {"hidden": (3, 2)}
        assert learning.Rows("rows", folder=tmp_path).add("a", settings, make)["value"] == 1
        assert learning.Rows("rows", folder=tmp_path).add("a", settings, make)["value"] == 1
        assert learning.Rows("rows", folder=tmp_path).add("a", {"hidden": (3,)}, make)["value"] == 2
        assert learning.Rows("rows", folder=tmp_path, again=True).add("a", {"hidden": (3,)}, make)["value"] == 3

    def test_what_is_done_outlives_a_failure(self, tmp_path):
        rows = learning.Rows("rows", folder=tmp_path)
        rows.add("a", {}, dict)
        with pytest.raises(ZeroDivisionError):
            rows.add("b", {}, lambda: {"value": 1 / 0})
        assert list(learning.Rows("rows", folder=tmp_path).rows) == ["a"]

    def test_training_goes_on_where_it_ended(self, sets, tmp_path):
        whole, part = (learning.Rows("density", folder=tmp_path / name) for name in ("whole", "part"))
        density.run(whole, DENSITY, *sets)
        density.run(part, dataclasses.replace(DENSITY, epochs=1), *sets)
        density.run(part, DENSITY, *sets)
        first, second = (read(rows.folder, "density")["snis"]["bounds"] for rows in (whole, part))
        assert second == pytest.approx(first, abs=1e-2)

    def test_again_starts_anew(self, tmp_path):
        file = learning.Rows("rows", folder=tmp_path).checkpoint("a b", {"seed": 1})
        file.touch()
        assert learning.Rows("rows", folder=tmp_path).checkpoint("a b", {"seed": 2}) != file
        assert file.exists()
        assert learning.Rows("rows", folder=tmp_path, again=True).checkpoint("a b", {"seed": 1}) == file
        assert not file.exists()

    def test_training_that_ends_early_is_no_result(self, sets, tmp_path):
        vae = learning.seeded(0, lambda: VAE((1, 8, 8), 3, hidden=(16,)))
        broken = lambda model, guide, x: next(vae.parameters()).sum() * math.nan  # noqa: E731
        budget = {"lr": 1e-3, "decay": True, "epochs": 1, "batch_size": 64, "seed": 0, "device": "cpu"}
        budget["checkpoint"] = tmp_path / "run.pt"
        with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="ended early: non-finite loss"):
            learning.train(vae.model, vae.guide, sets[0].images, [vae], objective=broken, **budget)


class TestReport:
    def test_of_both(self, results, tmp_path):
        file = tmp_path / "LEARNING.md"
        learning_report.write_report(results, file)
        text = file.read_text()
        row = read(results, "outliers")["1 tilted"]
        assert f"**{row['auprc'][learning_report.HEADLINE]:.3f} +- " in text
        assert "| hierarchical VAE (published) | 0.494 |" in text
        plain = read(results, "outliers")["1 vae"]["auprc"][learning_report.HEADLINE]
        ahead = int(row["auprc"][learning_report.HEADLINE] > plain)
        assert f"the same score of the plain VAE on {ahead} of 1" in text
        value, error = learning_report.gain(read(results, "density"))
        assert f"**{value:.2f} +- {error:.2f} nats**" in text

    def test_no_gain_between_unequal_budgets(self, results, tmp_path):
        rows = read(results, "density")
        rows["gaussian"]["settings"]["epochs"] = 1
        (tmp_path / "density.json").write_text(json.dumps({"rows": rows}))
        learning_report.write_report(tmp_path, tmp_path / "LEARNING.md")
        assert "Gain of" not in (tmp_path / "LEARNING.md").read_text()

    def test_of_log_z(self, log_z, tmp_path):
        file = tmp_path / "LEARNING.md"
        learning_report.write_report(log_z, file)
        text = file.read_text()
        rows = read(log_z, "log_normalizers")
        held = sum(row.get("held", 0) for row in rows.values())
        assert "## log Z on exact targets" in text and "## Density" not in text
        assert f"its bracket holds in {held} of 2." in text
        assert f"Of {len(rows)} estimates {sum(row['beyond_four'] for row in rows.values())} lie" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == len(rows) + 2 and {line.count("|") for line in lines} == {11}

    def test_of_a_part(self, results, tmp_path):
        folder, file = tmp_path / "part", tmp_path / "LEARNING.md"
        folder.mkdir()
        rows = read(results, "outliers")
        other = {"9 vae": rows["1 vae"], "1 tilted": rows["1 tilted"]}
        (folder / "outliers.json").write_text(json.dumps({"rows": other}))
        learning_report.write_report(folder, file)
        text = file.read_text()
        assert "## Density" not in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {4}
        assert any(line.startswith("| VAE: ") and line.split("|")[2].strip() == "-" for line in lines)
