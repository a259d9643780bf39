"""A tilt of the data that compares like with like: its energy sees images through the autoencoder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.models.vae import VAE

__all__ = ["ReconstructionEnergy"]


@checked
class ReconstructionEnergy(Energy):
    r"""``E(r(x))``, where ``r(x)`` is the VAE's reconstruction of ``x``: the decoded mean of its encoder.

    Real images and draws of a VAE differ in every pixel (by the noise of the likelihood, by what the decoder
    blurs), far more than in anything that one would correct. An energy of ``x`` learns that difference first, and the
    weights ``exp(-E(x))`` of the VAE's draws collapse. Both kinds of image have reconstructions on the decoder's
    manifold, where what is left to tell them apart is how often each part of it is visited.

    Args:
        energy: of reconstructions, (*batch, *event) -> (*batch,).
        vae: encodes and decodes; it is not learned, and its parameters are not among those of this energy.

    Example:
        >>> from pyro_ebm import MLPEnergy, ReconstructionEnergy, VAE, tilt
        >>> vae = VAE((8, 8), latent_dim=2, hidden=(16,))
        >>> energy = ReconstructionEnergy(MLPEnergy((8, 8)), vae)
        >>> tilted = tilt(vae.model, {"x": energy})  # fit(tilted, ..., train=energy)
    """

    def __init__(self, energy: Energy | Callable[[Tensor], Tensor], vae: VAE) -> None:
        super().__init__()
        self.energy = as_energy(energy)
        # In a tuple, the VAE is no submodule: whoever trains this energy must not train the VAE.
        self._through = (vae,)

    def reconstruct(self, value: Tensor) -> Tensor:
        """Decoded mean of the encoder, of the shape of ``value``."""
        vae = self._through[0]
        return vae.decode(vae.encode(value).mean).mean

    def forward(self, value: Tensor) -> Tensor:
        """Energy of the reconstruction, (*batch, *event) -> (*batch,)."""
        return self.energy(self.reconstruct(value))
