"""How classes are represented: in data sets, and in generated images before and after a tilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_ebm.annotations import checked
from pyro_ebm.checks import require_attributes
from pyro_ebm.plots.style import INK, MUTED, axes_or_new, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_ebm.diagnostics.balance import ClassBalance

__all__ = ["plot_class_balance", "plot_label_histograms"]


@checked
def plot_label_histograms(
    labels: Mapping[str, Any], classes: Sequence[Any] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Class proportions of several label sets, side by side.

    Args:
        labels: name of the set -> labels, shape (n,).
        classes: the classes and their order; those found in any set, sorted, when ``None``.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    sets = {name: _array(values).ravel() for name, values in labels.items()}
    if not sets or any(values.size == 0 for values in sets.values()):
        sizes = {name: int(values.size) for name, values in sets.items()}
        raise ValueError(f"labels must hold at least one set with at least one label each, got sizes {sizes}")
    order = np.unique(np.concatenate(list(sets.values()))) if classes is None else _array(classes)
    ax = axes_or_new(ax, (6.0, 3.6))
    width = 0.8 / len(sets)
    tones = np.linspace(0.75, 0.25, len(sets)).astype(str)  # grays: colors are the samplers'
    for i, (name, values) in enumerate(sets.items()):
        proportions = [(values == label).mean() for label in order]
        where = np.arange(len(order)) + width * (i - (len(sets) - 1) / 2)
        ax.bar(where, proportions, width=0.94 * width, color=tones[i], label=f"{name} (n = {values.size:,})")
    _label_classes(ax, order)
    ax.set_ylabel("proportion of images")
    # Above the bars: among them it would hide some.
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(len(sets), 3))
    return _headroom(ax)


@checked
def plot_class_balance(
    balances: Mapping[str, ClassBalance],
    *,
    target: Sequence[float] | torch.Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Class proportions of generated images with their intervals, against the proportions wanted.

    The legend gives the total variation distance ``TV = sum_k |p_k - target_k| / 2`` of each.

    Args:
        balances: name of the image source -> its class balance; all over the same classes.
        target: proportions wanted, shape (classes,); uniform when ``None``.
        ax: axes to draw on; a new figure when ``None``.

    Returns:
        The axes.
    """
    for each in balances.values():
        require_attributes("balances", each, ("classes", "proportions"), "a mapping of names to ClassBalance")
    if not balances:
        raise ValueError("balances is empty: give at least one name and its class balance")
    first = next(iter(balances.values()))
    classes = [str(label) for label in _array(first.classes)]
    for name, balance in balances.items():
        if [str(label) for label in _array(balance.classes)] != classes:
            raise ValueError(
                f"balances must share their classes: {name!r} has {[str(v) for v in balance.classes]}, "
                f"expected {classes}"
            )
    wanted = _target(target, len(classes))
    ax = axes_or_new(ax, (min(max(6.6, 2.0 + 0.14 * len(classes) * len(balances)), 10.0), 4.4))
    step, look = 0.72 / len(balances), looks(balances)
    for edge in range(1, len(wanted)):
        ax.axvline(edge - 0.5, color=MUTED, alpha=0.4, linewidth=0.6)
    for k, share in enumerate(wanted):
        label = "" if k else "target"
        ax.hlines(share, k - 0.42, k + 0.42, color=INK, linestyle=(0, (4, 2)), linewidth=1.2, label=label)
    for i, (name, balance) in enumerate(balances.items()):
        p, low, high = (_array(v).astype(float) for v in (balance.proportions, balance.lower, balance.upper))
        where = np.arange(len(classes)) + step * (i - (len(balances) - 1) / 2)
        # A bootstrap interval may just miss its estimate; matplotlib refuses negative lengths.
        error = np.stack([p - low, high - p]).clip(min=0.0)
        label = f"{name} (TV {np.abs(p - wanted).sum() / 2:.3f})"
        ax.errorbar(
            where, p, yerr=error, fmt=look[name].marker, color=look[name].color, markersize=6, capsize=3, label=label
        )
    _label_classes(ax, np.array(classes))
    ax.set_xlim(-0.5, len(wanted) - 0.5)
    ax.set_ylabel(f"proportion of images, {100 * float(first.prob):g} % interval")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return _headroom(ax)


def _target(target: Sequence[float] | torch.Tensor | None, num_classes: int) -> np.ndarray:
    if target is None:
        return np.full(num_classes, 1.0 / num_classes)
    wanted = _array(target).astype(float)
    if not np.isfinite(wanted).all():
        raise ValueError(f"target must be finite proportions, got {wanted.tolist()}")
    if wanted.shape != (num_classes,):
        raise ValueError(
            f"target must hold one proportion for each of {num_classes} classes, got shape {wanted.shape}"
        )
    return wanted


def _label_classes(ax: Axes, classes: np.ndarray) -> None:
    ax.set_xticks(np.arange(len(classes)), [str(label) for label in classes])
    ax.set_xlabel("class")
    ax.spines[["top", "right"]].set_visible(False)


def _headroom(ax: Axes) -> Axes:
    ax.set_ylim(0.0, 1.05 * ax.get_ylim()[1])
    return ax


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
