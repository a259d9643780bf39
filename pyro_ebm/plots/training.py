"""Loss by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pyro_ebm.annotations import checked
from pyro_ebm.checks import require_attributes
from pyro_ebm.plots.style import INK, axes_or_new, color, lighter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_ebm.training.fit import FitResult

__all__ = ["plot_training_curves"]

_DOTS = 20  # on a validation curve


@checked
def plot_training_curves(
    result: FitResult | Mapping[str, FitResult], *, label: str = "loss per datum (nats)", ax: Axes | None = None
) -> Axes:
    """Training loss (thin and light) and validation loss (dark, with dots) by epoch, and a star at the epoch kept.

    Where the first tenth of a long run towers over the rest, the vertical axis leaves it out and says so.

    Args:
        result: what ``fit`` returned, or several by name; put together only losses of one scale.
        label: what the loss is.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    from matplotlib.ticker import MaxNLocator

    results = dict(result) if isinstance(result, Mapping) else {"": result}
    for each in results.values():
        require_attributes("result", each, ("train_loss", "validation_loss"), "what fit returned, or several by name")
    if not any(len(each.train_loss) for each in results.values()):
        raise ValueError("result holds no epoch: train for at least one before plotting")
    ax = axes_or_new(ax, (6.0, 3.8) if len(results) == 1 else (8.0, 3.8))
    for i, (name, each) in enumerate(results.items()):
        _draw_curves(ax, each, f"{name}, " if name else "", color(i))
    ax.set(xlabel="epoch", ylabel=label)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    _leave_out_start(ax, results.values())
    if len(results) == 1:
        ax.legend(frameon=False)
    else:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _draw_curves(ax: Axes, result: FitResult, prefix: str, tone: str) -> None:
    validation = list(result.validation_loss)
    look: dict[str, Any] = {"color": lighter(tone, 0.5), "linewidth": 1.2} if validation else {"color": tone}
    ax.plot(range(1, len(result.train_loss) + 1), result.train_loss, label=f"{prefix}training", **look)
    if validation:
        every = max(len(validation) // _DOTS, 1)
        ax.plot(
            range(1, len(validation) + 1), validation, color=tone, linewidth=1.6, marker="o", markersize=4.5,
            markevery=every, label=f"{prefix}validation",
        )  # fmt: skip
    judged = validation or list(result.train_loss)
    if 1 <= result.kept_epoch <= len(judged):
        label = f"{prefix}kept (epoch {result.kept_epoch})"
        look = {"color": tone, "markeredgecolor": INK, "markersize": 14, "linestyle": "none", "zorder": 3}
        ax.plot([result.kept_epoch], [judged[result.kept_epoch - 1]], marker="*", label=label, **look)


def _leave_out_start(ax: Axes, results: Iterable[FitResult]) -> None:
    curves = [curve for result in results for curve in (result.train_loss, result.validation_loss)]
    curves = [[value for value in curve if math.isfinite(value)] for curve in curves]
    late = [value for curve in curves for value in curve[len(curve) // 10 :]]
    everything = [value for curve in curves for value in curve]
    low, high, top = min(late, default=0.0), max(late, default=0.0), max(everything, default=0.0)
    if top - low > 2.0 * (high - low) > 0.0:
        ax.set_ylim(min(everything) - 0.05 * (high - low), high + 0.1 * (high - low))
        ax.set_title("the first epochs lie above the axis", fontsize="small", loc="left")
