"""What a user writes, for `mypy --strict` to accept: ten public names and what comes out of them."""

from __future__ import annotations

import torch

from pyro_ebm import MCMC, VAE, ChEES, Draws, FitResult, MLPEnergy, TiltedModel, fit, importance, sample, tilt


def trained(images: torch.Tensor) -> tuple[VAE, FitResult]:
    vae = VAE((8, 8), latent_dim=2, hidden=(16,))
    return vae, fit(vae.model, vae.guide, images, epochs=2, seed=0, progress=False)


def tilted(vae: VAE) -> TiltedModel:
    return tilt(vae.model, {"z": MLPEnergy(2)}, normalize=False)


def main() -> None:
    data = torch.rand(64, 8, 8)
    vae, result = trained(data)
    model = tilted(vae)
    by_weights: Draws = importance(model, None, data[:1], num_samples=500, seed=0)
    by_chains: Draws = MCMC(ChEES(model), num_samples=50, num_chains=8, progress=False).run(data[:1])
    by_any: Draws = sample(model, data[:1], method="smc", num_samples=100, seed=0)
    weights: torch.Tensor = by_weights.weights
    means = {name: float(draws.mean("z").norm()) for name, draws in {"chains": by_chains, "smc": by_any}.items()}
    images: torch.Tensor = vae.decode(by_chains.flat("z")).mean
    losses: list[float] = result.train_loss
    assert len(losses) == 2 and weights.shape == (500,) and images.shape[-1] == 8 and means


if __name__ == "__main__":
    main()
