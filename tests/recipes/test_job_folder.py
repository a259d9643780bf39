"""A job that is interrupted anywhere goes on to the same numbers; what it kept belongs to it alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from pyro_ebm import CheckpointError, Draws, TrainingWarning
from pyro_ebm.estimates import BoundedEstimate, Estimate
from pyro_ebm.inference.importance import LogLikelihood
from pyro_ebm.recipes import debias as module
from pyro_ebm.recipes import outputs, steps
from pyro_ebm.recipes.debias import debias
from pyro_ebm.recipes.debias_config import Schedule
from pyro_ebm.recipes.job_folder import JobFolder, _packed, _unpacked, results_folder
from pyro_ebm.recipes.result import DebiasResult
from pyro_ebm.training.fit import FitResult
from pyro_ebm.training.run import Run

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "quick": True, "num_samples": 100, "num_chains": 2, "progress": False, "methods": ("chees",), "latent_dim": 3,
}  # fmt: skip
# After so few draws chains disagree.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.InferenceWarning")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four epochs of each training; results are not written."""
    schedule = Schedule(hidden=(8,), vae_epochs=4, vae_batch=128, tilt_epochs=4, patience=4)
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, config: schedule))
    monkeypatch.setattr(module, "write_results", lambda result, folder: None)


@pytest.fixture(scope="module")
def whole() -> DebiasResult:
    """The job without a folder and without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        schedule = Schedule(hidden=(8,), vae_epochs=4, vae_batch=128, tilt_epochs=4, patience=4)
        patch.setattr(Schedule, "of", classmethod(lambda cls, config: schedule))
        return debias(**SMALL)


def same(one: DebiasResult, other: DebiasResult) -> bool:
    """Whether all numbers but seconds are the same, to the last bit."""
    numbers = []
    for result in (one, other):
        summary = {name: value for name, value in result.summary.items() if name not in ("seconds", "mcmc")}
        numbers.append(json.dumps(summary))
    tables = [result.comparison.drop(columns=["seconds", "ess_per_second"]) for result in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    weights = zip(one.vae.parameters(), other.vae.parameters(), strict=True)
    return numbers[0] == numbers[1] and all(torch.equal(a, b) for a, b in weights)


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Ctrl-C at the n-th call of a function."""
    function, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def half_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while chains run: the sampler alone would return the draws so far."""
    sample = steps.sample

    def interrupted(*args: Any, **kwargs: Any) -> Draws:
        draws = sample(*args, **kwargs)
        return dataclasses.replace(draws, notes={**draws.notes, "interrupted": True})

    monkeypatch.setattr(steps, "sample", interrupted)


_SAMPLED = ["vae", "tilt", "prior_chees", "posterior_chees"]
STAGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[str]]] = {
    "classifier": (lambda patch: interrupt(patch, module.LabelClassifier, "fit", 1), []),
    "vae": (lambda patch: interrupt(patch, Run, "one_epoch", 3), []),
    "tilt": (lambda patch: interrupt(patch, Run, "one_epoch", 6), ["vae"]),
    "sampling": (half_sampled, ["vae", "tilt"]),
    "labels": (lambda patch: interrupt(patch, steps, "prior_labels", 1), _SAMPLED),
    "comparison": (
        lambda patch: interrupt(patch, module, "compare", 2),
        [*_SAMPLED, "labels_prior", "likelihood_base", "likelihood_tilted"],
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_job_stops_and_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch, stage):
    breaks, finished = STAGES[stage]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        breaks(patch)
        debias(out=tmp_path, **SMALL)
    kept = {path.stem for path in (tmp_path / "steps").glob("*.pt")}
    assert kept == {*finished, *([f"{stage}.checkpoint"] if stage in ("vae", "tilt") else [])}
    result = debias(out=tmp_path, resume=True, **SMALL)
    assert list(result.resumed) == finished
    assert same(result, whole)
    # And once more: there is nothing left to compute.
    monkeypatch.setattr(steps, "sample", lambda *args, **kwargs: pytest.fail("sampled again"))
    monkeypatch.setattr(Run, "one_epoch", lambda run: pytest.fail("trained again"))
    assert same(debias(out=tmp_path, resume=True, **SMALL), whole)


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    epochs: list[int] = []
    one_epoch = Run.one_epoch

    def watched(run: Run) -> None:
        epochs.append(run.progress.epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        one_epoch(run)

    monkeypatch.setattr(Run, "one_epoch", watched)
    with pytest.raises(KeyboardInterrupt):
        debias(out=tmp_path, **SMALL)
    debias(out=tmp_path, resume=True, **SMALL)
    assert epochs[:5] == [0, 1, 2, 2, 3]


@pytest.mark.slow
def test_an_interruption_while_results_are_written(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "write_results", outputs.write_results)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, outputs, "write_report", 1)
        debias(out=tmp_path, **SMALL)
    assert not (tmp_path / "report.html").exists()
    assert same(debias(out=tmp_path, resume=True, **SMALL), whole)
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------ whose steps these are


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a job that finished one step."""
    kept = JobFolder(tmp_path, {"seed": 0, "classes": (1, 2)}, 77, resume=False)
    assert kept.step("stage", "numbers", lambda: torch.arange(3)).tolist() == [0, 1, 2]
    return tmp_path


