"""The whole job in small: what it returns, what it writes, what it refuses, and that a seed decides it."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from pyro_ebm import VAE, InferenceWarning, MLPEnergy, TiltedModel, load_arviz, load_weights
from pyro_ebm.inference.resampled import resampled
from pyro_ebm.recipes import steps
from pyro_ebm.recipes.debias import debias
from pyro_ebm.recipes.debias_config import DebiasConfig, Schedule
from pyro_ebm.recipes.result import DebiasResult

METHODS = ("snis", "chees", "nuts", "hmc")
SMALL: dict[str, Any] = {"quick": True, "num_samples": 100, "num_chains": 2, "progress": False}
FIGURES = {
    "class_balance",
    "comparison_posterior",
    "comparison_prior",
    "label_histograms",
    "prior_samples",
    "tilt_training",
    "tilted_samples",
    "training",
}
REAL = Path(os.environ.get("PYRO_EBM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def run(**settings: Any) -> DebiasResult:
    """The job; what it warns of is no matter after so little training and so few draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return debias(**{**SMALL, **settings})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of each training."""
    schedule = Schedule(hidden=(8,), vae_epochs=2, vae_batch=64, tilt_epochs=2, patience=2)
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, config: schedule))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[DebiasResult, Path]:
    """One quick run and its folder, which did not exist before."""
    out = tmp_path_factory.mktemp("job") / "new" / "folder"
    return run(out=out), out


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_folder_holds_every_file(job):
    _, out = job
    for name in ("summary.json", "comparison.csv", "draws.nc", "vae.pt", "energy.pt", "report.html"):
        assert (out / name).stat().st_size > 100, name
    pictures = {path.stem: path.read_bytes() for path in (out / "figures").iterdir()}
    assert pictures.keys() == FIGURES | {"energy_landscape", "latent_scatter", "overlay"}
    assert all(content.startswith(b"\x89PNG") and len(content) > 3000 for content in pictures.values())


def test_the_summary_has_every_number(job):
    result, out = job
    summary = strict_json((out / "summary.json").read_text())
    assert (summary["data"], summary["seed"], summary["latent_dim"]) == ("digits", 0, 2)
    assert summary["sizes"] == result.split.sizes
    sources = {"biased_data", "prior", *METHODS}
    for name in ("tv", "class_proportions", "tv_interval", "fairness_discrepancy", "tv_chance", "tv_without_chance"):
        assert summary[name].keys() == sources, name
    assert summary["log_z"].keys() == {"value", "se"}
    assert summary["importance"].keys() == {"ess_fraction", "pareto_k", "pareto_k_limit"}
    assert summary["mcmc"].keys() == {"chees", "nuts", "hmc"}
    for row in summary["mcmc"].values():
        assert row.keys() == {"r_hat", "ess_bulk", "divergences", "seconds"} and None not in row.values()
    assert summary["test_log_likelihood"].keys() == {"base", "tilted"}
    gained = summary["log_likelihood_gain"]["tilted"]
    found = summary["test_log_likelihood"]
    assert gained["value"] == pytest.approx(found["tilted"] - found["base"], abs=1e-4) and 0 < gained["se"] < 1
    assert {"vae", "tilt", "sampling", "total"} <= summary["seconds"].keys()
    assert summary["settings"]["proportions"] == [0.12, 0.33, 0.28, 0.2, 0.07]


def test_the_numbers_hang_together(job):
    result, _ = job
    summary = result.summary
    for name, proportions in summary["class_proportions"].items():
        assert sum(proportions) == pytest.approx(1, abs=1e-5)
        tv = sum(abs(p - 0.2) for p in proportions) / 2
        assert summary["tv"][name] == pytest.approx(tv, abs=1e-5)
        low, high = summary["tv_interval"][name]
        assert 0 <= low <= high <= 1
    asked = torch.tensor([0.12, 0.33, 0.28, 0.20, 0.07])
    found = torch.tensor(summary["class_proportions"]["biased_data"])
    assert (found - asked).abs().max() < 1 / summary["sizes"]["biased"]
    assert 0 < summary["importance"]["ess_fraction"] <= 1 and summary["importance"]["pareto_k"] < 0.7
    # The reference is exact.
    exact = float(result.references["prior"].log_z.value)
    assert abs(summary["log_z"]["value"] - exact) < 4 * summary["log_z"]["se"] and abs(exact) > 1e-3
    stages = {name: value for name, value in summary["seconds"].items() if name != "total"}
    assert summary["seconds"]["total"] == pytest.approx(sum(stages.values())) and min(stages.values()) >= 0
    assert summary["classifier_accuracy"] > 0.9
    assert result.split.classes == (0, 1, 2, 3, 4)


def test_one_seed_one_length_for_every_method(job):
    result, _ = job
    assert result.prior_draws.keys() == result.posterior_draws.keys() == set(METHODS)
    for method, draws in result.prior_draws.items():
        shape = {"snis": (1, 1000), "chees": (64, 50)}.get(method, (2, 50))
        assert draws.values["z"].shape == (*shape, 2)
    assert result.posterior_draws["nuts"].values["z"].shape == (2, 50, 1, 2)
    assert result.references.keys() == {"prior", "posterior"}


def test_the_comparison_has_a_row_for_each_target_and_method(job):
    result, out = job
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["method"]) for row in rows] == [
        (target, method) for target in ("prior", "posterior") for method in METHODS
    ]
    wanted = "draws chains ess_bulk ess_tail r_hat mcse_per_sd pareto_k divergences acceptance gradients "
    wanted += "seconds ess_per_second ess_per_gradient log_z log_z_se worst_error_in_se verdict"
    assert set(wanted.split()) <= rows[0].keys()
    assert all(row["verdict"] for row in rows)
    assert all(math.isfinite(float(row["worst_error_in_se"])) for row in rows)
    assert len(result.comparison) == 2 * len(METHODS)


def test_the_draws_load_again(job):
    result, out = job
    loaded = load_arviz(out / "draws.nc")
    z = loaded["posterior"]["z"]
    best = result.prior_draws[result.best_method]
    assert z.dims == ("chain", "draw", "latent")
    torch.testing.assert_close(torch.as_tensor(z.values), resampled(best).draws.values["z"])  # ArviZ reads no weights
    assert "lp" in loaded["sample_stats"]
    # Those of the other methods lie beside them.
    beside = {path.name for path in out.glob("draws_*.nc")}
    assert beside == {f"draws_{method}.nc" for method in METHODS if method != result.best_method}


def test_the_weights_load_into_fresh_modules(job):
    result, out = job
    vae, energy = VAE((1, 8, 8), 2, hidden=(64, 32)), MLPEnergy(2)
    load_weights(vae, out / "vae.pt")
    load_weights(energy, out / "energy.pt")
    z = torch.randn(5, 2)
    assert torch.equal(vae.decode(z).mean, result.vae.decode(z).mean)
    assert torch.equal(energy(z), result.energy(z))


def test_the_report_needs_nothing_else(job):
    result, out = job
    text = (out / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,30})""", text)
    assert len(sources) == len(FIGURES) + 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text.lower() and "@import" not in text and "url(" not in text
    for word in ("tilted prior", "biased training images", "verdict", *METHODS):
        assert word in text, word
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert len({*alts}) == len(sources) and min(map(len, alts)) > 60
    classes = sum(int(n) for n in re.findall(r"(\d+) times \d", alts[1]))
    assert "the classifier sees" in alts[1] and classes == 64
    assert not re.search(r">\s*nan\s*<", text, flags=re.IGNORECASE)


