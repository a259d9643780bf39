"""Energies: a value in, one number per batch element out. They add (products of experts) and scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

from pyro_ebm.annotations import checked
from pyro_ebm.checks import finite_numbers, real_numbers
from pyro_ebm.modules import modules_of

__all__ = [
    "ConvEnergy",
    "Energy",
    "FunctionEnergy",
    "LinearEnergy",
    "MLPEnergy",
    "QuadraticEnergy",
    "as_energy",
    "gaussian_log_normalizer",
]


class Energy(nn.Module):
    """A learnable function ``E: (*batch, *event) -> (*batch,)``; low energy means probable.

    ``e1 + e2`` is the product of experts ``exp(-e1) exp(-e2)``; ``beta * e`` is ``e`` at inverse
    temperature ``beta``. Subclasses write ``forward(value)`` and need nothing else.
    """

    def __call__(self, value: Tensor) -> Tensor:
        """``forward``; of two precisions that do not meet, an error says which."""
        try:
            return super().__call__(value)
        except RuntimeError as error:
            other = [p.dtype for p in self.parameters() if p.is_floating_point() and p.dtype != value.dtype]
            if not other and "dtype" not in str(error) and "scalar type" not in str(error):
                raise
            own, theirs = (str(d).removeprefix("torch.") for d in ([*other, "another precision"][0], value.dtype))
            raise TypeError(
                f"the energy {type(self).__name__} computes in {own}, and the values of its site are {theirs}: make "
                f"them alike, with energy.to(dtype) or in the model ({str(error).splitlines()[0]})"
            ) from error

    def forward(self, value: Tensor) -> Tensor:
        """Energy of each batch element.

        Args:
            value: (*batch, *event).

        Returns:
            (*batch,)
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(value)")

    def __add__(self, other: Energy) -> Energy:
        if not isinstance(other, Energy):
            return NotImplemented
        return _Sum([*_terms(self), *_terms(other)])

    def __mul__(self, scale: float | Tensor) -> Energy:
        if not isinstance(scale, (int, float)) and not (isinstance(scale, Tensor) and scale.ndim == 0):
            raise TypeError(f"an energy is multiplied by a number, got {type(scale).__name__}")
        finite_numbers("the number that an energy is multiplied by", torch.as_tensor(scale))
        return _Scaled(self, scale)

    __rmul__ = __mul__


class _Sum(Energy):
    def __init__(self, terms: Sequence[Energy]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, value: Tensor) -> Tensor:
        values = [term(value) for term in self.terms]
        if any(part.shape != values[0].shape for part in values):  # broadcasting would hide a wrong term
            raise ValueError(
                f"the terms of a sum of energies must return the same shape, one number per batch element, "
                f"got {[tuple(part.shape) for part in values]} for a value of shape {tuple(value.shape)}"
            )
        return torch.stack(values).sum(0)


class _Scaled(Energy):
    scale: Tensor

    def __init__(self, energy: Energy, scale: float | Tensor) -> None:
        super().__init__()
        self.energy = energy
        if isinstance(scale, nn.Parameter):  # a learnable temperature stays one
            self.scale = scale
        else:
            self.register_buffer("scale", torch.as_tensor(scale).detach().clone())

    def forward(self, value: Tensor) -> Tensor:
        energy = self.energy(value)
        return _matched(self.scale, energy) * energy


def _matched(parameter: Tensor, value: Tensor) -> Tensor:
    """The parameter in the value's precision; as it is where the value is integer (a discrete site)."""
    real_numbers("the value that an energy gets", value)
    return parameter.to(value.dtype) if value.is_floating_point() else parameter


def _floating(value: Tensor) -> Tensor:
    real_numbers("the value that an energy gets", value)
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _numbers(name: str, values: Any) -> Tensor:
    """Given coefficients in torch's default precision, finite."""
    return finite_numbers(name, torch.as_tensor(values)).detach().to(torch.get_default_dtype()).clone()


def _terms(energy: Energy) -> list[Energy]:
    return list(energy.terms) if isinstance(energy, _Sum) else [energy]  # type: ignore[arg-type]


