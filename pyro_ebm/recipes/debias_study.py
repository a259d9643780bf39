"""Ways to debias a generative model, compared over reference sizes, latent dimensions and seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_ebm.annotations import checked
from pyro_ebm.devices import one_thread
from pyro_ebm.errors import TrainingWarning, warn_user
from pyro_ebm.files import replacing, write_whole
from pyro_ebm.recipes.job_folder import results_folder
from pyro_ebm.recipes.study_cells import Bench, run_cell
from pyro_ebm.recipes.study_config import Cell, StudyConfig
from pyro_ebm.recipes.study_store import StudyStore

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["StudyConfig", "StudyResult", "debias_study"]

_GRID = ["latent_dim", "reference_size", "method"]
_METRICS = [
    *("tv", "fairness_discrepancy", "log_likelihood", "log_likelihood_gain", "confidence", "diversity"),
    *("least_diversity", "kl", "seconds"),
]


@dataclass(frozen=True, eq=False)
class StudyResult:
    """What :func:`debias_study` found.

    Args:
        config: the settings.
        table: a row for each cell of the grid. ``tv``: total variation distance of the generated classes from
            uniform. ``fairness_discrepancy``: distance of mean class probabilities from those of balanced test
            images. ``log_likelihood``: mean over these test images in nats, with its standard error over images;
            ``log_likelihood_gain``: over the biased VAE of the same dimension and seed. ``confidence``: mean
            probability of the most probable class. ``diversity``: distances within a class relative to those of real
            images, mean over classes (``least_diversity``: the worst class). ``kl``: from the prior to its
            tilt, in nats. ``seconds``: training and sampling, the biased VAE excluded. ``auc`` and ``weights_ess``: of
            the density ratio. ``proposal_ess``, ``pareto_k``, ``sampler``: how the tilt was sampled. ``infeasible``:
            why no tilt has the shares asked for, where none has. ``error`` and ``notes``: what went wrong, and what
            was warned of.
    """

    config: StudyConfig
    table: pd.DataFrame

    @property
    def failures(self) -> pd.DataFrame:
        """Rows of the cells that failed."""
        return self.table[self.table["error"].notna()]

    @property
    def infeasible(self) -> pd.DataFrame:
        """Rows of the cells that found that there is no such tilt."""
        return self.table[self._without_tilt(self.table)]

    @staticmethod
    def _without_tilt(table: pd.DataFrame) -> pd.Series:
        return table.reindex(columns=["infeasible"])["infeasible"].notna()

    def summary(self) -> pd.DataFrame:
        """Means over seeds, and their standard errors in columns ``*_se`` (NaN from a single seed).

        Returns:
            Indexed by latent dimension, reference size and method; ``seeds``: cells with numbers.
        """
        table = self.table.reindex(columns=[*self.table.columns, *set(_METRICS).difference(self.table.columns)])
        numbers = table["error"].isna() & ~self._without_tilt(table)
        table = table.assign(seeds=numbers.astype(int)).astype(dict.fromkeys(_METRICS, float))
        groups = table.groupby(_GRID, sort=False)
        means, errors = groups[_METRICS].mean(), groups[_METRICS].sem().add_suffix("_se")
        columns = [name for metric in _METRICS for name in (metric, f"{metric}_se")]
        return groups[["seeds"]].sum().join(means).join(errors)[["seeds", *columns]]


@checked
def debias_study(
    config: StudyConfig | None = None, *, out: str | Path | None = None, **settings: Any
) -> StudyResult:
    """Compare ways to debias a VAE, each at equal reference size.

    ===================  ===================================================================================
    method               what is trained
    ===================  ===================================================================================
    biased               a VAE on the biased images; all others but the next and the fourth start from it
    reference_only       a VAE on the reference images
    fine_tuned           the biased VAE, on the reference images
    importance_weighted  a VAE on both sets, biased images weighted by an estimated density ratio
    tilt                 an energy that tilts the prior of the biased VAE, on the reference images
    constraint           the same, with class probabilities held equal by a label classifier; no reference images
    ===================  ===================================================================================

    Test images and label classifier are the same for all cells of a seed. With a folder, each cell is kept as
    soon as it is finished, and a later call computes what is missing, or had failed; several processes may share
    the folder. Cells of other settings (data, proportions, training) are kept apart.

    Args:
        config: the settings; or give them as keywords.
        out: folder for ``study.csv`` (a row for each cell), ``summary.csv``, ``figures/debias_study.png``,
            ``settings.json``, and what is kept: ``cells/*.json``, ``vaes/*.pt``; made when missing.
        **settings: fields of :class:`StudyConfig`, where ``config`` is not given.

    Returns:
        The table. Where cells failed, a :class:`TrainingWarning` says so, and their rows say why.

    Raises:
        ValueError: settings that cannot be; more reference images than the data have.
        FileNotFoundError: data that are not there and cannot be downloaded.
        OSError: a folder ``out`` that cannot be written.

    Reference:
        Choi, Grover, Singh, Shu and Ermon (2020), "Fair Generative Modeling via Weak Supervision".
    """
    if config is not None and settings:
        raise ValueError(f"give config or keywords, not both; got config and {sorted(settings)}")
    config = config or StudyConfig(**settings)
    # Networks for 8 x 8 images are too small to be worth a second thread.
    with results_folder(out) as folder, one_thread() if config.data == "digits" else nullcontext():
        store = StudyStore(folder, config.fingerprint)
        _run(config, store)
        result = StudyResult(config, _table(config, store))
        if folder is not None:
            _write(result, folder)
    failed = len(result.failures)
    if failed:
        first = result.failures.iloc[0]
        warn_user(
            f"{failed} of {len(result.table)} cells failed, the first of them {Cell(*first[[*Cell._fields]]).name} "
            f"({first['error']}); the same call tries them again",
            TrainingWarning,
        )
    return result


def _run(config: StudyConfig, store: StudyStore) -> None:
    """Compute every cell that is not finished."""
    missing = [cell for cell in config.cells if not _is_finished(store.row(cell))]
    with _bar(len(config.cells), len(config.cells) - len(missing), config.progress) as bar:
        for seed in dict.fromkeys(cell.seed for cell in missing):
            bench = Bench(config, seed, store)
            for cell in missing:
                if cell.seed == seed:
                    bar.set_postfix_str(cell.name)
                    store.keep_row(cell, run_cell(bench, cell))
                    bar.update()


def _is_finished(row: dict[str, Any] | None) -> bool:
    return row is not None and row.get("error") is None


@contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, disable=not progress, desc="debias-study", unit="cell") as bar:
        yield bar


def _table(config: StudyConfig, store: StudyStore) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = [store.row(cell) or {} for cell in config.cells]
    base = {(r["latent_dim"], r["seed"]): r.get("log_likelihood") for r in rows if r["method"] == "biased"}
    for i, row in enumerate(rows):
        found, before = row.get("log_likelihood"), base.get((row["latent_dim"], row["seed"]))
        gain = None if found is None or before is None else found - before
        rows[i] = {"data": config.data, **row, "log_likelihood_gain": gain}
    return pd.DataFrame(rows)


def _write(result: StudyResult, folder: Path) -> None:
    """Tables, figure and settings."""
    from matplotlib.figure import Figure

    from pyro_ebm.plots.study import plot_debias_study

    write_whole(folder / "study.csv", result.table.to_csv(index=False))
    write_whole(folder / "summary.csv", result.summary().to_csv())
    write_whole(folder / "settings.json", json.dumps(asdict(result.config), indent=1, default=str) + "\n")
    if "tv" in result.table and result.table["tv"].notna().any():
        # A figure of its own, which no notebook shows by itself.
        dims = len(result.config.dims)
        figure = Figure(figsize=(1.6 + 2.9 * dims, 6.0), layout="constrained")
        plot_debias_study(result.summary(), axes=figure.subplots(2, dims, squeeze=False))
        with replacing(folder / "figures" / "debias_study.png") as path:
            figure.savefig(path, dpi=130)
