"""Contrastive divergence: maximum likelihood whose negative phase comes from short or persistent Markov chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.energies import Energy
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.kernels.adaptation import initial_tuning
from pyro_ebm.inference.kernels.kernel import Kernel, State, Tuning
from pyro_ebm.inference.kernels.langevin import MALA
from pyro_ebm.modules import frozen
from pyro_ebm.objectives.positives import Positives, base_log_prob, draws_of, energy_of, positives, tilt_loss
from pyro_ebm.objectives.replay_buffer import ReplayBuffer
from pyro_ebm.tilts.tilt import TiltedModel

__all__ = ["ContrastiveDivergence", "contrast", "require_weight", "squared_slopes"]

_ADAPTATION_RATE = 0.25
_ENOUGH_DATA = 16  # to take scales from, as in MCMC


@checked
class ContrastiveDivergence:
    r"""Contrastive divergence: energies go down at the data and up where a few Markov steps lead.

    .. math:: \sum_i E(v_i) - n \, \overline{E(\tilde v)}, \qquad \tilde v = K^m(\text{start})

    with :math:`v_i` draws of the tilted site given the data and :math:`K` a Markov kernel whose target is the tilted
    site itself, ``exp(-E(v)) p(v)``. log Z does not enter. The gradient is that of maximum likelihood with the
    expectation under the tilt replaced by the mean over the negatives, which carry no gradient themselves:

    - Without a buffer, chains start at the data (CD-m). The gradient is biased: regions that no chain reaches from the
      data within ``num_steps`` may keep a low energy. It vanishes where the tilt fits the data exactly.
    - With a :class:`ReplayBuffer`, chains go on from step to step (persistent CD). The gradient is consistent: with
      long chains, few fresh ones and small steps of the optimizer the chains follow the tilt. ULA adds the bias of its
      step size, MALA and HMC none.

    The number it returns is no measure of fit and may go up or down; :meth:`validation` is one, and ``fit`` uses it.
    An instance belongs to one run: it keeps the step size and the chains.

    Args:
        kernel: makes the kernel from its target: ``MALA``, ``ULA``, ``HMC`` or for instance
            ``functools.partial(ULA, step_size=0.1)``. The step size is adapted as training goes on to the kernel's
            ``target_accept_prob``, unless it has ``adapt_step_size=False``; coordinates are scaled by the spread of
            the data of the batch, unless ``adapt_mass_matrix=False``. A call without gradients adapts nothing.
        num_steps: of each chain in each step of training.
        buffer: chains that persist; None: they start at the data.
        alpha: weight of the squared energies of data and negatives (Du and Mordatch), which holds
            the energies near zero; the tilt it leads to is weaker than the data ask for.
        gradient_penalty: weight of the squared gradient norm of the energy at data and negatives.

    Raises:
        TypeError, ValueError: an argument out of its range; in a call, a site with random parents, a
            discrete one, or one whose distribution differs from datum to datum.

    Reference:
        Hinton (2002), Training products of experts by minimizing contrastive divergence. Tieleman (2008). Du
        and Mordatch (2019), Implicit Generation and Modeling with Energy-Based Models.

    Example:
        ``fit(tilted, vae.guide, x, objective=ContrastiveDivergence(buffer=ReplayBuffer()), train=energy)``
    """

    def __init__(
        self,
        *,
        kernel: Callable[[Any], Kernel] = MALA,
        num_steps: int = 10,
        buffer: ReplayBuffer | None = None,
        alpha: float = 0.0,
        gradient_penalty: float = 0.0,
    ) -> None:
        _require_kernel(kernel)
        self.kernel, self.num_steps, self.buffer = kernel, whole_number("num_steps", num_steps), buffer
        self.alpha = require_weight("alpha", alpha)
        self.gradient_penalty = require_weight("gradient_penalty", gradient_penalty)
        self.step_size: float | None = None
        self._scales: Tensor | None = None
        self.acceptance_rate = math.nan  # of the last call

    def __call__(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss, summed over the batch.

        Args:
            model: a tilted model with one tilted site; its log Z is not used.
            guide: draws the site if it is latent.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        found = positives(model, guide, batch)
        energy = model.energies[found.site]
        # First the data: where the energy has spectral norms, they move now, and the chains see the same energy.
        down = energy_of(energy, found.values, found.site)
        negatives = self.negatives(energy, found)
        loss = contrast(down, energy_of(energy, negatives, found.site), alpha=self.alpha)
        if self.gradient_penalty:
            squares = squared_slopes(energy, torch.cat([found.values, negatives]))
            loss = loss + self.gradient_penalty * len(found.values) * squares.mean()
        return loss

    def validation(self, model: TiltedModel, guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The negative ELBO's (likelihood's) part of the tilt, log Z included: a measure of fit."""
        return tilt_loss(model, guide, *batch)

    def negatives(self, energy: Energy, found: Positives) -> Tensor:
        """Where the chains of this step arrive, (num, *event), without gradients.

        Args:
            energy: of the tilt.
            found: what :func:`positives` returned.
        """
        base, values = _continuous(found), found.values
        density = _site_density(base, energy, found.site)
        # Its own generator, seeded from the global one: kernels take one, and it may live on another device.
        generator = torch.Generator(values.device).manual_seed(int(torch.randint(2**62, (), device="cpu")))
        learning = torch.is_grad_enabled()
        with torch.no_grad(), frozen(energy), pyro.validation_enabled(False):
            u = density.unconstrain({found.site: values})
            starts, slots = u, None
            if self.buffer is not None:

                def fresh(num: int) -> Tensor:
                    return density.unconstrain({found.site: draws_of(base, num)})

                starts, slots = self.buffer.draw(len(values), fresh, generator)
            ends = self._run(density, starts.to(u), u, generator, learning)
            if self.buffer is not None and slots is not None and learning:
                self.buffer.put(ends, slots)
            return density.constrain(ends)[found.site]

    def _run(
        self, density: LogDensity, starts: Tensor, data: Tensor, generator: torch.Generator, learning: bool
    ) -> Tensor:
        kernel = self.kernel(density)
        tuning = self._tuning(kernel, data, learning)
        step = kernel.bind(density.value_and_grad, generator)
        state, accepted = State(starts, *density.value_and_grad(starts), tuning), []
        for _ in range(self.num_steps):
            state, info = step(state)
            accepted.append(kernel.average_acceptance(info.acceptance_rate))
        self.acceptance_rate = float(torch.stack(accepted).mean())
        if learning and kernel.adapt_step_size:
            change = _ADAPTATION_RATE * (self.acceptance_rate - kernel.target_accept_prob)
            self.step_size = float(tuning.step_size) * math.exp(change)
        return state.u

    def _tuning(self, kernel: Kernel, data: Tensor, learning: bool) -> Tuning:
        tuning = initial_tuning(kernel, data)  # scales from the data: the chains' own would bend their distribution
        if self.step_size is not None:
            tuning = tuning._replace(step_size=torch.full_like(tuning.step_size, self.step_size))
        if len(data) < _ENOUGH_DATA and self._scales is not None:  # the last batch of an epoch may be small
            return tuning._replace(inverse_mass=self._scales.to(tuning.inverse_mass))
        if learning:
            self._scales = tuning.inverse_mass
        return tuning

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues with: step size and scales, and the chains of the buffer."""
        chains = None if self.buffer is None else self.buffer.state_dict()
        return {"step_size": self.step_size, "scales": self._scales, "buffer": chains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what :meth:`state_dict` gave.

        Raises:
            ValueError: saved with a buffer and loaded without one, or the other way round.
        """
        if (state["buffer"] is None) != (self.buffer is None):
            saved, here = ("with" if chains is not None else "without" for chains in (state["buffer"], self.buffer))
            raise ValueError(f"this state was saved {saved} a ReplayBuffer, here the objective is {here} one")
        self.step_size, self._scales = state["step_size"], state["scales"]
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])


