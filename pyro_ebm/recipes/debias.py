"""The main job: train a VAE on biased images, learn its latent tilt from a few balanced ones, sample it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.datasets.splits import BiasedSplit
from pyro_ebm.devices import one_thread
from pyro_ebm.diagnostics.balance import ClassBalance, LabelClassifier, class_balance
from pyro_ebm.diagnostics.compare import compare
from pyro_ebm.energies import Energy
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import LogLikelihood
from pyro_ebm.inference.quadrature import quadrature
from pyro_ebm.models.vae import VAE
from pyro_ebm.randomness import fingerprint
from pyro_ebm.recipes import steps
from pyro_ebm.recipes.baselines import fit_vae, new_vae
from pyro_ebm.recipes.debias_config import DebiasConfig, Schedule
from pyro_ebm.recipes.job_folder import JobFolder, results_folder
from pyro_ebm.recipes.outputs import write_results
from pyro_ebm.recipes.result import DebiasResult, remarks_on, summarized
from pyro_ebm.tilts.tilt import TiltedModel, tilt
from pyro_ebm.training.fit import FitResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["debias"]

_POSTERIOR_SHARE = 0.25  # of the draws of the prior


@checked
def debias(
    config: DebiasConfig | None = None, *, out: str | Path | None = None, resume: bool = False, **settings: Any
) -> DebiasResult:
    """Run the whole job, and write its results into ``out`` when given.

    Each step (a model trained, a sampler run) is kept in ``out/steps`` as soon as it is finished, and training every
    ten epochs. After Ctrl-C or a crash the same call with ``resume=True`` goes on from there, to the same numbers.

    Args:
        config: the settings; or give them as keywords.
        out: folder for ``summary.json``, ``comparison.csv``, ``draws.nc``, ``vae.pt``, ``energy.pt``,
            ``figures/*.png`` and ``report.html``; made when missing.
        resume: go on with the job in ``out``, which must have the same settings and data.
        **settings: fields of :class:`DebiasConfig`, where ``config`` is not given.

    Returns:
        Models, draws, tables and numbers.

    Raises:
        ValueError: settings that cannot be; a class with too few examples.
        FileNotFoundError: data that are not there and cannot be downloaded.
        OSError: a folder ``out`` that cannot be written.
        CheckpointError: ``resume`` where there is no job, or one of other settings or data.
        KeyboardInterrupt: after Ctrl-C, also where a sampler or :func:`fit` alone would return what it has.
    """
    if config is not None and settings:
        raise ValueError(f"give config or keywords, not both; got config and {sorted(settings)}")
    if resume and out is None:
        raise ValueError("resume=True needs out, the folder of the job to go on with, got None")
    config = config or DebiasConfig(**settings)
    # Networks for 8 x 8 images are too small to be worth a second thread.
    threads = one_thread() if config.data == "digits" else nullcontext()
    with results_folder(out) as folder, threads, steps.interruptions_end_the_job():
        result = _Job.begun(config, folder, resume=resume).run()
        if folder is not None:
            write_results(result, folder)
    return result


class _Job:
    """The steps in their order, and what they share."""

    def __init__(self, config: DebiasConfig, split: BiasedSplit, kept: JobFolder) -> None:
        self.config, self.split, self.kept = config, split, kept
        self.device = torch.device(config.device)
        self.schedule = Schedule.of(config)
        self.options: dict[str, Any] = {"seed": config.seed, "progress": config.progress}

    @classmethod
    def begun(cls, config: DebiasConfig, folder: Path | None, *, resume: bool) -> _Job:
        """A job with its data, and with what is finished of it."""
        began = time.perf_counter()
        split = steps.load_split(config)
        parts = (split.biased, split.reference, split.test, split.classifier)
        data = fingerprint(tensor for part in parts for tensor in (part.images, part.labels))
        # Where the data lie and what the screen shows does not matter.
        settings = {k: v for k, v in asdict(config).items() if k not in ("data_root", "progress")}
        kept = JobFolder(folder, settings, data, resume=resume)
        kept.add("data", time.perf_counter() - began)
        return cls(config, split, kept)

    def run(self) -> DebiasResult:
        config, split, kept = self.config, self.split, self.kept
        with kept.timed("classifier"):
            labeled = split.classifier
            classifier = LabelClassifier.fit(labeled.images, labeled.labels, seed=config.seed)
        vae, energy, fits = self.trained()
        prior = tilt(steps.prior_model(vae), {"z": energy}, normalize=False)
        tilted = tilt(vae.model, {"z": energy})
        image = split.test.images[:1].to(self.device)
        labeled_draws = {method: self.prior_draws(method, prior, vae, classifier) for method in config.methods}
        prior_draws = {method: draws for method, (draws, _) in labeled_draws.items()}
        posterior_draws = {method: self.posterior_draws(method, tilted, image, vae) for method in config.methods}
        references = self.references(prior, tilted, image)
        balances = self.balances(vae, classifier, labeled_draws)
        models = {"base": vae.model, "tilted": tilted}
        likelihoods = {name: self.likelihood(name, model, vae) for name, model in models.items()}
        if config.baselines:
            self.add_baselines(vae, classifier, fits, balances, likelihoods)
        comparison = _compared(prior_draws, posterior_draws, references)
        weighted = prior_draws.get("snis") or kept.step(
            "sampling", "prior_snis_alone", partial(steps.draw, config, "snis", prior)
        )
        every = {"prior": prior_draws, "posterior": posterior_draws}
        remarks = list(remarks_on(config, fits, every, balances))
        summary = summarized(config, split, classifier, balances, likelihoods, comparison, weighted)
        seconds = {**kept.seconds, "total": sum(kept.seconds.values())}
        summary |= {"remarks": remarks, "seconds": seconds}
        return DebiasResult(
            config, split, classifier, vae.cpu(), energy.cpu(), fits, prior_draws, posterior_draws, references,
            balances, likelihoods, comparison, summary, remarks, tuple(kept.resumed),
        )  # fmt: skip

    def trained(self) -> tuple[VAE, Energy, dict[str, FitResult]]:
        images, reference = self.split.biased.images, self.split.reference.images.to(self.device)
        vae = new_vae(images, self.config.latent_dim, self.schedule, seed=self.config.seed).to(self.device)
        energy = steps.new_energy(self.config.latent_dim, seed=self.config.seed).to(self.device)
        train = partial(fit_vae, vae, images, self.schedule, **self.options)
        fits = {"vae": self.kept.model("vae", vae, train)}
        train = partial(steps.fit_energy, energy, vae, reference, self.schedule, **self.options)
        fits["tilt"] = self.kept.model("tilt", energy, train)
        return vae, energy, fits

    def prior_draws(
        self, method: str, prior: TiltedModel, vae: VAE, classifier: LabelClassifier
    ) -> tuple[Draws, Tensor]:
        """Draws of the tilted prior and the labels of their images."""
        make = partial(steps.draw_labeled, self.config, method, prior, vae, classifier)
        draws, labels = self.kept.step("sampling", f"prior_{method}", make)
        return draws.with_model(prior), labels

    def posterior_draws(self, method: str, tilted: TiltedModel, image: Tensor, vae: VAE) -> Draws:
        make = partial(steps.draw, self.config, method, tilted, image, guide=vae.guide, share=_POSTERIOR_SHARE)
        return self.kept.step("sampling", f"posterior_{method}", make).with_model(tilted, image.cpu())

    def references(self, prior: TiltedModel, tilted: TiltedModel, image: Tensor) -> dict[str, Draws]:
        if self.config.latent_dim > 2:
            return {}
        step = partial(self.kept.step, "sampling")
        return {
            "prior": step("reference_prior", lambda: quadrature(prior)),
            "posterior": step("reference_posterior", lambda: quadrature(tilted, image)),
        }

    def balances(
        self, vae: VAE, classifier: LabelClassifier, draws: Mapping[str, tuple[Draws, Tensor]]
    ) -> dict[str, ClassBalance]:
        """Class balance of the biased data (true labels) and of decoded draws (predicted labels)."""
        classes = self.split.classes
        generated = self.generated_balance("prior", vae, classifier)
        with self.kept.timed("balance"):
            return {
                "biased_data": class_balance(self.split.biased.labels, classes),
                "prior": generated,
                **{method: steps.label_balance(*found, classes) for method, found in draws.items()},
            }

    def generated_balance(self, name: str, vae: VAE, classifier: LabelClassifier) -> ClassBalance:
        labels = self.kept.step(
            "balance", f"labels_{name}", partial(steps.prior_labels, self.config, vae, classifier)
        )
        return class_balance(labels, self.split.classes)

    def likelihood(self, name: str, model: Any, vae: VAE) -> LogLikelihood:
        images = self.split.test.images
        return self.kept.step(
            "log_likelihood", f"likelihood_{name}",
            partial(steps.test_likelihood, self.config, model, vae, images),
        )  # fmt: skip

    def add_baselines(
        self,
        vae: VAE,
        classifier: LabelClassifier,
        fits: dict[str, FitResult],
        balances: dict[str, ClassBalance],
        likelihoods: dict[str, LogLikelihood],
    ) -> None:
        """What else one could do with the reference set: train on it alone, or fine-tune on it."""
        images, options = self.split.reference.images, {"budget": len(self.split.biased), **self.options}
        alone = new_vae(images, self.config.latent_dim, self.schedule, seed=self.config.seed).to(self.device)
        for name, other in (("reference_only", alone), ("fine_tuned", copy.deepcopy(vae))):
            train = partial(fit_vae, other, images, self.schedule, **options)
            fits[name] = self.kept.model("baselines", other, train, name)
            balances[name] = self.generated_balance(name, other, classifier)
            likelihoods[name] = self.likelihood(name, other.model, other)


def _compared(
    prior_draws: Mapping[str, Draws], posterior_draws: Mapping[str, Draws], references: Mapping[str, Draws]
) -> pd.DataFrame:
    """One row per target and method, and what ended its draws."""
    import pandas as pd

    tables = []
    for target, draws in (("prior", prior_draws), ("posterior", posterior_draws)):
        table = compare(draws, reference=references.get(target))
        table.insert(0, "target", target)
        table["stopped"] = [draws[method].notes.get("stopped", "num_samples") for method in draws]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
