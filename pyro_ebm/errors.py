"""What the library raises and warns with, so that a user can filter by cause."""

from __future__ import annotations

__all__ = ["CheckpointError", "InferenceError", "InferenceWarning", "TrainingWarning"]


class InferenceWarning(UserWarning):
    """An inference result that should not be trusted as it is; the text names cause and remedy."""


class InferenceError(RuntimeError):
    """What ``strict=True`` raises where an :class:`InferenceWarning` would be given."""


class TrainingWarning(UserWarning):
    """Training stopped before its end; the text says why, and which weights were kept."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another model or another training run."""
