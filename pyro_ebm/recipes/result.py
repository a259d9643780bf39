"""What a debias job found: models, draws, tables, numbers, and what must be said of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_ebm.datasets.splits import BiasedSplit
from pyro_ebm.diagnostics.balance import ClassBalance, LabelClassifier, fairness_discrepancy
from pyro_ebm.energies import Energy
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import LogLikelihood
from pyro_ebm.models.vae import VAE
from pyro_ebm.recipes.debias_config import QUICK, DebiasConfig
from pyro_ebm.recipes.steps import MAX_CHANCE, prior_model
from pyro_ebm.thresholds import pareto_k_limit
from pyro_ebm.tilts.tilt import TiltedModel, tilt
from pyro_ebm.training.fit import FitResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DebiasResult", "remarks_on", "summarized"]


@dataclass(frozen=True, eq=False)
class DebiasResult:
    """Everything :func:`debias` made; all of it on the CPU.

    Args:
        config: the settings.
        split: the data.
        classifier: labels decoded images.
        vae: trained on the biased set.
        energy: the latent tilt.
        fits: ``"vae"`` and ``"tilt"`` training curves (with baselines also ``"reference_only"`` and ``"fine_tuned"``).
        prior_draws: method -> draws of the tilted prior (site ``"z"``).
        posterior_draws: method -> draws of the tilted posterior of one test image.
        references: ``"prior"`` and ``"posterior"`` by quadrature, where z has one or two dimensions.
        balances: image source -> class balance.
        likelihoods: ``"base"`` and ``"tilted"`` (and baselines) -> log likelihood of balanced test images.
        comparison: one row per target and method; ``stopped`` says what ended the draws.
        summary: numbers by name, as written to ``summary.json``.
        remarks: sentences that belong beside the numbers: that they mean nothing (``quick``), which sampler was cut
            short, whose labels leave much to chance, which training ended before its time.
        resumed: steps that were read from the folder and not computed again.
    """

    config: DebiasConfig
    split: BiasedSplit
    classifier: LabelClassifier
    vae: VAE
    energy: Energy
    fits: Mapping[str, FitResult]
    prior_draws: Mapping[str, Draws]
    posterior_draws: Mapping[str, Draws]
    references: Mapping[str, Draws]
    balances: Mapping[str, ClassBalance]
    likelihoods: Mapping[str, LogLikelihood]
    comparison: pd.DataFrame
    summary: Mapping[str, Any]
    remarks: Sequence[str]
    resumed: Sequence[str]

    @property
    def tilted_prior(self) -> TiltedModel:
        return tilt(prior_model(self.vae), {"z": self.energy}, normalize=False)

    @property
    def best_method(self) -> str:
        """The method with verdict "ok" (else any) and the most effective draws per second on the prior."""
        table = self.comparison[self.comparison["target"] == "prior"].set_index("method")
        trusted = table[table["verdict"] == "ok"]
        return str((trusted if len(trusted) else table)["ess_per_second"].fillna(0.0).idxmax())


def remarks_on(
    config: DebiasConfig,
    fits: Mapping[str, FitResult],
    draws: Mapping[str, Mapping[str, Draws]],
    balances: Mapping[str, ClassBalance],
) -> Iterator[str]:
    """Sentences that belong beside the numbers.

    Args:
        config: the settings.
        fits: model -> its training.
        draws: target -> method -> draws.
        balances: image source -> class balance.
    """
    if config.quick:
        yield QUICK
    for name, fit in fits.items():
        if fit.stopped not in ("epochs", "early stopping"):
            yield f"Training of {name} ended before its time, after {fit.epochs} epochs: {fit.stopped}."
    for target, found in draws.items():
        for method, each in found.items():
            if each.notes.get("stopped") == "max_seconds":
                yield (
                    f"{method} was cut short on the {target}: its {config.max_seconds:g} s were spent after "
                    f"{each.num_draws:,} of {each.notes['num_samples']:,} draws a chain."
                )
    for name in draws.get("prior", ()):
        balance = balances[name]
        if balance.chance >= MAX_CHANCE:
            yield (
                f"The labels of {name} are worth {balance.ess:,.0f} independent ones, by which chance alone makes a TV "
                f"of {balance.chance:.3f}; with chance taken off its TV of {balance.tv():.3f} is "
                f"{balance.tv_without_chance():.3f}."
            )


def summarized(
    config: DebiasConfig,
    split: BiasedSplit,
    classifier: LabelClassifier,
    balances: Mapping[str, ClassBalance],
    likelihoods: Mapping[str, LogLikelihood],
    comparison: pd.DataFrame,
    weighted: Draws,
) -> dict[str, Any]:
    """The numbers of ``summary.json`` but for seconds and remarks.

    Args:
        config: the settings.
        split: the data.
        classifier: labels decoded images.
        balances: image source -> class balance.
        likelihoods: model -> log likelihood of test images.
        comparison: one row per target and method.
        weighted: of the tilted prior, for log Z.
    """
    log_z: Any = weighted.log_z
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    chains = comparison[(comparison["target"] == "prior") & (comparison["method"] != "snis")]
    columns = ["r_hat", "ess_bulk", "divergences", "seconds"]
    return {
        "data": config.data,
        "seed": config.seed,
        "latent_dim": config.latent_dim,
        "quick": config.quick,
        "sizes": split.sizes,
        "classifier_accuracy": classifier.accuracy,
        **_balance_numbers(balances),
        "log_z": {"value": float(log_z.value), "se": float(log_z.se)},
        "importance": {
            "ess_fraction": weighted.notes["ess"] / weighted.num_draws,
            "pareto_k": weighted.pareto_k,
            "pareto_k_limit": pareto_k_limit(weighted.num_chains * weighted.num_draws),
        },
        "mcmc": {row["method"]: {c: float(row[c]) for c in columns} for _, row in chains.iterrows()},
        "stopped": {
            target: dict(zip(rows["method"], rows["stopped"], strict=True))
            for target, rows in comparison.groupby("target", sort=False)
        },
        **likelihood_numbers(likelihoods),
        "log_likelihood_gain": {
            name: gain_over(found, likelihoods["base"]) for name, found in likelihoods.items() if name != "base"
        },
        "settings": settings,
    }


def likelihood_numbers(likelihoods: Mapping[str, LogLikelihood]) -> dict[str, dict[str, float]]:
    """Mean log likelihood of the test images by model, and the error of that mean for these images."""
    means = {name: found.mean() for name, found in likelihoods.items()}
    return {
        "test_log_likelihood": {name: float(mean.value) for name, mean in means.items()},
        "test_log_likelihood_se": {name: float(mean.se) for name, mean in means.items()},
    }


def gain_over(found: LogLikelihood, base: LogLikelihood) -> dict[str, float]:
    """Mean log likelihood gained for each of the same images, and its standard error: over images, and by log Z."""
    gained = (found.value - base.value).double()
    # The Monte Carlo error of each image is part of the spread over images; that of log Z is common to all.
    variance = float(gained.var()) / len(gained) + float((found.log_z_se - base.log_z_se).double().mean()) ** 2
    return {"value": float(gained.mean()), "se": math.sqrt(variance)}


def _balance_numbers(balances: Mapping[str, ClassBalance]) -> dict[str, dict[str, Any]]:
    return {
        "tv": {name: balance.tv() for name, balance in balances.items()},
        "tv_interval": {name: list(balance.tv_interval()) for name, balance in balances.items()},
        "tv_chance": {name: balance.chance for name, balance in balances.items()},
        "tv_without_chance": {name: balance.tv_without_chance() for name, balance in balances.items()},
        "labels_worth": {name: balance.ess for name, balance in balances.items()},
        "fairness_discrepancy": {n: fairness_discrepancy(balance.proportions) for n, balance in balances.items()},
        "class_proportions": {name: balance.proportions.tolist() for name, balance in balances.items()},
    }