def test_the_tilted_prior_is_the_model_that_was_sampled(job):
    result, _ = job
    tilted = result.tilted_prior
    assert isinstance(tilted, TiltedModel) and tilted.energies["z"] is result.energy
    z = steps.prior_model(result.vae)()
    assert z.shape == (2,)


def test_the_best_method_is_the_fastest_of_those_to_trust(job):
    result, _ = job

    def best(**rows: tuple[str, float]) -> str:
        columns = {"target": "prior", "method": list(rows), "verdict": [v for v, _ in rows.values()]}
        frame = pd.DataFrame({**columns, "ess_per_second": [rate for _, rate in rows.values()]})
        other = frame.assign(target="posterior", verdict="ok", ess_per_second=1e9).tail(1)
        table = pd.concat([frame, other], ignore_index=True)
        return dataclasses.replace(result, comparison=table).best_method

    assert best(snis=("ok", 10.0), nuts=("ok", 20.0), hmc=("r_hat 1.2 > 1.01", 30.0)) == "nuts"
    assert best(snis=("bad", 10.0), nuts=("bad", 30.0), hmc=("bad", 20.0)) == "nuts"
    assert best(snis=("ok", math.nan), nuts=("bad", 30.0), hmc=("ok", 0.1)) == "hmc"


# ------------------------------------------------------------------------------- other settings


