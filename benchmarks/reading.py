"""The few sentences above the tables, made from the numbers so that they cannot disagree with them."""

from __future__ import annotations

from typing import Any

HEADLINE = "tilted_prior_2d"
_OURS = ("ours-chees-eager", "ours-chees", "ours-chees-compiled", "ours-hmc", "ours-smc")
_PEERS = {
    "stock Pyro NUTS (the faster of plain and jit)": ("pyro-nuts", "pyro-nuts-jit"),
    "NumPyro's vectorized NUTS (the faster of 64 and 1,024 chains)": ("numpyro-nuts", "numpyro-nuts-1024"),
    "blackjax ChEES": ("blackjax-chees",),
    "torchebm HMC": ("torchebm-hmc",),
}
MAX_R_HAT = 1.05


def reading(targets: dict[str, Any], extras: dict[str, Any]) -> str:
    """What the tables say, wins and losses alike."""
    lines = _headline(targets.get(HEADLINE, {}).get("rows", {})) + _elsewhere(targets) + _doubts(targets)
    lines += _images(extras.get("images", [])) + _lean(extras.get("lean", []))
    return "\n".join(f"- {line}" for line in lines) if lines else "Nothing has been run yet."


def best(rows: dict[str, Any], names: tuple[str, ...], measure: str = "ess_per_second") -> float | None:
    """The highest value of a measure among those that ran."""
    found = [rows[n][measure] for n in names if n in rows and "failed" not in rows[n]]
    return max(found) if found else None


def _headline(rows: dict[str, Any]) -> list[str]:
    mine = best(rows, _OURS)
    if mine is None:
        return []
    lines = []
    for title, names in _PEERS.items():
        theirs = best(rows, names)
        if theirs:
            lines.append(f"2-D tilted prior, all-in: ours {mine:,.0f} ESS/s, {mine / theirs:,.1f} times {title}.")
    drawn, blackjax = best(rows, _OURS, "ess_per_second_draws"), best(rows, ("blackjax-chees",), "ess_per_second_draws")
    if drawn and blackjax:
        times = f"{drawn / blackjax:.2g} times blackjax ChEES"
        lines.append(f"2-D tilted prior, draws alone: ours {drawn:,.0f} ESS/s, {times}.")
    return lines


def _elsewhere(targets: dict[str, Any]) -> list[str]:
    """On which targets a peer is ahead, and by how much."""
    ahead, behind = [], []
    others = tuple(name for names in _PEERS.values() for name in names)
    for target, found in targets.items():
        mine, theirs = best(found["rows"], _OURS), best(found["rows"], others)
        if target != HEADLINE and mine and theirs:
            (ahead if mine > theirs else behind).append(f"{target} ({mine / theirs:.2g})")
    lines = [f"All-in ahead of every peer (times the best of them): {', '.join(ahead)}."] if ahead else []
    return lines + ([f"All-in behind the best peer: {', '.join(behind)}."] if behind else [])


def _doubts(targets: dict[str, Any]) -> list[str]:
    bad = [
        f"{name} on {target} (R-hat {row['r_hat']:.2f})"
        for target, found in targets.items()
        for name, row in found["rows"].items()
        if (row.get("r_hat") or 1.0) > MAX_R_HAT
    ]
    return [f"Chains that disagree, whose numbers mean little: {', '.join(bad)}."] if bad else []


def _images(rows: list[dict[str, Any]]) -> list[str]:
    good = {row["name"]: row for row in rows if "failed" not in row}
    mine = next((row for name, row in good.items() if name.startswith("ours")), None)
    if mine is None:
        return []
    every = "every image" if mine["done"] == mine["images"] else f"{mine['done']} images"
    lines = [f"{mine['images']} posteriors: ours has {every} done after {mine['seconds']:.1f} s."]
    for name, row in good.items():
        if row is not mine:
            theirs = row.get("hundred", row["seconds"]) * (1 if row.get("hundred") is None else mine["images"] / 100)
            done = f" at least: only {row['done']} of {row['images']} were done"
            least = "" if row["done"] == row["images"] else done
            times = f"{theirs / mine['seconds']:,.0f} times as long"
            lines.append(f"{name}: {times} ({theirs:,.0f} s{least}).")
    return lines


def _lean(rows: list[dict[str, Any]]) -> list[str]:
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    return [f"A gradient inside a run costs {max(ratios):.2f} times one of the bare graph, at most."] if ratios else []
