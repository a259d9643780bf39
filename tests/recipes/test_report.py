"""The report is one file that needs nothing else, and shows what it was given on any screen and on paper."""

from __future__ import annotations

import base64
import fnmatch
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pyro_ebm.recipes.report import Cell, Figure, Headline, Report, Row, Section, Table, number, write_report

ROOT = Path(__file__).parents[2]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TABLE = Table(
    "Samplers",
    ["verdict", "draws"],
    [Row("snis", [Cell("ok", "ok"), Cell("4,000")]), Row("nuts", [Cell("r_hat 1.04", "bad"), Cell("-")], "of Pyro")],
    note="What it means.",
    corner="sampler",
)


@pytest.fixture
def figure(tmp_path: Path) -> Figure:
    path = tmp_path / "pixel.png"
    path.write_bytes(PIXEL)
    return Figure(path, "A pixel", "One point, in gray")


def write(tmp_path: Path, **parts: Any) -> str:
    path = tmp_path / "report.html"
    assert write_report(path, Report(**{"title": "Balanced digits"} | parts)) == path
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Tags, attributes and addresses of a page; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.found]

    @property
    def addresses(self) -> list[str]:
        return [attributes[key] or "" for _, attributes in self.found for key in ("src", "href") if key in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(tmp_path: Path, figure: Figure) -> None:
    sections = [Section("Pictures", figures=[figure, figure._replace(path=str(figure.path))], tables=[TABLE])]
    page = write(tmp_path, sections=sections, story=["Done."], settings={"a": 1})
    tags = Tags(page)
    assert tags.names.count("img") == 2 and not {"script", "link", "iframe"} & set(tags.names)
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|url\(|@import", page)
    assert base64.b64decode(tags.addresses[0].split(",")[1]) == PIXEL
    assert page.startswith("<!DOCTYPE html>") and tags.names.count("main") == 1


def test_everything_said_is_shown_in_order(tmp_path: Path, figure: Figure) -> None:
    page = write(
        tmp_path,
        notices=["The numbers mean nothing."],
        story=["A VAE was trained."],
        provenance={"Command": "pyro-ebm debias"},
        headlines=[Headline("0.036", "distance from balance")],
        sections=[Section("Samplers", ["Some text."], {"snis": "importance sampling"}, [figure], [TABLE])],
        settings={"seed": 3, "tv": {"prior": 0.2}, "sizes": [1, 2.5], "unknown": None},
    )
    shown = [
        "<h1>Balanced digits</h1>", "The numbers mean nothing.", "A VAE was trained.", "pyro-ebm debias",
        "<b>0.036</b>", "Some text.", "importance sampling", 'alt="One point, in gray"', "A pixel</figcaption>",
        "<caption>Samplers</caption>", "4,000</td>", "What it means.", ">seed</code>", ">tv.prior</code>",
        "<td>1, 2.5</td>", "<td>-</td>",
    ]  # fmt: skip
    places = [page.find(text) for text in shown]
    assert -1 not in places and places == sorted(places), dict(zip(shown, places, strict=True))


def test_tables_name_their_heads_and_label_every_cell(tmp_path: Path) -> None:
    """On a narrow screen rows are cards: each cell then has its column's name beside it."""
    tags = Tags(write(tmp_path, sections=[Section("Samplers", tables=[TABLE])], settings={"seed": 0}))
    assert all(attributes.get("scope") in ("col", "row") for name, attributes in tags.found if name == "th")
    cells = [attributes for name, attributes in tags.found if name == "td" and attributes.get("role") == "cell"]
    assert [cell["data-label"] for cell in cells] == ["verdict", "draws"] * 2
    assert [cell.get("class") for cell in cells] == ["ok", None, "bad", None]
    assert all(attributes.get("alt") for name, attributes in tags.found if name == "img")


def test_pictures_keep_their_place_before_they_are_loaded(tmp_path: Path, figure: Figure) -> None:
    wide = tmp_path / "wide.png"
    header = PIXEL[:16] + (1500).to_bytes(4, "big") + (600).to_bytes(4, "big")
    wide.write_bytes(header + PIXEL[24:])
    figures = [figure, Figure(wide, "wide", "a wide one")]
    tags = Tags(write(tmp_path, sections=[Section("Pictures", figures=figures)]))
    sizes = [(a["width"], a["height"]) for name, a in tags.found if name == "img"]
    assert sizes == [("1", "1"), ("1000", "400")]
    assert [a.get("class") for name, a in tags.found if name == "figure"] == [None, "wide"]


@pytest.mark.parametrize("needed", ["prefers-color-scheme: dark", "@media print", "max-width: 46rem"])
def test_style_knows_dark_screens_narrow_ones_and_paper(tmp_path: Path, needed: str) -> None:
    assert needed in write(tmp_path)


def test_everything_is_escaped(tmp_path: Path, figure: Figure) -> None:
    evil = "<script>alert('x')</script>\"&"
    table = Table(evil, [evil], [Row(evil, [Cell(evil, "bad")], evil)], evil, evil)
    page = write(
        tmp_path,
        title=evil,
        notices=[evil],
        story=[evil],
        provenance={evil: evil},
        headlines=[Headline(evil, evil)],
        sections=[Section(evil, [evil], {evil: evil}, [figure._replace(caption=evil, alt=evil)], [table])],
        settings={evil: evil},
    )
    assert "script" not in Tags(page).names
    assert "&lt;script&gt;" in page


def test_a_report_may_hold_little(tmp_path: Path) -> None:
    assert not {"table", "dl", "ul", "section"} & {*Tags(write(tmp_path)).names}


def test_figures_must_exist_and_be_png(tmp_path: Path) -> None:
    def of(name: str) -> list[Section]:
        return [Section("Pictures", figures=[Figure(tmp_path / name, "gone", "nothing")])]

    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write(tmp_path, sections=of("none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="figures must be PNG files"):
        write(tmp_path, sections=of("text.png"))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0432, "1.043"), (4000, "4,000"), (float("nan"), "-"), (None, "-"), (0.00471, "0.00471"), ("smc", "smc")],
)
def test_numbers_are_rounded_for_reading(value: Any, text: str) -> None:
    assert number(value) == text


def test_an_installed_package_has_the_files_that_are_no_modules() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["pyro_ebm"]
    package = ROOT / "pyro_ebm"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    others = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert "recipes/report.html.jinja" in others
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
