"""Every notebook runs from top to bottom, in a small mode (its kernel sees PYRO_EBM_QUICK=1).

As a script, `python tests/test_notebooks.py notebooks/*.ipynb`, it runs them in full and keeps their outputs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 600
MAX_BYTES = 1_000_000


def execute(path: Path, *, folder: Path, environment: dict[str, str]):
    """Run a notebook's cells in `folder` with the interpreter of this process; return it with outputs."""
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient import NotebookClient

    class ThisInterpreter(KernelSpecManager):
        # an installed "python3" kernel may belong to another environment
        def get_kernel_spec(self, kernel_name):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    search_path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    # the figures of a notebook are inline, whatever backend the tests use
    inherited = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYRO_EBM_QUICK")}
    client.execute(cleanup_kc=True, env=inherited | {"PYTHONPATH": search_path} | environment)
    return notebook


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no .ipynb file"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    execute(path, folder=tmp_path, environment={"PYRO_EBM_QUICK": "1"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_small_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and c["source"]]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs, "run `make notebooks`: readers on a code host see the outputs"
    assert not [o for o in outputs if o["output_type"] == "error"], "an output is an error"
    assert path.stat().st_size <= MAX_BYTES, "too large for a repository: fewer or smaller pictures"


def test_a_failing_cell_fails(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "bad.ipynb"
    cells = [
        nbformat.v4.new_code_cell("import os, sys, pyro_ebm; assert os.environ['PYRO_EBM_QUICK'] == '1'"),
        nbformat.v4.new_code_cell(f"assert sys.executable == {sys.executable!r}"),
        nbformat.v4.new_code_cell("raise RuntimeError('red')"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(CellExecutionError, match="raise RuntimeError"):
        execute(path, folder=tmp_path, environment={"PYRO_EBM_QUICK": "1"})


def main(paths: list[str]) -> None:
    """Execute notebooks in full and write them back with their outputs."""
    import nbformat

    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder=Path(folder), environment={})
        nbformat.write(notebook, path)
        print(f"{path}: {len(notebook.cells)} cells, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
