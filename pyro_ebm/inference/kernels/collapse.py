"""A step size that shrinks to nothing: a warm-up that can only get slower, ended with its cause."""

from __future__ import annotations

import torch

from pyro_ebm.errors import InferenceError
from pyro_ebm.inference.kernels.kernel import State

__all__ = ["Collapse"]

_NOTHING = 1e-7  # of the scales; what moves so little is lost in single precision
_PATIENCE = 10  # steps; dual averaging dips below for one or two of them
_LOST = 0.1  # nats of rounding from which energies cannot be compared


class Collapse:
    """Watches the step sizes of a warm-up, and ends it where none is of any use."""

    def __init__(self) -> None:
        self._steps = 0

    def update(self, state: State, name: str) -> None:
        """Look at the state after a step.

        Args:
            state: with the tuning of the next step.
            name: of the method.

        Raises:
            InferenceError: all step sizes have been nothing for a while; with the cause, as far as it shows.
        """
        tiny = bool((state.tuning.step_size < _NOTHING).all())
        self._steps = self._steps + 1 if tiny else 0
        if self._steps >= _PATIENCE:
            raise InferenceError(
                f"{name}: the step size fell to {float(state.tuning.step_size.max()):.0e} during the warm-up, which "
                f"was ended: {_cause(state)}"
            )


def _cause(state: State) -> str:
    broken = ~state.grad.isfinite().all(-1)
    if bool(broken.any()):
        return (
            f"the gradient of the log density is not finite where {int(broken.sum())} of {broken.numel()} chains are; "
            f"look for sqrt() or norm() at 0, a torch.where() with a branch that is not finite, or NaN in the data"
        )
    size = float(state.log_prob.abs().median())
    if size * torch.finfo(state.log_prob.dtype).eps > _LOST:
        return (
            f"the log density is about {size:.0e} in size, and its differences are lost in the rounding of "
            f"{str(state.log_prob.dtype).removeprefix('torch.')}; scale data and parameters to numbers near 1, start "
            f"nearer the posterior (init=), or compute in float64"
        )
    return (
        "even such steps change the log density by more than its gradient says: it jumps (a rounding, an indicator, an "
        "in-place or random operation in the model), or its gradient is cut off (detach(), .data, numpy); importance "
        'sampling (method="snis") needs no gradient'
    )
