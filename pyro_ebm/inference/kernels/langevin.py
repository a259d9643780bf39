r"""Langevin dynamics on many chains at once, with the Metropolis correction (MALA) and without (ULA)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.foreign import named_elsewhere
from pyro_ebm.inference.kernels.hmc import Stride, hamiltonian_step
from pyro_ebm.inference.kernels.kernel import Info, Kernel, State, Step, ValueAndGrad

__all__ = ["MALA", "ULA"]


@checked
@named_elsewhere
@dataclass(eq=False, repr=False)
class MALA(Kernel):
    r"""Metropolis-adjusted Langevin: a Langevin step, accepted or not so that the target is exact.

    .. math:: u' = u + \tfrac{\epsilon}{2} M^{-1} \nabla \log p(u) + \sqrt{\epsilon M^{-1}}\, \xi

    with step size :math:`\epsilon` and a diagonal :math:`M^{-1}` adapted to the target's variances.

    Args of :class:`Kernel`.

    Reference:
        Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their discrete
        approximations.
    """

    _: KW_ONLY
    target_accept_prob: float = 0.574

    name: ClassVar[str] = "mala"
    adjusted: ClassVar[bool] = True

    def initial_step_size(self, dim: int) -> float:
        return float(dim) ** -0.5

    def leapfrog_length(self, step_size: Tensor) -> Tensor:
        # A leapfrog step of length sqrt(epsilon) is a Langevin step, and its energy error the Metropolis ratio.
        return step_size.sqrt()

    def bind(self, value_and_grad: ValueAndGrad, generator: torch.Generator) -> Step:
        stride = Stride(self)

        def step(state: State) -> tuple[State, Info]:
            stride.update(state.tuning)
            return hamiltonian_step(
                value_and_grad, state, generator, stride=stride, num_steps=1, adjusted=self.adjusted
            )

        return step


@checked
@named_elsewhere
@dataclass(eq=False, repr=False)
class ULA(MALA):
    r"""Unadjusted Langevin: steps without a Metropolis test, whose draws follow a distribution near the target.

    The bias does not shrink with more draws, only with the step size: of a Gaussian coordinate of variance
    :math:`s^2` the draws have variance :math:`s^2 / (1 - \epsilon / (4 s^2))` (scales by :math:`M^{-1}` aside), and
    with :math:`\epsilon \ge 4 s^2` they run away. By default the step size is adapted until a Metropolis step would
    have accepted 95 % of the proposals; ``acceptance_rate`` in the draws' statistics is that probability, a measure of
    the bias. Proposals at which the density is not finite, or of a Metropolis ratio below ``exp(-1000)`` for each
    coordinate, are not taken; they count as divergences, as do all of a ratio below ``exp(-1000)``.

    Args of :class:`Kernel`.

    Reference:
        Durmus and Moulines (2017), Nonasymptotic convergence analysis for the unadjusted Langevin algorithm.
    """

    _: KW_ONLY
    target_accept_prob: float = 0.95

    name: ClassVar[str] = "ula"
    adjusted: ClassVar[bool] = False
