"""One VAE of the bundled digits and its learned tilt per latent size, trained once and kept in ``cache/``."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_ebm import VAE, MLPEnergy, biased_split, digits, fit, fit_tilt, tilt
from pyro_ebm.devices import one_thread
from pyro_ebm.randomness import forked_rng

CACHE = Path(__file__).parent / "cache"
SEED = 0
HIDDEN = (256, 128)  # the settings of pyro_ebm's own debias job on these images
SHARES = {0: 0.12, 1: 0.33, 2: 0.28, 3: 0.20, 4: 0.07}


def trained(latent_dim: int, *, folder: Path = CACHE, quick: bool = False) -> dict[str, np.ndarray]:
    """Weights and images as plain arrays: ``energy.*``, ``vae.*``, ``images`` (n, 8, 8); read from the cache if there.

    Args:
        latent_dim: size of z.
        folder: the cache.
        quick: a few epochs only, for tests.
    """
    file = folder / f"digits_{latent_dim}d{'_quick' if quick else ''}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with one_thread():  # the networks are too small to be worth a second one
            arrays = _train(latent_dim, quick)
        np.savez(file, **arrays)
    with np.load(file) as stored:
        return dict(stored)


def _train(latent_dim: int, quick: bool) -> dict[str, np.ndarray]:
    found = digits(range(5))
    split = biased_split(found.images, found.labels, SHARES, 0.6, SEED)
    vae, energy = empty(latent_dim)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    fit(
        vae.model, vae.guide, split.biased.images, objective=TraceMeanField_ELBO(), optimizer=adam, batch_size=64,
        epochs=2 if quick else 400, patience=40, seed=SEED, progress=False,
    )  # fmt: skip
    # Quasi-random draws make log Z far less noisy, where there are few dimensions to fill.
    normalize = "qmc" if latent_dim <= 8 else "importance"
    reference = split.reference.images
    fit_tilt(
        tilt(vae.model, {"z": energy}, normalize=normalize), vae.guide, reference,
        num_particles=max(32, 8_000 // len(reference)), max_steps=2 if quick else 150, tolerance=None, folds=0,
        # 105 reference images let a fast fit in many dimensions run off to where the prior has no mass
        learning_rate=5e-3 if latent_dim <= 8 else 1e-3, seed=SEED, progress=False,
    )  # fmt: skip
    arrays = {f"energy.{name}": value.numpy() for name, value in energy.state_dict().items()}
    arrays |= {f"vae.{name}": value.numpy() for name, value in vae.state_dict().items()}
    return arrays | {"images": split.test.images.numpy()}


def empty(latent_dim: int) -> tuple[VAE, MLPEnergy]:
    """The two networks before training."""
    with forked_rng(SEED):
        return VAE((1, 8, 8), latent_dim, hidden=HIDDEN), MLPEnergy(latent_dim)


def networks(arrays: dict[str, np.ndarray], latent_dim: int) -> tuple[VAE, MLPEnergy]:
    """The trained networks, frozen: samplers move z only."""
    vae, energy = empty(latent_dim)
    for module, prefix in ((vae, "vae."), (energy, "energy.")):
        state = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
        module.load_state_dict(state)
        module.requires_grad_(False).eval()
    return vae, energy


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """Eight hex digits that change with any of the numbers: what a cached reference belongs to."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
