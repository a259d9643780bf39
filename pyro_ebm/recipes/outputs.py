"""What a debias job leaves in its folder: numbers, tables, draws, weights, figures and a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_ebm.diagnostics.arviz_bridge import to_arviz
from pyro_ebm.diagnostics.arviz_files import save_arviz
from pyro_ebm.files import write_whole
from pyro_ebm.recipes.debias_config import METHODS
from pyro_ebm.recipes.debias_figures import write_figures
from pyro_ebm.recipes.debias_report import debias_report
from pyro_ebm.recipes.report import write_report
from pyro_ebm.training.fit import save_weights

if TYPE_CHECKING:
    import pandas as pd

    from pyro_ebm.recipes.result import DebiasResult

__all__ = ["balance_table", "write_results"]


def balance_table(result: DebiasResult) -> pd.DataFrame:
    """Class proportions and total variation distance; one row per image source.

    ``TV`` comes with its 95 % interval; ``chance`` is what so many labels would have by chance alone, ``TV - chance``
    the distance with it taken off, ``worth`` the number of independent labels that those counted are worth.
    """
    import pandas as pd

    rows = {}
    for name, balance in result.balances.items():
        low, high = balance.tv_interval()
        shares = {f"class {c}": float(p) for c, p in zip(balance.classes, balance.proportions, strict=True)}
        rows[name] = {
            **shares, "TV": balance.tv(), "TV low": low, "TV high": high, "chance": balance.chance,
            "TV - chance": balance.tv_without_chance(), "worth": round(balance.ess), "images": balance.n,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("source")


def write_results(result: DebiasResult, folder: Path) -> None:
    """Write ``summary.json``, ``comparison.csv``, draws, weights, figures and ``report.html`` into a folder.

    Args:
        result: what to write.
        folder: made when missing, like its ``figures``.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    # NaN is no JSON: what is unknown is null.
    summary = json.dumps(_jsonable(result.summary), indent=2, allow_nan=False)
    write_whole(folder / "summary.json", summary + "\n")
    write_whole(folder / "comparison.csv", result.comparison.to_csv(index=False))
    for method, draws in result.prior_draws.items():
        name = "draws.nc" if method == result.best_method else f"draws_{method}.nc"
        save_arviz(to_arviz(draws, dims={"z": ["latent"]}, log_likelihood=False), folder / name)
    save_weights(result.vae, folder / "vae.pt")
    save_weights(result.energy, folder / "energy.pt")
    figures = write_figures(result, folder / "figures")
    write_report(folder / "report.html", debias_report(result, figures, folder))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _remove_leftovers(folder: Path) -> None:
    """Take away what an earlier job with other settings wrote here and this one may not write again."""
    optional = [folder / "figures" / f"{name}.png" for name in ("latent_scatter", "overlay", "energy_landscape")]
    for path in [*optional, *(folder / f"draws_{method}.nc" for method in METHODS)]:
        path.unlink(missing_ok=True)
