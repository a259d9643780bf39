"""Short-run Langevin: decoder and tilted prior learn together from chains on the posterior and on the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.annotations import checked
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.kernels.adaptation import initial_tuning
from pyro_ebm.inference.kernels.kernel import State
from pyro_ebm.inference.kernels.langevin import ULA
from pyro_ebm.modules import frozen
from pyro_ebm.objectives.positives import Positives, base_log_prob, draws_of, energy_of, positives
from pyro_ebm.structure import (
    is_observed,
    keep_dims,
    latent_sites,
    observed_sites,
    plate_depth,
    prototype_trace,
    sample_sites,
    subsampling_scale,
)
from pyro_ebm.tilts.tilt import TiltedModel, tilt

__all__ = ["ShortRun"]

_STARTS = ("base", "guide")


@checked
class ShortRun:
    r"""Maximum likelihood of a tilted prior and its decoder, with expectations from short Langevin chains.

    .. math:: \sum_i \big[ -\log p(x_i | z_i^+) + E(z_i^+) - \log q(z_i^+ | x_i) \big] - n \, \overline{E(z^-)}

    :math:`z^+` are chains on the posterior ``p(x | z) p(z) exp(-E(z))`` of each datum, :math:`z^-` as many on the
    tilted prior ``p(z) exp(-E(z))``, both unadjusted Langevin :math:`z' = z + \tfrac{\epsilon}{2} \nabla \log p(z) +
    \sqrt{\epsilon} \xi`, without gradients themselves. The gradient is that of ``log p(x)`` with its expectations under
    posterior and prior replaced by these chains: biased by their shortness and their step size. log Z does not
    enter. The last term in the sum fits the guide to the posterior chains; it is there where the guide draws the site,
    and moves neither decoder nor energy. Parameters of the site's own base do not learn.

    The number it returns is no bound and no measure of fit; :meth:`validation` is one, and ``fit`` uses it.

    Args:
        prior_steps: Langevin steps on the tilted prior, from draws of the base.
        prior_step_size: their :math:`\epsilon`.
        posterior_steps: Langevin steps on each posterior.
        posterior_step_size: their :math:`\epsilon`.
        start: posterior chains start from draws of the ``"base"``, or of the ``"guide"``.

    Raises:
        TypeError: in a call, a model that is not tilted.
        ValueError: an argument out of its range; in a call, a model with other latent sites than the tilted one, a
            site that is not on the whole real line or whose distribution differs from datum to datum, or plates other
            than one at dim -1 along the data.

    Reference:
        Pang, Han, Nijkamp, Zhu, Wu (2020), Learning Latent Space Energy-Based Prior Model; their steps of 0.4 and
        0.1 are :math:`\sqrt{\epsilon}`.

    Example:
        ``fit(tilted, vae.guide, x, objective=ShortRun(), train=[vae, energy])``
    """

    def __init__(
        self,
        *,
        prior_steps: int = 60,
        prior_step_size: float = 0.16,
        posterior_steps: int = 40,
        posterior_step_size: float = 0.01,
        start: str = "base",
    ) -> None:
        for name, size in {"prior_step_size": prior_step_size, "posterior_step_size": posterior_step_size}.items():
            if not isinstance(size, int | float) or not 0 < size < math.inf:
                raise ValueError(f"{name} must be a finite number above zero, got {size!r}")
        if start not in _STARTS:
            raise ValueError(f"start must be one of {_STARTS}, got {start!r}")
        self.prior_steps, self.prior_step_size = prior_steps, prior_step_size
        self.posterior_steps, self.posterior_step_size = posterior_steps, posterior_step_size
        self.start = start

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with one tilted site; its log Z is not used.
            guide: learns from the chains, and starts them with ``start="guide"``; one that draws nothing will do.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        found = self._starts(model, guide, batch)
        posterior, prior = self.chains(model, guide, batch, found)
        energy = model.energies[found.site]
        loss = energy_of(energy, posterior, found.site).sum() - _log_likelihoods(model, found, posterior, batch).sum()
        loss = loss - len(posterior) * energy_of(energy, prior, found.site).mean()
        proposal = poutine.trace(poutine.condition(guide, data={found.site: _in_place(found, posterior)}))
        node = proposal.get_trace(*batch).nodes.get(found.site)
        return loss if node is None else loss - node["fn"].log_prob(node["value"]).sum()

    def validation(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The negative ELBO of the tilted model, log Z included: a measure of fit, of the guide's too."""
        if not latent_sites(prototype_trace(guide, batch, {})):
            raise ValueError(
                "validation is by the ELBO, for which the guide must draw the tilted site; give such a guide (it "
                "learns from the chains), or use validation=None, which keeps the last weights"
            )
        model = tilt(model.base_model, model.energies) if model.normalize is False else model
        return torch.as_tensor(Trace_ELBO().differentiable_loss(model, guide, *batch))

    def chains(
        self, model: TiltedModel, guide: Callable[..., Any], batch: tuple[Any, ...], found: Positives | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where the chains on the posterior and on the tilted prior arrive, each (n, *event), without gradients.

        Args:
            model: the tilted model.
            guide: starts the posterior chains with ``start="guide"``.
            batch: arguments of model and guide.
            found: where the posterior chains start; drawn where None.
        """
        found = self._starts(model, guide, batch) if found is None else found
        energy, base = model.energies[found.site], found.base
        assert base is not None  # positives() was asked for one

        def log_prior(z: Tensor) -> Tensor:
            return base_log_prob(base, z) - energy_of(energy, z, found.site)

        def log_posterior(z: Tensor) -> Tensor:
            return log_prior(z) + _log_likelihoods(model, found, z, batch)

        starts = draws_of(base, len(found.values))
        with torch.no_grad(), frozen(model), pyro.validation_enabled(False):
            posterior = _langevin(log_posterior, found.values, self.posterior_steps, self.posterior_step_size)
            prior = _langevin(log_prior, starts, self.prior_steps, self.prior_step_size)
        return posterior, prior

    def _starts(self, model: TiltedModel, guide: Callable[..., Any], batch: tuple[Any, ...]) -> Positives:
        if not isinstance(model, TiltedModel):
            raise TypeError(f"model must be what tilt() returns, got {type(model).__name__}")
        trace = prototype_trace(model.base_model, batch, {})
        latent = sorted(latent_sites(trace))
        if latent != sorted(model.energies) or plate_depth(trace) != 1:
            raise ValueError(
                f"ShortRun needs a model whose one latent site is tilted, in one plate at dim -1 along the data; this "
                f"one has the latent site(s) {latent}, tilts {sorted(model.energies)} and nests {plate_depth(trace)} "
                "plate(s); use an ELBO such as pyro.infer.Trace_ELBO()"
            )
        if not observed_sites(trace):
            raise ValueError("ShortRun needs data: the model observes no site, so that no posterior can be told apart")
        first = guide if self.start == "guide" else poutine.block(model.base_model, hide_fn=is_observed)
        found = positives(model, first, batch)
        support = found.base.support if found.base is not None else None
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and support is not constraints.real_vector:
            raise ValueError(
                f"ShortRun moves chains on the whole real line, but the support of {found.site!r} is {support}; use "
                "ContrastiveDivergence, which maps it there, or an ELBO"
            )
        return found


def _in_place(found: Positives, values: Tensor) -> Tensor:
    """Values (n, *event) in the shape the site has in the model."""
    assert found.base is not None
    return values.reshape(*found.base.batch_shape, *found.base.event_shape)


def _log_likelihoods(model: TiltedModel, found: Positives, values: Tensor, batch: tuple[Any, ...]) -> Tensor:
    """Log probability of all sites but the tilted one, (n,), given its values."""
    given = poutine.condition(model.base_model, data={found.site: _in_place(found, values)})
    trace = poutine.trace(given).get_trace(*batch)
    trace.compute_log_prob(lambda name, node: name != found.site)
    trace.remove_node(found.site)
    sites = sample_sites(trace).values()
    logs = [keep_dims(site["log_prob"], (-1,)) / subsampling_scale(site) for site in sites]
    return sum(logs[1:], start=logs[0]).expand(len(values))


def _langevin(log_prob: Callable[[Tensor], Tensor], starts: Tensor, num_steps: int, step_size: float) -> Tensor:
    """Unadjusted Langevin from ``starts`` (n, *event), each a chain of its own."""
    event = starts.shape[1:]
    density = LogDensity(lambda u: log_prob(u.reshape(-1, *event)), event.numel(), like=starts)
    kernel = ULA(density, step_size=step_size, adapt_step_size=False, adapt_mass_matrix=False)
    # Its own generator, seeded from the global one: kernels take one, and it may live on another device.
    generator = torch.Generator(starts.device).manual_seed(int(torch.randint(2**62, (), device="cpu")))
    u = starts.reshape(len(starts), -1)
    step = kernel.bind(density.value_and_grad, generator)
    state = State(u, *density.value_and_grad(u), initial_tuning(kernel, u))
    for _ in range(num_steps):
        state, _ = step(state)
    return state.u.reshape(-1, *event)
