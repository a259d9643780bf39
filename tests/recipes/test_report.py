"""The report is one file that needs nothing else, and shows what it was given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pyro_ebm.recipes.report import write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SUMMARY: dict[str, Any] = {
    "data": "digits",
    "seed": 3,
    "tv": {"biased_data": 0.21, "prior": 0.2294, "snis": 0.0321},
    "log_z": {"value": 0.731, "se": 0.004},
    "importance": {"ess_fraction": 0.44, "pareto_k": 0.31},
    "test_log_likelihood": {"base": -142.3, "tilted": -141.1},
    "class_proportions": {"prior": [0.1, 0.9]},
    "seconds": {"total": 41.7},
}
COMPARISON = pd.DataFrame(
    {
        "draws": [4000, 2000],
        "pareto_k": [float("nan")] * 2,
        "r_hat": [float("nan"), 1.0432],
        "verdict": ["ok", "r_hat above 1.01"],
    },
    index=pd.Index(["snis", "nuts"], name="method"),
)
BALANCE = pd.DataFrame({"0": [0.1, 0.49], "1": [0.9, 0.51], "TV": [0.4, 0.01]}, index=["prior", "snis"])


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    path = tmp_path / "pixel.png"
    path.write_bytes(PIXEL)
    return path


def write(tmp_path: Path, **changes: Any) -> str:
    parts: dict[str, Any] = {
        "title": "Balanced digits",
        "summary": SUMMARY,
        "comparison": COMPARISON,
        "balance_table": BALANCE,
        "figures": [],
    }
    path = tmp_path / "report.html"
    assert write_report(path, **(parts | changes)) == path
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Tags and addresses of a page; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(tmp_path: Path, figure: Path) -> None:
    page = write(tmp_path, figures=[("A pixel", figure), ("Again", str(figure))])
    tags = Tags(page)
    assert tags.names.count("img") == 2 and not {"script", "link", "iframe"} & set(tags.names)
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|url\(|@import", page)
    assert base64.b64decode(tags.addresses[0].split(",")[1]) == PIXEL


def test_page_shows_headlines_tables_verdicts_and_settings(tmp_path: Path) -> None:
    page = write(tmp_path)
    for text in ("0.229", "0.032", "+1.2 nats", "0.731 ± 0.004", "44 %", "42 s"):
        assert f"<b>{text}</b>" in page
    assert '<td class="verdict ok">ok</td>' in page
    assert '<td class="verdict bad">r_hat above 1.01</td>' in page
    assert page.index("<th>verdict</th>") < page.index("<th>draws</th>")
    assert "<td>1.043</td>" in page and "<td>4,000</td>" in page and "<td>-</td>" in page
    assert "below 1.01 they agree" in page and "<th>pareto_k</th>" not in page
    assert '<th>class_proportions.prior</th><td class="text">0.1, 0.9</td>' in page
    assert '<th>seed</th><td class="text">3</td>' in page


def test_everything_is_escaped(tmp_path: Path, figure: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    frame = pd.DataFrame({evil: [evil], "verdict": [evil]}, index=[evil])
    page = write(
        tmp_path,
        title=evil,
        summary={evil: evil, "tv": {evil: 0.1}},
        comparison=frame,
        balance_table=frame,
        figures=[(evil, figure)],
    )
    assert "script" not in Tags(page).names
    assert "&lt;script&gt;" in page


def test_summary_may_hold_little(tmp_path: Path) -> None:
    Tags(write(tmp_path, summary={"tv": {}, "log_z": None}))


def test_figures_must_exist_and_be_png(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write(tmp_path, figures=[("gone", tmp_path / "none.png")])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="figures must be PNG files"):
        write(tmp_path, figures=[("text", tmp_path / "text.png")])
    assert not (tmp_path / "report.html").exists()
