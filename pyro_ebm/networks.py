"""Encoders and decoders (MLP, convolutional) that take any number of leading batch dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_ebm.annotations import checked
from pyro_ebm.checks import is_whole_number, whole_number

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder"]

Activation = Callable[[], nn.Module]
# A posterior scale of exactly zero has no density.
_SMALLEST_SCALE = 1e-4


def _checked_shape(event_shape: Sequence[int] | int, dims: int | None = None) -> tuple[int, ...]:
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if not shape or not all(map(is_whole_number, shape)):
        raise ValueError(f"event_shape must hold one or more positive whole numbers, got {event_shape!r}")
    if dims is not None and len(shape) != dims:
        raise ValueError(
            f"event_shape must be (channels, height, width) for a convolutional network, got {shape}; "
            "add a channel dimension, for instance (1, 28, 28), or use an MLP"
        )
    return shape


def _checked_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        whole_number(name, size)


def _checked_hidden(hidden: Sequence[int], at_least: int = 0) -> list[int]:
    sizes = list(hidden)
    if len(sizes) < at_least or not all(map(is_whole_number, sizes)):
        raise ValueError(
            f"hidden must hold {at_least} or more positive layer sizes, got {hidden!r}; for instance (64, 32)"
        )
    return sizes


def _mlp(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Linear layers through the given sizes, an activation between any two of them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def _gaussian(output: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw_scale = output.chunk(2, dim=-1)
    return loc, F.softplus(raw_scale) + _SMALLEST_SCALE


def _split(
    output: Tensor, batch: Sequence[int], event: Sequence[int], num: int
) -> Tensor | tuple[Tensor, ...]:
    """(prod(batch), num * prod(event)) as one tensor (*batch, *event), or as a tuple of ``num`` of them."""
    parts = output.reshape(*batch, num, *event)
    return parts.squeeze(len(batch)) if num == 1 else parts.unbind(len(batch))


def _check_event(value: Tensor, event_shape: tuple[int, ...]) -> None:
    if value.shape[-len(event_shape) :] != event_shape:
        raise ValueError(
            f"value must have shape (*batch, {', '.join(map(str, event_shape))}), got {tuple(value.shape)}; "
            "reshape it, or build the encoder with the event_shape of the data"
        )


@checked
class MLPEncoder(nn.Module):
    """Fully connected network from a datum to the location and scale of a Gaussian over the latent.

    Args:
        event_shape: shape of one datum, for instance (1, 28, 28).
        latent_dim: size of the latent vector.
        hidden: widths of the hidden layers.
        activation: makes the nonlinearity between layers.
    """

    def __init__(
        self,
        event_shape: Sequence[int] | int,
        latent_dim: int,
        hidden: Sequence[int] = (512, 256),
        *,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.event_shape = _checked_shape(event_shape)
        _checked_sizes(latent_dim=latent_dim)
        sizes = [math.prod(self.event_shape), *_checked_hidden(hidden), 2 * latent_dim]
        self.layers = _mlp(sizes, activation)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """(*batch, *event_shape) -> location and positive scale, each (*batch, latent_dim)."""
        _check_event(value, self.event_shape)
        return _gaussian(self.layers(value.flatten(-len(self.event_shape))))


@checked
class MLPDecoder(nn.Module):
    """Fully connected network from a latent vector to the parameters of a datum's distribution.

    Args:
        latent_dim: size of the latent vector.
        event_shape: shape of one datum.
        hidden: widths of the hidden layers.
        num_outputs: numbers per element of the datum: 1 for logits, 2 for a mean and a scale.
        activation: makes the nonlinearity between layers.
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int] | int,
        hidden: Sequence[int] = (256, 512),
        num_outputs: int = 1,
        *,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.event_shape = _checked_shape(event_shape)
        _checked_sizes(latent_dim=latent_dim, num_outputs=num_outputs)
        self.num_outputs = num_outputs
        sizes = [latent_dim, *_checked_hidden(hidden), num_outputs * math.prod(self.event_shape)]
        self.layers = _mlp(sizes, activation)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(*batch, latent_dim) -> (*batch, *event_shape), or a tuple of ``num_outputs`` of these."""
        return _split(self.layers(z), z.shape[:-1], self.event_shape, self.num_outputs)


def _levels(height: int, width: int, depth: int) -> list[tuple[int, int]]:
    """Sizes of an image that is halved ``depth`` times, each half rounded up."""
    sizes = [(height, width)]
    for _ in range(depth):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


@checked
class ConvEncoder(nn.Module):
    """Convolutions of stride two from an image to the location and scale of a Gaussian over the latent.

    Args:
        event_shape: (channels, height, width), of any size.
        latent_dim: size of the latent vector.
        hidden: channels after each halving of the image.
        activation: makes the nonlinearity between layers.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (32, 64),
        *,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.event_shape = channels, height, width = _checked_shape(event_shape, 3)
        _checked_sizes(latent_dim=latent_dim)
        sizes = [channels, *_checked_hidden(hidden, at_least=1)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), activation()]
        smallest = _levels(height, width, len(sizes) - 1)[-1]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(sizes[-1] * math.prod(smallest), 2 * latent_dim)
        )

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """(*batch, channels, height, width) -> location and positive scale, each (*batch, latent_dim)."""
        _check_event(value, self.event_shape)
        batch = value.shape[:-3]
        output = self.layers(value.reshape(math.prod(batch), *self.event_shape))
        return _gaussian(output.reshape(*batch, output.shape[-1]))


@checked
class ConvDecoder(nn.Module):
    """Transposed convolutions of stride two from a latent vector to the parameters of an image.

    Args:
        latent_dim: size of the latent vector.
        event_shape: (channels, height, width), of any size.
        hidden: channels before each doubling of the image.
        num_outputs: numbers per pixel: 1 for logits, 2 for a mean and a scale.
        activation: makes the nonlinearity between layers.
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (64, 32),
        num_outputs: int = 1,
        *,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.event_shape = channels, height, width = _checked_shape(event_shape, 3)
        _checked_sizes(latent_dim=latent_dim, num_outputs=num_outputs)
        self.num_outputs = num_outputs
        sizes = [*_checked_hidden(hidden, at_least=1), num_outputs * channels]
        levels = _levels(height, width, len(sizes) - 1)[::-1]
        first = (sizes[0], *levels[0])
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(-1, first)]
        for (fan_in, fan_out), (small, large) in zip(pairwise(sizes), pairwise(levels), strict=True):
            # A doubled side has 2n - 1 or 2n pixels; the padding makes it exactly the wanted one.
            padding = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
            up = nn.ConvTranspose2d(fan_in, fan_out, 3, stride=2, padding=1, output_padding=padding)
            layers += [activation(), up]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(*batch, latent_dim) -> (*batch, *event_shape), or a tuple of ``num_outputs`` of these."""
        batch = z.shape[:-1]
        output = self.layers(z.reshape(math.prod(batch), z.shape[-1]))
        return _split(output, batch, self.event_shape, self.num_outputs)
