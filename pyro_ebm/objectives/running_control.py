"""A running average of Z against which the gradient of log Z is taken, for normalizers with few draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.tilts.listeners import log_z_through

__all__ = ["RunningControl"]


@checked
class RunningControl:
    r"""Another objective, with the gradient of log Z taken against a running average of Z.

    K draws give ``log Z`` the gradient ``grad Z_K / Z_K``, a ratio whose bias is of the order of ``1 / K``, and of the
    relative variance of the weights: with few draws the tilt comes out too sharp. Here numerator and denominator part:

    .. math:: \nabla \log Z \approx \nabla Z_K / \bar Z, \qquad \bar Z \leftarrow d \bar Z + (1 - d) Z_K

    with ``d`` the decay: only a share of ``1 - d`` of the denominator still comes from the same draws, and about as
    much is left of the bias. The price is noise, as the denominator no longer varies along with the numerator: twice as
    much at a KL of half a nat between tilt and base, more beyond. It pays for tens of draws, hardly for a thousand. The
    loss itself and its validation are those of the objective inside.

    An instance belongs to one run: it keeps the average, and checkpoints keep it too.

    Args:
        objective: one whose log Z is sampled: ``TiltELBO()``, ``TiltLikelihood(base)``, ``ObservedTiltLikelihood()``,
            ``pyro.infer.Trace_ELBO()``, ...
        decay: ``d``, at least 0 (no change) and below 1.

    Raises:
        TypeError: an objective that cannot be called and is no ELBO with a differentiable loss.
        ValueError: a decay out of its range; in a call, an objective that samples no log Z, or a log Z that
            differs from datum to datum.

    Reference:
        Belghazi et al. (2018), Mutual Information Neural Estimation, section 3.2.

    Example:
        ``fit(tilted, vae.guide, x, objective=RunningControl(TiltELBO()), train=energy)``
    """

    def __init__(self, objective: Any, *, decay: float = 0.9) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
        loss = getattr(objective, "differentiable_loss", None) if isinstance(objective, pyro.infer.ELBO) else objective
        if isinstance(objective, type) or not callable(loss):
            got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
            raise TypeError(f"objective must be an instance such as TiltELBO() or pyro.infer.Trace_ELBO(), got {got}")
        self.objective, self.decay = objective, float(decay)
        self._loss: Callable[..., Any] = loss
        self._averages: list[Tensor] = []  # log of them; one for each log Z of a call, in their order
        if hasattr(objective, "validation"):  # elsewhere the loss itself is the measure of fit
            self.validation = objective.validation

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], *batch: Any) -> Tensor:
        """The loss of the objective inside, with other gradients; without gradients nothing is averaged.

        Args:
            model: a tilted model whose log Z is sampled.
            guide: as the objective asks.
            *batch: arguments of model and guide.

        Returns:
            0-d.
        """
        seen: list[Tensor] = []

        def control(log_z: Tensor) -> Tensor:
            if log_z.ndim:
                raise ValueError(
                    f"RunningControl needs one log Z for all data, but here it has shape {tuple(log_z.shape)}: it "
                    f"differs from datum to datum; train without RunningControl, with more draws"
                )
            value = log_z.detach()
            average = self._average(len(seen), value) if torch.is_grad_enabled() else value
            seen.append(average)
            return value + (value - average).exp() * (log_z - value)

        with log_z_through(control):
            loss = self._loss(model, guide, *batch)
        if not seen:
            raise ValueError(
                f"{type(self.objective).__name__} samples no log Z here (none enters, or it is summed exactly): train "
                f"without RunningControl"
            )
        if torch.is_grad_enabled():
            self._averages = seen
        return loss

    def _average(self, index: int, log_z: Tensor) -> Tensor:
        if index >= len(self._averages) or not self.decay:
            return log_z
        before = self._averages[index].to(log_z)
        return torch.logaddexp(before + math.log(self.decay), log_z + math.log1p(-self.decay))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues with: the averages, and the state of the objective inside."""
        inner = self.objective.state_dict() if hasattr(self.objective, "state_dict") else None
        return {"averages": self._averages, "objective": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what :meth:`state_dict` gave."""
        self._averages = state["averages"]
        if state["objective"] is not None:
            self.objective.load_state_dict(state["objective"])
