"""An energy linear in chosen features: the tilt that holds their means at given values, with the least change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers
from pyro_ebm.energies import Energy, FunctionEnergy

__all__ = ["MomentEnergy"]


@checked
class MomentEnergy(Energy):
    r"""``E(v) = -lambda . f(v)``, the exponential family of the features ``f`` over a base distribution.

    With the right multipliers ``lambda`` it is the one nearest to the base, in KL divergence, whose features have
    given means: :func:`fit_moments` finds them. Features may be any function of the value, for example
    class probabilities of the image decoded from it. Features without a gradient (labels, counts, scikit-learn) are
    fine for importance sampling and SMC; gradients of the energy then lack them, so that moves of HMC or
    MALA are blind to them (still exact, less often accepted).

    Args:
        features: maps (*batch, *event) to (*batch, k).
        multipliers: (k,) lambda; ``None`` leaves them to :func:`fit_moments` or to ``load_state_dict``.
        names: what the k features are called in messages.

    Reference:
        Csiszar (1975), I-divergence geometry of probability distributions and minimization problems.

    Example:
        >>> import torch
        >>> from pyro_ebm import MomentEnergy
        >>> energy = MomentEnergy(lambda z: torch.stack([z, z**2], -1), [1.0, -0.5])
        >>> energy(torch.tensor([2.0, 0.0])).tolist()
        [-0.0, -0.0]
    """

    multipliers: nn.Parameter | None

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        multipliers: Tensor | Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.names = None if names is None else tuple(str(name) for name in names)
        self._features = FunctionEnergy(features)  # finds the modules behind a method
        self.register_parameter("multipliers", None)
        if multipliers is not None:
            self.set_multipliers(multipliers)

    def features(self, value: Tensor) -> Tensor:
        """``f(v)``, (*batch, k).

        Raises:
            TypeError: features that are not a tensor.
            ValueError: features without a last dimension k, or of another k than ``multipliers`` or ``names``.
        """
        found = self._features(value)
        if not isinstance(found, Tensor):
            raise TypeError(f"features must return a tensor, got {type(found).__name__}; use torch.as_tensor")
        expected = self._num_features()
        if found.ndim == 0 or (expected is not None and found.shape[-1] != expected):
            last = "k" if expected is None else str(expected)
            raise ValueError(
                f"features must return shape (*batch, {last}), got {tuple(found.shape)} for a value of shape "
                f"{tuple(value.shape)}; a single feature needs a last dimension of one: f(v)[..., None]"
            )
        real_numbers("features", found)
        return found if found.is_floating_point() else found.to(torch.get_default_dtype())

    def forward(self, value: Tensor) -> Tensor:
        if self.multipliers is None:
            raise ValueError(
                "this MomentEnergy has no multipliers yet: fit_moments(base, energy, target) finds them, or give "
                "multipliers="
            )
        found = self.features(value)
        return -(found @ self.multipliers.to(found))

    def name(self, index: int) -> str:
        """What feature ``index`` is called."""
        return f"feature {index}" if self.names is None else repr(self.names[index])

    def set_multipliers(self, multipliers: Tensor | Sequence[float]) -> None:
        """Replace lambda, in place where there is one already.

        Args:
            multipliers: (k,) finite.

        Raises:
            ValueError: not a finite vector, or of another length than before.
        """
        given = real_numbers("multipliers", torch.as_tensor(multipliers))
        values = given.detach().to(given.dtype if given.is_floating_point() else torch.get_default_dtype()).clone()
        if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
            raise ValueError(
                f"multipliers must be finite, one for each feature, shape (k,), got shape {tuple(values.shape)}: "
                f"{values.flatten()[:8].tolist()}"
            )
        expected = self._num_features()
        if expected is not None and len(values) != expected:
            raise ValueError(f"multipliers must be {expected}, one for each feature, got {len(values)}")
        if self.multipliers is None:
            self.multipliers = nn.Parameter(values)
        else:
            with torch.no_grad():
                self.multipliers.copy_(values)

    def _num_features(self) -> int | None:
        if self.multipliers is not None:
            return len(self.multipliers)
        return None if self.names is None else len(self.names)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(f"{prefix}multipliers")
        if stored is not None and self.multipliers is None:
            self.set_multipliers(stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
