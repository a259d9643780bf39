"""The command: its options, what it prints and writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pyro_ebm
from pyro_ebm import DebiasConfig, InferenceWarning, StudyConfig
from pyro_ebm.cli import app
from pyro_ebm.recipes.debias_config import Schedule

OPTIONS = """--data --data-root --digits --proportions --fraction --latent-dim --methods --num-samples --num-chains
--max-seconds --seed --device --out --resume --baselines --quick --progress""".split()


def invoke(*arguments: str) -> Any:
    environment = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1", "TERM": "dumb"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts the job."""

    def work(config: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("pyro_ebm.recipes.steps.load_split", work)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_help_lists_the_options():
    result = invoke("debias", "--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in OPTIONS:
        assert re.search(rf"{option}\b", text), option
    assert "digits, mnist, fashion_mnist, kmnist" in text
    assert "0.12,0.33,0.28,0.2,0.07" in text


@pytest.mark.parametrize(("command", "settings"), [("debias", DebiasConfig), ("debias-study", StudyConfig)])
def test_defaults_are_those_of_the_settings(monkeypatch, command, settings):
    """Whoever gives no option gets what Python's callers get."""
    given = []
    for function in ("debias.debias", "debias_study.debias_study"):
        monkeypatch.setattr(f"pyro_ebm.recipes.{function}", lambda config, **options: given.append(config) or 1 / 0)
    assert isinstance(invoke(command, "--progress").exception, ZeroDivisionError)
    assert given == [settings()]


def test_the_version_and_python_m():
    found = invoke("--version")
    assert found.exit_code == 0 and found.stdout == f"pyro-ebm {pyro_ebm.__version__}\n"
    found = subprocess.run(
        [sys.executable, "-m", "pyro_ebm", "--version"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (found.returncode, found.stdout) == (0, f"pyro-ebm {pyro_ebm.__version__}\n")


def test_the_command_names_its_jobs():
    result = invoke("--help")
    assert result.exit_code == 0 and "debias" in result.output
    assert invoke().exit_code in (0, 2) and "debias" in invoke().output


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from pyro_ebm.cli import app; "
        "assert CliRunner().invoke(app, ['debias', '--help']).exit_code == 0; "
        "print([name for name in ('torch', 'arviz', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert found.stdout.strip() == "[]"


def test_success_prints_the_tables_and_writes_the_files(tmp_path, monkeypatch):
    schedule = Schedule(hidden=(8,), vae_epochs=2, vae_batch=64, tilt_epochs=2, patience=2)
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, config: schedule))
    out = tmp_path / "out"
    arguments = "debias --quick --digits 1,2 --proportions 0.25,0.75 --methods snis,hmc --num-samples 100"
    result = invoke(*arguments.split(), "--seed", "5", "--fraction", "0.5", "--no-progress", "--out", str(out))
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert re.search(r"Images: biased \d+, reference \d+, test \d+, classifier \d+\. Label classifier: ", text)
    balance, samplers = text.split("Which sampler to trust")
    assert re.search(r"class 1 +class 2 +TV +TV low +TV high +chance +TV - chance +worth +images", balance)
    assert "its numbers mean nothing" in balance
    for source in ("biased_data", "prior", "snis", "hmc"):
        assert re.search(rf"^{source} +(\d\.\d+ +)", balance, flags=re.MULTILINE), source
    for row in ("prior snis", "prior hmc", "posterior snis", "posterior hmc"):
        assert re.search(r"^ *" + row.replace(" ", " +") + " ", samplers, flags=re.MULTILINE), row
    assert "verdict" in samplers and "worst_error_in_se" in samplers
    assert re.search(r"per balanced test image: base -\d+\.\d\d, tilted -\d+\.\d\d", samplers)
    assert re.search(r"among the trusted: (snis|hmc)\.", samplers)
    assert str(out / "report.html") in samplers
    assert result.stderr == ""
    settings = json.loads((out / "summary.json").read_text())["settings"]
    assert settings["digits"] == [1, 2] and settings["proportions"] == [0.25, 0.75]
    assert (settings["seed"], settings["fraction"], settings["num_samples"]) == (5, 0.5, 100)
    assert settings["methods"] == ["snis", "hmc"] and settings["quick"] and not settings["baselines"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("--data cifar", r"data must be one of \('digits', 'mnist'"),
        ("--digits 0,1,two", "--digits must be numbers separated by commas, got '0,1,two'"),
        ("--proportions 0.5;0.5", "--proportions must be numbers separated by commas, got '0.5;0.5'"),
        ("--proportions 0.2,0.2,0.2,0.2,0.1", "proportions must sum to 1"),
        ("--digits 0,1,2", r"proportions must have one entry per class in digits \(0, 1, 2\)"),
        ("--methods snis,gibbs", "methods must be among"),
        ("--methods ,", r"methods must be among .* got \(\)"),
        ("--num-samples 3", "num_samples must be at least 4 per chain, got 3"),
        ("--max-seconds 0", "max_seconds must be a positive number, got 0"),
        ("--device gpu", "device='gpu' is not available here .*; try 'cpu'"),
        ("--device meta", "device='meta' is not available here .*; try 'cpu'"),
        ("--resume --out /nowhere/at/all --data cifar", "data must be one of"),
        ("--latent-dim 0", "latent_dim must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options(tmp_path, arguments, match):
    result = invoke("debias", *arguments.split(), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert re.search(match, result.stderr) and result.stderr.startswith("error: ")
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_job_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(config: Any, *, out: Path, resume: bool) -> None:
        assert resume
        (out / "steps").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_ebm.recipes.debias.debias", stopped)
    result = invoke("debias", "--seed", "7", "--resume", "--out", str(tmp_path / "a"))
    assert result.exit_code == 130 and result.stdout == ""
    assert f"kept in {tmp_path / 'a' / 'steps'}. Go on with" in result.stderr
    assert f"pyro-ebm debias --seed 7 --out {tmp_path / 'a'} --resume" in result.stderr


def test_nothing_to_go_on_with(tmp_path):
    result = invoke("debias", "--resume", "--out", str(tmp_path / "a"))
    assert result.exit_code == 2 and "there is no job to go on with" in result.stderr
    assert not (tmp_path / "a").exists()


def test_an_option_that_does_not_exist():
    result = invoke("debias", "--sede", "3")
    assert result.exit_code == 2 and "--sede" in result.stderr


@pytest.mark.usefixtures("no_work")
def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    result = invoke("debias", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(r"error: out='.*file' cannot be written to .*; choose another folder", result.stderr)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("data", "folder"), [("mnist", "MNIST"), ("kmnist", "KMNIST")])
def test_missing_files_without_a_network(tmp_path, data, folder):
    arguments = ["--data", data, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    result = invoke("debias", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    message = re.sub(r"\s+", " ", result.stderr)
    assert f"{folder} is not complete in {tmp_path / 'data' / folder / 'raw'}" in message
    assert "train-images-idx3-ubyte" in message and "no network" in message
    assert "Try again on a machine with a network, or copy these four files into that folder" in message
    assert "; --data-root names another folder" in message and "download=" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["debias", "debias-study --reference-sizes 10"])
def test_a_rejected_run_leaves_no_folder(tmp_path, command):
    out = tmp_path / "new" / "folder"
    result = invoke(*command.split(), *"--digits 0,12 --proportions 0.5,0.5 --out".split(), str(out))
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()
    assert re.search(r"classes must be among the labels of digits.*unknown: \[12\]", result.stderr)


# --------------------------------------------------------------------------------- debias-study

STUDY_OPTIONS = """--data --data-root --digits --proportions --fraction --reference-sizes --latent-dims --seeds
--methods --out --quick --progress""".split()


def test_help_of_the_study_lists_the_options():
    result = invoke("debias-study", "--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in STUDY_OPTIONS:
        assert re.search(rf"{option}\b", text), option


def fake_study(error: str | None, infeasible: str | None = None) -> Any:
    """What a study of two seeds and one method would have found."""
    import pandas as pd

    from pyro_ebm import StudyConfig, StudyResult

    def run(config: Any, *, out: Any) -> Any:
        rows = [
            {"method": "biased", "latent_dim": 2, "seed": seed, "reference_size": 0, "error": why, "infeasible": no}
            | ({} if no else {"tv": tv})
            for seed, tv, why, no in ((0, 0.1, None, None), (1, 0.2, error, infeasible))
        ]
        assert isinstance(config, StudyConfig)
        return StudyResult(config, pd.DataFrame(rows))

    return run


def test_the_study_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_ebm.recipes.debias_study.debias_study", fake_study(None))
    result = invoke("debias-study", "--latent-dims", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert re.search(r"means over seeds", result.stdout)
    assert re.search(r"^ *2 +0 +biased +2 +0\.150 \+- 0\.050 +- ", result.stdout, flags=re.MULTILINE)
    assert str(tmp_path / "study.csv") in result.stdout and result.stderr == ""


def test_the_study_names_cells_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_ebm.recipes.debias_study.debias_study", fake_study("ValueError: too few"))
    result = invoke("debias-study", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "failed: biased, 2 dimensions, 0 images, seed 1: ValueError: too few" in result.stderr


def test_an_infeasible_cell_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_ebm.recipes.debias_study.debias_study", fake_study(None, "share of class 4"))
    result = invoke("debias-study", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 0 and result.stderr == ""
    assert "not possible: biased, 2 dimensions, 0 images, seed 1: share of class 4" in result.stdout
    assert re.search(r"^ *2 +0 +biased +1 +0\.100 ", result.stdout, flags=re.MULTILINE)
    assert "its numbers mean nothing" in result.stdout


def test_an_interrupted_study_says_how_to_continue(tmp_path, monkeypatch):
    def stopped(config: Any, *, out: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_ebm.recipes.debias_study.debias_study", stopped)
    result = invoke("debias-study", "--out", str(tmp_path))
    assert result.exit_code == 130 and "the same command continues" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("--seeds 0,one", "--seeds must be numbers separated by commas, got '0,one'"),
        ("--reference-sizes 5", r"reference_sizes must be different numbers of at least 10, got \(5,\)"),
        ("--latent-dims 2,2", "latent_dims must be different numbers of at least 1"),
        ("--methods tilt,magic", "methods must be among"),
    ],
)
def test_bad_options_of_the_study(tmp_path, arguments, match):
    result = invoke("debias-study", *arguments.split(), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert re.search(match, result.stderr) and result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
