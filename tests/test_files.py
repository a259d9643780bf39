"""Files that appear whole or not at all, by every writer of the library."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_ebm import (
    VAE,
    CheckpointError,
    Draws,
    LinearEnergy,
    fit,
    load_arviz,
    load_weights,
    save_arviz,
    save_weights,
    to_arviz,
)
from pyro_ebm import files as module
from pyro_ebm.files import replacing, require_writable, write_whole
from pyro_ebm.recipes.debias_figures import _save
from pyro_ebm.recipes.job_folder import JobFolder
from pyro_ebm.recipes.report import Report, write_report
from pyro_ebm.recipes.study_config import Cell
from pyro_ebm.recipes.study_store import StudyStore

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("content", ["a\nline of \u00e4\u00f6\u00fc\r\n", b"\x00\xffbytes"], ids=["text", "bytes"])
def test_text_and_bytes_are_written_as_they_are(content, tmp_path):
    path = tmp_path / "a folder" / "with another" / "file"
    for _ in range(2):  # the second replaces the first
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["file"]


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def learn(folder: Path) -> None:
    vae, data = VAE((2,), 1, hidden=(2,)), torch.rand(8, 2)
    fit(vae.model, vae.guide, data, epochs=1, seed=0, progress=False, validation=None, checkpoint=folder / "run.pt")


def draw(folder: Path) -> None:
    save_arviz(to_arviz(Draws({"mu": torch.randn(2, 5)}, "nuts")), folder / "draws.nc")


def figure(folder: Path) -> None:
    drawn = Figure().subplots()
    _save(lambda: drawn, folder / "figure.png")


def step(folder: Path) -> None:
    job = JobFolder(None, {}, 0, resume=False)
    job.folder = folder
    job._keep("stage", "numbers", torch.ones(2), 1.0)


def cell(folder: Path) -> None:
    StudyStore(folder, "f").keep_row(Cell("biased", 2, 0, 0), {"tv": 0.5})


# Whoever writes a file: each writes one into a folder.
WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda folder: write_whole(folder / "file", "new"),
    "save_weights": lambda folder: save_weights(LinearEnergy([1.0, 2.0]), folder / "w.pt"),
    "fit": learn,
    "save_arviz": draw,
    "report": lambda folder: write_report(folder / "report.html", Report("Title")),
    "figure": figure,
    "step": step,
    "study cell": cell,
    "study vae": lambda folder: StudyStore(folder, "f").keep_vae(VAE((2,), 1, hidden=(2,)), 0),
}


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_write_that_fails_leaves_the_old_file(write, tmp_path, monkeypatch):
    write(tmp_path)
    before = found(tmp_path)
    assert len(before) == 1
    for owner, name in ((os, "fsync"), (Path, "replace"), (os, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            with pytest.raises((OSError, CheckpointError), match="cannot write .*No space left on device; choose"):
                write(tmp_path)
        assert found(tmp_path) == before, name


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_permissions_stay_and_links_are_followed(write, tmp_path):
    there, away = tmp_path / "there", tmp_path / "away"
    there.mkdir()
    write(there)
    (path,) = (each for each in there.rglob("*") if each.is_file())
    mine = away / path.name
    away.mkdir()
    path.rename(mine)
    mine.write_bytes(b"old")
    mine.chmod(0o640)
    path.symlink_to(mine)
    write(there) if path.suffix != ".pt" or path.name != "run.pt" else learn(there)
    assert path.is_symlink() and os.listdir(away) == [path.name]
    assert mine.read_bytes() != b"old" and stat.S_IMODE(mine.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_that_files_have(tmp_path):
    write_whole(tmp_path / "ours", "")
    (tmp_path / "other").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new" / "target")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new" / "target").read_text() == "text"


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """What is no file. The device is a terminal of the test's own: one that fails must not harm the machine."""
    ends = os.openpty()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "device").symlink_to(os.ttyname(ends[1]))
    yield {name: tmp_path / name for name in ("pipe", "folder", "circle", "device")}
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("name", ["pipe", "folder", "circle", "device"])
def test_what_is_no_file_is_refused_and_stays(name, special):
    path = special[name]
    before = path.lstat()
    writers = (
        lambda: write_whole(path, "new"), lambda: require_writable(path), lambda: save_weights(nn.Linear(1, 1), path),
        lambda: save_arviz(to_arviz(Draws({"mu": torch.randn(2, 5)}, "nuts")), path),
    )  # fmt: skip
    for write in writers:
        with pytest.raises((OSError, CheckpointError), match=f"cannot write .*{name}: it is a .*; choose a file"):
            write()
    assert path.lstat() == before and (name != "device" or stat.S_ISCHR(path.stat().st_mode))


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Whoever knows the name beside the file cannot have another file overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = []
    monkeypatch.setattr(module.secrets, "token_hex", lambda size: names.append(size) or "known")
    (tmp_path / ".pyro_ebm-known.pt").symlink_to(victim)
    with pytest.raises(OSError, match="cannot write .*w.pt: File exists"):
        write_whole(tmp_path / "w.pt", "new")
    assert victim.read_text() == "precious" and min(names) >= 8
    monkeypatch.undo()
    with replacing(tmp_path / "w.pt") as one, replacing(tmp_path / "w.pt") as other:
        assert one != other and one.suffix == ".pt"
        one.write_text("one")
        other.write_text("other")


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "old"


def test_many_threads_write_one_file(tmp_path):
    """Each call succeeds, and what is there afterwards is what one of them wrote."""
    path, errors = tmp_path / "w.pt", []

    def save(number: int) -> None:
        try:
            for _ in range(5):
                save_weights(LinearEnergy(torch.full((2000,), float(number))), path)
        except Exception as error:  # of any kind
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    energy = LinearEnergy(torch.zeros(2000))
    load_weights(energy, path)
    assert not errors and len(energy.a.unique()) == 1 and os.listdir(tmp_path) == ["w.pt"]


def test_weights_are_the_same_bytes_wherever_they_lie(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_weights(LinearEnergy(torch.ones(3)), tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize(
    "path, error", [("", ValueError), ("a\0b", ValueError), (None, TypeError), (b"x", TypeError), (3, TypeError)]
)
def test_paths_that_are_none_are_named(path, error, tmp_path):
    tree = to_arviz(Draws({"mu": torch.randn(2, 5)}, "nuts"))
    energy = LinearEnergy([1.0])
    for call in (
        lambda: write_whole(path, ""), lambda: save_weights(energy, path), lambda: load_weights(energy, path),
        lambda: save_arviz(tree, path), lambda: load_arviz(path),
    ):  # fmt: skip
        with pytest.raises(error, match="path must be"):
            call()


# ------------------------------------------------------------------- what cannot be loaded again


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(
    "made, named",
    [
        (lambda: Extra({"deep": [object()]}), "entry 0 of entry 'deep' of entry '_extra_state' of entry 'weights'"),
        (lambda: Extra(lambda: 3), "'_extra_state'"),
        (lambda: Extra({"a": Path("x")}), "'a' of entry '_extra_state'"),
        (lambda: nn.LazyLinear(3), "'weight' of the LazyLinear holds no numbers yet"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' of the Linear holds no numbers yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_weights_that_would_not_come_back_are_not_saved(made, named, tmp_path):
    path = tmp_path / "w.pt"
    save_weights(nn.Linear(1, 1), path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"cannot write .*w.pt: .*{named}"):
        save_weights(made(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.pt"]


def test_weights_of_every_kind_come_back(tmp_path):
    module = nn.Module()
    kinds = {
        "nan": torch.tensor([float("nan"), 1.0]), "empty": torch.zeros(0), "complex": torch.ones(2, dtype=torch.cfloat),
        "float16": torch.ones(2).half(), "scalar": torch.tensor(3),
        "view": torch.arange(6.0)[::2],
    }  # fmt: skip
    for name, value in kinds.items():
        module.register_buffer(name, value)
    save_weights(module, tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")


# ----------------------------------------------------------------------------------- the rule


_WRITES = {"write_text", "write_bytes", "savefig", "save", "savez", "dump", "to_netcdf", "to_json", "to_pickle"}
# In memory, or by way of write_whole.
_HARMLESS = ("run.save(", "torch.save(value, buffer", "data.to_netcdf(None")


def writes_outside(source: str) -> list[str]:
    """Calls that write to a path and do not stand in a `with replacing(...)`."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and any("replacing(" in ast.unparse(item) for item in block.items)
        for node in ast.walk(block)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in inside]
    return [ast.unparse(call) for call in calls if _writes(call)]


def _writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    text = ast.unparse(call)
    if name in ("open", "fdopen"):
        return any(isinstance(arg, ast.Constant) and str(arg.value)[:1] in "wax" for arg in call.args)
    if name == "to_csv":
        return bool(call.args)
    return name in _WRITES and not text.startswith(_HARMLESS)


@pytest.mark.parametrize("path", sorted((ROOT / "pyro_ebm").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_written_in_another_way(path):
    if path.name != "files.py":
        assert writes_outside(path.read_text()) == []


def test_the_rule_sees_writers():
    bad = 'path.write_text("x")\nopen(p, "w")\ntable.to_csv(path)\nfigure.savefig(path)\ntorch.save(x, path)'
    assert len(writes_outside(bad)) == 5
    assert writes_outside('with replacing(p) as t:\n    t.write_text("x")\ntable.to_csv(index=False)\nopen(p)') == []


# ------------------------------------------------------------------------------ a disk that is full


_FULL = """
import resource, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, "tests")
import test_files
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name, write in test_files.WRITERS.items():
    (folder / name).mkdir()
    write(folder / name)
before = test_files.found(folder)
smallest = min(len(content) for name, content in before.items())
resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
failed = 0
for name, write in test_files.WRITERS.items():
    try:
        write(folder / name)
    except Exception as error:
        failed += "cannot write" in str(error)
assert failed == len(test_files.WRITERS), failed
assert test_files.found(folder) == before
print("all kept")
"""


@pytest.mark.slow
def test_a_file_system_that_refuses_bytes_loses_no_file_and_no_interpreter(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "all kept", done.stderr
