"""The objective of published notebooks, which puts E_p[-E] in the place of log Z: for reproduction, no bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.energies import Energy
from pyro_ebm.objectives.contrastive import contrast, require_weight, squared_slopes
from pyro_ebm.objectives.positives import base_draws, energy_of, positives, tilt_loss
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["FirstOrder"]


@checked
class FirstOrder:
    r"""Energies go down at the data and up at draws of the base: the first-order term of log Z instead of log Z.

    .. math:: \sum_i E(v_i) - n\, \overline{E(\tilde v)}, \qquad \tilde v \sim p(v)

    minimizes ``-(E_q[-E] - E_p[-E])``. **This is not a bound on the likelihood.** By Jensen's inequality
    ``log Z >= E_p[-E]``, so what is maximized lies above the log likelihood; it is linear in the energy, so doubling
    any energy that is better than none doubles it, and without regularizers the energy grows without bound. With them
    the regularizers decide what it settles on: squared energies make the optimum ``-(q - p) / (2 alpha (q + p))``,
    which lies between ``-1 / (2 alpha)`` and ``1 / (2 alpha)`` and is no log ratio of densities. Kept so that
    published results can be reproduced; use :class:`TiltELBO`, :class:`ContrastiveDivergence` or
    :class:`NoiseContrastive` to learn a tilt.

    log Z does not enter. The gradient is an unbiased one of this loss. :meth:`validation` is a measure of
    fit, and ``fit`` uses it: the weights it keeps are the best on the way.

    Args:
        num_samples: draws of the base per step; None: as many as data in the batch.
        alpha: weight of the squared energies of data and draws.
        gradient_penalty: weight of ``(|grad E| - 1)^2`` at random places between data and draws (Gulrajani et
            al.). The third regularizer in use, squared weights, is ``weight_decay`` of the optimizer.

    Raises:
        ValueError: an argument out of its range; in a call, a site whose distribution differs from datum to datum.

    Reference:
        Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville (2017), Improved training of Wasserstein GANs.

    Example:
        ``fit(tilted, vae.guide, x, objective=FirstOrder(alpha=0.1), train=energy)``
    """

    def __init__(
        self, *, num_samples: int | None = None, alpha: float = 0.0, gradient_penalty: float = 0.0
    ) -> None:
        self.num_samples = None if num_samples is None else whole_number("num_samples", num_samples)
        self.alpha = require_weight("alpha", alpha)
        self.gradient_penalty = require_weight("gradient_penalty", gradient_penalty)

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with one tilted site; its log Z is not used.
            guide: draws the site if it is latent.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        found = positives(model, guide, batch, need_base=False)
        energy, num = model.energies[found.site], len(found.values)
        draws = base_draws(model, batch, found, num if self.num_samples is None else self.num_samples)
        down, up = (energy_of(energy, values, found.site) for values in (found.values, draws))
        loss = contrast(down, up, alpha=self.alpha)
        if self.gradient_penalty:
            loss = loss + self.gradient_penalty * num * _excess_slope(energy, found.values, draws)
        return loss

    def validation(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The negative ELBO's (likelihood's) part of the tilt, log Z included: a measure of fit."""
        return tilt_loss(model, guide, *batch)


def _excess_slope(energy: Energy, values: Tensor, draws: Tensor) -> Tensor:
    """``mean (|grad E| - 1)^2`` at random places between pairs of a datum and a draw."""
    num = min(len(values), len(draws))
    share = torch.rand(num, *[1] * (values.ndim - 1)).to(values)
    between = share * values[:num] + (1 - share) * draws[:num]
    # The root of zero has no gradient.
    return ((squared_slopes(energy, between) + 1e-12).sqrt() - 1).square().mean()
