"""Names and types for checkers; written by `python tests/test_typing.py` from `__init__.py`."""

from pyro_ebm.chain_statistics import (
    nested_r_hat,
)
from pyro_ebm.datasets.digits import (
    digits,
)
from pyro_ebm.datasets.images import (
    ImageSet,
    fashion_mnist,
    kmnist,
    mnist,
)
from pyro_ebm.datasets.mixture import (
    GaussianMixture2D,
)
from pyro_ebm.datasets.splits import (
    BiasedSplit,
    biased_split,
)
from pyro_ebm.diagnostics.arviz_bridge import (
    to_arviz,
)
from pyro_ebm.diagnostics.arviz_files import (
    load_arviz,
    save_arviz,
)
from pyro_ebm.diagnostics.balance import (
    ClassBalance,
    LabelClassifier,
    class_balance,
    fairness_discrepancy,
    mean_confidence,
    total_variation,
)
from pyro_ebm.diagnostics.calibration import (
    calibrate,
)
from pyro_ebm.diagnostics.compare import (
    compare,
)
from pyro_ebm.diagnostics.density_ratio import (
    DensityRatio,
    density_ratio,
)
from pyro_ebm.diagnostics.diversity import (
    class_diversity,
)
from pyro_ebm.diagnostics.ranks import (
    Calibration,
)
from pyro_ebm.energies import (
    ConvEnergy,
    Energy,
    LinearEnergy,
    MLPEnergy,
    QuadraticEnergy,
    gaussian_log_normalizer,
)
from pyro_ebm.errors import (
    CheckpointError,
    ImproperError,
    InfeasibleError,
    InferenceError,
    InferenceWarning,
    InputError,
    TrainingWarning,
)
from pyro_ebm.estimates import (
    BoundedEstimate,
    Estimate,
)
from pyro_ebm.inference.annealing.ais import (
    annealed_importance,
)
from pyro_ebm.inference.annealing.log_normalizer import (
    log_normalizer,
)
from pyro_ebm.inference.annealing.smc import (
    SMC,
)
from pyro_ebm.inference.annealing.tempering import (
    Annealing,
)
from pyro_ebm.inference.chains.mcmc import (
    MCMC,
)
from pyro_ebm.inference.chains.pyro_kernels import (
    pyro_hmc,
    pyro_nuts,
)
from pyro_ebm.inference.density.log_density import (
    LogDensity,
)
from pyro_ebm.inference.density.marginal import (
    marginal_density,
)
from pyro_ebm.inference.density.noncentered import (
    centered,
    noncentered,
)
from pyro_ebm.inference.draws import (
    Draws,
)
from pyro_ebm.inference.importance import (
    importance,
    log_likelihood,
    posterior_draws,
)
from pyro_ebm.inference.kernels.hmc import (
    HMC,
    ChEES,
)
from pyro_ebm.inference.kernels.langevin import (
    MALA,
    ULA,
)
from pyro_ebm.inference.predictive import (
    predictive,
)
from pyro_ebm.inference.quadrature import (
    quadrature,
)
from pyro_ebm.inference.sample import (
    sample,
)
from pyro_ebm.models.vae import (
    VAE,
)
from pyro_ebm.moments.energy import (
    MomentEnergy,
)
from pyro_ebm.moments.fit import (
    MomentFit,
    fit_moments,
)
from pyro_ebm.networks import (
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
)
from pyro_ebm.objectives.contrastive import (
    ContrastiveDivergence,
)
from pyro_ebm.objectives.first_order import (
    FirstOrder,
)
from pyro_ebm.objectives.fit_tilt import (
    fit_tilt,
)
from pyro_ebm.objectives.likelihood import (
    TiltELBO,
    TiltLikelihood,
)
from pyro_ebm.objectives.noise_contrastive import (
    NoiseContrastive,
)
from pyro_ebm.objectives.observed import (
    ObservedTiltLikelihood,
)
from pyro_ebm.objectives.replay_buffer import (
    ReplayBuffer,
)
from pyro_ebm.objectives.running_control import (
    RunningControl,
)
from pyro_ebm.objectives.sampling_bound import (
    SamplingBound,
    snis_log_likelihood,
)
from pyro_ebm.objectives.short_run import (
    ShortRun,
)
from pyro_ebm.plots import (
    plot_calibration,
    plot_class_balance,
    plot_compare,
    plot_debias_study,
    plot_energy_landscape,
    plot_images,
    plot_label_histograms,
    plot_latent_overlay,
    plot_latent_scatter,
    plot_training_curves,
)
from pyro_ebm.recipes.data_space import (
    ReconstructionEnergy,
)
from pyro_ebm.recipes.debias import (
    debias,
)
from pyro_ebm.recipes.debias_config import (
    DebiasConfig,
)
from pyro_ebm.recipes.debias_study import (
    StudyConfig,
    StudyResult,
    debias_study,
)
from pyro_ebm.recipes.result import (
    DebiasResult,
)
from pyro_ebm.tilts.distribution import (
    TiltedDistribution,
)
from pyro_ebm.tilts.normalizer import (
    Normalizer,
)
from pyro_ebm.tilts.tilt import (
    TiltedModel,
    tilt,
)
from pyro_ebm.training.callbacks import (
    EpochEnd,
)
from pyro_ebm.training.capture import (
    CapturedLoss,
)
from pyro_ebm.training.fit import (
    Average,
    Batches,
    Checkpoint,
    EachStep,
    FitResult,
    Validation,
    Weighted,
    fit,
    load_weights,
    save_weights,
)

