"""Noise-contrastive estimation: the tilt as the classifier that tells data from draws of the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.annotations import checked
from pyro_ebm.objectives.positives import base_draws, energy_of, log_z_of, positives
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["NoiseContrastive"]


@checked
class NoiseContrastive:
    r"""Noise-contrastive estimation between the tilted site given the data and the site's distribution before the tilt.

    .. math:: \sum_i \log(1 + \nu e^{E(v_i)}) + \sum_{j \le \nu n} \log(1 + e^{-E(\tilde v_j)} / \nu), \qquad
        \tilde v_j \sim p(v)

    the logistic loss of the classifier with logit ``-E(v) - log nu``. At a latent site it compares the
    aggregate posterior with the prior, at an observed one the data with draws of the model. Its minimum is where
    ``exp(-E)`` is the ratio of the two densities, so ``log Z`` is 0 there: it does not enter, and tells how far
    training came. No chains and no weights that can degenerate; but where a classifier hardly errs (a tilt far from
    its base, many dimensions) the loss is flat and the ratio badly known: take more noise, or another objective.
    The gradient is unbiased. The loss is a proper score, comparable between epochs.

    The energy needs a constant of its own to bring log Z to 0, as the networks have in their last layer. With
    ``normalize=True`` the logit is ``-E(v) - log Z - log nu`` with the estimate of log Z and its gradient as the
    tilted model makes it: for energies without a constant, such as :class:`LinearEnergy`.

    Args:
        num_noise: draws of the base per datum, the ratio ``nu``; more of them bring the estimate
            nearer to maximum likelihood.
        normalize: let log Z enter.

    Raises:
        ValueError: an argument out of its range; in a call, a site whose distribution differs from datum to datum.

    Reference:
        Gutmann and Hyvaerinen (2010), Noise-contrastive estimation. Aneja, Schwing, Kautz, Vahdat (2021), A contrastive
        learning approach for training variational autoencoder priors.

    Example:
        ``fit(tilted, vae.guide, x, objective=NoiseContrastive(num_noise=4), train=energy)``
    """

    def __init__(self, *, num_noise: float = 1, normalize: bool = False) -> None:
        if isinstance(num_noise, bool) or not isinstance(num_noise, int | float) or not 0 < num_noise < math.inf:
            raise ValueError(f"num_noise must be a finite number above zero, got {num_noise!r}")
        self.num_noise, self.normalize = num_noise, normalize

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with one tilted site.
            guide: draws the site if it is latent.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        found = positives(model, guide, batch, need_base=False)
        num = len(found.values)
        noise = base_draws(model, batch, found, max(round(self.num_noise * num), 1))
        energy = energy_of(model.energies[found.site], torch.cat([found.values, noise]), found.site)
        logits = -energy - math.log(len(noise) / num)
        if self.normalize:
            logits = logits - log_z_of(model, batch, found)
        return softplus(-logits[:num]).sum() + softplus(logits[num:]).sum()
