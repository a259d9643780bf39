"""The main job: train a VAE on biased images, learn its latent tilt from a few balanced ones, sample it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_ebm import datasets
from pyro_ebm.chain_statistics import ess_bulk
from pyro_ebm.datasets.splits import BiasedSplit, biased_split
from pyro_ebm.devices import one_thread
from pyro_ebm.diagnostics.balance import ClassBalance, LabelClassifier, class_balance, fairness_discrepancy
from pyro_ebm.diagnostics.compare import compare
from pyro_ebm.energies import Energy, MLPEnergy
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.importance import LogLikelihood, log_likelihood
from pyro_ebm.inference.quadrature import quadrature
from pyro_ebm.inference.sample import sample
from pyro_ebm.models.vae import VAE
from pyro_ebm.objectives.fit_tilt import fit_tilt
from pyro_ebm.randomness import forked_rng
from pyro_ebm.recipes.baselines import fine_tune, train_vae
from pyro_ebm.recipes.debias_config import DATASETS, DebiasConfig, Schedule
from pyro_ebm.tilts.normalizer import Normalizer
from pyro_ebm.tilts.tilt import TiltedModel, tilt
from pyro_ebm.training.fit import FitResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DATASETS", "DebiasConfig", "DebiasResult", "debias", "prior_model"]

# A batch of chains makes so many draws for each one of Pyro's kernels, in a fraction of the time.
_DRAWS_PER_STOCK_DRAW = 5
# Importance sampling weighs this many proposals for each draw a chain makes: they cost next to nothing.
_PROPOSALS_PER_DRAW = 10
# Few reference images need more posterior draws each, or the tilt overfits the draws.
_POSTERIOR_POINTS = 8_000
_TILT_BATCH = 128


@dataclass(frozen=True, eq=False)
class DebiasResult:
    """Everything :func:`debias` made.

    Args:
        config: the settings.
        split: the data.
        classifier: labels decoded images.
        vae: trained on the biased set.
        energy: the latent tilt.
        fits: ``"vae"`` and ``"tilt"`` training curves.
        prior_draws: method -> draws of the tilted prior (site ``"z"``).
        posterior_draws: method -> draws of the tilted posterior of one test image.
        references: ``"prior"`` and ``"posterior"`` by quadrature, where z has one or two dimensions.
        balances: image source -> class balance.
        comparison: one row per target and method.
        summary: numbers by name, as written to ``summary.json``.
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
    comparison: pd.DataFrame
    summary: Mapping[str, Any]

    @property
    def tilted_prior(self) -> TiltedModel:
        return tilt(prior_model(self.vae), {"z": self.energy}, normalize=False)

    @property
    def best_method(self) -> str:
        """The method with verdict "ok" (else any) and the most effective draws per second on the prior."""
        table = self.comparison[self.comparison["target"] == "prior"].set_index("method")
        trusted = table[table["verdict"] == "ok"]
        return str((trusted if len(trusted) else table)["ess_per_second"].fillna(0.0).idxmax())


def debias(
    config: DebiasConfig | None = None, *, out: str | Path | None = None, **settings: Any
) -> DebiasResult:
    """Run the whole job, and write its results into ``out`` when given.

    Args:
        config: the settings; or give them as keywords.
        out: folder for ``summary.json``, ``comparison.csv``, ``draws.nc``, ``vae.pt``, ``energy.pt``,
            ``figures/*.png`` and ``report.html``; made when missing.
        **settings: fields of :class:`DebiasConfig`, where ``config`` is not given.

    Returns:
        Models, draws, tables and numbers.

    Raises:
        ValueError: settings that cannot be; a class with too few examples.
        FileNotFoundError: data that are not there and cannot be downloaded.
        OSError: a folder ``out`` that cannot be written.
    """
    if config is not None and settings:
        raise ValueError(f"give config or keywords, not both; got config and {sorted(settings)}")
    config = config or DebiasConfig(**settings)
    if out is not None:
        from pyro_ebm.recipes.outputs import prepare_folder

        prepare_folder(out)
    result = _Job(config).run()
    if out is not None:
        from pyro_ebm.recipes.outputs import write_results

        write_results(result, out)
    return result


def prior_model(vae: VAE) -> Any:
    """The prior of one z as a model of its own: what the tilted prior is sampled from."""

    def model() -> Tensor:
        return pyro.sample("z", vae.prior)

    return model