__all__ = [
    "__version__",
    "Annealing",
    "Average",
    "Batches",
    "BiasedSplit",
    "BoundedEstimate",
    "Calibration",
    "CapturedLoss",
    "ChEES",
    "Checkpoint",
    "CheckpointError",
    "ClassBalance",
    "ContrastiveDivergence",
    "ConvDecoder",
    "ConvEncoder",
    "ConvEnergy",
    "DebiasConfig",
    "DebiasResult",
    "DensityRatio",
    "Draws",
    "EachStep",
    "Energy",
    "EpochEnd",
    "Estimate",
    "FirstOrder",
    "FitResult",
    "GaussianMixture2D",
    "HMC",
    "ImageSet",
    "ImproperError",
    "InfeasibleError",
    "InferenceError",
    "InferenceWarning",
    "InputError",
    "LabelClassifier",
    "LinearEnergy",
    "LogDensity",
    "MALA",
    "MCMC",
    "MLPDecoder",
    "MLPEncoder",
    "MLPEnergy",
    "MomentEnergy",
    "MomentFit",
    "NoiseContrastive",
    "Normalizer",
    "ObservedTiltLikelihood",
    "QuadraticEnergy",
    "ReconstructionEnergy",
    "ReplayBuffer",
    "RunningControl",
    "SMC",
    "SamplingBound",
    "ShortRun",
    "StudyConfig",
    "StudyResult",
    "TiltELBO",
    "TiltLikelihood",
    "TiltedDistribution",
    "TiltedModel",
    "TrainingWarning",
    "ULA",
    "VAE",
    "Validation",
    "Weighted",
    "annealed_importance",
    "biased_split",
    "calibrate",
    "centered",
    "class_balance",
    "class_diversity",
    "compare",
    "debias",
    "debias_study",
    "density_ratio",
    "digits",
    "fairness_discrepancy",
    "fashion_mnist",
    "fit",
    "fit_moments",
    "fit_tilt",
    "gaussian_log_normalizer",
    "importance",
    "kmnist",
    "load_arviz",
    "load_weights",
    "log_likelihood",
    "log_normalizer",
    "marginal_density",
    "mean_confidence",
    "mnist",
    "nested_r_hat",
    "noncentered",
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
    "posterior_draws",
    "predictive",
    "pyro_hmc",
    "pyro_nuts",
    "quadrature",
    "sample",
    "save_arviz",
    "save_weights",
    "snis_log_likelihood",
    "tilt",
    "to_arviz",
    "total_variation",
]

__version__: str
