"""A type checker sees the public names: `__init__.pyi` states them all, and they have types.

`python tests/test_typing.py` writes `__init__.pyi` anew from the table in `__init__.py`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_ebm

ROOT = Path(__file__).parents[1]
STUB = ROOT / "pyro_ebm" / "__init__.pyi"
PROGRAM = ROOT / "tests" / "typed_program.py"
COMMAND = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "--no-error-summary"]


def stub(exports: dict[str, list[str]]) -> str:
    """The text of `__init__.pyi`: every name of the table, imported from its module; `__all__` exports it."""
    lines = ['"""Names and types for checkers; written by `python tests/test_typing.py` from `__init__.py`."""', ""]
    for module, names in sorted(exports.items()):
        lines.append(f"from pyro_ebm.{module} import (")
        lines += [f"    {name}," for name in sorted(names, key=_isort_key)]
        lines.append(")")
    public = ["__version__", *sorted(name for names in exports.values() for name in names)]
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in public), "]", "", "__version__: str", ""]
    return "\n".join(lines)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts imports."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def checked(*files: Path) -> list[str]:
    """What mypy --strict says about the files."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    done = subprocess.run([*COMMAND, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_stub_states_every_public_name():
    fix = "run `python tests/test_typing.py`, which writes pyro_ebm/__init__.pyi from the table in __init__.py"
    assert STUB.read_text() == stub(pyro_ebm._EXPORTS), fix


@pytest.mark.slow
def test_a_checker_accepts_the_program_and_finds_mistakes(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from pyro_ebm import tild\n"
        "from pyro_ebm import VAE, Draws, importance, sample, tilt\n"
        "vae = VAE((8, 8), latent_dim='2')\n"
        "draws: Draws = sample(vae.model, method=7)\n"
        "draws.num_chain\n"
        "shares: int = importance(vae.model).weights\n"
        "tilt(vae.model, 3.0)\n"
    )
    faults = [line.split(":")[:2] for line in checked(PROGRAM, wrong) if " note: " not in line]
    # By name: from its cache mypy reports the folder of an earlier run
    assert [(Path(file).name, int(line)) for file, line in faults] == [("wrong.py", n) for n in (1, 3, 4, 5, 6, 7)]


if __name__ == "__main__":
    STUB.write_text(stub(pyro_ebm._EXPORTS))
