"""What fit() tells the functions it calls after each epoch, and what they can ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyro_ebm.randomness import forked_rng
from pyro_ebm.training.run import Run

__all__ = ["Callback", "EpochEnd", "checked_callbacks", "tell"]


class EpochEnd:
    """The state of a training run after an epoch, as its callbacks see it.

    Attributes:
        epoch: epochs finished, those before a resume included.
        train_loss: mean loss per datum of each epoch so far.
        validation_loss: loss per datum at the end of each; empty without validation.
        metrics: name -> value at the end of each epoch, of the metrics of :class:`Validation`.
        best_epoch: the epoch with the best validation loss so far; 0: none yet.
        modules: what is trained, with the weights of this epoch, in ``eval()`` mode.
    """

    def __init__(self, run: Run) -> None:
        past = run.progress
        self.epoch, self.best_epoch = past.epoch, past.best_epoch
        self.train_loss, self.validation_loss = list(past.train_loss), list(past.validation_loss)
        self.metrics = {name: list(values) for name, values in past.metrics.items()}
        self.modules: list[nn.Module] = list(run.trained)
        self.stopping = False

    def stop(self) -> None:
        """Let this epoch be the last: ``FitResult.stopped`` is then ``"callback"``."""
        self.stopping = True


Callback = Callable[[EpochEnd], Any]


def checked_callbacks(callbacks: Any) -> Sequence[Callback]:
    """The callbacks, each of them callable."""
    if not isinstance(callbacks, Sequence) or not all(callable(item) for item in callbacks):
        raise TypeError(f"callbacks must be a sequence of functions of one argument, got {callbacks!r}")
    return callbacks


def tell(callbacks: Sequence[Callback], run: Run, checkpoint: str | Path | None) -> bool:
    """Call each with the state of the run; whether one of them wants it to stop.

    Random numbers they draw are not those of the training, which goes on as without them. Where one raises, the epoch
    that is over is kept in the checkpoint first.
    """
    state = EpochEnd(run)
    for module in run.trained:
        module.eval()
    try:
        for callback in callbacks:
            with forked_rng(None):
                callback(state)
    except Exception:
        if checkpoint is not None:
            run.save(checkpoint)
        raise
    return state.stopping