def opened(folder: Path, seed: int = 0, data: int = 77) -> JobFolder:
    return JobFolder(folder, {"seed": seed, "classes": (1, 2)}, data, resume=True)


def test_steps_are_read_again(folder):
    kept = opened(folder)
    assert kept.step("stage", "numbers", lambda: pytest.fail("computed again")).tolist() == [0, 1, 2]
    assert kept.resumed == ["numbers"] and kept.seconds["stage"] > 0


@pytest.mark.parametrize(
    ("change", "match"), [({"seed": 1}, "had seed=0, here it is 1"), ({"data": 78}, "had data=77, here it is 78")]
)
def test_a_job_of_other_settings_or_data_is_refused(folder, change, match):
    with pytest.raises(CheckpointError, match=f"{match}; go on with the settings and data it had, or start anew"):
        opened(folder, **change)
    opened(folder)  # and it is still there


@pytest.mark.parametrize("damage", [None, "{", '{"settings": 3}'])
def test_a_folder_without_a_job(tmp_path, damage):
    if damage is not None:
        (tmp_path / "steps").mkdir()
        (tmp_path / "steps" / "job.json").write_text(damage)
    with pytest.raises(CheckpointError, match="there is no job to go on with in out=.*; start one without resume"):
        opened(tmp_path)


def test_a_new_job_forgets_the_old_one(folder):
    kept = JobFolder(folder, {"seed": 0}, 77, resume=False)
    assert kept.step("stage", "numbers", lambda: torch.ones(1)).tolist() == [1.0] and kept.resumed == []


def test_a_damaged_step_is_computed_again(folder):
    path = folder / "steps" / "numbers.pt"
    path.write_bytes(path.read_bytes()[:-40])
    kept = opened(folder)
    with pytest.warns(TrainingWarning, match=r"numbers.pt cannot be used .*the step is computed again and the file"):
        assert kept.step("stage", "numbers", lambda: torch.ones(1)).tolist() == [1.0] and kept.resumed == []
    assert opened(folder).step("stage", "numbers", lambda: pytest.fail("again")).tolist() == [1.0]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"seconds": 1.0},
        {"seconds": "long", "value": 3},
        {"seconds": 1.0, "value": {"record": "System", "parts": {}}},
        {"seconds": 1.0, "value": {"record": "Draws", "parts": {"values": 3}}},
        {"seconds": 1.0, "value": {"no": "mapping"}},
    ],
    ids=str,
)
def test_a_step_of_another_content_is_computed_again(folder, payload):
    torch.save({"format": "pyro_ebm step", "version": 1, **payload}, folder / "steps" / "numbers.pt")
    kept = opened(folder)
    with pytest.warns(TrainingWarning, match=r"numbers.pt cannot be used"):
        assert kept.step("stage", "numbers", lambda: torch.ones(1)).tolist() == [1.0]


