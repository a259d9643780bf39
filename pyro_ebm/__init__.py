"""Tilt any site of any Pyro model with a learned energy, train the tilt, sample it, compare samplers.

Every public name is importable from here; modules load when a name of theirs is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "errors": [
        "CheckpointError",
        "ImproperError",
        "InfeasibleError",
        "InferenceError",
        "InferenceWarning",
        "InputError",
        "TrainingWarning",
    ],
    "energies": [
        "ConvEnergy",
        "Energy",
        "LinearEnergy",
        "MLPEnergy",
        "QuadraticEnergy",
        "gaussian_log_normalizer",
    ],
    "tilts.normalizer": ["Normalizer"],
    "tilts.tilt": ["TiltedModel", "tilt"],
    "tilts.distribution": ["TiltedDistribution"],
    "networks": ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder"],
    "models.vae": ["VAE"],
    "objectives.likelihood": ["TiltELBO", "TiltLikelihood"],
    "objectives.observed": ["ObservedTiltLikelihood"],
    "objectives.contrastive": ["ContrastiveDivergence"],
    "objectives.replay_buffer": ["ReplayBuffer"],
    "objectives.noise_contrastive": ["NoiseContrastive"],
    "objectives.first_order": ["FirstOrder"],
    "objectives.sampling_bound": ["SamplingBound", "snis_log_likelihood"],
    "objectives.short_run": ["ShortRun"],
    "objectives.running_control": ["RunningControl"],
    "training.callbacks": ["EpochEnd"],
    "training.capture": ["CapturedLoss"],
    "training.fit": [
        "Average",
        "Batches",
        "Checkpoint",
        "EachStep",
        "FitResult",
        "Validation",
        "Weighted",
        "fit",
        "load_weights",
        "save_weights",
    ],
    "inference.draws": ["Draws"],
    "estimates": ["Estimate", "BoundedEstimate"],
    "chain_statistics": ["nested_r_hat"],
    "inference.density.log_density": ["LogDensity"],
    "inference.importance": ["importance", "log_likelihood", "posterior_draws"],
    "inference.kernels.hmc": ["ChEES", "HMC"],
    "inference.kernels.langevin": ["MALA", "ULA"],
    "inference.chains.mcmc": ["MCMC"],
    "inference.annealing.tempering": ["Annealing"],
    "inference.annealing.smc": ["SMC"],
    "inference.annealing.ais": ["annealed_importance"],
    "inference.annealing.log_normalizer": ["log_normalizer"],
    "inference.chains.pyro_kernels": ["pyro_hmc", "pyro_nuts"],
    "inference.predictive": ["predictive"],
    "inference.quadrature": ["quadrature"],
    "inference.sample": ["sample"],
    "inference.density.noncentered": ["centered", "noncentered"],
    "inference.density.marginal": ["marginal_density"],
    "objectives.fit_tilt": ["fit_tilt"],
    "moments.energy": ["MomentEnergy"],
    "moments.fit": ["MomentFit", "fit_moments"],
    "diagnostics.arviz_bridge": ["to_arviz"],
    "diagnostics.arviz_files": ["load_arviz", "save_arviz"],
    "diagnostics.compare": ["compare"],
    "diagnostics.calibration": ["calibrate"],
    "diagnostics.ranks": ["Calibration"],
    "diagnostics.balance": [
        "ClassBalance",
        "LabelClassifier",
        "class_balance",
        "fairness_discrepancy",
        "mean_confidence",
        "total_variation",
    ],
    "diagnostics.diversity": ["class_diversity"],
    "diagnostics.density_ratio": ["DensityRatio", "density_ratio"],
    "datasets.digits": ["digits"],
    "datasets.images": ["ImageSet", "fashion_mnist", "kmnist", "mnist"],
    "datasets.mixture": ["GaussianMixture2D"],
    "datasets.splits": ["BiasedSplit", "biased_split"],
    "plots": [
        "plot_calibration",
        "plot_class_balance",
        "plot_compare",
        "plot_debias_study",
        "plot_energy_landscape",
        "plot_images",
        "plot_label_histograms",
        "plot_latent_overlay",
        "plot_latent_scatter",
        "plot_training_curves",
    ],
    "recipes.data_space": ["ReconstructionEnergy"],
    "recipes.debias": ["debias"],
    "recipes.debias_config": ["DebiasConfig"],
    "recipes.result": ["DebiasResult"],
    "recipes.debias_study": ["StudyConfig", "StudyResult", "debias_study"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    hint = importlib.import_module(f"{__name__}.foreign").pointer(name)
    if hint is not None:  # `from pyro_ebm import name` drops the text of an AttributeError
        raise ImportError(f"cannot import name {name!r} from {__name__!r}: {hint}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
