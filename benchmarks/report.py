"""``python -m benchmarks.report``: RESULTS.md from the stored results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.measure import expected_largest
from benchmarks.reading import reading
from benchmarks.targets import NAMES

TITLES = {
    "tilted_prior_2d": "2-D tilted prior",
    "tilted_prior_32d": "32-D tilted prior",
    "posterior_1": "One image's tilted posterior (2-D)",
    "posterior_100": "100 images' tilted posteriors (200-D)",
    "gaussian_10d": "10-D Gaussian, condition number 100",
    "eight_schools": "Eight schools, non-centered (10-D)",
    "logistic_25": "Logistic regression, 25 coefficients",
}
COLUMNS = (
    "sampler", "chains x draws (warm-up)", "ESS/s all-in", "ESS/s draws alone", "ESS per gradient", "R-hat", "error",
    "seconds", "threads",
)  # fmt: skip
HOW = """\
How to read the tables. One contender is one fresh process, one at a time. The clock starts when libraries are
imported and weights are loaded, and stops when the last draw lies in memory: compilation and warm-up are in "all-in"
and in "seconds". *ESS* is ArviZ's bulk effective sample size, the smallest over all coordinates; R-hat is the
largest. *ESS per gradient* counts the gradients of the draws, not of the warm-up. *Error* is the largest deviation of
a mean or a variance from the reference, in standard errors; its expected value for a sampler without bias is given
above each table. Every chain starts at a draw from the prior (for the Gaussian, at draws ten times wider than its
narrowest axis; for images, at resampled draws of the encoder, the same for all). A star marks runs that a time limit
of 30 s for the draws ended: their warm-up is whole and the draws are carried on, at the pace they had, to the number
planned. SMC's effective draws come from the spread of its islands; importance sampling is for reference only.

