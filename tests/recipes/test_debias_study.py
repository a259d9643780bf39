"""The study in small: its table, that it continues where it stopped, and that one failure does not end it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from pyro_ebm import VAE, LinearEnergy, StudyConfig, StudyResult, TrainingWarning, debias_study
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes import debias_study as study
from pyro_ebm.recipes import study_cells
from pyro_ebm.recipes.debias_config import Schedule
from pyro_ebm.recipes.study_cells import Bench, run_cell
from pyro_ebm.recipes.study_config import METHODS, Cell
from pyro_ebm.recipes.study_store import StudyStore

SMALL: dict[str, Any] = {"quick": True, "progress": False, "latent_dims": (1,), "reference_sizes": (20,)}
METRICS = ["tv", "fairness_discrepancy", "log_likelihood", "log_likelihood_se", "confidence", "diversity",
           "least_diversity", "seconds", "log_likelihood_gain"]  # fmt: skip
# Long enough that the decoder shows digits: shares of a gray blur cannot be held at anything.
LONGER = Schedule(hidden=(32,), vae_epochs=30, vae_batch=64, tilt_epochs=2, patience=30)
WITHOUT_CLASSIFIER = METHODS[:5]
WHOLE = {**SMALL, "latent_dims": (2,), "methods": WITHOUT_CLASSIFIER}
# None of them is slow.
CHEAP = ("biased", "reference_only", "fine_tuned")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of each training."""
    schedule = Schedule(hidden=(8,), vae_epochs=2, vae_batch=64, tilt_epochs=2, patience=2)
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, config: schedule))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, Path]:
    """A study of every method, two sizes and one seed, and its folder."""
    out = tmp_path_factory.mktemp("study") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "of", classmethod(lambda cls, config: LONGER))
        return debias_study(out=out, **WHOLE), out