class FunctionEnergy(Energy):
    """A plain function or any ``nn.Module`` as an energy: ``E(value) = function(value)``.

    Args:
        function: maps (*batch, *event) to (*batch,). Parameters are found only if it is a module or a
            method of one.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.owners = nn.ModuleList([] if isinstance(function, nn.Module) else modules_of(function))

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value)


def as_energy(energy: Energy | Callable[[Tensor], Tensor], *, name: str = "energy") -> Energy:
    """Return ``energy`` itself, or a plain callable wrapped as one."""
    if isinstance(energy, Energy):
        return energy
    if callable(energy):
        return FunctionEnergy(energy)
    raise TypeError(
        f"{name} must be an Energy or a callable from (*batch, *event) to (*batch,), "
        f"got {type(energy).__name__}"
    )


def _event_shape(shape: int | Sequence[int], argument: str) -> torch.Size:
    size = torch.Size([shape]) if isinstance(shape, int) else torch.Size(shape)
    if any(n < 1 for n in size):
        raise ValueError(f"{argument} must be positive, got {tuple(size)}")
    return size


def _split_batch(value: Tensor, event_shape: torch.Size, owner: Energy) -> torch.Size:
    batch = value.shape[: value.ndim - len(event_shape)]
    if value.ndim < len(event_shape) or value.shape[len(batch) :] != event_shape:
        raise ValueError(
            f"{type(owner).__name__} was built for events of shape {tuple(event_shape)}, "
            f"got a value of shape {tuple(value.shape)}; build it with the event shape of the tilted site"
        )
    return batch


class _SpectralNorms:
    """The spectral norms of an energy's layers, which in ``train()`` mode follow the weights by power iteration.

    torch iterates at every call, so that two calls in one training step would be of two functions. Here
    the first call after a change of the weights iterates, and the others see the same energy.

    Args:
        wanted: whether layers get one at all.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._seen: dict[str, int] = {}

    def on(self, layer: nn.Module) -> nn.Module:
        return parametrizations.spectral_norm(layer) if self.wanted else layer

    def follow(self, energy: Energy) -> None:
        """To be called before the layers are."""
        for name, module in energy.named_modules() if self.wanted else ():
            if isinstance(module, ParametrizationList):
                version = module.original._version if energy.training else 0
                for norm in module:
                    norm.training = energy.training and self._seen.get(name) != version
                if energy.training:
                    self._seen[name] = version


