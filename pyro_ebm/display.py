"""Results at a glance: one line of text, and a small table for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.chain_statistics import ess_bulk, r_hat
from pyro_ebm.convergence import Agreement, agreement, superchains_of
from pyro_ebm.thresholds import MIN_STARTS, R_HAT_OF_DISAGREEMENT, weights_problem

__all__ = [
    "describe_draws",
    "describe_log_likelihood",
    "draws_as_html",
    "log_likelihood_as_html",
    "number",
    "table",
]

_MAX_COMPONENTS = 16  # of a table with one row a component: its statistics take milliseconds each
_MAX_DRAWS = 500_000
# Colors and fonts are the notebook's own, so that dark ones stay readable.
_LINE = "1px solid rgba(128,128,128,.4)"
_CELL = "padding:.15em .8em .15em 0;text-align:{side};background:transparent;color:inherit;border:0;{extra}"


def number(value: Any) -> str:
    """A number in four digits, large ones with separators; a dash for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:#.4g}"  # with its last zeros: columns align


def table(
    title: str,
    facts: Iterable[str],
    header: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    notes: Iterable[str] = (),
) -> str:
    """HTML of one result: its name, facts in a line, a table, notes below. All texts are escaped.

    Args:
        title: what it is.
        facts: short phrases.
        header: names of the columns; the first column is text, the others are numbers.
        rows: as many texts as the header has.
        notes: sentences.
    """
    line = " · ".join([f"<strong>{html.escape(title)}</strong>", *map(html.escape, facts)])
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    head = f'<thead><tr style="border-bottom:{_LINE}">{_cells("th", header)}</tr></thead>' if header else ""
    style = "border-collapse:collapse;margin:.4em 0;color:inherit;font:inherit"
    grid = f'<table style="{style}">{head}<tbody>{body}</tbody></table>' if body else ""
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return f'<div style="line-height:1.5"><div>{line}</div>{grid}{below}</div>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    sides = ("left", *["right"] * (len(texts) - 1))
    extra = "" if tag == "th" else "font-variant-numeric:tabular-nums;"
    return "".join(
        f'<{tag}{scope} style="{_CELL.format(side=side, extra=extra)}">{html.escape(text)}</{tag}>'
        for text, side in zip(texts, sides, strict=True)
    )


def describe_draws(draws: Any) -> str:
    """One line: how they were made, how many there are, the sites with their shapes."""
    sites = ", ".join(f"{name}: {tuple(value.shape[2:])}" for name, value in draws.values.items())
    weighted = ", weighted" if draws.log_weights is not None else ""
    chains = "chain" if draws.num_chains == 1 else "chains"
    return f"Draws({draws.method!r}, {draws.num_chains} {chains} of {draws.num_draws} draws{weighted}, {{{sites}}})"


def draws_as_html(draws: Any) -> str:
    """A row for each component where they are few, else for each site; ESS and R-hat of chains where that is cheap."""
    few = sum(value.shape[2:].numel() for value in draws.values.values()) <= _MAX_COMPONENTS
    chains = draws.log_weights is None and few and draws.num_chains * draws.num_draws <= _MAX_DRAWS
    header = ["site", *([] if few else ["shape"]), "mean", "sd", *(["ESS", "R-hat"] if chains else [])]
    rows: list[list[str]] = []
    for site, value in draws.values.items():
        of_chains = [ess_bulk(value).ravel(), r_hat(value).ravel()] if chains else []
        rows += _component_rows(draws, site, of_chains) if few else [_site_row(draws, site)]
    worst = agreement(draws.values, R_HAT_OF_DISAGREEMENT, superchains_of(draws)) if chains else None
    return table("Draws", _facts(draws), header, rows, _notes(draws, worst))


def describe_log_likelihood(found: Any) -> str:
    """One line: for how many data, their mean with its error, the worst weights."""
    value, se = (float(part) for part in found.mean())
    worst = float(found.pareto_k.max())
    return f"LogLikelihood({len(found.value)} data: mean {value:.4f} +- {se:.4f} nats, Pareto k up to {worst:.2f})"


