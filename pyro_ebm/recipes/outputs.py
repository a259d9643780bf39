"""What a debias job leaves in its folder: numbers, tables, draws, weights, figures and a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_ebm import plots
from pyro_ebm.diagnostics.arviz_bridge import save_arviz, to_arviz
from pyro_ebm.files import write_whole
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.debias_config import METHODS
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
    result.comparison.to_csv(folder / "comparison.csv", index=False)
    for method, draws in result.prior_draws.items():
        save_arviz(to_arviz(draws, dims={"z": ["latent"]}, log_likelihood=False), folder / f"draws_{method}.nc")
    best = folder / f"draws_{result.best_method}.nc"
    best.replace(folder / "draws.nc")
    save_weights(result.vae, folder / "vae.pt")
    save_weights(result.energy, folder / "energy.pt")
    figures = _write_figures(result, folder / "figures")
    write_report(
        folder / "report.html",
        title=f"Debiasing a VAE of {result.config.data} by a latent tilt",
        summary=result.summary,
        comparison=_labeled(result.comparison),
        balance_table=balance_table(result),
        figures=figures,
    )


def _labeled(comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison with "target: method" as the name of each row."""
    names = comparison["target"] + ": " + comparison["method"]
    return comparison.drop(columns=["target", "method"]).set_axis(names)


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


def _write_figures(result: DebiasResult, folder: Path) -> list[tuple[str, Path]]:
    """Every figure as (caption, file)."""
    split, vae = result.split, result.vae
    with forked_rng(result.config.seed), torch.no_grad():
        prior_z = vae.prior.sample((1500,))
        generator = torch.Generator().manual_seed(result.config.seed)
        tilted_z = result.prior_draws[result.best_method].resample(1500, generator=generator)["z"]
        encoded = vae.encode(split.biased.images[:3000]).mean
        decoded = {name: vae.decode(z[:64]).mean for name, z in (("prior", prior_z), ("tilted", tilted_z))}
    figures: dict[str, tuple[str, Callable[[], Any]]] = {
        "label_histograms": (
            "Classes in the biased training set and in the balanced reference set.",
            lambda: plots.plot_label_histograms(
                {"biased": split.biased.labels, "reference": split.reference.labels}, split.classes
            ),
        ),
        "class_balance": (
            "Classes of decoded draws before the tilt (prior) and after it, by sampler, with 95 % intervals.",
            lambda: plots.plot_class_balance(
                {name: b for name, b in result.balances.items() if name != "biased_data"}
            ),
        ),
        "prior_samples": (
            "Decoded draws of the untilted prior.",
            lambda: plots.plot_images(decoded["prior"], title="decoded prior draws"),
        ),
        "tilted_samples": (
            f"Decoded draws of the tilted prior ({result.best_method}).",
            lambda: plots.plot_images(decoded["tilted"], title="decoded tilted draws"),
        ),
        "training": (
            "Training and validation loss of the VAE (per image).",
            lambda: plots.plot_training_curves(result.fits["vae"]),
        ),
        "tilt_training": (
            "Training and validation loss of the tilt: minus the log likelihood gained per image.",
            lambda: plots.plot_training_curves(result.fits["tilt"]),
        ),
        "comparison_prior": (
            "Samplers of the tilted prior compared.",
            lambda: plots.plot_compare(result.prior_draws, reference=result.references.get("prior")),
        ),
        "comparison_posterior": (
            "Samplers of the tilted posterior of one test image compared.",
            lambda: plots.plot_compare(
                result.posterior_draws, reference=result.references.get("posterior")
            ),
        ),
    }
    if result.config.latent_dim >= 2:
        figures["latent_scatter"] = (
            "Encodings of the biased training images by class.",
            lambda: plots.plot_latent_scatter(encoded, split.biased.labels[:3000]),
        )
        figures["overlay"] = (
            "Encodings, prior draws and tilted draws.",
            lambda: plots.plot_latent_overlay(encoded, prior_z, tilted_z),
        )
    if result.config.latent_dim == 2:
        figures["energy_landscape"] = (
            "Log density of the tilted prior, -E + log p, with draws.",
            lambda: plots.plot_energy_landscape(result.energy, vae.prior, tilted_z[:400]),
        )
    return [(caption, _save(draw, folder / f"{name}.png")) for name, (caption, draw) in figures.items()]


def _save(draw: Callable[[], Any], path: Path) -> Path:
    """Draw without showing a window or an output, and write it."""
    import matplotlib.pyplot as plt
    import numpy as np

    # Not rc_context({"backend": ...}): it leaves the backend changed.
    with plt.ioff():
        figure = np.ravel(draw())[0].figure
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path
