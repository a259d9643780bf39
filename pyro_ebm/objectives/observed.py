"""Maximum likelihood of a tilt at an observed site, the model itself frozen."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["ObservedTiltLikelihood"]


class ObservedTiltLikelihood:
    r"""Log likelihood ratio of a model tilted at its data to its base: ``-E(x) - log Z``.

    With the base model frozen this is ``log p_theta(x) - log p(x)`` exactly: the latent sites play no part, and
    no guide is asked. log Z enters, estimated by running the model forward, with its gradient the self-normalized
    estimate of the negative phase. The estimate is only as good as those draws: K of them cannot tell a gain of
    more than about ``log K`` nats, and the energy runs away beyond.

    Example:
        ``fit(tilt(vae.model, {"x": energy}), vae.guide, x, objective=ObservedTiltLikelihood(), train=energy)``
    """

    def __call__(self, model: TiltedModel, guide: Any, *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with a normalizer.
            guide: not used.
            *batch: arguments of the model.

        Returns:
            0-d.

        Raises:
            TypeError: if the model is not tilted.
            ValueError: without normalizer; a tilted site that is not observed.
        """
        if not isinstance(model, TiltedModel):
            raise TypeError(f"ObservedTiltLikelihood needs the model that tilt() returns, got {type(model).__name__}")
        if model.normalize is False:
            raise ValueError(
                "ObservedTiltLikelihood needs log Z: without it the energy runs away; use tilt(..., normalize=True)"
            )
        trace = poutine.trace(model).get_trace(*batch)
        latent = [site for site in model.energies if not trace.nodes[site]["is_observed"]]
        if latent:
            raise ValueError(
                f"ObservedTiltLikelihood: the tilted site(s) {latent} are not observed; use TiltELBO(), or fit_tilt()"
            )
        factors = [trace.nodes[f"{site}_tilt"] for site in model.energies]
        totals = [scale_and_mask(node["fn"].log_factor, node["scale"], node["mask"]).sum() for node in factors]
        return -torch.stack(totals).sum()
