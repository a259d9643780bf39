"""What ``MCMC`` says about a run in numbers: diagnostics by site, and Pyro's table of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from pyro.ops import stats
from torch import Tensor

from pyro_ebm.chain_statistics import ess_bulk, split_r_hat
from pyro_ebm.inference.draws import Draws

__all__ = ["diagnostics_of", "headline", "table"]


def diagnostics_of(draws: Draws) -> dict[str, dict[str, Any]]:
    """Site -> ``n_eff`` and split ``r_hat``, of its shape; divergences and acceptance rate of each chain."""
    found: dict[str, dict[str, Any]] = {
        site: {"n_eff": torch.from_numpy(ess_bulk(value)), "r_hat": torch.from_numpy(split_r_hat(value))}
        for site, value in draws.values.items()
    }
    chains = range(draws.num_chains)
    if "diverging" in draws.stats:
        diverging = draws.stats["diverging"].reshape(draws.num_chains, draws.num_draws, -1).any(-1)  # any datum's
        found["divergences"] = {f"chain {i}": diverging[i].nonzero().flatten().tolist() for i in chains}
    if "acceptance_rate" in draws.stats:
        found["acceptance rate"] = {f"chain {i}": float(draws.stats["acceptance_rate"][i].mean()) for i in chains}
    return found


def headline(draws: Draws) -> str:
    """How many draws there are, and what ran."""
    chains, num = draws.num_chains, draws.num_draws
    ways = {
        "plate": "chains as an outer plate",
        "vmap": "chains under torch.vmap",
        "loop": "chains in a loop",
        "sequential": "chains one after another",
    }
    how = [ways[way] for way in [draws.notes.get("vectorize")] if way in ways]
    how += [f"graph {graph}" for graph in [draws.notes.get("graph")] if graph]
    text = f"{chains} chain{'s' * (chains != 1)} x {num:,} draws = {chains * num:,} draws by {draws.method}"
    return text + (f" ({', '.join(how)})" if how else "")


def table(draws: Draws, prob: float) -> str:
    """Mean, sd, median, interval, n_eff and R-hat of each entry of each site, as Pyro prints them."""
    found = diagnostics_of(draws)
    columns = ["mean", "std", "median", f"{50 * (1 - prob):.1f}%", f"{50 * (1 + prob):.1f}%", "n_eff", "r_hat"]
    rows = [row for site, value in draws.values.items() for row in _rows(site, value, found[site], prob)]
    width = max([10, *(len(name) for name, _ in rows)])
    lines = ["", "".join([" " * width, *(f" {column:>9}" for column in columns)])]
    for name, numbers in rows:
        lines.append("".join([f"{name:>{width}}", *(f" {number:>9.2f}" for number in numbers)]))
    return "\n".join(lines)


def _rows(site: str, value: Tensor, found: Mapping[str, Any], prob: float) -> Iterator[tuple[str, list[float]]]:
    flat = value.flatten(0, 1).double()
    interval = stats.hpdi(flat, prob, dim=0)
    columns = [flat.mean(0), flat.std(0), flat.median(0)[0], interval[0], interval[1], found["n_eff"], found["r_hat"]]
    for index in product(*map(range, value.shape[2:])):
        name = site + (f"[{','.join(map(str, index))}]" if index else "")
        yield name, [float(column[index]) for column in columns]
