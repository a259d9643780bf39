"""What the figures share: colors that color-blind readers can tell apart, and new axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INK", "MUTED", "PALETTE", "axes_or_new", "class_style", "color"]

# Okabe & Ito (2008), with gray for their yellow: small yellow marks vanish on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
INK, MUTED = "#222222", "#8A8A8A"
_MARKERS = "o^sDv"


def color(index: int) -> str:
    """Color number ``index`` of the palette, which repeats after eight."""
    return PALETTE[index % len(PALETTE)]


def class_style(index: int) -> tuple[str, str]:
    """Color and marker of a class; the marker changes when the colors have been used up."""
    return color(index), _MARKERS[index // len(PALETTE) % len(_MARKERS)]


def axes_or_new(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The given axes, or those of a new pyplot figure of this size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]
