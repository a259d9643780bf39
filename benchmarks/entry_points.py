"""``python -m benchmarks.entry_points``: how users write models, by every entry point, against exact answers.

The models are those of ``tests/zoo``. A cell is *right* (within 4 standard errors of the exact mean and spread; where
the first seed is not, a second one has to be), *right, warned* (so, though a warning says it may not be), *warned* (it
is not, and a warning says so), *refused* (an error of the library's, with its text), *no answer known* (it ran),
**wrong** (off without a word), **raw error** (an exception of some other library) or **late** (past its limit of
time). Rows are kept as soon as they are done.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from benchmarks.machine import describe
from pyro_ebm import (
    Draws,
    InferenceWarning,
    calibrate,
    fit,
    importance,
    log_likelihood,
    predictive,
    sample,
    tilt,
    to_arviz,
)
from pyro_ebm.chain_statistics import ess_bulk
from pyro_ebm.structure import latent_sites, prototype_trace
from tests.alarm import alarm
from tests.zoo.case import Case, kinds, prior_runs
from tests.zoo.cases import CASES

RESULTS = Path(__file__).parent / "results" / "entry_points.jsonl"
REPORT = Path(__file__).parent / "ENTRY_POINTS.md"
_LIMIT = {"max_seconds": 20}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "auto": _LIMIT,
    "snis": {"num_samples": 5_000, "num_chains": 4} | _LIMIT,
    "chees": {"num_samples": 200} | _LIMIT,
    "mala": {"num_samples": 500} | _LIMIT,
    "smc": {"num_samples": 1_000} | _LIMIT,
    "nuts": {"num_samples": 400, "num_chains": 2} | _LIMIT,
    "hmc": {"num_samples": 400, "num_chains": 2} | _LIMIT,
}
OTHERS = ("tilt", "log_normalizer", "predictive", "log_likelihood", "to_arviz", "calibrate", "fit")
SECONDS = 60
LIMIT_OF_REFUSALS = 5
STANDARD_ERRORS = 4.0
BAD = ("wrong", "raw error", "late")


class Late(BaseException):
    """The alarm of a cell; no handler of the library's may take it for a failure."""


class Off(Exception):
    """A number that is not the exact one."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.entry_points", description=__doc__)
    parser.add_argument("--models", nargs="+", help="names; all by default")
    parser.add_argument("--entries", nargs="+", choices=(*METHODS, *OTHERS), default=(*METHODS, *OTHERS))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--again", action="store_true", help="run also what is stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    first, step = map(int, options.part.split("/"))
    stored = {(row["model"], row["entry"]) for row in rows_of(options.results)}
    for case in CASES[first::step]:
        for entry in options.entries if not options.models or case.name in options.models else ():
            if options.again or (case.name, entry) not in stored:
                keep(options.results, row := {"model": case.name, "entry": entry} | cell(case, entry))
                print(
                    f"{case.name:36} {entry:15} {row['result']:16} {row['seconds']:6.1f} {row['text'][:90]}", flush=True
                )
    if options.report is not None:
        options.report.write_text(report(rows_of(options.results)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What is stored, the latest of each cell."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({(row["model"], row["entry"]): row for row in map(json.loads, lines)}.values())


def keep(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def cell(case: Case, entry: str) -> dict[str, Any]:
    """One entry point on one model: what came of it, in how many seconds."""
    began = time.perf_counter()
    result, text = attempt(case, entry, 0)
    if result in ("wrong", "warned"):  # one in ten thousand numbers lies that far out
        result, text = attempt(case, entry, 1)
    return {"result": result, "seconds": round(time.perf_counter() - began, 2), "text": " ".join(text.split())}


def attempt(case: Case, entry: str, seed: int) -> tuple[str, str]:
    run = functools.partial(by_method, method=entry) if entry in METHODS else globals()[f"by_{entry}"]
    result, text, began = "right", "", time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            with alarm(SECONDS, Late):
                result = run(case, seed) or "right"
        except Late:
            return "late", f"over {SECONDS} seconds"
        except Off as off:
            result, text = "wrong", str(off)
        except Exception as error:
            kind = "refused" if is_ours(error) else "raw error"
            spent = "max_seconds" in str(error)  # the limit of time itself, told
            if kind == "refused" and not spent and time.perf_counter() - began > LIMIT_OF_REFUSALS:
                kind = "late"
            return kind, f"{type(error).__name__}: {error}"
    limit = METHODS.get(entry, {}).get("max_seconds")
    if limit is not None and (took := time.perf_counter() - began) > 1.2 * limit + 1:
        return "late", f"{took:.0f} seconds, max_seconds={limit}; {text}"
    doubts = [str(one.message) for one in told if issubclass(one.category, InferenceWarning)]
    if doubts and result == "wrong":
        return "warned", f"{text}; {doubts[0]}"
    if doubts and result == "right":
        return "right, warned", doubts[0]
    return result, text


def is_ours(error: BaseException) -> bool:
    """Whether the library raised it on purpose: the innermost frame is its own."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames)
        and "/pyro_ebm/" in frames[-1].filename
        and isinstance(error, ValueError | TypeError | RuntimeError)
    )


