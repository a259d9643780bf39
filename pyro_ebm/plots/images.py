"""A grid of images: what a decoder makes of draws from a prior or from a tilt."""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.plots.style import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_images"]


@checked
def plot_images(
    images: Tensor, *, num_rows: int | None = None, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Images side by side in one grid, filled row by row.

    Args:
        images: (n, height, width) gray, or (n, channels, height, width) with 1 or 3 channels. Values
            belong in [0, 1]; what lies outside (a Gaussian decoder's mean may) is clipped.
        num_rows: rows of the grid; as square as possible when ``None``.
        title: what they are, for example ``"decoded prior draws"``.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes, with ticks and frame off.
    """
    from torchvision.utils import make_grid

    batch = images.detach().cpu().float()
    batch = batch.unsqueeze(1) if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[0] == 0 or batch.shape[1] not in (1, 3):
        raise ValueError(
            "images must have shape (n, height, width) or (n, 1 or 3, height, width) with n >= 1, "
            f"got {tuple(images.shape)}: reshape flat pixels first"
        )
    count = batch.shape[0]
    num_rows = max(1, round(sqrt(count))) if num_rows is None else num_rows
    if not 1 <= num_rows <= count:
        raise ValueError(f"num_rows must lie between 1 and the number of images {count}, got {num_rows}")
    grid = make_grid(batch.clamp(0.0, 1.0), nrow=ceil(count / num_rows), padding=1, pad_value=0.6)
    height, width = grid.shape[1:]
    ax = axes_or_new(ax, (5.0, 5.0 * height / width + (0.4 if title else 0.0)))
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax
