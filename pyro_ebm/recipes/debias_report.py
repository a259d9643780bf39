"""What the report of a debias job says: what was done and how, what came out, and what not to trust."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_ebm.recipes.provenance import provenance
from pyro_ebm.recipes.report import Cell, Figure, Headline, Report, Row, Section, Table, number
from pyro_ebm.thresholds import MAX_R_HAT

if TYPE_CHECKING:
    import pandas as pd

    from pyro_ebm.recipes.result import DebiasResult

__all__ = ["debias_report"]

_SAMPLERS = {
    "snis": "self-normalized importance sampling: draws of the prior, or of the encoder, weighted",
    "chees": "batched Hamiltonian chains that learn their trajectory length together",
    "nuts": "Pyro's No-U-Turn sampler, one chain after another",
    "hmc": "Pyro's Hamiltonian Monte Carlo, one chain after another",
    "mala": "batched Langevin chains with acceptance",
    "ula": "batched Langevin chains without acceptance, which are biased",
    "smc": "sequential Monte Carlo: particles led from the prior to the target",
}
_SOURCES = {
    "biased_data": "biased training images",
    "prior": "prior, before the tilt",
    "reference_only": "VAE of the reference images alone",
    "fine_tuned": "VAE fine-tuned on the reference images",
}
# What decides whether to trust a sampler, and what its draws cost: (column, head).
_MAIN = {
    "verdict": "verdict",
    "ess_bulk": "effective draws",
    "r_hat": "R-hat",
    "pareto_k": "Pareto k",
    "divergences": "divergences",
    "worst_error_in_se": "largest error, in se",
    "seconds": "seconds",
    "ess_per_second": "effective draws per second",
}
_MEANING = {
    "draws": "draws in each chain",
    "chains": "independent chains, or islands of particles; 1 for other weighted draws",
    "stopped": "what ended the draws: their number, or the budget of time",
    "ess_bulk": "effective sample size of means, the smallest over all components; 400 is enough to judge by",
    "ess_tail": "effective sample size of the 5 % and 95 % quantiles, the smallest over all components",
    "r_hat": f"disagreement between chains, the largest over all components; below {MAX_R_HAT} they agree, "
    "and many short chains below what their length explains, which the verdict goes by",
    "mcse_per_sd": "standard error of the mean, in posterior standard deviations, the largest",
    "pareto_k": "tail of the importance weights; above 0.7 (less for few draws) do not trust them",
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
    "worst_error_in_se": "largest error of a mean or mean square against quadrature, in standard errors; "
    "up to 4 may be chance",
}
_TARGETS = {"prior": "the tilted prior", "posterior": "the tilted posterior of one test image"}


def debias_report(result: DebiasResult, figures: Mapping[str, Figure], out: str | Path | None = None) -> Report:
    """Everything the report says, from what the job found.

    Args:
        result: of the job.
        figures: those of :func:`write_figures`, by name.
        out: the folder, for the command.
    """
    shown = {name: [figures[each] for each in names if each in figures] for name, names in _SECTIONS.items()}
    return Report(
        title=f"Debiasing a VAE of {result.config.data} by a latent tilt",
        story=[*_story(result)],
        notices=[*_notices(result)],
        provenance=_provenance(result, out),
        headlines=[*_headlines(result)],
        sections=[
            Section("Before and after", figures=shown["before"]),
            Section("The tilt", figures=shown["tilt"]),
            Section("The samplers", terms=_glossary(result), figures=shown["samplers"]),
            Section("The training", figures=shown["training"]),
            Section("Class balance in numbers", tables=[*_balance_tables(result)]),
            Section("Samplers in numbers", tables=[*_sampler_tables(result)]),
        ],
        settings={name: value for name, value in result.summary.items() if name != "remarks"},  # said at the top
    )


_SECTIONS = {
    "before": ("class_balance", "prior_samples", "tilted_samples"),
    "tilt": ("energy_landscape", "overlay", "latent_scatter"),
    "samplers": ("comparison_prior", "comparison_posterior"),
    "training": ("label_histograms", "training", "tilt_training"),
}


# --------------------------------------------------------------------------------------- in words


def _story(result: DebiasResult) -> Iterator[str]:
    config, sizes = result.config, result.split.sizes
    pairs = zip(config.digits, config.proportions, strict=True)
    shares = ", ".join(f"{100 * share:g} % of class {digit}" for digit, share in pairs)
    yield (
        f"A variational autoencoder (VAE) with {config.latent_dim} latent dimension{'s' * (config.latent_dim > 1)} "
        f"was trained on {sizes['biased']:,} images of {config.data} in biased proportions: {shares}. Then, with "
        f"encoder and decoder left as they are, an energy that tilts its prior was learned from {sizes['reference']:,} "
        "reference images, balanced over the classes. The tilted prior, and the tilted posterior of one test image, "
        f"were sampled by {_listed(config.methods)}. What the draws decode to was labeled by a classifier that is "
        f"right on {result.classifier.accuracy:.1%} of unseen images."
    )
    tv, best = result.summary["tv"], result.best_method
    how = (
        f"by {best}, of the samplers to be trusted the most effective in a second"
        if _is_trusted(result, best)
        else f"by {best}, though no sampler is to be trusted here"
    )
    yield (
        "Distance from balance is total variation (TV): 0 is perfect, 1 the worst. It is "
        f"{number(tv['prior'])} for the prior and {number(tv[best])} for the tilted prior ({how})."
    )


def _is_trusted(result: DebiasResult, method: str) -> bool:
    table = result.comparison
    mine = table[(table["target"] == "prior") & (table["method"] == method)]
    return bool((mine["verdict"] == "ok").all())


def _notices(result: DebiasResult) -> Iterator[str]:
    """What makes numbers below mean less than they seem to."""
    yield from result.remarks
    bad = result.comparison[result.comparison["verdict"] != "ok"]
    for target, words in _TARGETS.items():
        methods = [*bad[bad["target"] == target]["method"]]
        if methods:
            yield f"Not to be trusted on {words}: {_listed(methods)}; the verdicts below say why."


def _listed(names: Any) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def _glossary(result: DebiasResult) -> dict[str, str]:
    return {method: _SAMPLERS[method] for method in result.config.methods}


def _provenance(result: DebiasResult, out: str | Path | None) -> dict[str, str]:
    found = provenance(result.config, out, seconds=result.summary["seconds"]["total"])
    if result.resumed:
        found["Resumed"] = "finished before, and read again: " + ", ".join(result.resumed)
    return found


# ------------------------------------------------------------------------------------- in numbers


def _headlines(result: DebiasResult) -> Iterator[Headline]:
    """The numbers that sum it up, as far as they are known."""
    summary, best = result.summary, result.best_method
    tv = summary["tv"]
    yield Headline(number(tv["prior"]), "distance from balance (TV) of the prior")
    yield Headline(number(tv[best]), f"the same for the tilted prior, by {best}")
    gain = summary.get("log_likelihood_gain", {}).get("tilted")
    if gain is not None:
        value = f"{gain['value']:+.2f} ± {_rounded(gain['se'])}"
        yield Headline(value, "nats of log likelihood gained per balanced test image, and its standard error")
    log_z = summary["log_z"]
    yield Headline(f"{number(log_z['value'])} ± {log_z['se']:.1g}", "log Z of the tilt and its standard error")
    weights = summary["importance"]
    if weights["pareto_k"] is not None:
        trust = f"Pareto k {number(weights['pareto_k'])}, trust below {number(weights['pareto_k_limit'])}"
        yield Headline(f"{100 * weights['ess_fraction']:.0f} %", f"of the importance draws are effective ({trust})")


def _rounded(error: float) -> str:
    return f"{error:.2f}" if error >= 0.01 else f"{error:.1g}"


def _balance_tables(result: DebiasResult) -> Iterator[Table]:
    """How far each source of images lies from balance, then its classes one by one."""
    interval = f"{next(iter(result.balances.values())).prob:.0%} interval"
    note = (
        "TV: total variation distance from equal proportions. Worth in labels: how many independent labels those of "
        "the decoded draws are worth. TV of chance: how far so few labels lie, on average, from the proportions they "
        "come from; without chance: with this taken off."
    )
    columns = ["TV", interval, "worth in labels", "TV of chance", "TV without chance"]
    distances, shares = [], []
    for name, balance in result.balances.items():
        title = _SOURCES.get(name, f"tilted prior by {name}")
        low, high = balance.tv_interval()
        cells = [f"{balance.tv():.3f}", f"{low:.3f} to {high:.3f}", number(round(balance.ess))]
        cells += [f"{balance.chance:.3f}", f"{balance.tv_without_chance():.3f}"]
        distances.append(Row(title, [Cell(text) for text in cells], note=f"{balance.n:,} images"))
        shares.append(Row(title, [Cell(f"{float(p):.3f}") for p in balance.proportions]))
    yield Table("Distance from balance", columns, distances, note, corner="images of")
    classes = [f"class {label}" for label in result.split.classes]
    yield Table("Proportion of images in each class", classes, shares, corner="images of")


def _sampler_tables(result: DebiasResult) -> Iterator[Table]:
    """For each target a row for each sampler, then everything else with a row for each diagnostic."""
    tables = {target: result.comparison[result.comparison["target"] == target] for target in _TARGETS}
    for target, table in tables.items():
        yield _main_table(f"Samplers of {_TARGETS[target]}", table)
    for target, table in tables.items():
        yield _full_table(f"Every diagnostic, {_TARGETS[target]}", table, explain=target == "prior")


def _main_table(caption: str, table: pd.DataFrame) -> Table:
    known = [name for name in _MAIN if name in table and table[name].notna().any()]
    rows = [
        Row(str(row["method"]), [_cell(name, row[name]) for name in known]) for _, row in table.iterrows()
    ]
    note = "Errors are those of means and mean squares against quadrature." if "worst_error_in_se" in known else ""
    return Table(caption, [_MAIN[name] for name in known], rows, note, corner="sampler")


def _full_table(caption: str, table: pd.DataFrame, explain: bool) -> Table:
    known = table.drop(columns=["target", "method", "verdict"])
    names = [str(name) for name in known if known[name].notna().any()]
    meaning = _MEANING if explain else {}
    rows = [Row(name, [_cell(name, value) for value in table[name]], meaning.get(name, "")) for name in names]
    return Table(caption, [*map(str, table["method"])], rows, corner="diagnostic")


def _cell(name: str, value: Any) -> Cell:
    if name == "verdict":
        return Cell(str(value), "ok" if value == "ok" else "bad")
    return Cell(number(value))