def check(found: Tensor, exact: Any, se: Tensor, what: str) -> None:
    """Raise where a number is off its exact value."""
    off = (found.double() - torch.as_tensor(exact).double()).abs()
    far = off / (STANDARD_ERRORS * se.double() + 1e-4 * torch.as_tensor(exact).double().abs() + 1e-9)
    if not bool((far <= 1).all()):
        raise Off(f"{what}: {float(off.max()):.3g} off, {STANDARD_ERRORS * float(far.max()):.1f} standard errors")


def check_draws(case: Case, draws: Draws) -> str | None:
    """Means and spreads against the exact ones."""
    answers = {site: answer for site, answer in case.answers.items() if site in draws.values}
    for site, (mean, sd) in answers.items():
        mean, sd = torch.as_tensor(mean).double(), torch.as_tensor(sd).double()
        value = draws.values[site].detach().double()
        for name, values, exact in (("mean", value, mean), ("variance", (value - mean) ** 2, sd**2)):
            if draws.log_weights is None:
                columns = values.reshape(*values.shape[:2], -1)
                spread = columns.flatten(0, 1).std(0)
                if bool(((spread == 0) & (sd.expand_as(value[0, 0]).flatten() > 0)).any()):
                    raise Off(f"{site}: all draws are equal")
                se = spread / torch.as_tensor(ess_bulk(columns)).nan_to_num(1.0).clamp(min=1).sqrt()
                check(
                    columns.mean((0, 1)).reshape(value.shape[2:]),
                    exact,
                    se.reshape(value.shape[2:]),
                    f"{name} of {site}",
                )
            else:
                weights = draws.weights.double().reshape(*values.shape[:2], *([1] * (values.ndim - 2)))
                center = (weights * values).sum((0, 1))
                se = (weights * (values - center)).square().sum((0, 1)).sqrt()
                if len(weights) > 3:  # islands, whose particles are not independent
                    share = weights.sum(1)
                    each = ((weights * values).sum(1) - share * center) * len(share)
                    se = torch.maximum(se, each.std(0) / math.sqrt(len(share)))
                check(center, exact, se, f"{name} of {site}")
    return None if answers else "no answer known"


def by_method(case: Case, seed: int, *, method: str) -> str | None:
    options = dict(METHODS[method]) | ({"progress": False} if method != "snis" else {})
    draws = sample(case.model, *case.args, method=method, seed=seed, model_kwargs=case.kwargs, **options)
    return check_draws(case, draws)


def first_site(case: Case) -> str | None:
    """The first continuous latent site."""
    trace = prototype_trace(case.model, case.args, case.kwargs)
    names = [name for name, site in latent_sites(trace).items() if not site["fn"].support.is_discrete]
    return names[0] if names else None


def energy_of(case: Case, site: str, c: float = 0.1) -> Callable[[Tensor], Tensor]:
    """A bounded one, of the site's event."""
    event = prototype_trace(case.model, case.args, case.kwargs).nodes[site]["fn"].event_dim
    return lambda value: -c * value.tanh().flatten(value.ndim - event).sum(-1) if event else -c * value.tanh()


def reference(case: Case, num: int = 20_000, seed: int = 99) -> Draws:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importance(case.model, None, *case.args, num_samples=num, seed=seed, model_kwargs=case.kwargs)


def slow(case: Case) -> bool:
    return (case.draws or case.ways)[:1] == ("loop",)