@checked
class MLPEnergy(Energy):
    """A multilayer perceptron from one event to one number.

    Args:
        event_shape: shape of one event, which is flattened, or the length of a vector; ``()`` for a
            scalar site.
        hidden: widths of the hidden layers.
        activation: module class between the layers; a smooth one, because samplers take gradients.
        spectral_norm: divide the weights of each layer by their largest singular value, which bounds the slope
            of the energy by that of the activations (1.1 a layer for SiLU); ``beta * energy`` allows a steeper one.
            Such a module is saved by its state dict (``save_weights``, checkpoints), torch cannot pickle it.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        hidden: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape = _event_shape(event_shape, "event_shape")
        self._norms = _SpectralNorms(spectral_norm)
        widths = [math.prod(self.event_shape), *hidden]
        layers: list[nn.Module] = []
        for size_in, size_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [self._norms.on(nn.Linear(size_in, size_out)), activation()]
        self.net = nn.Sequential(*layers, self._norms.on(nn.Linear(widths[-1], 1)))

    def forward(self, value: Tensor) -> Tensor:
        batch = _split_batch(value, self.event_shape, self)
        flat = value.reshape(*batch, self.event_shape.numel())
        self._norms.follow(self)
        return self.net(_floating(flat)).squeeze(-1)


@checked
class ConvEnergy(Energy):
    """A small convolutional network from one image to one number.

    Args:
        event_shape: (channels, height, width).
        channels: feature maps of each stride-2 layer.
        activation: module class between the layers.
        spectral_norm: as in :class:`MLPEnergy`; of a convolution the norm of its kernel as a matrix.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        activation: type[nn.Module] = nn.SiLU,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape = _event_shape(event_shape, "event_shape")
        if len(self.event_shape) != 3:
            raise ValueError(f"event_shape must be (channels, height, width), got {tuple(self.event_shape)}")
        self._norms = _SpectralNorms(spectral_norm)
        widths = [self.event_shape[0], *channels]
        layers: list[nn.Module] = []
        for size_in, size_out in zip(widths[:-1], widths[1:], strict=True):
            convolution = nn.Conv2d(size_in, size_out, 3, stride=2, padding=1)
            layers += [self._norms.on(convolution), activation()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            num_features = self.features(torch.zeros(1, *self.event_shape)).shape[1]
        self.head = self._norms.on(nn.Linear(num_features, 1))

    def forward(self, value: Tensor) -> Tensor:
        batch = _split_batch(value, self.event_shape, self)
        self._norms.follow(self)
        value = _floating(value)
        return self.head(self.features(value.reshape(-1, *self.event_shape))).reshape(batch)


@checked
class LinearEnergy(Energy):
    """``E(z) = -a . z``: exponential tilting; turns N(0, I) into N(a, I), with ``log Z = |a|^2 / 2``.

    Args:
        a: (d,) the direction, or a number for a scalar site.
    """

    def __init__(self, a: Tensor | float | Sequence[float]) -> None:
        super().__init__()
        self.a = nn.Parameter(_numbers("a", a))
        if self.a.ndim > 1:
            raise ValueError(f"a must be a number or a vector (d,), got shape {tuple(self.a.shape)}")

    def forward(self, value: Tensor) -> Tensor:
        a = _matched(self.a, value)
        if a.ndim == 0:
            return -a * value
        _split_batch(value, a.shape, self)
        return -(_floating(value) @ a)


@checked
class QuadraticEnergy(Energy):
    """``E(z) = c |z|^2 / 2``; turns N(0, I) into N(0, I / (1 + c)), ``log Z = -(d/2) log(1 + c)``.

    Against a standard normal base the tilt exists only for ``c > -1``.

    Args:
        c: curvature.
        event_dim: number of rightmost dimensions that form one event; 0 for a scalar site.
    """

    def __init__(self, c: float | Tensor, *, event_dim: int = 1) -> None:
        super().__init__()
        self.c = nn.Parameter(_numbers("c", c))
        self.event_dim = event_dim

    def forward(self, value: Tensor) -> Tensor:
        squared = real_numbers("the value that an energy gets", value) ** 2
        if self.event_dim:
            squared = squared.sum(tuple(range(-self.event_dim, 0)))
        return 0.5 * _matched(self.c, squared) * squared


@checked
def gaussian_log_normalizer(energy: LinearEnergy | QuadraticEnergy, loc: Tensor, scale: Tensor) -> Tensor:
    r"""Exact ``log E_{N(loc, diag(scale^2))}[exp(-E(z))]`` of a linear or quadratic energy.

    Linear: ``a . loc + |a scale|^2 / 2``. Quadratic: with ``s_i = 1 + c scale_i^2``,
    ``-1/2 sum_i (log s_i + c loc_i^2 / s_i)``.

    Args:
        energy: linear or quadratic.
        loc: (*batch, d) mean.
        scale: (*batch, d) standard deviation.

    Returns:
        (*batch,)

    Raises:
        ValueError: if a quadratic energy has ``1 + c scale^2 <= 0``: the integral is infinite.
    """
    loc, scale = (finite_numbers(*pair) for pair in (("loc", torch.as_tensor(loc)), ("scale", torch.as_tensor(scale))))
    loc, scale = torch.broadcast_tensors(loc, scale)
    if isinstance(energy, LinearEnergy):
        return (energy.a * loc + 0.5 * (energy.a * scale) ** 2).sum(-1)
    spread = 1 + energy.c * scale**2
    if (spread <= 0).any():
        raise ValueError(
            f"log Z is infinite: 1 + c * scale^2 must be positive, got c = {energy.c.item():.4g}"
        )
    return -0.5 * (spread.log() + energy.c * loc**2 / spread).sum(-1)
