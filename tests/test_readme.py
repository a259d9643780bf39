"""The README and the pages beside it: short, and true as far as a program can tell."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import pyro_ebm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 1200
# Called or used in the pages, but not ours.
FOREIGN = {"NUTS", "Predictive", "Trace_ELBO"}


def names_in(text: str) -> set[str]:
    """Names in code that are called, or written like a class: `tilt(...)`, `MLPEnergy`; attributes are left out."""
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    called = re.findall(r"(?<![\w.])([a-z_]\w{3,})\(", code)  # longer than exp() and p()
    classes = re.findall(r"(?<![\w.])([A-Z][a-z]+[A-Z]\w*|[A-Z]{2,}[a-z]\w*)\b", code)
    return {*called, *classes}


def test_the_readme_is_short():
    assert len(README.split()) <= MAX_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text)
    local = [target for pair in targets for target in pair if target and not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_names_are_public(page):
    assert names_in(page.read_text(encoding="utf-8")) - {*pyro_ebm.__all__, *FOREIGN} == set()


def test_every_notebook_is_in_the_readme():
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {Path(name).name for name in re.findall(r"notebooks/\S+?\.ipynb", README)}


@pytest.mark.slow
def test_the_first_program_does_what_it_says():
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    rows = printed.getvalue().splitlines()
    verdicts = {row.split()[0]: row.split()[-1] for row in rows[-3:]}
    assert verdicts == {"snis": "ok", "chees": "ok", "smc": "ok"}