def log_likelihood_as_html(found: Any) -> str:
    """Log likelihoods of some data: their mean, and how each number spreads over the data."""
    value, se = (number(float(part)) for part in found.mean())
    columns = [("log p(x), nats", found.value), ("standard error", found.se), ("Pareto k", found.pareto_k)]
    columns.append(("effective draws", found.ess))
    rows = [[name, *(number(float(f(x))) for f in (Tensor.min, Tensor.median, Tensor.max))] for name, x in columns]
    facts = [f"{len(found.value):,} data", f"mean {value} ± {se} nats"]
    return table("LogLikelihood", facts, ["of the data", "least", "median", "most"], rows)


def _component_rows(draws: Any, site: str, of_chains: Sequence[Any]) -> list[list[str]]:
    names = draws.component_names(site)
    columns = [draws.mean(site).flatten(), draws.std(site).flatten(), *of_chains]
    formats = (number, number, "{:,.0f}".format, "{:.3f}".format)
    return [
        [name, *("–" if math.isnan(x) else shown(float(x)) for shown, x in zip(formats, row, strict=False))]
        for name, *row in zip(names, *columns, strict=True)
    ]


def _site_row(draws: Any, site: str) -> list[str]:
    shape = " × ".join(map(str, draws.values[site].shape[2:])) or "scalar"
    return [site, shape, *(_span(found) for found in (draws.mean(site), draws.std(site)))]


def _span(values: Tensor) -> str:
    if not values.numel():
        return "–"
    low, high = number(float(values.min())), number(float(values.max()))
    return low if low == high else f"{low} to {high}"


def _facts(draws: Any) -> list[str]:
    chains = "chain" if draws.num_chains == 1 else "chains"
    facts = [draws.method, f"{draws.num_chains} {chains} × {draws.num_draws:,} draws"]
    if draws.log_weights is not None:
        facts.append(f"weighted, worth {float(importance_ess(draws.log_weights.flatten().double())):,.0f} draws")
    if draws.pareto_k is not None:
        facts.append(f"Pareto k {draws.pareto_k:.2f}")
    if draws.log_z is not None and getattr(draws.log_z.value, "numel", lambda: 1)() == 1:
        facts.append(f"log Z {number(float(draws.log_z.value))} ± {number(float(draws.log_z.se))}")
    if math.isfinite(draws.seconds):
        facts.append(f"{draws.seconds:.3g} s")
    return facts


def _notes(draws: Any, worst: Agreement | None) -> list[str]:
    """What a person should know before they trust the numbers."""
    notes = []
    if worst is not None and worst.disagrees:
        notes.append(f"chains disagree: {worst.told()}")
    if draws.log_weights is None and draws.notes.get("distinct_starts", MIN_STARTS) < MIN_STARTS <= draws.num_chains:
        notes.append(f"started at {draws.notes['distinct_starts']} point(s): R-hat does not show a mode they missed")
    if draws.pareto_k is not None:
        logs = draws.log_weights.flatten()
        problem = weights_problem(draws.pareto_k, float(importance_ess(logs)), logs.numel())
        notes += [f"the weights are not reliable: {problem}"] if problem else []
    divergences = int(draws.stats["diverging"].sum()) if "diverging" in draws.stats else 0
    if divergences:
        notes.append(f"{divergences:,} of {draws.stats['diverging'].numel():,} transitions diverged")
    broken = [name for name, value in draws.values.items() if not bool(value.isfinite().all())]
    if broken:
        notes.append(f"not finite: {', '.join(broken)}")
    if draws.notes.get("interrupted"):
        notes.append("interrupted before its end")
    if draws.notes.get("stopped") in ("max_seconds", "num_samples", "pareto_k"):
        notes.append(f"stopped by {draws.notes['stopped']} before the effective sample size asked for")
    return notes
