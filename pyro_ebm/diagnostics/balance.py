"""How evenly generated images are spread over the classes: a label classifier and distances from a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import Array, as_tensor
from pyro_ebm.checks import finite_numbers, real_numbers
from pyro_ebm.randomness import numpy_seed

__all__ = [
    "ClassBalance",
    "LabelClassifier",
    "class_balance",
    "fairness_discrepancy",
    "mean_confidence",
    "total_variation",
]

_MAX_COMPONENTS = 40


@dataclass(frozen=True, eq=False)
class LabelClassifier:
    """A support vector machine on principal components; made by :meth:`fit`.

    Args:
        classes_: the labels it knows, sorted; columns of :meth:`predict_proba`.
        accuracy: share of labels predicted rightly, cross-validated on the images it was fitted on.
        event_shape: shape of one image.
    """

    classes_: tuple[int, ...]
    accuracy: float
    event_shape: torch.Size
    _machine: Any = field(repr=False)
    _calibration: Any = field(repr=False)

    @classmethod
    def fit(cls, images: Array, labels: Array, *, seed: int = 0) -> LabelClassifier:
        """Fit on labeled images that no model was trained on.

        Args:
            images: (n, *event_shape), any event shape; flattened.
            labels: (n,) integers, at least two classes and two images of each.
            seed: of the cross-validation folds.

        Returns:
            The classifier, with ``accuracy`` from cross-validation in at most five folds.

        Raises:
            ValueError: lengths that differ, images not finite or all the same, or too few images of a class.
        """
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        images, labels = as_tensor(images), _whole_labels("labels", as_tensor(labels))
        classes, folds = _checked_labels(images, labels)
        features, targets = _features(images), labels.detach().cpu().numpy()
        if (features == features[0]).all():
            raise ValueError("images are all the same: no classifier can tell their labels apart")
        smallest_fit = len(targets) - math.ceil(len(targets) / folds)
        num_components = min(_MAX_COMPONENTS, features.shape[1], smallest_fit)
        # Without random_state the machine would draw from numpy's global generator.
        seed = numpy_seed(seed)
        machine = make_pipeline(PCA(num_components, random_state=seed), SVC(C=10.0, random_state=seed))
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        scores = cross_val_predict(machine, features, targets, cv=splitter, method="decision_function")
        scores = scores.reshape(len(targets), -1)
        # Probabilities come from scores on images unseen by the machine, else they would be overconfident.
        calibration = LogisticRegression(C=10.0, max_iter=1000).fit(scores, targets)
        accuracy = float((calibration.predict(scores) == targets).mean())
        return cls(classes, accuracy, images.shape[1:], machine.fit(features, targets), calibration)

    def predict(self, images: Array) -> Tensor:
        """Return the most probable label of each image, int64 (n,).

        Args:
            images: (n, *event_shape), finite.

        Raises:
            ValueError: images of another shape, or not finite.
        """
        best = self.predict_proba(images).argmax(-1)
        return torch.tensor(self.classes_, device=best.device)[best]

    def predict_proba(self, images: Array) -> Tensor:
        """Return class probabilities, float32 (n, classes), in the order of ``classes_``.

        Args:
            images: (n, *event_shape), finite.

        Raises:
            ValueError: images of another shape, or not finite.
        """
        images = as_tensor(images)
        if images.shape[1:].numel() != self.event_shape.numel() or images.ndim < 2:
            raise ValueError(
                f"images must have shape (n, *{tuple(self.event_shape)}) as those fitted on, "
                f"got {tuple(images.shape)}"
            )
        if len(images) == 0:
            return torch.zeros(0, len(self.classes_), device=images.device)
        scores = self._machine.decision_function(_features(images))
        probabilities = self._calibration.predict_proba(scores.reshape(len(images), -1))
        return torch.from_numpy(probabilities).to(images.device, torch.float32)


@dataclass(frozen=True, eq=False)
class ClassBalance:
    """Class proportions with bootstrap intervals; made by :func:`class_balance`.

    Args:
        classes: the classes, in the order of the other fields.
        proportions: (classes,) float64, sums to one.
        lower: (classes,) lower end of the interval of each proportion.
        upper: (classes,) upper end.
        n: number of labels.
        ess: number of independent labels they are worth; trials of the bootstrap.
        prob: probability content of the intervals.
        replicates: (num_bootstrap, classes) bootstrap proportions.
    """

    classes: tuple[int, ...]
    proportions: Tensor
    lower: Tensor
    upper: Tensor
    n: int
    ess: float
    prob: float
    replicates: Tensor = field(repr=False)

    def tv(self, target: Tensor | Sequence[float] | None = None) -> float:
        """Return the total variation distance from ``target`` (uniform when ``None``)."""
        return total_variation(self.proportions, target)

    @property
    def chance(self) -> float:
        """What chance alone adds to the total variation distance: that of so many labels from where they come from.

        The mean distance between bootstrap and observed proportions; it falls as one over the root of ``ess``.
        """
        return self._distances().mean().item()

    def tv_without_chance(self, target: Tensor | Sequence[float] | None = None) -> float:
        """Return the total variation distance from ``target`` with chance taken off: ``sqrt(max(tv^2 - chance^2, 0))``.

        Few labels lie far from the target even where they come from it. Chance is independent of the distance it is
        added to, so the two add as squares; where all classes are clearly off the target this errs a little low.
        """
        return math.sqrt(max(self.tv(target) ** 2 - self.chance**2, 0.0))

    def _distances(self) -> Tensor:
        return 0.5 * (self.replicates - self.proportions).abs().sum(-1)

    def tv_interval(self, target: Tensor | Sequence[float] | None = None) -> tuple[float, float]:
        """Return an interval for the total variation distance of the true proportions from ``target``.

        ``tv -+ q`` with q the ``prob`` quantile of the distance between bootstrap and observed
        proportions. Bootstrap distances from the target itself are biased upward near zero, where
        their quantiles can lie above the estimate; by the triangle inequality this interval does
        not, and its coverage is at least that of q.
        """
        radius = torch.quantile(self._distances(), self.prob).item()
        value = self.tv(target)
        return max(0.0, value - radius), min(1.0, value + radius)


@checked
def class_balance(
    labels: Array,
    classes: Sequence[int],
    *,
    weights: Array | None = None,
    ess: float | None = None,
    num_bootstrap: int = 1000,
    prob: float = 0.95,
    seed: int = 0,
) -> ClassBalance:
    """Count classes and bootstrap the proportions.

    Replicates are ``Multinomial(round(ess), proportions) / round(ess)``.

    Args:
        labels: (n,) integers, each among ``classes``.
        classes: all classes, also those that may not occur.
        weights: (n,) non-negative; normalized here. Equal when ``None``.
        ess: effective sample size of the draws behind the labels (autocorrelated or weighted draws
            tell less than n independent ones); ``(sum w)^2 / sum w^2`` when ``None``, n if weights are equal.
        num_bootstrap: number of replicates.
        prob: probability content of the intervals.
        seed: of the bootstrap; the global random state is neither read nor changed.

    Returns:
        Proportions with percentile intervals. A class never seen has the interval [0, 0].

    Raises:
        ValueError: a label outside ``classes``, no labels, bad weights, ``ess`` or ``prob``.

    Example:
        >>> balance = class_balance(torch.tensor([0, 0, 0, 1]), (0, 1))
        >>> balance.tv()
        0.25
    """
    import numpy as np

    labels, names = _whole_labels("labels", as_tensor(labels)).cpu().flatten(), tuple(int(label) for label in classes)
    n, equal = len(labels), weights is None
    weights = _checked_weights(labels, names, as_tensor(weights))
    if not 0.0 < prob < 1.0:
        raise ValueError(f"prob must lie strictly between 0 and 1, got {prob}")
    if ess is None:  # exactly n without weights, where the formula would round
        ess = n if equal else float(1.0 / weights.square().sum())
    if not (math.isfinite(ess) and ess > 0.0):
        raise ValueError(f"ess must be finite and positive, got {ess}")
    proportions = torch.stack([weights[labels == label].sum() for label in names])
    proportions = proportions / proportions.sum()
    trials = max(1, round(ess))
    counts = np.random.default_rng(numpy_seed(seed)).multinomial(trials, proportions.numpy(), size=num_bootstrap)
    replicates = torch.from_numpy(counts / trials)
    tail = torch.tensor([(1.0 - prob) / 2.0, (1.0 + prob) / 2.0], dtype=torch.float64, device="cpu")
    lower, upper = torch.quantile(replicates, tail, dim=0)
    return ClassBalance(names, proportions, lower, upper, n, float(ess), prob, replicates)


@checked
def total_variation(p: Tensor | Sequence[float], target: Tensor | Sequence[float] | None = None) -> float:
    """Return the total variation distance ``1/2 sum_c |p_c - target_c|``, in [0, 1].

    Args:
        p: (classes,) proportions.
        target: (classes,) proportions; uniform when ``None``.

    Raises:
        ValueError: not two sets of proportions of the same length.
    """
    return 0.5 * _difference(p, target).abs().sum().item()


@checked
def fairness_discrepancy(
    p: Tensor | Sequence[float], target: Tensor | Sequence[float] | None = None
) -> float:
    """Return the fairness discrepancy ``|| p - target ||_2``.

    Choi et al. take for ``p`` and ``target`` the classifier's mean probabilities over generated and
    over reference images: pass ``classifier.predict_proba(images).mean(0)``.

    Args:
        p: (classes,) proportions or mean probabilities.
        target: (classes,) likewise; uniform when ``None``.

    Raises:
        ValueError: not two sets of proportions of the same length.

    Reference:
        Choi, Grover, Singh, Shu and Ermon (2020), "Fair Generative Modeling via Weak Supervision".
    """
    return _difference(p, target).norm().item()


@checked
def mean_confidence(probabilities: Tensor) -> float:
    """Return the mean probability of the most probable class, ``1/n sum_i max_c p_ic``, in [1 / classes, 1].

    Images between the classes, as a blurred generator makes them, pull it down.

    Args:
        probabilities: (n, classes), as :meth:`LabelClassifier.predict_proba` gives them.

    Raises:
        ValueError: another shape, no images, or rows that are no probabilities.
    """
    if probabilities.ndim != 2 or not probabilities.numel():
        raise ValueError(f"probabilities must have shape (n, classes), n >= 1, got {tuple(probabilities.shape)}")
    real_numbers("probabilities", probabilities)
    if not bool((probabilities >= 0).all() and ((probabilities.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities must be non-negative and each row sum to 1; pass what predict_proba returns")
    return probabilities.detach().double().amax(-1).mean().item()


def _difference(p: Tensor | Sequence[float], target: Tensor | Sequence[float] | None) -> Tensor:
    p = _checked_simplex("p", p)
    target = torch.full_like(p, 1.0 / len(p)) if target is None else _checked_simplex("target", target)
    if len(p) != len(target):
        raise ValueError(f"p and target must have the same length, got {len(p)} and {len(target)}")
    return p - target


def _checked_simplex(name: str, values: Tensor | Sequence[float]) -> Tensor:
    real_numbers(name, torch.as_tensor(values))
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must have shape (classes,), got {tuple(values.shape)}")
    # Mean probabilities in float32 miss a sum of one by about 1e-6.
    if not bool((values >= 0).all()) or abs(values.sum().item() - 1.0) > 1e-4:
        raise ValueError(f"{name} must be non-negative and sum to 1, got {values.tolist()}")
    return values


def _checked_weights(labels: Tensor, classes: tuple[int, ...], weights: Tensor | None) -> Tensor:
    if len(labels) == 0:
        raise ValueError("labels is empty: there is nothing to count")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must be distinct, got {list(classes)}")
    unknown = sorted(set(labels.unique().tolist()) - set(classes))
    if unknown:
        raise ValueError(f"labels must be among the classes {list(classes)}, got also {unknown}")
    if weights is None:
        return torch.full((len(labels),), 1.0 / len(labels), dtype=torch.float64, device="cpu")
    weights = real_numbers("weights", weights).detach().to("cpu", torch.float64).flatten()
    total = weights.sum()
    if len(weights) != len(labels) or not bool((weights >= 0).all()) or not 0.0 < total.item() < math.inf:
        raise ValueError(
            f"weights must be {len(labels)} finite non-negative numbers, not all zero, got {len(weights)} "
            f"that sum to {total.item():.6g} (for log weights pass their exp)"
        )
    return weights / total


def _whole_labels(name: str, labels: Tensor) -> Tensor:
    """Labels as int64; those that are no whole numbers would become some."""
    labels = finite_numbers(name, labels).detach()
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise ValueError(f"{name} must be whole numbers, got {labels[labels != labels.round()].flatten()[:5].tolist()}")
    return labels.to(torch.int64)


def _checked_labels(images: Tensor, labels: Tensor) -> tuple[tuple[int, ...], int]:
    """Classes present, and the number of folds the rarest of them allows."""
    if labels.ndim != 1 or images.ndim < 2 or len(images) != len(labels):
        raise ValueError(
            "images must have shape (n, *event_shape) and labels shape (n,), "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        found = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"labels must hold at least two classes with two images each, got {found}")
    return tuple(int(label) for label in classes), min(5, int(counts.min()))


def _features(images: Tensor) -> Any:
    """Images as a numpy matrix (n, pixels)."""
    return finite_numbers("images", images).detach().flatten(1).to("cpu", torch.float32).numpy()