@pytest.fixture
def copied(whole: tuple[StudyResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, and the settings of the study."""
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, config: LONGER))
    return Path(shutil.copytree(whole[1], tmp_path / "copy"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that computes a cell."""
    monkeypatch.setattr(study, "run_cell", lambda bench, cell: pytest.fail(f"work began on {cell}"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that are computed during the test."""
    names: list[str] = []

    def spy(bench: Bench, cell: Cell) -> Any:
        names.append(cell.name)
        return run_cell(bench, cell)

    monkeypatch.setattr(study, "run_cell", spy)
    return names


def timeless(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=["seconds"])


def bench(config: StudyConfig, seed: int = 0) -> Bench:
    return Bench(config, seed, StudyStore(None, ""))


# --------------------------------------------------------------------------------------- results


def test_a_row_for_each_cell_of_the_grid(whole):
    result, _ = whole
    found = [Cell(*row) for row in result.table[list(Cell._fields)].itertuples(index=False)]
    assert found == [Cell(m, 2, 0, 0 if m == "biased" else 20) for m in WITHOUT_CLASSIFIER]
    assert len(result.failures) == 0 and set(result.table["data"]) == {"digits"}


def test_every_metric_is_known_and_possible(whole):
    table = whole[0].table
    assert table[METRICS].notna().all(axis=None)
    assert table["tv"].between(0, 0.8).all() and table["confidence"].between(0.2, 1).all()
    assert (table["log_likelihood_se"] > 0).all() and (table["least_diversity"] <= table["diversity"]).all()
    for proportions, tv in zip(table["proportions"], table["tv"], strict=True):
        assert sum(proportions) == pytest.approx(1) and tv == pytest.approx(sum(abs(p - 0.2) for p in proportions) / 2)
    tilted = table["method"] == "tilt"
    assert table.loc[tilted, ["kl", "proposal_ess", "pareto_k", "sampler"]].notna().all(axis=None)
    assert table.loc[~tilted, "kl"].isna().all()
    assert table.loc[table["method"] == "importance_weighted", ["auc", "weights_ess"]].notna().all(axis=None)


def test_the_gain_is_that_over_the_biased_vae_of_the_same_seed(whole):
    table = whole[0].table
    biased = table.loc[table["method"] == "biased", "log_likelihood"].item()
    assert (table["log_likelihood_gain"] == table["log_likelihood"] - biased).all()


def test_the_constraint_holds_what_the_classifier_sees():
    """Two classes whose probability is sigmoid(z + 1) and the rest: 0.5 each under the tilt, by quadrature."""
    vae = SimpleNamespace(
        latent_dim=1,
        prior=torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), torch.ones(1)), 1),
        decode=lambda z: SimpleNamespace(mean=torch.cat([(z + 1).sigmoid(), (-z - 1).sigmoid()], -1)),
    )
    data = SimpleNamespace(
        biased_vae=lambda latent_dim: vae, split=SimpleNamespace(classes=(3, 8)), config=StudyConfig(**SMALL), seed=0,
        classifier=SimpleNamespace(predict_proba=lambda images: images),
    )  # fmt: skip
    energy = study_cells._constraint(data, Cell("constraint", 1, 0, 0)).energy
    grid = torch.linspace(-8, 8, 2001)[:, None]
    weights = (vae.prior.log_prob(grid) - energy(grid)).detach().softmax(0)
    share = float(weights @ vae.decode(grid).mean[:, 0])
    # The multipliers come from 3,000 draws; under the prior the share is 0.70, with a standard deviation of 0.19.
    assert abs(share - 0.5) < 4 * 1.5 * 0.19 / math.sqrt(3000)


def test_the_folder(whole):
    result, out = whole
    assert (out / "figures" / "debias_study.png").read_bytes().startswith(b"\x89PNG")
    written = pd.read_csv(out / "study.csv")
    pd.testing.assert_series_equal(written["tv"], result.table["tv"])
    assert list(pd.read_csv(out / "summary.csv").columns[:4]) == ["latent_dim", "reference_size", "method", "seeds"]
    assert json.loads((out / "settings.json").read_text())["reference_sizes"] == [20]
    assert len(list((out / "cells").iterdir())) == len(result.table)
    assert len(list((out / "vaes").iterdir())) == 1
    assert not list(out.rglob("*.tmp"))


def test_the_summary_takes_means_over_seeds():
    rows = [
        {"method": "biased", "latent_dim": 2, "seed": seed, "reference_size": 0, "error": error, "tv": tv}
        for seed, tv, error in ((0, 0.1, None), (1, 0.2, None), (2, 0.6, None), (3, math.nan, "ValueError: no"))
    ]
    found = StudyResult(StudyConfig(), pd.DataFrame(rows)).summary().loc[(2, 0, "biased")]
    assert (found["seeds"], found["tv"]) == (3, pytest.approx(0.3))
    assert found["tv_se"] == pytest.approx(torch.tensor([0.1, 0.2, 0.6]).std().item() / math.sqrt(3), rel=1e-5)
    assert math.isnan(found["kl"])


def test_the_seed_decides(rng_untouched):
    with rng_untouched():
        first, again, other = (debias_study(**SMALL, methods=CHEAP, seeds=(seed,)).table for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(timeless(first), timeless(again), check_exact=True)
    assert (first["log_likelihood"] != other["log_likelihood"]).all()


# ---------------------------------------------------------------------------------- continuation


@pytest.mark.usefixtures("no_work")
def test_a_finished_study_is_read(whole, copied):
    result, _ = whole
    for name in ("study.csv", "summary.csv", "figures/debias_study.png"):
        (copied / name).unlink()
    again = debias_study(result.config, out=copied)
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(pd.read_csv(copied / "study.csv")[METRICS], result.table[METRICS])
    assert (copied / "figures" / "debias_study.png").is_file()


@pytest.mark.usefixtures("no_work")
def test_a_smaller_grid_is_a_part_of_it(whole, copied):
    part = debias_study(out=copied, **{**WHOLE, "methods": ("tilt", "biased")})
    assert list(part.table["method"]) == ["biased", "tilt"] and list(part.table["reference_size"]) == [0, 20]


def test_an_interrupted_study_continues_where_it_stopped(tmp_path, monkeypatch, computed):
    whole = debias_study(**SMALL, methods=CHEAP)
    computed.clear()
    with monkeypatch.context() as patch:

        def interrupted(bench: Bench, cell: Cell) -> Any:
            raise KeyboardInterrupt

        patch.setitem(study_cells._TRAIN, "fine_tuned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            debias_study(out=tmp_path, **SMALL, methods=CHEAP)
    assert len(computed) == 3 and len(list((tmp_path / "cells").iterdir())) == 2
    # The biased VAE is not trained again: who starts from it gets that of the first run.
    monkeypatch.setattr(study_cells, "train_vae", lambda *args, **options: pytest.fail("trained again"))
    finished = debias_study(out=tmp_path, **SMALL, methods=CHEAP)
    assert computed[3:] == ["fine_tuned-d1-s0-n20"]
    pd.testing.assert_frame_equal(timeless(finished.table), timeless(whole.table), check_exact=True)


def test_a_training_that_was_interrupted_is_no_result(tmp_path, monkeypatch):
    """fit() takes an interruption for the end of training and says so."""
    original = study_cells.fine_tune

    def stopped(*args: Any, **options: Any) -> Any:
        vae, result = original(*args, **options)
        return vae, dataclasses.replace(result, stopped="interrupted")

    monkeypatch.setattr(study_cells, "fine_tune", stopped)
    with pytest.raises(KeyboardInterrupt):
        debias_study(out=tmp_path, **SMALL, methods=CHEAP)
    kept = [path.name.split("-")[0] for path in (tmp_path / "cells").iterdir()]
    assert sorted(kept) == ["biased", "reference_only"]


def test_other_settings_are_kept_apart(whole, copied, computed):
    result, _ = whole
    before = {path.name for path in (copied / "cells").iterdir()}
    other = debias_study(out=copied, **{**WHOLE, "methods": ("biased",)}, fraction=0.5)
    assert computed == ["biased-d2-s0"]
    assert other.table["log_likelihood"].item() != result.table["log_likelihood"][0]
    after = {path.name for path in (copied / "cells").iterdir()}
    assert before < after and len(after) == len(before) + 1


def test_damaged_files_are_made_anew(whole, copied, computed):
    result, _ = whole
    biased, tilted = (next((copied / "cells").glob(f"{method}-*")) for method in ("biased", "tilt"))
    tilted.write_text(biased.read_text())  # of another cell
    biased.write_text(biased.read_text()[:40])
    next((copied / "vaes").iterdir()).write_bytes(b"no weights")
    with pytest.warns(TrainingWarning, match="cannot be used .*made anew and replaced") as told:
        again = debias_study(result.config, out=copied)
    assert [Path(str(warning.message).split()[0]).suffix for warning in told] == [".json", ".json"]
    assert "pt cannot be used" in again.table["notes"][0]  # the cell that came upon it says so
    assert computed == ["biased-d2-s0", "tilt-d2-s0-n20"]
    tables = [timeless(each.table).drop(columns="notes") for each in (again, result)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_methods_share_the_biased_vae(monkeypatch):
    trained = []
    original = study_cells.train_vae

    def spy(*args: Any, **options: Any) -> Any:
        trained.append(options.get("budget"))
        return original(*args, **options)

    monkeypatch.setattr(study_cells, "train_vae", spy)
    debias_study(**SMALL, methods=CHEAP)
    assert trained == [None, 330]  # that of the biased images, and that of the reference


# -------------------------------------------------------------------------------------- failures


def test_shares_that_no_tilt_has_are_a_result(tmp_path, computed):
    """After two epochs the decoder shows no digit: what the classifier says of it hardly varies."""
    settings = {**SMALL, "methods": ("biased", "constraint")}
    for _ in range(2):  # the second time there is nothing to compute
        result = debias_study(out=tmp_path, **settings)
    assert computed == ["biased-d1-s0", "constraint-d1-s0"]
    assert len(result.failures) == 0 and list(result.infeasible["method"]) == ["constraint"]
    assert "share of class" in result.infeasible["infeasible"].item()
    assert list(result.summary()["seeds"]) == [1, 0]
    assert pd.read_csv(tmp_path / "study.csv")["infeasible"].notna().sum() == 1


def test_a_cell_that_fails_is_recorded_and_tried_again(tmp_path, monkeypatch, computed):
    def broken(bench: Bench, cell: Cell) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setitem(study_cells._TRAIN, "reference_only", broken)
        with pytest.warns(TrainingWarning, match=r"1 of 3 cells failed, .* reference_only-d1-s0-n20 \(Runtime"):
            result = debias_study(out=tmp_path, **SMALL, methods=CHEAP)
    assert list(result.failures["error"]) == ["RuntimeError: out of luck"]
    assert result.table.set_index("method")["tv"].isna().to_dict() == {
        "biased": False, "reference_only": True, "fine_tuned": False,
    }  # fmt: skip
    assert result.summary()["seeds"].tolist() == [1, 0, 1]
    assert pd.read_csv(tmp_path / "study.csv")["error"].notna().sum() == 1
    computed.clear()
    again = debias_study(out=tmp_path, **SMALL, methods=CHEAP)
    assert computed == ["reference_only-d1-s0-n20"] and len(again.failures) == 0


def test_training_that_became_non_finite_is_a_failure(monkeypatch):
    original = study_cells.fine_tune

    def stopped(*args: Any, **options: Any) -> Any:
        vae, result = original(*args, **options)
        return vae, dataclasses.replace(result, stopped="non-finite loss")

    monkeypatch.setattr(study_cells, "fine_tune", stopped)
    with pytest.warns(TrainingWarning, match="training stopped after 10 epochs: non-finite loss"):
        result = debias_study(**SMALL, methods=("fine_tuned",))
    assert result.table["tv"].isna().all() if "tv" in result.table else True


def test_warnings_of_a_cell_are_its_notes(monkeypatch):
    from pyro_ebm.errors import InferenceWarning, warn_user

    original = study_cells._TRAIN["biased"]

    def doubtful(bench: Bench, cell: Cell) -> Any:
        warn_user("weights are not reliable", InferenceWarning)
        return original(bench, cell)

    monkeypatch.setitem(study_cells._TRAIN, "biased", doubtful)
    result = debias_study(**SMALL, methods=("biased",))
    assert result.table["notes"].item().startswith("weights are not reliable") and len(result.failures) == 0


# --------------------------------------------------------------------------------------- judging


def test_reference_sets_are_balanced_and_nested():
    found = bench(StudyConfig(**{**SMALL, "reference_sizes": (20, 53)}))
    labels = found.split.reference.labels

    def places(size: int) -> list[int]:
        images, all_images = found.reference(size).flatten(1), found.split.reference.images.flatten(1)
        return [int((all_images == image).all(1).nonzero()[0]) for image in images]

    small, large = places(20), places(53)
    assert labels[small].bincount().tolist() == [4] * 5 and labels[large].bincount().tolist() == [10] * 5
    assert set(small) < set(large)


def tilted(config: StudyConfig, a: list[float], seed: int) -> Any:
    """Draws of the prior of a VAE tilted by E = -a.z, and what is told of them."""
    with forked_rng(0):
        vae = VAE((1, 8, 8), len(a), hidden=(8,))
    data = SimpleNamespace(config=config, seed=seed)
    return study_cells._sample_tilted(data, vae, LinearEnergy(a))


@pytest.mark.parametrize(
    ("a", "sampler"), [([0.6, -0.8], "snis"), pytest.param([3.0, 4.0], "chees", marks=pytest.mark.slow)]
)
def test_a_linear_tilt_is_sampled_and_its_kl_is_known(a, sampler):
    """N(a, I) from N(0, I): KL and log Z are both |a|^2 / 2, whichever sampler it takes."""
    config = StudyConfig(**SMALL)
    kls, log_zs, means = [], [], []
    for seed in range(5):
        draws, log_z, facts = tilted(config, a, seed)
        assert facts["sampler"] == sampler
        kls.append(facts["kl"])
        log_zs.append(float(log_z.value))
        means.append((draws.weights[:, None] * draws.flat("z")).sum(0))
    kl, log_z, mean = torch.tensor(kls), torch.tensor(log_zs), torch.stack(means)
    exact = sum(x * x for x in a) / 2
    # Five runs have a t distribution with four degrees of freedom: 7.2 standard errors are what 4 are of a normal.
    for found in (kl, log_z):
        assert abs(found.mean() - exact) < 7.2 * found.std() / math.sqrt(5) + 1e-3 * exact
    assert ((mean.mean(0) - torch.tensor(a)).abs() < 7.2 * mean.std(0) / math.sqrt(5) + 1e-3).all()


@pytest.mark.parametrize(("a", "per_image"), [([0.6, -0.8], 10), ([1.2, 1.2], 50)])
def test_draws_are_worth_as_many_as_there_are_images(a, per_image):
    """N(a, I) from N(0, I): the effective share of the proposals is exp(-|a|^2), 0.37 and 0.056."""
    config = StudyConfig(**SMALL)
    draws, _, facts = tilted(config, a, 0)
    assert draws.weights.numel() == per_image * config.num_generated
    assert facts["proposal_ess"] * draws.weights.numel() >= config.num_generated
    assert facts["proposal_ess"] == pytest.approx(math.exp(-sum(x * x for x in a)), rel=0.3)


# -------------------------------------------------------------------------------------- settings


def test_defaults_follow_the_data():
    digits, mnist, quick = StudyConfig(), StudyConfig(data="mnist"), StudyConfig(quick=True)
    assert (digits.sizes, digits.dims, digits.seeds) == ((25, 105), (2, 10), (0, 1, 2))
    assert (mnist.sizes, mnist.dims) == ((50, 250, 1000, 3425), (2, 10, 32, 64))
    assert (quick.sizes, quick.dims, quick.seeds) == ((105,), (2,), (0,))
    assert len(digits.cells) == 3 * 2 * (2 + 4 * 2) and len(set(digits.cells)) == len(digits.cells)


def test_the_fingerprint_tells_settings_that_change_a_cell():
    base = StudyConfig()
    same = {"reference_sizes": (10,), "latent_dims": (3,), "seeds": (7,), "methods": ("tilt",), "progress": False,
            "data_root": "elsewhere"}  # fmt: skip
    for name, value in same.items():
        assert StudyConfig(**{name: value}).fingerprint == base.fingerprint, name
    other = {"data": "mnist", "fraction": 0.5, "proportions": (0.2,) * 5, "digits": (5, 6, 7, 8, 9), "quick": True}
    assert len({base.fingerprint, *(StudyConfig(**{k: v}).fingerprint for k, v in other.items())}) == 6


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reference_sizes": (9,)}, r"reference_sizes must be different numbers of at least 10, got \(9,\)"),
        ({"latent_dims": ()}, "latent_dims must be different numbers of at least 1"),
        ({"seeds": (1, 1)}, "seeds must be different numbers of at least 0"),
        ({"methods": ("tilt", "magic")}, "methods must be among"),
        ({"methods": ()}, "methods must be among"),
        ({"proportions": (0.5, 0.6)}, "proportions must have one entry per class"),
        ({"data": "cifar"}, "data must be one of"),
    ],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        debias_study(**settings)


def test_more_reference_images_than_there_are():
    with pytest.raises(ValueError, match="reference_sizes must be at most 105, the balanced reference images"):
        debias_study(**{**SMALL, "reference_sizes": (20, 110)})


def test_settings_twice():
    with pytest.raises(ValueError, match=r"give config or keywords, not both; got config and \['quick'\]"):
        debias_study(StudyConfig(), quick=True)


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot be written to"):
        debias_study(out=tmp_path / "file", **SMALL)
