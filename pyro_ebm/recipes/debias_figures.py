"""The figures of a debias job: each drawn, written, captioned, and put into words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm import plots
from pyro_ebm.files import replacing
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.report import SCALE, Figure, number

if TYPE_CHECKING:
    from pyro_ebm.recipes.result import DebiasResult
    from pyro_ebm.training.fit import FitResult

__all__ = ["write_figures"]

_GRID = 64  # images in a grid of generated ones


class _Planned(NamedTuple):
    """A figure not drawn yet."""

    draw: Callable[[], Any]
    caption: str
    alt: str


class _Points(NamedTuple):
    """Latent points the figures share."""

    prior: Tensor
    tilted: Tensor
    encoded: Tensor
    decoded: Mapping[str, Tensor]


def write_figures(result: DebiasResult, folder: Path) -> dict[str, Figure]:
    """Draw every figure into ``folder``: name -> what the report shows; those of the plane where z has one."""
    points = _points(result)
    planned = {**_of_balance(result, points), **_of_samplers(result), **_of_training(result)}
    if result.config.latent_dim >= 2:
        planned |= _of_the_plane(result, points)
    if result.config.latent_dim == 2:
        planned["energy_landscape"] = _landscape(result, points)
    return {
        name: Figure(_save(each.draw, folder / f"{name}.png"), each.caption, each.alt)
        for name, each in planned.items()
    }


def _points(result: DebiasResult) -> _Points:
    split, vae, seed = result.split, result.vae, result.config.seed
    with forked_rng(seed), torch.no_grad():
        prior = vae.prior.sample((1500,))
        generator = torch.Generator().manual_seed(seed)
        tilted = result.prior_draws[result.best_method].resample(1500, generator=generator)["z"]
        encoded = vae.encode(split.biased.images[:3000]).mean
        decoded = {name: vae.decode(z[:_GRID]).mean for name, z in (("prior", prior), ("tilted", tilted))}
    return _Points(prior, tilted, encoded, decoded)


def _of_balance(result: DebiasResult, points: _Points) -> dict[str, _Planned]:
    split = result.split
    shown = {name: balance for name, balance in result.balances.items() if name != "biased_data"}
    labels = {"biased": split.biased.labels, "reference": split.reference.labels}
    return {
        "label_histograms": _Planned(
            lambda: plots.plot_label_histograms(labels, split.classes),
            "Classes in the biased training set and in the balanced set of reference images.",
            "Bars, two a class. " + " ".join(_shares(name, found, split.classes) for name, found in labels.items()),
        ),
        "class_balance": _Planned(
            lambda: plots.plot_class_balance(shown),
            "Classes of decoded draws before the tilt (prior) and after it, by sampler, with intervals. The closer to "
            "the dashed line, the more balanced.",
            f"Points with intervals around a dashed line at {1 / len(split.classes):.0%}, a group for each class. "
            + " ".join(_range(name, each) for name, each in shown.items()),
        ),
        "prior_samples": _Planned(
            lambda: plots.plot_images(points.decoded["prior"], title="prior, decoded"),
            "Before: draws of the prior, decoded.",
            _grid_in_words(result, points.decoded["prior"]),
        ),
        "tilted_samples": _Planned(
            lambda: plots.plot_images(points.decoded["tilted"], title="tilted prior, decoded"),
            f"After: draws of the tilted prior by {result.best_method}, decoded.",
            _grid_in_words(result, points.decoded["tilted"]),
        ),
    }


def _of_samplers(result: DebiasResult) -> dict[str, _Planned]:
    def planned(target: str, words: str) -> _Planned:
        draws = getattr(result, f"{target}_draws")
        caption = (
            f"Samplers of {words}. Ranks: flat histograms mean that chains agree. Effective sample size: how many "
            "independent draws they are worth. "
        )
        exact = result.references.get(target)
        caption += (
            "Errors of means and mean squares against quadrature on a grid: within the band they may be chance."
            if exact is not None
            else "Means of all samplers should agree within their intervals."
        )
        return _Planned(
            lambda: plots.plot_compare(draws, reference=exact), caption, _comparison_in_words(result, target)
        )

    return {
        "comparison_prior": planned("prior", "the tilted prior"),
        "comparison_posterior": planned("posterior", "the tilted posterior of one test image"),
    }


def _of_training(result: DebiasResult) -> dict[str, _Planned]:
    vae, fitted = result.fits["vae"], result.fits["tilt"]
    return {
        "training": _Planned(
            lambda: plots.plot_training_curves(vae, label="negative ELBO per image (nats)"),
            "Training of the VAE: negative ELBO of the images it learns from, and of those held out. The star marks "
            "the weights kept.",
            _curves_in_words(vae),
        ),
        "tilt_training": _Planned(
            lambda: plots.plot_training_curves(fitted, label="loss per reference image (nats)"),
            "Training of the tilt: minus the log likelihood that reference images gain over the untilted VAE (beyond "
            "four latent dimensions, its lower bound). Below 0 the tilt fits them better. All are learned from, none "
            "is held out.",
            _curves_in_words(fitted),
        ),
    }


def _of_the_plane(result: DebiasResult, points: _Points) -> dict[str, _Planned]:
    labels = result.split.biased.labels[: len(points.encoded)]
    plane = "the latent plane" if result.config.latent_dim == 2 else "a plane through the latent space"
    scatter = f"{len(labels):,} points in {plane}, one color and marker a class."
    overlay = f"Gray points of encodings in {plane}, dashed lines around the prior, solid ones around the tilted prior."
    if result.config.latent_dim == 2:
        scatter += " Means: " + "; ".join(
            f"class {label} at {_place(points.encoded[labels == label])}" for label in result.split.classes
        )
        overlay += f" Mean of the prior's draws: {_place(points.prior)}; of the tilted: {_place(points.tilted)}."
    return {
        "latent_scatter": _Planned(
            lambda: plots.plot_latent_scatter(points.encoded, labels),
            "Where the encoder puts the biased training images, by class.",
            scatter,
        ),
        "overlay": _Planned(
            lambda: plots.plot_latent_overlay(points.encoded, points.prior, points.tilted),
            "Where the prior draws, where the tilted prior draws, and where the biased training images are encoded.",
            overlay,
        ),
    }


def _landscape(result: DebiasResult, points: _Points) -> _Planned:
    with torch.no_grad():
        density = -result.energy(points.tilted) + result.vae.prior.log_prob(points.tilted)
    peak = points.tilted[density.argmax()][None]
    return _Planned(
        lambda: plots.plot_energy_landscape(result.energy, result.vae.prior, points.tilted[:400]),
        "Log density of the tilted prior, -E + log p, with 400 of its draws.",
        "A map of the latent plane, bright where the density is high, with lines around its most probable regions and "
        f"400 draws as dots. It is brightest near {_place(peak)}.",
    )


# ---------------------------------------------------------------------------------------- in words


def _shares(name: str, labels: Tensor, classes: tuple[int, ...]) -> str:
    return f"{name}: " + ", ".join(f"class {k} {float((labels == k).double().mean()):.0%}" for k in classes) + "."


def _range(name: str, balance: Any) -> str:
    p, classes = balance.proportions, balance.classes
    low, high = int(p.argmin()), int(p.argmax())
    return f"{name}: from {float(p[low]):.0%} (class {classes[low]}) to {float(p[high]):.0%} (class {classes[high]})."


def _grid_in_words(result: DebiasResult, images: Tensor) -> str:
    labels = result.classifier.predict(images)
    counts = ", ".join(f"{int((labels == k).sum())} times {k}" for k in result.split.classes)
    return f"A grid of {len(images)} generated images, in which the classifier sees {counts}."


def _comparison_in_words(result: DebiasResult, target: str) -> str:
    table = result.comparison[result.comparison["target"] == target]
    sizes = ", ".join(f"{m} {number(ess)}" for m, ess in zip(table["method"], table["ess_bulk"], strict=True))
    words = f"Rank histograms of the chains, bars of effective sample sizes ({sizes}), "
    errors = table.dropna(subset=["worst_error_in_se"]) if "worst_error_in_se" in table else table[:0]
    if errors.empty:
        return words + "and the means of each sampler with intervals."
    worst = errors.loc[errors["worst_error_in_se"].idxmax()]
    return words + (
        "and errors of means in standard errors, the largest "
        f"{number(round(float(worst['worst_error_in_se']), 1))} ({worst['method']})."
    )


def _curves_in_words(fitted: FitResult) -> str:
    def curve(name: str, values: list[float]) -> str:
        return f"{name} loss goes from {number(values[0])} to {number(values[-1])}"

    if not fitted.train_loss:
        return "No epoch was finished."
    said = [curve("training", fitted.train_loss)]
    said += [curve("validation", fitted.validation_loss)] if fitted.validation_loss else []
    return f"Over {len(fitted.train_loss)} epochs " + ", ".join(said) + f"; a star at epoch {fitted.kept_epoch}."


def _place(points: Tensor) -> str:
    x, y = (float(value) for value in points.mean(0))
    return f"({x:.1f}, {y:.1f})"


def _save(draw: Callable[[], Any], path: Path) -> Path:
    """Draw without showing a window or an output, and write it."""
    import matplotlib.pyplot as plt
    import numpy as np

    # Not rc_context({"backend": ...}): it leaves the backend changed.
    with plt.ioff():
        figure = np.ravel(draw())[0].figure
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110 * SCALE)
        plt.close(figure)
    return path