def test_a_new_job_takes_away_its_own_steps_and_nothing_else(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "mine.txt").write_text("mine")
    JobFolder(tmp_path, {"seed": 0}, 77, resume=False).step("stage", "numbers", lambda: torch.ones(1))
    JobFolder(tmp_path, {"seed": 1}, 77, resume=False)
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["job.json", "mine.txt"]


def test_weights_of_another_module_are_refused(tmp_path):
    result = FitResult([1.0], [], 1, 1, "epochs", 0.1, 0)
    kept = JobFolder(tmp_path, {}, 0, resume=False)
    kept.model("vae", nn.Linear(2, 3), lambda checkpoint: result)
    with pytest.raises(CheckpointError, match="does not fit this Linear"):
        JobFolder(tmp_path, {}, 0, resume=True).model("vae", nn.Linear(2, 4), lambda checkpoint: result)


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs out, the folder of the job to go on with, got None"):
        debias(resume=True)


def test_what_steps_return_comes_back_as_it_was():
    weights = torch.tensor([[0.25, 0.75]]).log()
    draws = Draws(
        {"z": torch.randn(1, 2, 3)}, "snis", {"lp": torch.randn(1, 2)}, log_weights=weights, pareto_k=0.3,
        log_z=Estimate(torch.tensor(1.0), torch.tensor(0.1)), dims={"z": ("latent",)}, seconds=2.0,
        notes={"ess": torch.tensor(1.5), "sizes": [1, 2], "why": None, "odd": math.inf},
    )  # fmt: skip
    bounded = BoundedEstimate(*torch.arange(4.0))
    likelihood = LogLikelihood(*torch.randn(5, 3))
    back, bounds, value, plain = _unpacked(_packed((draws, bounded, likelihood, {"a": [1, None]})))
    assert torch.equal(back.values["z"], draws.values["z"]) and torch.equal(back.log_weights, weights)
    assert back.log_z == draws.log_z and isinstance(back.log_z, Estimate) and back.dims == draws.dims
    assert back.notes == {**draws.notes, "ess": torch.tensor(1.5)} and (back.method, back.seconds) == ("snis", 2.0)
    assert isinstance(bounds, BoundedEstimate) and (bounds.lower, bounds.upper) == (2, 3)
    assert torch.equal(value.se, likelihood.se) and plain == {"a": [1, None]}


def test_a_refused_job_takes_its_empty_folders_away_and_no_others(tmp_path):
    (tmp_path / "there").mkdir()
    for out in ("there/new/folder", "there"):
        with pytest.raises(RuntimeError), results_folder(tmp_path / out):
            raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(RuntimeError), results_folder(tmp_path / "new") as folder:
        (folder / "kept").touch()
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]


# ------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_signals_end_the_command_and_resume_goes_on(tmp_path):
    command = [sys.executable, "-m", "pyro_ebm", *"debias --quick --methods snis --no-progress --out".split()]
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}

    def stopped(number: signal.Signals, after: str, *more: str) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen([*command, str(tmp_path / "a"), *more], stderr=subprocess.PIPE, **options)
        deadline = time.monotonic() + 120
        while not (tmp_path / "a" / "steps" / after).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, text = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, stderr=text)

    found = stopped(signal.SIGINT, "vae.checkpoint.pt")
    assert found.returncode == 130 and "--resume" in found.stderr
    assert stopped(signal.SIGKILL, "tilt.pt", "--resume").returncode == -signal.SIGKILL
    for more in ([str(tmp_path / "a"), "--resume"], [str(tmp_path / "b")]):
        subprocess.run([*command, *more], check=True, capture_output=True, **options)
    once, twice = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ba")
    for name in ("tv", "log_z", "test_log_likelihood", "class_proportions"):
        assert once[name] == twice[name]
