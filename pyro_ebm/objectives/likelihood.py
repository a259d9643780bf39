"""Maximum likelihood of a tilt whose base model is frozen: exactly, or through the ELBO."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.annotations import checked
from pyro_ebm.tilts.normalizer import Normalizer, checked_energy, site_log_normalizer
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["TiltELBO", "TiltLikelihood"]


@checked
class TiltLikelihood:
    r"""Log likelihood ratio of a tilted model to its base: ``log E_{p(z|x)}[exp(-E(z))] - log Z``.

    With the base model frozen this is ``log p_theta(x) - log p(x)``, no bound: the expectation is over the
    base's own posterior, given as weighted draws that are made once (:func:`fit_tilt` does so). log Z
    enters, with its gradient the self-normalized estimate of the negative phase. The ELBO has ``E[-E(z)]``
    in place of ``log E[exp(-E(z))]``, which prefers energies that are flat across each posterior.

    Args:
        base: distribution of the tilted site before the tilt, event shape (*event), the same for all data.
    """

    def __init__(self, base: Distribution) -> None:
        self.base = base

    def __call__(self, model: TiltedModel, guide: Any, values: Tensor, log_weights: Tensor) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with one tilted site and a normalizer.
            guide: not used.
            values: (batch, num_particles, *event) draws of the site given each datum.
            log_weights: (batch, num_particles) their log weights, normalized per datum.

        Returns:
            0-d.

        Raises:
            TypeError: if the model is not tilted.
            ValueError: several tilted sites; a model without normalizer.
        """
        site, normalize = one_tilt(model)
        energy = model.energies[site]
        log_ratio = torch.logsumexp(
            log_weights - checked_energy(energy, values, values.ndim - 2, f"site {site!r}"), -1
        )
        log_z = site_log_normalizer(self.base, energy, normalize, name=f"site {site!r}")
        return len(values) * log_z - log_ratio.sum()


def one_tilt(model: TiltedModel) -> tuple[str, Normalizer]:
    """The name of the one tilted site of a model, and how log Z is estimated."""
    if not isinstance(model, TiltedModel):
        raise TypeError(f"model must be what tilt() returns, got {type(model).__name__}")
    if len(model.energies) != 1:
        raise ValueError(
            f"model must have one tilted site, got {sorted(model.energies)}; "
            "use fit() with an ELBO for several"
        )
    if not isinstance(model.normalize, Normalizer):
        raise ValueError(
            "model must estimate its log Z: without it the energy runs away; use tilt(..., normalize=True)"
        )
    return next(iter(model.energies)), model.normalize


class TiltELBO:
    r"""The part of the ELBO of a tilted model that depends on the tilt: ``E_q[-E(z)] - log Z``.

    Its gradient with respect to the energies is that of ``Trace_ELBO`` on the tilted model, at a fraction
    of the cost: the model stops after its last tilted site, before the likelihood. log Z enters, with its
    gradient the self-normalized estimate of the negative phase. Only for sites that the guide draws;
    use ``Trace_ELBO`` elsewhere, or when model or guide learn too.

    Example:
        ``fit(tilted, vae.guide, reference, objective=TiltELBO(), train=energy)``
    """

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with a normalizer.
            guide: draws every tilted site.
            *batch: arguments of model and guide.

        Returns:
            0-d.

        Raises:
            TypeError: if the model is not tilted.
            ValueError: without normalizer; a tilted site that the guide does not draw.
        """
        if not isinstance(model, TiltedModel):
            raise TypeError(f"TiltELBO needs the model that tilt() returns, got {type(model).__name__}")
        if model.normalize is False:
            raise ValueError(
                "TiltELBO needs log Z: without it the energy runs away; use tilt(..., normalize=True)"
            )
        with torch.no_grad():
            proposal = poutine.trace(guide).get_trace(*batch)
        missing = [site for site in model.energies if site not in proposal.nodes]
        if missing:
            raise ValueError(
                f"TiltELBO: the guide does not draw the tilted site(s) {missing}; use pyro.infer.Trace_ELBO()"
            )
        collector = _CollectFactors(list(model.energies))
        with collector, suppress(_AllCollected):
            poutine.replay(model, trace=proposal)(*batch)
        return -torch.stack(collector.totals).sum()


class _AllCollected(Exception):
    """Ends a model run early: nothing after the last tilt is needed."""


class _CollectFactors(Messenger):
    """Sums the tilts' factors, and stops the model after the last of them."""

    def __init__(self, sites: list[str]) -> None:
        super().__init__()
        self.waiting = {f"{site}_tilt" for site in sites}
        self.totals: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.waiting:
            self.waiting.remove(msg["name"])
            self.totals.append(scale_and_mask(msg["fn"].log_factor, msg["scale"], msg["mask"]).sum())
            if not self.waiting:
                raise _AllCollected