def train_tilt(
    vae: VAE, reference: Tensor, schedule: Schedule, *, seed: int, progress: bool = True
) -> tuple[Energy, FitResult]:
    """Maximum likelihood of the latent tilt on the reference images, encoder and decoder frozen."""
    with forked_rng(seed):
        energy = MLPEnergy(vae.latent_dim)
    # Quasi-random draws make log Z far less noisy, where there are few dimensions to fill; elsewhere many draws do.
    steps_per_epoch = math.ceil(len(reference) / _TILT_BATCH)
    normalize = Normalizer("qmc") if vae.latent_dim <= 8 else Normalizer(num_samples=4096)
    result = fit_tilt(
        tilt(vae.model, {"z": energy}, normalize=normalize),
        vae.guide,
        reference,
        num_particles=max(32, _POSTERIOR_POINTS // len(reference)),
        epochs=max(schedule.tilt_epochs, schedule.tilt_steps // steps_per_epoch),
        batch_size=_TILT_BATCH,
        validation=None,  # the falling learning rate ends it; the noise of an epoch's loss would choose at random
        seed=seed,
        progress=progress,
    )
    return energy, result


@dataclass
class _Job:
    config: DebiasConfig
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> DebiasResult:
        # Networks for 8 x 8 images are too small to be worth a second thread.
        with one_thread() if self.config.data == "digits" else nullcontext():
            return self._run()

    def _run(self) -> DebiasResult:
        config = self.config
        with self.timed("data"):
            split = load_split(config)
        with self.timed("classifier"):
            labeled = split.classifier
            classifier = LabelClassifier.fit(labeled.images, labeled.labels, seed=config.seed)
        with self.timed("vae"):
            vae, vae_fit = train_vae(split.biased.images, config.latent_dim, self.schedule, **self.run_options)
        with self.timed("tilt"):
            energy, tilt_fit = train_tilt(vae, split.reference.images, self.schedule, **self.run_options)
        prior = tilt(prior_model(vae), {"z": energy}, normalize=False)
        tilted = tilt(vae.model, {"z": energy})
        image = split.test.images[:1]
        with self.timed("sampling"):
            prior_draws = self.sample_all(prior)
            posterior_draws = self.sample_all(tilted, image, guide=vae.guide, share=0.25)
            references = self.references(prior, tilted, image)
        with self.timed("balance"):
            balances = self.balances(split, vae, classifier, prior_draws)
        with self.timed("log_likelihood"):
            likelihoods = {
                "base": self.test_likelihood(vae.model, vae, split),
                "tilted": self.test_likelihood(tilted, vae, split),
            }
        if config.baselines:
            with self.timed("baselines"):
                self.add_baselines(split, vae, classifier, balances, likelihoods)
        comparison = self.compare(prior_draws, posterior_draws, references)
        weighted = prior_draws.get("snis") or self.sample_by("snis", prior)
        summary = self.summary(split, classifier, balances, weighted, comparison, likelihoods)
        return DebiasResult(
            config, split, classifier, vae, energy, {"vae": vae_fit, "tilt": tilt_fit}, prior_draws,
            posterior_draws, references, balances, comparison, summary,
        )  # fmt: skip

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.config)

    @property
    def run_options(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "progress": self.config.progress}

    def sample_all(self, *target: Any, guide: Any = None, share: float = 1.0) -> dict[str, Draws]:
        return {
            method: self.sample_by(method, *target, guide=guide, share=share)
            for method in self.config.methods
        }

    def sample_by(self, method: str, *target: Any, guide: Any = None, share: float = 1.0) -> Draws:
        """Draws by one method; target: a model and its arguments."""
        config = self.config
        total = max(int((config.num_samples or 0) * share / (10 if config.quick else 1)), 50 * config.num_chains)
        warmup_steps = 50 if config.quick else 200
        options: dict[str, Any] = {"progress": config.progress}
        num_chains = config.num_chains
        if method == "snis":
            total *= _PROPOSALS_PER_DRAW
        elif method in ("nuts", "hmc"):
            options |= {"warmup_steps": warmup_steps, "jit_compile": True}
        else:  # one batch, in which many chains cost little more than one
            num_chains = 8 if method == "smc" else 64
            total *= _DRAWS_PER_STOCK_DRAW
            options |= {} if method == "smc" else {"warmup_steps": warmup_steps}
        return sample(
            *target,
            method=method,
            guide=guide,
            num_samples=max(total // num_chains, 50),
            num_chains=num_chains,
            seed=config.seed,
            **options,
        )

    def references(self, prior: TiltedModel, tilted: TiltedModel, image: Tensor) -> dict[str, Draws]:
        if self.config.latent_dim > 2:
            return {}
        return {"prior": quadrature(prior), "posterior": quadrature(tilted, image)}

    def balances(
        self, split: BiasedSplit, vae: VAE, classifier: LabelClassifier, draws: Mapping[str, Draws]
    ) -> dict[str, ClassBalance]:
        """Class balance of the biased data (true labels) and of decoded draws (predicted labels)."""
        classes = split.classes
        found = {
            "biased_data": class_balance(split.biased.labels, classes),
            "prior": self.generated_balance(vae, classifier, classes),
        }
        for method, drawn in draws.items():
            labels = decoded_labels(vae, drawn.flat("z"), classifier)
            if drawn.log_weights is not None:
                found[method] = class_balance(labels, classes, weights=drawn.weights)
            else:
                ess = _label_ess(labels, classes, drawn.num_chains)
                found[method] = class_balance(labels, classes, ess=ess)
        return found

    def generated_balance(
        self, vae: VAE, classifier: LabelClassifier, classes: Sequence[int]
    ) -> ClassBalance:
        with forked_rng(self.config.seed):
            z = vae.prior.sample((2_000 if self.config.quick else 20_000,))
        return class_balance(decoded_labels(vae, z, classifier), classes)

    def test_likelihood(self, model: Any, vae: VAE, split: BiasedSplit) -> LogLikelihood:
        images = split.test.images[: 50 if self.config.quick else 500]
        return log_likelihood(
            model, vae.guide, images, num_samples=100 if self.config.quick else 500, seed=self.config.seed
        )

    def add_baselines(
        self,
        split: BiasedSplit,
        vae: VAE,
        classifier: LabelClassifier,
        balances: dict[str, ClassBalance],
        likelihoods: dict[str, LogLikelihood],
    ) -> None:
        """What else one could do with the reference set: train on it alone, or fine-tune on it."""
        images, budget = split.reference.images, len(split.biased)
        fine_tuned, _ = fine_tune(vae, images, self.schedule, budget=budget, **self.run_options)
        alone, _ = train_vae(images, self.config.latent_dim, self.schedule, budget=budget, **self.run_options)
        for name, other in (("reference_only", alone), ("fine_tuned", fine_tuned)):
            balances[name] = self.generated_balance(other, classifier, split.classes)
            likelihoods[name] = self.test_likelihood(other.model, other, split)

    def compare(
        self,
        prior_draws: Mapping[str, Draws],
        posterior_draws: Mapping[str, Draws],
        references: Mapping[str, Draws],
    ) -> pd.DataFrame:
        import pandas as pd

        tables = []
        for target, draws in (("prior", prior_draws), ("posterior", posterior_draws)):
            table = compare(draws, reference=references.get(target))
            table.insert(0, "target", target)
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def summary(
        self,
        split: BiasedSplit,
        classifier: LabelClassifier,
        balances: Mapping[str, ClassBalance],
        weighted: Draws,
        comparison: pd.DataFrame,
        likelihoods: Mapping[str, LogLikelihood],
    ) -> dict[str, Any]:
        log_z: Any = weighted.log_z
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.config).items()}
        chains = comparison[(comparison["target"] == "prior") & (comparison["method"] != "snis")]
        columns = ["r_hat", "ess_bulk", "divergences", "seconds"]
        summary: dict[str, Any] = {
            "data": self.config.data,
            "seed": self.config.seed,
            "latent_dim": self.config.latent_dim,
            "sizes": split.sizes,
            "classifier_accuracy": classifier.accuracy,
            "tv": {name: balance.tv() for name, balance in balances.items()},
            "tv_interval": {name: list(balance.tv_interval()) for name, balance in balances.items()},
            "fairness_discrepancy": {
                name: fairness_discrepancy(balance.proportions) for name, balance in balances.items()
            },
            "class_proportions": {name: balance.proportions.tolist() for name, balance in balances.items()},
            "log_z": {"value": float(log_z.value), "se": float(log_z.se)},
            "importance": {
                "ess_fraction": weighted.notes["ess"] / weighted.num_draws,
                "pareto_k": weighted.pareto_k,
            },
            "mcmc": {row["method"]: {c: float(row[c]) for c in columns} for _, row in chains.iterrows()},
            "test_log_likelihood": {name: float(found.value.mean()) for name, found in likelihoods.items()},
            "test_log_likelihood_se": {name: float(found.se.mean()) for name, found in likelihoods.items()},
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "settings": settings,
        }
        return summary


def load_split(config: DebiasConfig) -> BiasedSplit:
    """The images asked for, split."""
    if config.data == "digits":
        found = datasets.digits(config.digits)
    else:
        loader = getattr(datasets, config.data)
        found = loader(config.data_root or "data", classes=config.digits)
    shares = dict(zip(config.digits, config.proportions, strict=True))
    return biased_split(found.images, found.labels, shares, config.fraction, config.seed)


@torch.no_grad()
def decoded_labels(vae: VAE, z: Tensor, classifier: LabelClassifier) -> Tensor:
    """The label the classifier gives to each decoded z, (n,)."""
    return torch.cat([classifier.predict(vae.decode(part).mean) for part in z.split(2_000)])


def _label_ess(labels: Tensor, classes: Sequence[int], num_chains: int) -> float:
    """Effective number of independent labels in chains of labels: the worst over the classes."""
    chains = labels.reshape(num_chains, -1)
    indicators = torch.stack([(chains == label).double() for label in classes], -1)
    ess = torch.as_tensor(ess_bulk(indicators))
    usable = ess[ess.isfinite()]
    return float(usable.min().clamp(1.0, labels.numel())) if len(usable) else 1.0
