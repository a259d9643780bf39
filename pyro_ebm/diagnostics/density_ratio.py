"""How much more often one set of data meets a point than another set does, by a classifier between the two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arrays import Array, as_tensor
from pyro_ebm.arviz_statistics import importance_ess
from pyro_ebm.checks import finite_numbers
from pyro_ebm.randomness import numpy_seed

__all__ = ["DensityRatio", "density_ratio"]

_MAX_COMPONENTS, _LANDMARKS = 40, 200
_STRENGTHS = (0.1, 1.0, 10.0)  # inverse of the ridge penalty; with little data the smallest says: much alike
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class DensityRatio:
    """Log density ratio at the data of the denominator; made by :func:`density_ratio`.

    Args:
        log_ratio: (n,) ``log p_numerator(x_i) - log p_denominator(x_i)``, float64.
        auc: area under the ROC curve of the classifier on data it was not fitted on; 0.5: it cannot tell the
            two sets apart, and the ratio is about one everywhere.
    """

    log_ratio: Tensor
    auc: float

    def weights(self, largest: float | None = None) -> Tensor:
        """Importance weights ``p_numerator / p_denominator`` with mean one, truncated.

        Args:
            largest: no weight is more than this many times their mean; ``None``: ``sqrt(n)``.

        Returns:
            (n,) float32, positive.

        Raises:
            ValueError: ``largest`` below one, which not even equal weights would meet.

        Reference:
            Ionides (2008), "Truncated Importance Sampling".
        """
        n = len(self.log_ratio)
        largest = math.sqrt(n) if largest is None else largest
        if not largest >= 1.0:
            raise ValueError(f"largest must be at least 1, the mean of the weights, got {largest!r}")
        weights = _truncated(n * self.log_ratio.double().softmax(0), largest)
        # Smaller than any number a loss would notice, but not zero: Pyro scales by positive numbers only.
        return (weights / weights.mean()).clamp(min=1e-6).to(torch.float32)

    def ess(self, largest: float | None = None) -> float:
        """Effective sample size of these weights, between 1 and n."""
        return float(importance_ess(self.weights(largest).double().log().log_softmax(0)))


def _truncated(weights: Tensor, largest: float) -> Tensor:
    """``min(w, c)`` with the largest c that is at most ``largest`` times the mean of the result."""
    n, ordered = len(weights), weights.sort(descending=True).values
    # With the k largest cut, c = largest (k c + rest) / n; k is right where c is not below the next one.
    k = torch.arange(n, dtype=weights.dtype, device=weights.device)
    rest = ordered.flip(0).cumsum(0).flip(0)
    room = n - k * largest
    caps = torch.where(room > 0, largest * rest / room, math.inf)
    first = int((caps >= ordered * (1.0 - 1e-12)).nonzero()[0])
    return weights.clamp(max=float(caps[first]))


@checked
def density_ratio(numerator: Array, denominator: Array, *, seed: int = 0) -> DensityRatio:
    r"""Estimate ``p_numerator(x) / p_denominator(x)`` at the data of the denominator by classification.

    A classifier's log odds between the two sets are ``log p_num(x) - log p_den(x) + log n_num - log n_den``.
    It is a logistic regression on kernel features of the principal components. Each datum is judged by a
    classifier fitted without it, in five folds: one that has memorized it would call it what it is, with a
    weight near zero. The ridge penalty is the one with the best log loss there.

    Args:
        numerator: (m, *event_shape), the data wanted, at least ten.
        denominator: (n, *event_shape), the data there are, at least ten.
        seed: of folds and kernel landmarks; the global generators are neither read nor changed.

    Returns:
        The log ratio at each datum of ``denominator``, and how well the sets can be told apart.

    Raises:
        ValueError: shapes that differ, fewer than ten data, data not finite or all the same.

    Reference:
        Choi, Grover, Singh, Shu and Ermon (2020), "Fair Generative Modeling via Weak Supervision".

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(200, 2, generator=g) + 1.0, torch.randn(200, 2, generator=g)
        >>> ratio = density_ratio(a, b)
        >>> bool(ratio.log_ratio[b.sum(1) > 1].mean() > ratio.log_ratio[b.sum(1) < -1].mean())
        True
    """
    import numpy as np
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    numerator, denominator = as_tensor(numerator), as_tensor(denominator)
    features = _checked_features(numerator, denominator)
    is_numerator = np.arange(len(features)) < len(numerator)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=numpy_seed(seed))
    fits = []
    for strength in _STRENGTHS:
        machine = _machine(features, strength, seed)
        log_odds = cross_val_predict(machine, features, is_numerator, cv=folds, method="decision_function")
        fits.append((log_loss(is_numerator, 1.0 / (1.0 + np.exp(-log_odds))), log_odds))
    log_odds = min(fits, key=lambda fit: fit[0])[1]
    auc = float(roc_auc_score(is_numerator, log_odds))
    log_ratio = log_odds[~is_numerator] - math.log(len(numerator) / len(denominator))
    return DensityRatio(torch.as_tensor(log_ratio, device=denominator.device), auc)


def _machine(features: Any, strength: float, seed: int) -> Any:
    """Kernel logistic regression; the kernel's width is a typical distance between the data."""
    from sklearn.decomposition import PCA
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    smallest_fit = len(features) - math.ceil(len(features) / _FOLDS)
    # Twice the total variance is the mean squared distance of two data.
    gamma = 0.5 / float(features.var(0).sum())
    return make_pipeline(
        PCA(min(_MAX_COMPONENTS, features.shape[1], smallest_fit), random_state=numpy_seed(seed)),
        Nystroem(gamma=gamma, n_components=min(_LANDMARKS, smallest_fit), random_state=numpy_seed(seed)),
        LogisticRegression(C=strength, max_iter=1000),
    )


def _checked_features(numerator: Tensor, denominator: Tensor) -> Any:
    """Both sets as one numpy matrix (m + n, size), the numerator first."""
    for name, data in {"numerator": numerator, "denominator": denominator}.items():
        if data.ndim < 2 or len(data) < 2 * _FOLDS:
            raise ValueError(
                f"{name} must have shape (n, *event_shape) with n >= {2 * _FOLDS}, got {tuple(data.shape)}; "
                "fewer data say nothing about a density"
            )
        finite_numbers(name, data)
    if numerator.shape[1:] != denominator.shape[1:]:
        raise ValueError(
            "numerator and denominator must hold data of one shape, "
            f"got {tuple(numerator.shape[1:])} and {tuple(denominator.shape[1:])}"
        )
    features = torch.cat([numerator, denominator]).detach().flatten(1).to("cpu", torch.float32).numpy()
    if (features == features[0]).all():
        raise ValueError("numerator and denominator hold one value only: no classifier can tell them apart")
    return features
