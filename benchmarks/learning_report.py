"""``python -m benchmarks.learning_report``: LEARNING.md from the stored results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import FOLDER, RESULTS, Row, stored
from benchmarks.report import table

REPORT = FOLDER / "LEARNING.md"
DIGITS = (1, 4, 5, 7, 9)
HEADLINE = "excess_rate"
# What is computed for each image -> how it is named; higher: more of an outlier.
SCORES = {
    "log_p": "-log p(x), importance-weighted",
    "elbo": "-ELBO",
    "joint_mean": "-log p(x, z) at the posterior mean, without log Z",
    "joint_mode": "-log p(x, z) at its mode, without log Z (as Pang et al.)",
    "reconstruction": "E_q[-log p(x given z)]",
    "squared_error": "E_q[squared distance of x and mean(z)]",
    "rate": "rate: KL from q(z given x) to the prior, tilt included",
    "energy": "E_q[E(z)]",
    "excess": "excess: E_q[-log p(x given z) - entropy of p(. given z)]",
    "excess_energy": "excess + energy",
    "excess_rate": "excess + rate",
    "excess_over_ink": "(excess + rate) / sum of x",
}
PUBLISHED = {
    "VAE (published)": (0.063, 0.337, 0.325, 0.148, 0.104),
    "latent energy prior, Pang et al. 2020 (published)": (0.336, 0.630, 0.619, 0.463, 0.413),
    "hierarchical VAE (published)": (0.494, 0.920, 0.913, 0.680, 0.791),
}
_MODELS = {"vae": "VAE", "tilted": "energy prior"}

INTRODUCTION = """\
Two tasks with published numbers, at a budget that two CPU cores bear; `--device cuda` and more `--epochs` go
further. Then estimates of log Z where it is known. Rows are kept one by one in `benchmarks/results/`, with their
settings and what they ran on."""
DENSITY = """\
The setting of Lawson et al. 2019: 50 latent dimensions, networks 300-300, energy 100-100, K = 1,024, Adam 3e-4,
batch 128. Each image is made binary once, by draws with a fixed seed from its gray values (not the published draws,
so that only the difference can be compared with the paper's). Both models make the same number of steps on the first
50,000 training images, the energy learning together with encoder and decoder by `SamplingBound`. Test figures are
importance-weighted lower bounds in nats; for the learned prior that of the sampled prior with K proposals, which is a
true bound, and beside it that of the tilted prior itself, with log Z from 262,144 draws (an estimate, no bound: log Z
comes out too small where draws miss what the energy likes)."""
OUTLIERS = """\
Average precision on the whole MNIST test set with the left-out digit as the positive class, trained on the training
images of the other nine digits (gray values under a Bernoulli likelihood). The energy learns jointly with encoder and
decoder by `SamplingBound`: with log Z from independent draws of the prior (`Trace_ELBO` on the tilted model) the
encoder moves to where no draw falls, and the loss runs away. After the +-, the standard error over bootstrapped test
sets; the training seed is a single one. Latent size, networks and the score in bold were chosen with the digits 3 and
8 left out, on part of the test images, before any of the digits reported was scored.

*Excess* is the surprise at x beyond the surprise that the decoder itself expects: -log p(x given z) minus the entropy
of p(. given z). Images of few strokes have high likelihood under any model, whether seen in training or not; what is
expected of them is subtracted here. Excess + rate is thus the negative ELBO minus that entropy."""
LOG_Z = """\
A standard normal tilted by a linear or a quadratic energy as strong in every dimension, so that log Z is known in any
of them; KL says how many nats the tilted distribution lies from its base. Each method has the number of draws it takes
by default, and the same seeds. z is the error in the estimate's own standard errors; mean z^2 of an unbiased estimate
is 1 where the standard error is known, 1.07 where 32 nets tell it (`qmc`), 1.15 with 16 islands or groups (`bridge`,
`ais`) and 1.4 with 8 (`smc`)."""
AGAIN = """\
`python -m benchmarks.density --data FOLDER` and `python -m benchmarks.outliers --data FOLDER`, FOLDER being where
MNIST lies or shall be downloaded to; `--digits 9`, `--models tilted` run a part, `--again` runs what is stored once
more. `python -m benchmarks.log_normalizers` needs no data. `python -m benchmarks.learning_report` writes this file
again from `benchmarks/results/`."""


def write_report(folder: Path = RESULTS, file: Path = REPORT) -> None:
    """Write the tables of what is stored in ``folder``."""
    names = ("density", "outliers", "log_normalizers")
    density, outliers, log_z = (stored(name, folder).get("rows", {}) for name in names)
    parts = ["# Benchmarks of learning", INTRODUCTION]
    parts += _density(density) if density else []
    parts += _outliers(outliers) if outliers else []
    parts += _log_z(log_z) if log_z else []
    file.write_text("\n\n".join([*parts, "## Again", AGAIN]) + "\n")


def gain(rows: dict[str, Row]) -> tuple[float, float]:
    """Mean gain in nats of the learned prior over the Gaussian one on the same images, and its standard error."""
    first, second = (torch.tensor(rows[name]["bounds"], dtype=torch.float64) for name in ("gaussian", "snis"))
    difference = second - first
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def _density(rows: dict[str, Row]) -> list[str]:
    settings = next(iter(rows.values()))["settings"]
    columns = ["prior", "log p(x) >=", "tilted prior", "steps", "training, seconds"]
    titles = {"gaussian": "Gaussian", "snis": f"learned, {settings['num_proposals']:,} proposals"}
    lines = [[titles[name], *_density_cells(row)] for name, row in rows.items()]
    parts = ["## Density: static MNIST", DENSITY, table(columns, lines)]
    # Half of a new run beside half of an old one is no comparison.
    if set(rows) == {"gaussian", "snis"} and rows["gaussian"]["settings"] == rows["snis"]["settings"]:
        value, error = gain(rows)
        parts.append(
            f"Gain of the learned prior on the same {settings['num_test']:,} test images: **{value:.2f} +- {error:.2f} "
            f"nats** ({settings['num_samples']} draws per image, {settings['epochs']} epochs)."
        )
    return [*parts, _setting(rows)]


def _density_cells(row: Row) -> list[str]:
    tilted = f"{row['tilted']:.2f} (log Z {row['log_z']:.2f} +- {row['log_z_se']:.2f})" if "tilted" in row else "-"
    return [f"{row['mean']:.2f} +- {row['se']:.2f}", tilted, f"{row['steps']:,}", f"{row['train_seconds']:.0f}"]


def _outliers(rows: dict[str, Row]) -> list[str]:
    digits = sorted({int(key.split()[0]) for key in rows})
    columns = ["left out", *map(str, digits)]
    lines = [[name, *_published(values, digits)] for name, values in PUBLISHED.items()]
    for model, score in (("vae", "log_p"), ("vae", HEADLINE), ("tilted", "joint_mode"), ("tilted", "log_p")):
        lines.append([f"{_MODELS[model]}: {SCORES[score]}", *(_cell(rows, d, model, score) for d in digits)])
    best = [_cell(rows, d, "tilted", HEADLINE) for d in digits]
    lines.append([f"**{_MODELS['tilted']}: {SCORES[HEADLINE]}**", *(f"**{cell}**" for cell in best)])
    parts = ["## Outliers: one digit left out", OUTLIERS, table(columns, lines), _verdict(rows), "### Every score"]
    for model, title in _MODELS.items():
        found = [score for score in SCORES if any(score in row["auprc"] for key, row in rows.items() if model in key)]
        cells = [[SCORES[score], *(_cell(rows, d, model, score, error=False) for d in digits)] for score in found]
        parts.append(table([title, *columns[1:]], cells))
    seconds = sum(row["train_seconds"] for row in rows.values()) / len(rows)
    first = next(iter(rows.values()))["settings"]
    about = (
        f"{first['epochs']} epochs, {seconds:.0f} s of training on average; {first['latent_dim']} latent dimensions, "
        f"networks {'-'.join(map(str, first['hidden']))}, energy {'-'.join(map(str, first['energy_hidden']))}, "
        f"K = {first['num_proposals']:,}, Adam {first['lr']:g} with cosine decay, batch {first['batch_size']}."
    )
    return [*parts, about, _setting(rows)]


def _verdict(rows: dict[str, Row]) -> str:
    """How the score in bold compares, in words."""
    published = dict(zip(DIGITS, PUBLISHED["latent energy prior, Pang et al. 2020 (published)"], strict=True))
    found = {d: row["auprc"][HEADLINE] for d in DIGITS if (row := rows.get(f"{d} tilted"))}
    reached = [str(digit) for digit, value in found.items() if value >= published[digit]]
    plain = {d: rows[f"{d} vae"]["auprc"][HEADLINE] for d in found if f"{d} vae" in rows}
    ahead = [str(digit) for digit, value in plain.items() if found[digit] > value]
    return (
        f"The score in bold reaches the published latent energy prior on {len(reached)} of {len(found)} digits"
        f"{' (' + ', '.join(reached) + ')' if reached else ''}, and is above the same score of the plain VAE on "
        f"{len(ahead)} of {len(plain)}{' (' + ', '.join(ahead) + ')' if ahead else ''}."
    )


def _published(values: tuple[float, ...], digits: list[int]) -> list[str]:
    known = dict(zip(DIGITS, values, strict=True))
    return [f"{known[digit]:.3f}" if digit in known else "-" for digit in digits]


def _cell(rows: dict[str, Row], digit: int, model: str, score: str, *, error: bool = True) -> str:
    row = rows.get(f"{digit} {model}")
    if row is None or score not in row["auprc"]:
        return "-"
    return f"{row['auprc'][score]:.3f}" + (f" +- {row['se'][score]:.3f}" if error else "")


def _log_z(rows: dict[str, Row]) -> list[str]:
    columns = [
        "target", "method", "rms error", "mean se", "mean z^2", "beyond 2 se", "farthest, in se", "CPU seconds",
        "calls that warn", "bracket holds",
    ]  # fmt: skip
    lines = []
    for row in rows.values():
        made = row["settings"]
        beyond, warned, held = (_share(row.get(name), made["seeds"]) for name in ("beyond_two", "warned", "held"))
        lines.append([
            f"{made['energy']}, {made['dim']}-D, KL {made['kl']:g}", made["method"], f"{row['rms']:.4f}",
            f"{row['mean_se']:.4f}", f"{row['mean_z2']:.2f}", beyond, f"{row['largest_z']:.1f}",
            f"{row['seconds']:.2f}", warned, held,
        ])  # fmt: skip
    return ["## log Z on exact targets", LOG_Z, table(columns, lines), _log_z_reading(rows), _setting(rows)]


def _share(count: int | None, calls: int) -> str:
    return "-" if count is None else f"{count} of {calls}"


def _log_z_reading(rows: dict[str, Row]) -> str:
    """How far each method's standard error can be trusted, in words."""
    every = list(rows.values())
    calls = sum(row["settings"]["seeds"] for row in every)
    far, silent = (sum(row[name] for row in every) for name in ("beyond_four", "beyond_four_silently"))
    parts = [f"Of {calls:,} estimates {far} lie more than 4 of their standard errors off, {silent} without a warning."]
    for method in dict.fromkeys(row["settings"]["method"] for row in every):
        own = [row for row in every if row["settings"]["method"] == method]
        n = sum(row["settings"]["seeds"] for row in own)
        mean = sum(row["mean_z2"] * row["settings"]["seeds"] for row in own) / n
        warned = sum(row["warned"] for row in own)
        says = f"`{method}`: mean z^2 {mean:.2f}, farthest {max(row['largest_z'] for row in own):.1f}"
        held = f", its bracket holds in {sum(row['held'] for row in own)} of {n}" if "held" in own[0] else ""
        parts.append(f"{says}, a warning in {warned} of {n} calls{held}.")
    return " ".join(parts)


def _setting(rows: dict[str, Row]) -> str:
    """Where and with what the rows were made; all of it, where they differ."""
    loads = [row["machine"]["load"] for row in rows.values()]
    places = dict.fromkeys(_machine(row["machine"], row["settings"]) for row in rows.values())
    load = f"Load of the machine at the end of each row: {min(loads):.1f} to {max(loads):.1f}."
    return f"Ran on: {' / '.join(places)}. {load}"


def _machine(machine: dict[str, Any], settings: dict[str, Any]) -> str:
    wanted = ("pyro-ebm", "torch", "pyro-ppl", "scikit-learn")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in wanted if name in machine["versions"])
    return (
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, device {settings['device']}, "
        f"Python {machine['python']}; {versions}"
    )


if __name__ == "__main__":
    write_report()
