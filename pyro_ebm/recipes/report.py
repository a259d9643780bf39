"""One HTML file that a colleague can open anywhere: text, pictures and tables, no scripts, no network."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pyro_ebm.files import write_whole

__all__ = ["Cell", "Figure", "Headline", "Report", "Row", "Section", "Table", "number", "write_report"]

_TEMPLATE = "report.html.jinja"
SCALE = 1.5  # pixels of a figure for each pixel of the page: sharp on fine screens and on paper
_WIDE = 700


class Headline(NamedTuple):
    """A number that sums up the job, and what it is."""

    value: str
    label: str


class Figure(NamedTuple):
    """A PNG file, what to know about it, and what is seen on it, for those who cannot see it."""

    path: str | Path
    caption: str
    alt: str


class Cell(NamedTuple):
    """A table's cell; ``mark`` is ``"ok"``, ``"bad"`` or empty."""

    text: str
    mark: str = ""


class Row(NamedTuple):
    """A table's row: its head, a note under the head, and its cells."""

    name: str
    cells: Sequence[Cell]
    note: str = ""


class Table(NamedTuple):
    """A table that becomes a list of cards on a narrow screen."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    corner: str = ""


class Section(NamedTuple):
    """A heading with text, words explained, pictures and tables below it, in this order."""

    title: str
    text: Sequence[str] = ()
    terms: Mapping[str, str] = MappingProxyType({})
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """What a report says.

    Args:
        title: heading of the page.
        story: paragraphs on what was done.
        notices: what a reader must know before any number, for example that a run was cut short.
        provenance: command, versions, date, ...: name -> text.
        headlines: the numbers that sum it up.
        sections: the rest, in order.
        settings: nested mapping, listed in full at the end.
    """

    title: str
    story: Sequence[str] = ()
    notices: Sequence[str] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    headlines: Sequence[Headline] = ()
    sections: Sequence[Section] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> Path:
    """Write a report as one self-contained HTML file.

    Args:
        path: where to write.
        report: what it says; all of its text is escaped.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if a figure does not exist.
        ValueError: if a figure is no PNG file.
    """
    import jinja2

    # Autoescaping, and an error for a name that is not there; blocks leave no empty lines.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    page = template.render(report=report, settings=[*_flat(report.settings)], picture_of=_picture, slug=_slug)
    write_whole(path, page)
    return Path(path)


def number(value: Any) -> str:
    """Rounded for reading, thousands separated; a dash for what does not apply."""
    if value is None or isinstance(value, bool) or not isinstance(value, Real):
        return "-" if value is None else str(value)
    size = abs(float(value))
    if math.isnan(size):
        return "-"
    if isinstance(value, Integral) or 1000 <= size < 1e9:
        return f"{float(value):,.0f}"
    # R-hat lives between 1.00 and 1.05: three digits would hide what it says.
    return f"{float(value):.3f}" if 0.01 <= size < 10 else f"{float(value):.3g}"


class _Picture(NamedTuple):
    """A figure within the page: its address, and its size in CSS pixels."""

    url: str
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        """Whether it needs a row of its own."""
        return self.width > _WIDE


def _picture(file: str | Path) -> _Picture:
    content = Path(file).read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f"figures must be PNG files, and {str(file)!r} is none: save it with the ending .png"
        )
    width, height = struct.unpack(">II", content[16:24])  # of the header, which comes first
    url = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return _Picture(url, max(round(width / SCALE), 1), max(round(height / SCALE), 1))


def _slug(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as (dotted name, text)."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list | tuple):
            yield f"{prefix}{name}", ", ".join(_exact(item) for item in inner)
        else:
            yield f"{prefix}{name}", _exact(inner)


def _exact(value: Any) -> str:
    plain = isinstance(value, Real) and not isinstance(value, Integral)
    return f"{float(value):.6g}" if plain else "-" if value is None else str(value)
