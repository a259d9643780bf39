"""The variational autoencoder: a model and its guide, usable without the rest of the library."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.modules import register_for_svi
from pyro_ebm.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

__all__ = ["VAE"]

# likelihood -> (numbers the decoder gives per element, smallest datum, largest datum)
_LIKELIHOODS = {
    "bernoulli": (1, 0.0, 1.0),
    "continuous_bernoulli": (1, 0.0, 1.0),
    "gaussian": (2, -math.inf, math.inf),
    "gaussian_shared": (1, -math.inf, math.inf),
}
_NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "mlp": (MLPEncoder, MLPDecoder, (512, 256)),
    "conv": (ConvEncoder, ConvDecoder, (32, 64)),
}
# Keeps the density of a pixel that is the same in every image finite.
_SMALLEST_SCALE = 1e-3


@checked
class VAE(nn.Module):
    """A variational autoencoder with a standard normal prior, as a Pyro model and guide.

        z ~ N(0, I),   x ~ p(x | decoder(z)),   q(z | x) = N(loc(x), scale(x)^2)

    With ``beta`` other than 1 the log probabilities of z in model and guide are multiplied by
    ``beta``, which makes the ELBO that of a beta-VAE. That is a training objective and not a
    generative model, so it holds in ``train()`` mode only: in ``eval()`` mode the model is
    p(z) p(x | z) itself, and sampling, log likelihoods and validation losses mean what they say.

    Args:
        event_shape: shape of one datum, for instance (1, 28, 28).
        latent_dim: size of z.
        likelihood: ``"bernoulli"``: values in [0, 1]; a gray value counts as the expected value of
            a binary pixel (cross-entropy). ``"continuous_bernoulli"``: a density on [0, 1].
            ``"gaussian"``: N(mu(z), sigma(z)^2) per element. ``"gaussian_shared"``: N(mu(z),
            sigma^2) with one learned sigma.
        beta: weight of the divergence between q(z | x) and the prior, above zero.
        network: ``"mlp"`` or ``"conv"``.
        hidden: widths (or channels) of the encoder; the decoder has them reversed.
        encoder: in place of the built one: x (*batch, *event_shape) -> location and positive scale.
        decoder: in place of the built one: z (*batch, latent_dim) -> (*batch, *event_shape), or for
            ``"gaussian"`` a pair of these: the mean and the scale before its softplus.

    Raises:
        ValueError: an argument out of its range; in ``model`` and ``guide``, data with the wrong
            shape, with NaN or infinite values, or outside the likelihood's support.

    Reference:
        Kingma and Welling (2014); Higgins et al. (2017) for beta; Loaiza-Ganem and Cunningham (2019)
        for the continuous Bernoulli.

    Example:
        >>> vae = VAE((8, 8), latent_dim=2, hidden=(16,))
        >>> vae.decode(vae.prior.sample((5,))).mean.shape
        torch.Size([5, 8, 8])
    """

    # Scalars that follow the module's device and dtype.
    _zero: Tensor
    _one: Tensor

    def __init__(
        self,
        event_shape: Sequence[int] | int,
        latent_dim: int,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        *,
        network: str = "mlp",
        hidden: Sequence[int] | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {sorted(_LIKELIHOODS)}, got {likelihood!r}")
        if network not in _NETWORKS:
            raise ValueError(f"network must be one of {sorted(_NETWORKS)}, got {network!r}")
        if not (isinstance(beta, int | float) and 0 < beta < math.inf):
            raise ValueError(f"beta must be a finite number above zero, got {beta!r}")
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.latent_dim, self.likelihood, self.beta = latent_dim, likelihood, float(beta)
        make_encoder, make_decoder, default_hidden = _NETWORKS[network]
        sizes = tuple(default_hidden if hidden is None else hidden)
        num_outputs = _LIKELIHOODS[likelihood][0]
        self.encoder = encoder or make_encoder(event_shape, latent_dim, sizes)
        self.decoder = decoder or make_decoder(latent_dim, event_shape, sizes[::-1], num_outputs)
        if likelihood == "gaussian_shared":
            self.raw_scale = nn.Parameter(torch.tensor(math.log(math.expm1(1.0))))
        self.register_buffer("_zero", torch.zeros(()), persistent=False)
        self.register_buffer("_one", torch.ones(()), persistent=False)
        self._checked: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def prior(self) -> TorchDistribution:
        """The prior of z, N(0, I): batch shape (), event shape (latent_dim,)."""
        # Expanded and not filled: a plate of a million data costs no memory either.
        loc, scale = self._zero.expand(self.latent_dim), self._one.expand(self.latent_dim)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def encode(self, x: Tensor) -> TorchDistribution:
        """The approximate posterior q(z | x).

        Args:
            x: (*batch, *event_shape).

        Returns:
            A diagonal normal, batch shape batch, event shape (latent_dim,).
        """
        loc, scale = self.encoder(x)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def decode(self, z: Tensor) -> TorchDistribution:
        """The distribution p(x | z); its ``mean`` holds the images.

        Args:
            z: (*batch, latent_dim).

        Returns:
            Batch shape batch, event shape event_shape.
        """
        output = self.decoder(z)
        first = output[0] if isinstance(output, tuple) else output
        wanted = (*z.shape[:-1], *self.event_shape)
        if first.shape != wanted:
            raise ValueError(
                f"decoder must turn z of shape {tuple(z.shape)} into {wanted}, "
                f"it returned {tuple(first.shape)}; make its last layer fit event_shape={self.event_shape}"
            )
        return self._distribution(output).to_event(len(self.event_shape))

    def _distribution(self, output: Any) -> TorchDistribution:
        # Pyro's own validation would refuse gray values for a Bernoulli; model and guide check the data.
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output, validate_args=False)
        if self.likelihood == "continuous_bernoulli":
            return dist.ContinuousBernoulli(logits=output, validate_args=False)
        mean, raw_scale = output if self.likelihood == "gaussian" else (output, self.raw_scale)
        return dist.Normal(mean, F.softplus(raw_scale) + _SMALLEST_SCALE, validate_args=False)

    def model(self, x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """The generative model, with sites ``"z"`` and ``"x"`` in the plate ``"data"`` (dim -1).

        Args:
            x: data (num_data, *event_shape), or None to generate.
            num_data: how many data to generate where ``x`` is None.

        Returns:
            x, as given or as drawn, (num_data, *event_shape).
        """
        register_for_svi(self, "VAE")
        with pyro.plate("data", self._num_data(x, num_data), dim=-1):
            with self._beta_weight():
                z = pyro.sample("z", self.prior)
            return pyro.sample("x", self.decode(z), obs=x)

    def guide(self, x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """The approximate posterior q(z | x) of each datum, or the prior where ``x`` is None.

        Args:
            x: data (num_data, *event_shape), or None.
            num_data: size of the plate where ``x`` is None.

        Returns:
            z, (num_data, latent_dim).
        """
        register_for_svi(self, "VAE")
        with pyro.plate("data", self._num_data(x, num_data), dim=-1), self._beta_weight():
            return pyro.sample("z", self.prior if x is None else self.encode(x))

    def _beta_weight(self) -> AbstractContextManager[Any]:
        if self.training and self.beta != 1.0:
            return pyro.poutine.scale(scale=self.beta)
        return nullcontext()

    def _num_data(self, x: Tensor | None, num_data: int) -> int:
        if x is not None:
            self._check_data(x)
            return x.shape[0]
        return whole_number("num_data", num_data)

    def _check_data(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a torch tensor, got {type(x).__name__}; pass torch.as_tensor(x)")
        if x.shape[1:] != self.event_shape or x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(
                f"x must have shape (num_data, {', '.join(map(str, self.event_shape))}) with num_data >= 1, "
                f"got {tuple(x.shape)}; reshape x or build the VAE with the event_shape of the data"
            )
        if x.dtype != self._zero.dtype:
            raise ValueError(
                f"x must have the dtype of the VAE, {self._zero.dtype}, got {x.dtype}; "
                "convert x with x.to(dtype), or the VAE with vae.to(dtype)"
            )
        # A graph being captured has no values to look at.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        version = -1 if x.is_inference() else x._version
        if version < 0 or self._checked is None or self._checked[0]() is not x or self._checked[1] != version:
            self._checked = (weakref.ref(x), version) if self._check_values(x) else None

    def _check_values(self, x: Tensor) -> bool:
        """Raise ValueError for values no datum can have; False where the values cannot be seen."""
        try:
            smallest, largest = (float(bound) for bound in x.detach().aminmax())
        except RuntimeError:  # inside vmap or make_fx, where a value cannot be read either
            return False
        if not (math.isfinite(smallest) and math.isfinite(largest)):  # aminmax passes NaN on
            bad = int((~x.detach().isfinite()).sum())
            raise ValueError(
                f"x must be finite, got {bad} NaN or infinite values of {x.numel()}; "
                "remove or impute these data before they reach the model"
            )
        _, low, high = _LIKELIHOODS[self.likelihood]
        if smallest < low or largest > high:
            raise ValueError(
                f"x must lie in [{low:g}, {high:g}] for likelihood={self.likelihood!r}, got values from "
                f"{smallest:g} to {largest:g}; rescale x (8-bit images: x / 255) or use likelihood='gaussian'"
            )
        return True

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither pickled nor of use in a copy.
        return {**self.__dict__, "_checked": None}
