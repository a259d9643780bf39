"""What the figures share: one color and one marker for each sampler, colors for classes, and new axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INK", "MUTED", "PALETTE", "TILTED", "Look", "axes_or_new", "class_style", "color", "lighter", "looks"]

# Okabe & Ito (2008), with gray for their yellow: small yellow marks vanish on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
INK, MUTED = "#222222", "#8A8A8A"
TILTED = "#AA3377"  # the tilted distribution itself, whichever sampler drew from it
# Tol's muted scheme (2021): classes of data share no color with the samplers.
_CLASS_COLORS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499",
                 "#444444")  # fmt: skip
_CLASS_MARKERS = "o^sDvP<X>h"


class Look(NamedTuple):
    """How one series is drawn."""

    color: str
    marker: str


_LOOKS = {
    "snis": Look("#0072B2", "o"),
    "chees": Look("#009E73", "s"),
    "nuts": Look("#D55E00", "^"),
    "hmc": Look("#E69F00", "v"),
    "mala": Look("#CC79A7", "D"),
    "ula": Look("#56B4E9", "<"),
    "smc": Look("#000000", "P"),
    # What samplers are compared with, in grays.
    "prior": Look("#6E6E6E", "X"),
    "biased_data": Look("#A5A5A5", "d"),
    "reference_only": Look("#A5A5A5", "h"),
    "fine_tuned": Look("#6E6E6E", "*"),
}
# For what has no look of its own: colors in an order, markers in another, so that few pairs share either.
_SPARE = [Look(PALETTE[i % 7], "h*p>d8H1"[i % 8]) for i in range(56)]


def looks(names: Iterable[str], methods: Mapping[str, str] | None = None) -> dict[str, Look]:
    """A look for each name: that of the sampler where it is one, whichever others are shown beside it.

    Args:
        names: of the series, in the order they are drawn in.
        methods: name -> the sampler that made it, where the name is the user's own; of several by one sampler the
            first has the sampler's look.

    Returns:
        Name -> look; no two are equal, up to sixty names.
    """
    names, methods = list(names), methods or {}
    found = {name: _LOOKS[name] for name in names if name in _LOOKS}
    for name in names:
        look = _LOOKS.get(methods.get(name, ""))
        if name not in found and look is not None and look not in found.values():
            found[name] = look
    taken = {look.color for look in found.values()}
    spare = sorted(_SPARE, key=lambda look: look.color in taken)  # stable: unused colors first
    for name in names:
        if name not in found:
            found[name] = spare.pop(0) if spare else _SPARE[0]
    return {name: found[name] for name in names}


def color(index: int) -> str:
    """Color number ``index`` of the palette, which repeats after eight."""
    return PALETTE[index % len(PALETTE)]


def class_style(index: int) -> Look:
    """Color and marker of class number ``index``; the pairs repeat after a hundred classes."""
    turn = index // len(_CLASS_COLORS)
    return Look(_CLASS_COLORS[index % len(_CLASS_COLORS)], _CLASS_MARKERS[(index + turn) % len(_CLASS_MARKERS)])


def lighter(tone: str, amount: float) -> tuple[float, float, float]:
    """The color mixed with so much white, as red, green and blue."""
    from matplotlib.colors import to_rgb

    red, green, blue = (amount + (1.0 - amount) * part for part in to_rgb(tone))
    return red, green, blue


def axes_or_new(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The given axes, or those of a new pyplot figure of this size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]