Each contender runs as its users would run it: Pyro 4 chains one after another on one thread (a second one slows it
down); NumPyro 64 chains (and 1,024) in one program; blackjax, torchebm and ours 1,024 chains. torchebm adapts nothing:
its step size and number of steps were found by hand, which took time that is not counted. Threads are torch's; XLA
uses all cores. Pyro's NUTS and ours get the same Pyro model, torchebm a plain torch function, NumPyro and blackjax a
JAX function with the same weights; log densities and gradients were checked to agree within 1e-4. The look at R-hat
with which ours ends a run is not timed: the others have none.
"""


def write_report(folder: Path, file: Path) -> None:
    """Write the tables of the results in ``folder``."""
    machine = _read(folder / "machine.json")
    targets = {name: found for name in NAMES if (found := _read(folder / f"{name}.json"))}
    stored = {name: _read(folder / f"{name}.json") for name in ("images", "scaling", "lean")}
    extras = {name: found["rows"] for name, found in stored.items() if found}
    parts = ["# Benchmarks", _setting(machine), "## In short", reading(targets, extras), "## Samplers", HOW.strip()]
    parts += [section for name, found in targets.items() for section in _target(name, found)]
    parts += _images(extras.get("images", [])) + _scaling(extras.get("scaling", [])) + _lean(extras.get("lean", []))
    parts += ["## Again", _AGAIN]
    file.write_text("\n\n".join(parts) + "\n")


_AGAIN = """\
`make bench` runs everything (about 25 minutes on two cores, which should have nothing else to do) and rewrites this
file; `make bench BENCH="--only tilted_prior_2d --samplers ours-chees blackjax-chees"` a part of it, `BENCH=--quick`
two targets in small, into `benchmarks/cache/quick`. Raw numbers are in `benchmarks/results/`."""


def table(columns: tuple[str, ...] | list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _setting(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores (load before the start "
        f"{machine['load']}), {machine['system']}, Python {machine['python']}; {versions}."
    )


def _target(name: str, found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    good = [row for row in rows.values() if "failed" not in row]
    about = ""
    if good:
        compared = max(row["compared"] for row in good)
        about = (
            f"Reference: {good[0]['reference']}. Largest of {compared} errors, expected without bias: "
            f"{expected_largest(compared):.1f} standard errors. "
        )
    about += f"Versions of the density agree to {found['disagreement']:.0e}."
    order = [key for key in CONTENDERS if key in rows]
    return [f"### {TITLES[name]}", about, table(COLUMNS, [_row(key, rows[key]) for key in order])]


def _row(name: str, row: dict[str, Any]) -> list[str]:
    title = CONTENDERS[name].title
    if "failed" in row:
        return [title, *["-"] * (len(COLUMNS) - 2), row["failed"].replace("|", "/")]
    star = "*" if row["extrapolated"] else ""
    per_gradient = "-" if row["ess_per_gradient"] is None else f"{row['ess_per_gradient']:.3f}"
    return [
        title,
        f"{row['chains']:,} x {row['draws']:,}{star} ({row['warmup']})",
        f"{row['ess_per_second']:,.0f}{star}",
        f"{row['ess_per_second_draws']:,.0f}",
        per_gradient,
        "-" if row["r_hat"] is None else f"{row['r_hat']:.3f}",
        f"{row['error']:.1f}",
        f"{row['seconds']:.1f}",
        str(row["threads"]),
    ]


def _images(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    text = (
        "Seconds until every image has R-hat below 1.01 and 400 effective draws, 4 chains each. All chains start at "
        "resampled draws of the encoder; for Pyro these are given, and when to stop is found afterwards, so that "
        "neither costs it time, while ours includes both. One by one: some images were run, the time of a hundred is a "
        "hundred times their mean."
    )
    columns = ["", "images done", "draws per chain (warm-up)", "seconds", "seconds for 100"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], row["failed"], "-", "-", "-"])
            continue
        hundred = row.get("hundred", row["seconds"] * 100 / row["images"] if row["images"] != 100 else row["seconds"])
        more = ">" if row["done"] < row["images"] else ""
        counts = f"{row['done']} of {row['images']}"
        draws = f"{row['draws']:,} ({row['warmup']})"
        lines.append([row["name"], counts, draws, f"{row['seconds']:.1f}", f"{more}{hundred:,.1f}"])
    return ["## A hundred posteriors", text, table(columns, lines)]


_AXES = {
    "chains": "Chains (2-D tilted prior)",
    "dimensions": "Dimensions (Gaussian, condition number 100; 1,024 chains)",
    "images": "Images (tilted posteriors, 16 chains; ours with an accept step for each image)",
}


def _scaling(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    text = "Milliseconds for one draw of all chains: HMC with five leapfrog steps of a fixed size, compiled beforehand."
    parts = ["## How the cost grows", text]
    for axis, title in _AXES.items():
        found = [row for row in rows if row["axis"] == axis and "failed" not in row]
        if found:
            sizes = list(found[0]["milliseconds"])
            lines = [[row["name"], *(f"{row['milliseconds'][size]:.3g}" for size in sizes)] for row in found]
            parts += [f"### {title}", table(["", *(f"{int(size):,}" for size in sizes)], lines)]
    return parts


def _lean(rows: list[dict[str, Any]]) -> list[str]:
    good = [row for row in rows if "failed" not in row]
    times, sizes = [r for r in good if "ratio" in r], [r for r in good if "peak_mib" in r]
    parts = []
    if times:
        text = "At 1,024 chains: time per gradient in the draws of ChEES over that of the bare captured graph, medians."
        columns = ["", "ratio", "microseconds inside", "bare", "steps per draw"]
        lines = [
            [r["target"], f"{r['ratio']:.2f}", f"{r['microseconds_inside']:.0f}", f"{r['microseconds_bare']:.0f}",
             f"{r['steps_per_draw']:.1f}"] for r in times
        ]  # fmt: skip
        parts += ["## What a run costs beyond its gradients", text, table(columns, lines)]
    if sizes:
        columns = ["draws kept of 1,024 chains", "kept, MiB", "peak of the process, MiB"]
        lines = [[f"{r['draws']:,}", f"{r['kept_mib']:.0f}", f"{r['peak_mib']:.0f}"] for r in sizes]
        parts += [table(columns, lines)]
    if len(sizes) > 1:
        first, last = sizes[0], sizes[-1]
        slope = (last["peak_mib"] - first["peak_mib"]) / (last["kept_mib"] - first["kept_mib"])
        parts += [f"Between the first and the last, the peak grows by {slope:.1f} times what is kept."]
    return parts


if __name__ == "__main__":
    here = Path(__file__).parent
    write_report(here / "results", here / "RESULTS.md")
