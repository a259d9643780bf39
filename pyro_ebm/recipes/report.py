"""One HTML file that a colleague can open anywhere: text, tables and pictures, no scripts, no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_report"]

_COLUMNS = {
    "draws": "draws in each chain",
    "chains": "independent chains, or islands of particles; 1 for other weighted draws",
    "ess_bulk": "effective sample size of means, the smallest over all components; 400 is enough to judge by",
    "ess_tail": "effective sample size of the 5 % and 95 % quantiles, the smallest over all components",
    "r_hat": "disagreement between chains, the largest over all components; below 1.01 they agree",
    "mcse_per_sd": "standard error of the mean, in posterior standard deviations, the largest",
    "pareto_k": "tail of the importance weights; above 0.7 do not trust the weighted draws",
    "divergences": "steps at which the integrator failed; should be 0",
    "acceptance": "mean acceptance probability of the proposals",
    "step_size": "mean step size of the chains",
    "n_steps": "mean number of gradient evaluations for a draw",
    "tree_depth": "mean depth of the trajectory trees of NUTS",
    "temperatures": "steps from the prior to the target",
    "gradients": "gradient evaluations, warm-up included",
    "seconds": "wall-clock time, warm-up included",
    "ess_per_second": "ess_bulk for a second of work",
    "ess_per_gradient": "ess_bulk for a gradient evaluation",
    "log_z": "log of the normalizing constant of the target",
    "log_z_se": "standard error of log_z",
    "worst_error_in_se": "largest error of a mean or mean square against the reference, in standard errors; "
    "up to 4 may be chance",
    "verdict": "ok, or each threshold that fell",
}

_STYLE = """
:root { --ink: #1f2430; --muted: #5c6470; --line: #d9dde3; --paper: #fff;
  --wash: #f4f6f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; color: var(--ink);
  background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .75rem; }
.tile { background: var(--wash); border-left: 4px solid var(--accent);
  border-radius: 4px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span, figcaption, .note { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { background: var(--wash); }
tbody th, thead th:first-child, td.text { text-align: left; }
td.text, td.verdict { white-space: normal; min-width: 8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0 0; }
dt { font-family: ui-monospace, Menlo, Consolas, monospace; } dd { margin: 0; }
td.ok { color: #00664b; font-weight: 600; }
td.bad { color: #a33b00; font-weight: 600; }
figure { margin: 1.75rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { margin-top: .4rem; }
@media print {
  body { padding: 0; max-width: none; }
  figure, .tile, tr { break-inside: avoid; }
}
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    comparison: pd.DataFrame,
    balance_table: pd.DataFrame,
    figures: Sequence[tuple[str, str | Path]],
) -> Path:
    """Write the results of a job as one self-contained HTML file.

    Args:
        path: where to write; the folder must exist.
        title: heading of the page.
        summary: what ``summary.json`` holds; the headline numbers come from its keys ``tv``,
            ``test_log_likelihood``, ``log_z``, ``importance`` and ``seconds`` where present, and all of it
            is listed at the end.
        comparison: samplers, one row each, as :func:`compare` makes it.
        balance_table: class proportions, one row for each image source.
        figures: (caption, path of a PNG file), in the order to show them.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if a figure, or the folder to write into, does not exist.
        ValueError: if a figure is no PNG file.
    """
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            _tiles(summary),
            "<h2>Class balance</h2>",
            '<p class="note">Proportion of images in each class, before and after the tilt. '
            "TV is the total variation distance from the proportions wanted: 0 is perfect, 1 the worst.</p>",
            _table(balance_table),
            "<h2>Samplers</h2>",
            _comparison_table(comparison),
            "<h2>Figures</h2>",
            *(_figure(caption, file) for caption, file in figures),
            "<h2>Settings and results in full</h2>",
            _settings(summary),
        ]
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser itself then refuses scripts and any request over the network.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in _headlines(summary)
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _headlines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(number, what it is) for the parts of the summary that are there."""
    tv = summary.get("tv") or {}
    untilted = ("biased_data", "prior", "reference_only", "fine_tuned")
    if "prior" in tv:
        yield _number(tv["prior"]), "distance from balance (TV) of the prior's samples"
    for method, value in tv.items():
        if method not in untilted:
            yield _number(value), f"the same for the tilted prior, sampled by {method}"
    likelihood = summary.get("test_log_likelihood") or {}
    if {"base", "tilted"} <= likelihood.keys():
        gain = likelihood["tilted"] - likelihood["base"]
        yield f"{gain:+.3g} nats", f"test log likelihood per image gained over {_number(likelihood['base'])}"
    log_z = summary.get("log_z") or {}
    if {"value", "se"} <= log_z.keys():
        yield f"{_number(log_z['value'])} ± {log_z['se']:.1g}", "log Z of the tilt and its standard error"
    importance = summary.get("importance") or {}
    if {"ess_fraction", "pareto_k"} <= importance.keys():
        share = f"{100 * importance['ess_fraction']:.0f} %"
        yield (
            share,
            f"of importance draws effective (Pareto k {_number(importance['pareto_k'])}, trust below 0.7)",
        )
    seconds = summary.get("seconds") or {}
    if "total" in seconds:
        yield f"{seconds['total']:.0f} s", "for the whole job"


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in [frame.index.name or "", *frame.columns])
    rows = []
    for label, row in zip(frame.index, frame.itertuples(index=False, name=None), strict=True):
        cells = "".join(f"<td>{escape(_number(value))}</td>" for value in row)
        rows.append(f"<tr><th>{escape(str(label))}</th>{cells}</tr>")
    return _scrolling(head, rows)


def _comparison_table(frame: pd.DataFrame) -> str:
    """One column a sampler, so that many diagnostics fit the page; below it what each of them means."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in ["", *frame.index])
    known = [name for name in frame.columns if frame[name].notna().any()]
    rows = []
    for name in sorted(known, key=lambda column: column != "verdict"):
        cells = "".join(_cell(name, value) for value in frame[name])
        rows.append(f"<tr><th>{escape(str(name))}</th>{cells}</tr>")
    notes = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_COLUMNS[name])}</dd>" for name in known if name in _COLUMNS
    )
    return f'{_scrolling(head, rows)}<dl class="note">{notes}</dl>'


def _scrolling(head: str, rows: list[str]) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>" + "".join(rows) + "</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cell(column: object, value: Any) -> str:
    if column == "verdict":
        return f'<td class="verdict {"ok" if value == "ok" else "bad"}">{escape(str(value))}</td>'
    return f"<td>{escape(_number(value))}</td>"


def _number(value: Any) -> str:
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


def _exact(value: Any) -> str:
    return (
        f"{float(value):.6g}" if isinstance(value, Real) and not isinstance(value, Integral) else str(value)
    )


def _figure(caption: str, file: str | Path) -> str:
    content = Path(file).read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f"figures must be PNG files, and {str(file)!r} is none: save it with the ending .png"
        )
    data = base64.b64encode(content).decode("ascii")
    text = escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _settings(summary: Mapping[str, Any]) -> str:
    rows = [(escape(name), escape(_exact(value))) for name, value in _flat(summary)]
    body = "".join(f'<tr><th>{name}</th><td class="text">{value}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted name, value)."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list | tuple):
            yield f"{prefix}{name}", ", ".join(_exact(item) for item in inner)
        else:
            yield f"{prefix}{name}", inner