def by_tilt(case: Case, seed: int) -> str | None:
    """The tilted posterior is the posterior reweighted by exp(-E)."""
    site = first_site(case)
    if site is None or not case.prior_reaches:
        return "no answer known"
    num = 500 if slow(case) else 20_000
    energy = energy_of(case, site)
    tilted = tilt(case.model, {site: energy}, normalize=False)
    draws = importance(tilted, None, *case.args, num_samples=num, seed=seed, model_kwargs=case.kwargs)
    plain = reference(case, num)
    values, log_weights = plain.flat(site), plain.log_weights.flatten()
    cost = energy(values)
    log_weights = (log_weights - cost.reshape(len(cost), -1).sum(1)).log_softmax(0)
    other = Draws({site: values[None]}, "snis", log_weights=log_weights[None])
    means, ses = zip(*(weighted_mean(one, site) for one in (draws, other)), strict=True)
    check(means[0], means[1], (ses[0] ** 2 + ses[1] ** 2).sqrt(), f"mean of {site}")
    return None


def weighted_mean(draws: Draws, site: str) -> tuple[Tensor, Tensor]:
    values = draws.flat(site).double()
    weights = draws.weights.double().flatten().reshape(-1, *([1] * (values.ndim - 1)))
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean)).square().sum(0).sqrt()


def by_log_normalizer(case: Case, seed: int) -> str | None:
    """Log Z of a tilt of the first latent site, against the mean of exp(-E) over runs of the model."""
    site = first_site(case)
    if site is None:
        return "no answer known"
    energy = energy_of(case, site)
    tilted = tilt(case.model, {site: energy})
    found = tilted.log_normalizer(
        *case.args, num_samples=500 if slow(case) else 5_000, seed=seed, model_kwargs=case.kwargs
    )
    runs = forward(case, 400, site)
    weights = (-energy(runs)).double().exp().reshape(len(runs), -1)
    value = torch.as_tensor(found.value).double()
    if value.ndim == 0 or value.numel() == 1 and weights.shape[1] > 1:
        weights = weights.log().sum(1, keepdim=True).exp() if value.numel() == 1 else weights
    se = weights.std(0) / weights.mean(0) / math.sqrt(len(weights))
    exact = weights.mean(0).log()
    if value.numel() not in (1, exact.numel()):
        return "no answer known"
    per = exact.reshape(value.shape) if exact.numel() == value.numel() else exact.sum()
    tolerance = (se**2).reshape(value.shape) if se.numel() == value.numel() else (se**2).sum()
    check(value, per, (tolerance + torch.as_tensor(found.se).double() ** 2).sqrt(), "log Z")
    return None


def forward(case: Case, num: int, site: str) -> Tensor:
    """Values of a latent site in so many runs of the model."""
    return torch.stack([run[site] for run in prior_runs(case, num)])


def by_predictive(case: Case, seed: int) -> str | None:
    """Given draws, latent sites come back as they are; the prior predictive has the mean of runs by hand."""
    num = 200 if slow(case) else 2_000
    draws = reference(case, num)
    given = predictive(case.model, *case.args, draws=draws, num_samples=100, seed=seed, model_kwargs=case.kwargs)
    for site in draws.values:
        if not bool(torch.isin(given[site], draws.values[site]).all()):
            raise Off(f"{site} given the draws is not among them")
    drawn = predictive(case.model, *case.args, num_samples=num, seed=seed, model_kwargs=case.kwargs)
    site = first_site(case)
    if site is not None and site in drawn:
        runs = forward(case, 300, site).double().clamp(-1e3, 1e3)
        many = drawn[site].double().clamp(-1e3, 1e3)
        se = (runs.var(0) / len(runs) + many.var(0) / len(many)).sqrt()
        check(many.mean(0), runs.mean(0), se, f"prior mean of {site}")
    return None


def by_log_likelihood(case: Case, seed: int) -> str | None:
    """Of models of one datum a row, proposed from the prior; the others are refused."""
    observed = [
        name for name, site in prototype_trace(case.model, case.args, case.kwargs).nodes.items() if is_data(site)
    ]
    prior = poutine.block(case.model, hide=observed)
    log_likelihood(case.model, prior, *case.args, num_samples=100, seed=seed, model_kwargs=case.kwargs)
    return "no answer known"


