"""What a model's runs show: its sites and plates, what depends on what; and how it is run for many values at once."""

from pyro_ebm.structure.batched import Batch, BatchedModel, Layout, batched_run
from pyro_ebm.structure.dependencies import ModelStructure, model_structure
from pyro_ebm.structure.sites import (
    event_dim_of,
    is_deterministic,
    is_factor,
    is_observed,
    keep_dims,
    latent_sites,
    log_prob_of,
    observed_sites,
    padded_shape,
    plate_depth,
    plate_dims,
    prototype_trace,
    sample_sites,
    subsampling_scale,
    unconditioned,
    unmasked,
)
from pyro_ebm.structure.tilted import Tilted, tilt_of, unnormalized, untilted
from pyro_ebm.structure.ways import WAYS, DoesNotBroadcast, Failure, candidate_ways, slowest

__all__ = [
    "WAYS",
    "Batch",
    "BatchedModel",
    "DoesNotBroadcast",
    "Failure",
    "Layout",
    "ModelStructure",
    "Tilted",
    "batched_run",
    "candidate_ways",
    "event_dim_of",
    "is_deterministic",
    "is_factor",
    "is_observed",
    "keep_dims",
    "latent_sites",
    "log_prob_of",
    "model_structure",
    "observed_sites",
    "padded_shape",
    "plate_depth",
    "plate_dims",
    "prototype_trace",
    "sample_sites",
    "slowest",
    "subsampling_scale",
    "tilt_of",
    "unconditioned",
    "unmasked",
    "unnormalized",
    "untilted",
]
