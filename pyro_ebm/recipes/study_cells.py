"""One cell of the debias study: train a model by one method, generate with it, and judge what it generates."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.datasets.splits import BiasedSplit
from pyro_ebm.deadline import interruptions_pass
from pyro_ebm.diagnostics.balance import (
    LabelClassifier,
    class_balance,
    fairness_discrepancy,
    mean_confidence,
)
from pyro_ebm.diagnostics.diversity import class_diversity
from pyro_ebm.energies import Energy
from pyro_ebm.errors import InfeasibleError, InferenceWarning, TrainingWarning
from pyro_ebm.estimates import Estimate
from pyro_ebm.inference.annealing.log_normalizer import log_normalizer
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import log_likelihood
from pyro_ebm.inference.sample import sample
from pyro_ebm.models.vae import VAE
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.baselines import fine_tune, train_vae, train_weighted
from pyro_ebm.recipes.steps import load_split, prior_model, train_tilt
from pyro_ebm.recipes.study_config import Cell, StudyConfig
from pyro_ebm.recipes.study_store import Row, StudyStore
from pyro_ebm.thresholds import pareto_k_limit
from pyro_ebm.tilts.tilt import tilt
from pyro_ebm.training.fit import FitResult

__all__ = ["Bench", "run_cell"]

# Importance sampling weighs so many proposals for each image to generate: the larger number where the smaller is not
# worth as many draws as there are images to be. Chains take over where that is no use.
_PROPOSALS_PER_IMAGE = (10, 50)
_LEAST_ESS = 1000


@dataclass(frozen=True, eq=False)
class _Trained:
    """A generative model: a VAE, perhaps with a tilt of its prior, and what is to be told of its training."""

    vae: VAE
    energy: Energy | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class Bench:
    """What the cells of one seed share: the data, the label classifier, and the biased VAEs.

    Args:
        config: the study.
        seed: the seed.
        store: keeps the biased VAEs.

    Raises:
        ValueError: a reference size that the data do not have.
    """

    def __init__(self, config: StudyConfig, seed: int, store: StudyStore) -> None:
        self.config, self.seed, self.store = config, seed, store
        self.split: BiasedSplit = load_split(config.job(config.dims[0], seed))
        available = len(self.split.reference)
        if max(config.sizes) > available:
            raise ValueError(
                f"reference_sizes must be at most {available}, the balanced reference images that these data and "
                f"proportions leave, got {config.sizes}; leave out the larger ones, or lower fraction"
            )
        labeled = self.split.classifier
        self.classifier = LabelClassifier.fit(labeled.images, labeled.labels, seed=seed)
        self.test_probabilities = self.classifier.predict_proba(self.split.test.images).double().mean(0)
        self._vaes: dict[int, VAE] = {}

    def reference(self, size: int) -> Tensor:
        """The first so many images of the reference set, equally many of each class."""
        images, labels = self.split.reference.images, self.split.reference.labels
        each = size // len(self.split.classes)
        return images[torch.cat([(labels == label).nonzero().squeeze(1)[:each] for label in self.split.classes])]

    def biased_vae(self, latent_dim: int) -> VAE:
        """The VAE of the biased images: from memory, from the folder of the study, or trained now."""
        if latent_dim not in self._vaes:
            images, schedule = self.split.biased.images, self.config.schedule
            with forked_rng(self.seed):
                vae = VAE(images.shape[1:], latent_dim, hidden=schedule.hidden)
            if self.store.load_vae(vae, self.seed):
                vae.eval()
            else:
                vae, result = train_vae(images, latent_dim, schedule, **self.options)
                _require_finished(result)
                self.store.keep_vae(vae, self.seed)
            self._vaes[latent_dim] = vae
        return self._vaes[latent_dim]

    @property
    def options(self) -> dict[str, Any]:
        return {"seed": self.seed, "progress": False}


def run_cell(bench: Bench, cell: Cell) -> Row:
    """Train, generate and judge; what goes wrong is in the row, under ``"error"``.

    Shares of the classes that no tilt of the VAE's prior has are no fault but a result, under ``"infeasible"``.
    ``seconds`` is what the method takes beyond the biased VAE, judging excluded; ``notes`` holds the warnings.

    Raises:
        KeyboardInterrupt: also where :func:`fit` took an interruption for the end of training.
    """
    row: Row = {**cell._asdict(), "error": None, "infeasible": None}
    with interruptions_pass(), warnings.catch_warnings(record=True) as caught:
        for category in (InferenceWarning, TrainingWarning):
            warnings.simplefilter("always", category)
        try:
            # Its own time belongs to no method.
            bench.biased_vae(cell.latent_dim)
            began = time.perf_counter()
            trained = _TRAIN[cell.method](bench, cell)
            vae, energy = trained.vae, trained.energy
            sampled = None if energy is None else _sample_tilted(bench, vae, energy)
            row["seconds"] = time.perf_counter() - began
            row |= {**trained.facts, **({} if sampled is None else sampled.facts)}
            row |= {**_judge_images(bench, vae, sampled), **_judge_fit(bench, trained, sampled)}
        except InfeasibleError as error:
            row["infeasible"] = str(error)
        except Exception as error:  # one cell that fails must not end a study of hours
            row["error"] = f"{type(error).__name__}: {error}"
    notes = []
    for each in caught:
        if issubclass(each.category, InferenceWarning | TrainingWarning):
            notes.append(str(each.message))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    row["notes"] = "; ".join(dict.fromkeys(notes))
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _require_finished(*results: FitResult) -> None:
    """A model that was stopped halfway is no result."""
    for result in results:
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        if result.stopped not in ("epochs", "early stopping"):
            raise RuntimeError(f"training stopped after {result.epochs} epochs: {result.stopped}")


# ---------------------------------------------------------------------------------------- methods


def _biased(bench: Bench, cell: Cell) -> _Trained:
    return _Trained(bench.biased_vae(cell.latent_dim))


def _reference_only(bench: Bench, cell: Cell) -> _Trained:
    vae, result = train_vae(
        bench.reference(cell.reference_size), cell.latent_dim, bench.config.schedule,
        budget=len(bench.split.biased), **bench.options,
    )  # fmt: skip
    _require_finished(result)
    return _Trained(vae)


def _fine_tuned(bench: Bench, cell: Cell) -> _Trained:
    vae, result = fine_tune(
        bench.biased_vae(cell.latent_dim), bench.reference(cell.reference_size), bench.config.schedule,
        budget=len(bench.split.biased), **bench.options,
    )  # fmt: skip
    _require_finished(result)
    return _Trained(vae)


def _importance_weighted(bench: Bench, cell: Cell) -> _Trained:
    biased, reference = bench.split.biased.images, bench.reference(cell.reference_size)
    vae, result, ratio = train_weighted(
        biased, reference, cell.latent_dim, bench.config.schedule, **bench.options
    )
    _require_finished(result)
    return _Trained(vae, facts={"auc": ratio.auc, "weights_ess": ratio.ess() / len(biased)})


def _tilt(bench: Bench, cell: Cell) -> _Trained:
    vae, reference = bench.biased_vae(cell.latent_dim), bench.reference(cell.reference_size)
    energy, result = train_tilt(vae, reference, bench.config.schedule, **bench.options)
    _require_finished(result)
    return _Trained(vae, energy)


def _constraint(bench: Bench, cell: Cell) -> _Trained:
    from pyro_ebm.moments.energy import MomentEnergy
    from pyro_ebm.moments.fit import fit_moments

    vae, classes = bench.biased_vae(cell.latent_dim), bench.split.classes

    def class_probabilities(z: Tensor) -> Tensor:
        images = vae.decode(z.reshape(-1, vae.latent_dim)).mean
        return bench.classifier.predict_proba(images).reshape(*z.shape[:-1], len(classes))

    energy = MomentEnergy(class_probabilities, names=[f"share of class {label}" for label in classes])
    # An error of the multipliers moves the classes as the noise of the images generated does: so make it smaller.
    num_samples = 3 * bench.config.num_generated
    # Not by SMC: its moves would decode and classify thousands of z at each step, without a gradient to follow.
    fit_moments(
        vae.prior, energy, [1.0 / len(classes)] * len(classes), method="importance", num_samples=num_samples,
        seed=bench.seed,
    )  # fmt: skip
    return _Trained(vae, energy)


_TRAIN: dict[str, Callable[[Bench, Cell], _Trained]] = {
    "biased": _biased,
    "reference_only": _reference_only,
    "fine_tuned": _fine_tuned,
    "importance_weighted": _importance_weighted,
    "tilt": _tilt,
    "constraint": _constraint,
}


# ---------------------------------------------------------------------------------------- judging


class _Sampled(NamedTuple):
    """Draws of a tilted prior, its log Z, and how they were made."""

    draws: Draws
    log_z: Estimate
    facts: Row


def _sample_tilted(bench: Bench, vae: VAE, energy: Energy) -> _Sampled:
    """Importance sampling of the tilted prior, and where its weights are no use a batch of chains."""
    prior, num = tilt(prior_model(vae), {"z": energy}, normalize=False), bench.config.num_generated
    for each in _PROPOSALS_PER_IMAGE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InferenceWarning)  # judged here
            draws = sample(prior, method="snis", num_samples=num * each, num_chains=1, seed=bench.seed)
        ess, k, log_z = float(draws.notes["ess"]), draws.pareto_k, draws.log_z
        share = ess / (num * each)
        if ess >= num:
            break
    if log_z is None or not (k is not None and k <= pareto_k_limit(num * each) and ess > min(_LEAST_ESS, num)):
        draws = sample(
            prior, method="chees", num_samples=max(-(-num // 64), 300), num_chains=64, warmup_steps=200,
            seed=bench.seed, progress=False,
        )  # fmt: skip
        log_z = log_normalizer(vae.prior, energy, method="smc", seed=bench.seed)
    # log p(z) - E(z) less log p(z): energies that decode and classify each z are not asked again.
    lowered = draws.stats["lp"].flatten().double() - vae.prior.log_prob(draws.flat("z")).double()
    kl = float(draws.weights.double() @ lowered) - float(log_z.value)
    facts = {"kl": kl, "proposal_ess": share, "pareto_k": k, "sampler": draws.method}
    return _Sampled(draws, log_z, facts)


@torch.no_grad()
def _generate(bench: Bench, vae: VAE, sampled: _Sampled | None) -> Tensor:
    """Decoded draws of the prior, or of its tilt."""
    num = bench.config.num_generated
    if sampled is None:
        with forked_rng(bench.seed):
            z = vae.prior.sample((num,))
    else:
        z = sampled.draws.resample(num, generator=torch.Generator().manual_seed(bench.seed))["z"]
    return torch.cat([vae.decode(part).mean for part in z.split(2_000)])


def _judge_images(bench: Bench, vae: VAE, sampled: _Sampled | None) -> Row:
    """Balance, confidence and diversity of generated images."""
    split, classifier = bench.split, bench.classifier
    images = _generate(bench, vae, sampled)
    probabilities = torch.cat([classifier.predict_proba(part) for part in images.split(2_000)])
    labels = torch.tensor(classifier.classes_)[probabilities.argmax(-1)]
    balance = class_balance(labels, split.classes)
    diversity = class_diversity(images, labels, split.test.images, split.test.labels, split.classes)
    return {
        "tv": balance.tv(),
        "fairness_discrepancy": fairness_discrepancy(probabilities.double().mean(0), bench.test_probabilities),
        "confidence": mean_confidence(probabilities),
        "diversity": float(diversity.mean()),
        "least_diversity": float(diversity.min()),
        "proportions": balance.proportions.tolist(),
    }


def _judge_fit(bench: Bench, trained: _Trained, sampled: _Sampled | None) -> Row:
    """Log likelihood of balanced test images, with its standard error."""
    model, variance, quick = trained.vae.model, 0.0, bench.config.quick
    if trained.energy is not None and sampled is not None:
        model = tilt(model, {"z": trained.energy}, normalize=float(sampled.log_z.value))
        variance = float(sampled.log_z.se) ** 2  # all images share this error
    images = bench.split.test.images[: 50 if quick else 500]
    num_samples = 100 if quick else 500
    value = log_likelihood(model, trained.vae.guide, images, num_samples=num_samples, seed=bench.seed).value.double()
    se = math.sqrt(float(value.var()) / len(value) + variance)
    return {"log_likelihood": float(value.mean()), "log_likelihood_se": se}