def is_data(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def by_to_arviz(case: Case, seed: int) -> str | None:
    import numpy as np

    draws = reference(case, 200 if slow(case) else 2_000, seed)
    tree = to_arviz(draws)
    for site, value in draws.values.items():
        posterior = tree["posterior"][site].values
        if posterior.shape[2:] != tuple(value.shape[2:]) or not np.isfinite(posterior).all():
            raise Off(f"{site} has shape {posterior.shape} or holds NaN")
    return None


def by_calibrate(case: Case, seed: int) -> str | None:
    """Importance sampling from the prior is calibrated."""
    draw = functools.partial(importance, num_samples=200 if slow(case) else 2_000)
    result = calibrate(
        case.model, *case.args, num_simulations=5 if slow(case) else 20, num_draws=19, seed=seed, progress=False,
        model_kwargs=case.kwargs,
        sampler=lambda model, *args, seed, model_kwargs=None, **kwargs: draw(
            model, None, *args, seed=seed, model_kwargs=dict(model_kwargs or {}) | kwargs
        ),
    )  # fmt: skip
    if result.failures:
        raise Off(f"failures: {result.failures}")
    return None


def rows(case: Case) -> bool:
    """Whether the arguments are data with one first dimension."""
    return len({tuple(getattr(arg, "shape", ())[:1]) for arg in case.args} - {()}) == 1 and all(
        getattr(arg, "ndim", 0) and len(arg) for arg in case.args
    )


def by_fit(case: Case, seed: int) -> str | None:
    """An AutoNormal guide by full batches: the loss of stock SVI after as many steps."""
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal
    from pyro.optim import Adam

    steps, model = 150, functools.partial(case.model, **case.kwargs)
    if kinds(case)[1]:
        return "no answer known"  # no guide to compare
    data = case.args if rows(case) else None
    if data is None:
        model, data = functools.partial(model, *case.args), ()
    stock = AutoNormal(model)
    svi = SVI(model, stock, Adam({"lr": 0.02}), Trace_ELBO())
    try:
        for _ in range(steps):
            svi.step(*data)
    except (ValueError, NotImplementedError, RuntimeError):
        return "no answer known"  # Pyro's own guide or checks do not serve it
    theirs = torch.tensor([Trace_ELBO().loss(model, stock, *data) for _ in range(200)])
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoNormal(model)
    fit(
        model, guide, data or None, epochs=steps, batch_size=10**6, validation=None, patience=None, seed=seed,
        progress=False, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    )  # fmt: skip
    ours = torch.tensor([Trace_ELBO().loss(model, guide, *data) for _ in range(200)])
    se = (ours.var() / 200 + theirs.var() / 200).sqrt() + 0.02 * theirs.abs().mean() + 0.05
    check(ours.mean().clamp(min=theirs.mean()), theirs.mean(), se, "loss against stock SVI")
    return None


def report(rows: list[dict[str, Any]]) -> str:
    """The table, the counts, and the texts of what was refused or told."""
    entries = [entry for entry in (*METHODS, *OTHERS) if any(row["entry"] == entry for row in rows)]
    results = {(row["model"], row["entry"]): row for row in rows}
    models = list(dict.fromkeys(case.name for case in CASES if any(row["model"] == case.name for row in rows)))
    machine = describe()
    lines = ["# Users' models by every entry point", "", *str(__doc__).split("\n\n")[1].splitlines(), ""]
    lines += [
        f"{machine['date']}, Python {machine['python']}, "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "",
    ]
    kinds = ("right", "right, warned", "warned", "refused", "no answer known", *BAD)
    lines += ["| entry point | " + " | ".join(kinds) + " | median seconds |", "|---" * (len(kinds) + 2) + "|"]
    for entry in entries:
        mine = [row for row in rows if row["entry"] == entry]
        seconds = sorted(row["seconds"] for row in mine)[len(mine) // 2]
        counts = [str(sum(row["result"] == kind for row in mine)) for kind in kinds]
        lines.append(f"| {entry} | " + " | ".join(counts) + f" | {seconds:.1f} |")
    lines += ["", "| model | " + " | ".join(entries) + " |", "|---" * (len(entries) + 1) + "|"]
    for model in models:
        found = [results.get((model, entry), {"result": ""})["result"] for entry in entries]
        lines.append(f"| {model} | " + " | ".join(f"**{one}**" if one in BAD else one for one in found) + " |")
    lines += ["", "## What was refused, and what was told", ""]
    lines += [f"- {row['model']}, {row['entry']}: {row['result']}: {row['text'][:160]}" for row in rows if row["text"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