def contrast(down: Tensor, up: Tensor, *, alpha: float = 0.0) -> Tensor:
    """``n (mean(down) - mean(up))``, and ``alpha n`` times the means of their squares.

    Args:
        down: (n,) energies of the data.
        up: (num,) energies of the negatives.
        alpha: weight of the squared energies.
    """
    loss = down.sum() - len(down) * up.mean()
    return loss + alpha * len(down) * (down.square().mean() + up.square().mean()) if alpha else loss


def squared_slopes(energy: Energy, values: Tensor) -> Tensor:
    """Squared norm of the energy's gradient at values (num, *event), (num,); differentiable where gradients are on."""
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(values).sum(), values, create_graph=learning, materialize_grads=True)
    return slope.flatten(1).square().sum(-1) if slope.ndim > 1 else slope.square()


def require_weight(name: str, weight: float) -> float:
    """The weight of a penalty, or a ValueError."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be a finite number of at least zero, got {weight!r}")
    return float(weight)


def _require_kernel(kernel: Any) -> None:
    advice = "pass a class such as MALA, or functools.partial(MALA, step_size=0.1)"
    if isinstance(kernel, Kernel) or not callable(kernel):
        raise TypeError(f"kernel must make a kernel from its target, got {type(kernel).__name__}; {advice}")
    made = kernel(LogDensity(lambda u: u.sum(-1), 1))
    if not isinstance(made, Kernel):
        raise TypeError(f"kernel must return MALA, ULA or HMC, it returned {type(made).__name__}; {advice}")


def _continuous(found: Positives) -> Distribution:
    if found.base is None or found.base.support is None or found.base.support.is_discrete:
        raise ValueError(
            f"contrastive divergence moves chains along gradients, but site {found.site!r} is discrete; "
            "use NoiseContrastive or TiltELBO"
        )
    return found.base


def _site_density(base: Distribution, energy: Energy, site: str) -> LogDensity:
    """``log p(v) - E(v)`` of one tilted site as a density on unconstrained space, one point per value."""
    transform = biject_to(base.support)
    shape = torch.Size(transform.inverse_shape((*base.batch_shape, *base.event_shape)))
    event = shape[len(base.batch_shape) :]
    copies = math.prod(base.batch_shape)

    def in_copies(points: Tensor) -> Tensor:
        # Bounds of the support may be stored once for each element of the plate.
        missing = -len(points) % copies
        padded = torch.cat([points, points[-1:].expand(missing, *points.shape[1:])]) if missing else points
        return padded.reshape(-1, *base.batch_shape, *points.shape[1:])

    def constrain(u: Tensor) -> tuple[Tensor, Tensor]:
        flat = in_copies(u.reshape(-1, *event))
        values = transform(flat)
        jacobian = transform.log_abs_det_jacobian(flat, values)
        return values.reshape(-1, *base.event_shape)[: len(u)], jacobian.reshape(-1)[: len(u)]

    def log_prob(u: Tensor) -> Tensor:
        values, jacobian = constrain(u)
        return base_log_prob(base, values) - energy(values) + jacobian

    def unconstrain(values: Tensor) -> Tensor:
        return transform.inv(in_copies(values)).reshape(-1, event.numel())[: len(values)]

    return LogDensity(
        log_prob,
        event.numel(),
        constrain=lambda u: {site: constrain(u)[0]},
        unconstrain=lambda values: unconstrain(values[site]),
    )