def without_seconds(result: DebiasResult) -> tuple[dict[str, Any], pd.DataFrame]:
    summary = {name: value for name, value in result.summary.items() if name != "seconds"}
    summary["mcmc"] = {
        method: {name: value for name, value in row.items() if name != "seconds"}
        for method, row in summary["mcmc"].items()
    }
    return summary, result.comparison.drop(columns=["seconds", "ess_per_second"])


@pytest.mark.slow
def test_the_seed_decides_everything(tiny, rng_untouched):
    with rng_untouched():
        first, again = (run(seed=3, methods=("snis", "hmc")) for _ in range(2))
        other = run(seed=4, methods=("snis",))
    assert json.dumps(without_seconds(first)[0]) == json.dumps(without_seconds(again)[0])
    pd.testing.assert_frame_equal(without_seconds(first)[1], without_seconds(again)[1], check_exact=True)
    for name in ("snis", "hmc"):
        assert torch.equal(first.prior_draws[name].values["z"], again.prior_draws[name].values["z"])
    assert first.summary["class_proportions"]["prior"] != other.summary["class_proportions"]["prior"]
    assert not torch.equal(first.split.biased.images, other.split.biased.images)


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"latent_dim": 1, "digits": range(2), "proportions": torch.tensor([0.25, 0.75])}, set()),
        ({"latent_dim": 3, "baselines": True}, {"latent_scatter", "overlay"}),
    ],
)
def test_other_latent_dimensions_baselines_and_classes(tiny, tmp_path, monkeypatch, settings, extra):
    monkeypatch.setitem(mpl.rcParams, "backend", "svg")  # as a notebook has its own
    result = run(out=tmp_path, methods=["snis"], **settings)
    assert mpl.rcParams["backend"] == "svg"
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == FIGURES | extra
    summary = strict_json((tmp_path / "summary.json").read_text())
    sources = {"biased_data", "prior", "snis"}
    if "baselines" in settings:
        baselines = {"reference_only", "fine_tuned"}
        sources |= baselines
        assert summary["test_log_likelihood"].keys() == {"base", "tilted", *baselines}
        assert "baselines" in summary["seconds"]
        assert summary["class_proportions"]["fine_tuned"] != summary["class_proportions"]["prior"]
    assert summary["tv"].keys() == summary["class_proportions"].keys() == sources
    assert summary["mcmc"] == {}
    assert bool(result.references) == (settings["latent_dim"] < 3)
    assert [path.name for path in tmp_path.glob("draws*.nc")] == ["draws.nc"]


def test_nothing_of_an_earlier_job_stays_behind_and_nothing_else_goes(tmp_path):
    from pyro_ebm.recipes.job_folder import results_folder
    from pyro_ebm.recipes.outputs import _remove_leftovers

    with results_folder(tmp_path) as folder:
        pass
    ours = [folder / "draws_nuts.nc", folder / "figures" / "energy_landscape.png"]
    theirs = [folder / "notes.txt", folder / "figures" / "mine.png"]
    for path in ours + theirs:
        path.write_text("x")
    _remove_leftovers(folder)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)


def test_the_base_is_not_touched_by_baselines(tiny):
    """Fine-tuning works on a copy."""
    plain, with_baselines = (run(methods=("snis",), baselines=b) for b in (False, True))
    for first, second in zip(plain.vae.parameters(), with_baselines.vae.parameters(), strict=True):
        assert torch.equal(first, second)
    assert plain.summary["tv"]["snis"] == with_baselines.summary["tv"]["snis"]


def test_log_z_is_known_without_importance_sampling_among_the_methods(tiny):
    result = run(methods=("hmc",), latent_dim=1)
    assert result.prior_draws.keys() == {"hmc"}
    assert result.best_method == "hmc"
    exact = float(result.references["prior"].log_z.value)
    found = result.summary["log_z"]
    assert abs(found["value"] - exact) < 4 * found["se"] + 1e-6
    assert result.summary["importance"]["ess_fraction"] > 0


def test_a_class_may_be_missing_from_the_biased_set(tiny):
    result = run(methods=("snis",), digits=(7, 3, 1), proportions=(0.0, 0.4, 0.6), latent_dim=1)
    assert result.split.classes == (1, 3, 7)
    assert result.summary["class_proportions"]["biased_data"] == pytest.approx([0.6, 0.4, 0.0], abs=0.01)


def write_idx(folder: Path, classes: int, num: int) -> None:
    """An MNIST look-alike: a bright row for each class, and noise."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % classes
    images = torch.randint(0, 60, (num, 28, 28), generator=generator)
    for label in range(classes):
        images[labels == label, 4 * label : 4 * label + 4] += 180
    for part in ("train", "t10k"):
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + bytes(values.flatten().tolist()))


@pytest.mark.parametrize(("data", "folder"), [("kmnist", "KMNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvision_sets(tiny, tmp_path, data, folder):
    write_idx(tmp_path / folder / "raw", classes=4, num=240)
    result = run(
        data=data, data_root=tmp_path, methods=("snis",), digits=(0, 1, 2), proportions=(0.2, 0.3, 0.5)
    )
    assert result.summary["data"] == data
    assert result.vae.event_shape == (1, 28, 28)
    assert result.summary["settings"]["data_root"] == str(tmp_path)
    assert sum(result.summary["sizes"].values()) == 180  # the fourth class is not asked for


# After three epochs a VAE puts some reference images where its prior has no mass.
@pytest.mark.filterwarnings("ignore:log Z rests on:pyro_ebm.TrainingWarning")
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason="needs the MNIST files")
def test_real_mnist(tmp_path):
    classes = {"digits": (3, 8), "proportions": (0.3, 0.7)}
    result = run(data="mnist", data_root=REAL, methods=("snis",), out=tmp_path, **classes)
    summary = strict_json((tmp_path / "summary.json").read_text())
    assert summary["sizes"]["biased"] > 3000 and summary["classifier_accuracy"] > 0.97
    assert summary["tv"]["biased_data"] == pytest.approx(0.2, abs=0.01)
    assert result.split.biased.images.shape[1:] == (1, 28, 28)
    assert -400 < summary["test_log_likelihood"]["base"] < -100


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"data": "cifar"}, r"data must be one of \('digits', 'mnist', .*, got 'cifar'"),
        ({"digits": (3,), "proportions": (1.0,)}, r"at least two different classes, got \(3,\)"),
        ({"digits": (3, 3), "proportions": (0.5, 0.5)}, r"at least two different classes, got \(3, 3\)"),
        ({"digits": range(6)}, r"proportions must have one entry per class in digits \(0, 1, 2, 3, 4, 5\)"),
        ({"proportions": (0.2, 0.2, 0.2, 0.2, 0.1)}, r"proportions must sum to 1 .*\(sum 0\.9\)"),
        ({"digits": (0, 1), "proportions": (1.2, -0.2)}, "not be negative"),
        ({"digits": (0, 1), "proportions": (math.nan, 0.5)}, r"must sum to 1 .*\(sum nan\)"),
        ({"methods": ("snis", "gibbs")}, r"methods must be among .* got \('snis', 'gibbs'\)"),
        ({"methods": ()}, r"methods must be among .* got \(\)"),
        ({"methods": ("nuts", "nuts")}, "each once, got"),
        ({"methods": "snis"}, "methods must be a sequence of names, got 'snis'"),
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
        ({"num_chains": 0}, "num_chains must be a whole number of at least 1, got 0"),
        ({"num_samples": 15, "num_chains": 4}, "num_samples must be at least 4 per chain, got 15"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, settings, match):
    with pytest.raises((ValueError, TypeError), match=match):
        debias(**settings, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fraction": 1.0}, "fraction must lie strictly between 0 and 1, got 1.0"),
        ({"fraction": 0.99}, "class 1 has too few examples left for the classifier set"),
        ({"digits": (0, 12), "proportions": (0.5, 0.5)}, r"classes must be among .* unknown: \[12\]"),
    ],
)
def test_settings_that_do_not_fit_the_data(settings, match):
    with pytest.raises(ValueError, match=match):
        run(**settings)


@pytest.mark.parametrize(("data", "number"), [("digits", 4000), ("mnist", 12000)])
def test_more_draws_where_there_are_more_data(data, number):
    assert DebiasConfig(data=data).num_samples == number
    assert DebiasConfig(data=data, num_samples=100).num_samples == 100


def test_settings_come_one_way():
    with pytest.raises(ValueError, match=r"give config or keywords, not both; got config and \['seed'\]"):
        debias(DebiasConfig(), seed=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        debias(sed=1)


@pytest.mark.parametrize("blocked", ["out", "out/figures", "parent"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch, blocked):
    def work(config: DebiasConfig) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(steps, "load_split", work)
    file = tmp_path / blocked
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    out = file / "out" if blocked == "parent" else tmp_path / "out"
    with pytest.raises(OSError, match=r"out='.*out' cannot be written to \(.*\); choose another folder"):
        debias(out=out)
    assert file.read_text() == "mine"


def test_data_that_are_not_there(tmp_path, monkeypatch):
    import urllib.request

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match=r"KMNIST is not complete in .* copy these four files"):
        run(data="kmnist", data_root=tmp_path)
