"""Learners as other people write them: a model with a guide that train on data, small, linear and Gaussian within.

A decoder that is linear in z (a convolution is too) with a Gaussian likelihood leaves ``log p(x)`` in closed form
whatever its weights, so that each learner brings along what its likelihood really is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pyro.infer
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

NOISE, N = 1.0, 48
Twin = Callable[..., Tensor]
Component = tuple[Tensor, Tensor, Tensor]  # log weight, mean, covariance


@dataclass(frozen=True)
class Learner:
    """A model and guide that learn.

    Args:
        name: unique.
        make: a new pair, an object with ``model`` and ``guide``.
        data: its data, a tuple of tensors with one row a datum.
        objective: what makes the loss; None: ``Trace_ELBO``.
        site: a latent site of each datum to tilt; None: there is none.
        twin: (pair, *data) -> exact log p of each datum, (n,); None: not known.
        refused: entry point -> what the refusal says.
        options: of ``fit``.
        fills_param_store: whether a call leaves parameters in Pyro's store.
    """

    name: str
    make: Callable[[], Any]
    data: Callable[[], tuple[Tensor, ...]]
    objective: Callable[[], Any] | None = None
    site: str | None = "z"
    twin: Twin | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    fills_param_store: bool = False

    def __str__(self) -> str:
        return self.name


def normal(layer: nn.Module, x: Tensor) -> dist.Distribution:
    loc, log_scale = layer(x).chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def vectors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(N, 2, generator=generator), torch.randn(2, 3, generator=generator)
    return (z @ w + NOISE * torch.randn(N, 3, generator=generator),)


def pairs() -> tuple[Tensor, ...]:
    (y,) = vectors()
    return torch.linspace(-1, 1, N)[:, None].expand(N, 2).contiguous(), y


def images() -> tuple[Tensor, ...]:
    return (torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(0)),)


def series() -> tuple[Tensor, ...]:
    return (torch.randn(N, 3, 2, generator=torch.Generator().manual_seed(0)).cumsum(1),)


def of_linear(decode: Callable[[Tensor], Tensor], dim: int, x: Tensor, priors: list[Component]) -> Tensor:
    """Log p(x) for x ~ N(decode(z), NOISE^2 I) with a linear decoder and z from a mixture of normals."""
    with torch.no_grad():
        offset = decode(torch.zeros(1, dim)).flatten()
        matrix = decode(torch.eye(dim)).flatten(1) - offset
        noise = NOISE**2 * torch.eye(len(offset))
        terms = [
            dist.MultivariateNormal(offset + mean @ matrix, matrix.T @ cov @ matrix + noise).log_prob(x.flatten(1))
            for _, mean, cov in priors
        ]
        return (torch.stack(terms) + torch.stack([weight for weight, _, _ in priors])[:, None]).logsumexp(0)


STANDARD = [(torch.zeros(()), torch.zeros(2), torch.eye(2))]


class Tutorial(nn.Module):
    """As in Pyro's tutorial: modules registered at each call, the plate inside, no ``dim``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), x.new_ones(x.shape[0], 2)).to_event(1))
            loc = self.decoder(z)
            pyro.sample("obs", dist.Normal(loc, NOISE).to_event(1), obs=x)
            return loc

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", normal(self.encoder, x))


class Plain(nn.Module):
    """A VAE whose prior and decoder others change."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def prior(self) -> dist.Distribution:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def encode(self, x: Tensor) -> dist.Distribution:
        return normal(self.encoder, x)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            loc = self.decode(z)
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(x.ndim - 1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encode(x))


class Convolutional(Plain):
    """Takes one batch axis, as torch's convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(12, 4))
        self.decoder = nn.Sequential(
            nn.Linear(2, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1)
        )


class Conditional(nn.Module):
    """p(y | x) with a prior that depends on x."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.decoder, self.encoder = nn.Linear(2, 2), nn.Linear(4, 3), nn.Linear(5, 4)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior(x), 1.0).to_event(1))
            inputs = torch.cat([x.expand(*z.shape[:-1], 2), z], -1)
            pyro.sample("y", dist.Normal(self.decoder(inputs), NOISE).to_event(1), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(self.encoder, torch.cat([x, y], -1)))

    def twin(self, x: Tensor, y: Tensor) -> Tensor:
        rows = zip(x, y, self.prior(x).detach(), strict=True)
        return torch.cat([
            of_linear(lambda z, a=a: self.decoder(torch.cat([a.expand(len(z), 2), z], -1)), 2, b[None],
                      [(torch.zeros(()), mean, torch.eye(2))])
            for a, b, mean in rows
        ])  # fmt: skip


class SemiSupervised(Plain):
    """A class that is seen for some data; here for none: summed out by enumeration, or drawn by the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.decoder = nn.Linear(3, 2), nn.Linear(4, 3)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2)), obs=y)
            z, y = torch.broadcast_tensors(z, y)
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z, y], -1)), NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if y is None:
                pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", self.encode(x))

    def twin(self, x: Tensor) -> Tensor:
        parts = [
            of_linear(lambda z, one=one: self.decoder(torch.cat([z, one.expand(len(z), 2)], -1)), 2, x, STANDARD)
            for one in torch.eye(2)
        ]
        return torch.stack(parts).logsumexp(0) - torch.tensor(2.0).log()


class TwoLayer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.upper, self.upper_encoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.prior())
            z1 = pyro.sample("z1", dist.Normal(self.upper(z2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z1), NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", self.encode(x))
            pyro.sample("z2", dist.Normal(self.upper_encoder(z1), 1.0).to_event(1))

    def twin(self, x: Tensor) -> Tensor:
        weight, bias = self.upper.weight.detach(), self.upper.bias.detach()
        return of_linear(self.decoder, 2, x, [(torch.zeros(()), bias, weight @ weight.T + torch.eye(2))])


def components(pair: Any) -> list[Component]:
    mixture = pair.prior()
    inner = mixture.component_distribution.base_dist
    weights = mixture.mixture_distribution.logits.detach().log_softmax(-1)
    moments = zip(inner.loc.detach(), inner.scale.detach().expand_as(inner.loc), strict=True)
    return [(weight, mean, scale.square().diag()) for weight, (mean, scale) in zip(weights, moments, strict=True)]


class Mixture(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.locs, self.logits = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(3))

    def prior(self) -> dist.Distribution:
        normals = dist.Normal(self.locs, 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)


class VampPrior(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.randn(3, 3))

    def prior(self) -> dist.Distribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(3)), self.encode(self.pseudo_inputs))


class Flow(Plain):
    """An affine flow: normal again, with a mean and a covariance that are read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = transforms.affine_autoregressive(2, hidden_dims=[5])
        for p in self.flow.parameters():
            p.data.mul_(0.3)

    def prior(self) -> dist.Distribution:
        return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [self.flow])


class DeepMarkov(nn.Module):
    """A chain of latent states in a Python loop, inside the plate of the series."""

    def __init__(self) -> None:
        super().__init__()
        self.move, self.emit, self.encoder = nn.Linear(1, 1), nn.Linear(1, 2), nn.Linear(6, 6)

    def model(self, x: Tensor) -> None:
        with pyro.plate("series", len(x), dim=-1):
            loc: Tensor = x.new_zeros(1)
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(loc, 1.0).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(self.emit(z), NOISE).to_event(1), obs=x[:, t])
                loc = self.move(z)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x.flatten(1)).chunk(2, -1)
        with pyro.plate("series", len(x), dim=-1):
            for t in range(x.shape[1]):
                pyro.sample(f"z_{t}", dist.Normal(loc[:, t : t + 1], log_scale[:, t : t + 1].exp()).to_event(1))

    def twin(self, x: Tensor) -> Tensor:
        def decode(noise: Tensor) -> Tensor:
            states = [noise[:, :1]]
            for t in range(1, 3):
                states.append(self.move(states[-1]) + noise[:, t : t + 1])
            return torch.cat([self.emit(state) for state in states], -1)

        return of_linear(decode, 3, x, [(torch.zeros(()), torch.zeros(3), torch.eye(3))])


class Regression:
    """Global latents and a guide that Pyro makes."""

    def __init__(self) -> None:
        self.guide = AutoNormal(self.model)

    @staticmethod
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal((x * slope).sum(-1), NOISE), obs=y)


class OfParams:
    """A function with ``pyro.param`` and no module at all."""

    @staticmethod
    def model(x: Tensor) -> None:
        loc = pyro.param("prior_loc", torch.zeros(2))
        weight = pyro.param("weight", torch.tensor([[1.0, 0.5, -0.5], [0.3, -1.0, 0.2]]))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, NOISE).to_event(1), obs=x)

    @staticmethod
    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", 0.3 * torch.tensor([[1.0, 0.3], [0.5, -1.0], [-0.5, 0.2]]))
        scale = pyro.param("scale", 0.6 * torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x @ gain, scale).to_event(1))

    def twin(self, x: Tensor) -> Tensor:
        loc, weight = pyro.param("prior_loc").detach(), pyro.param("weight").detach()
        return of_linear(lambda z: z @ weight, 2, x, [(torch.zeros(()), loc, torch.eye(2))])


def svi_first() -> Tutorial:
    """Trained by Pyro's own loop before anything here sees it."""
    pair, (x,) = Tutorial(), vectors()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    for _ in range(40):
        svi.step(x)
    return pair


def regression_data() -> tuple[Tensor, ...]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([1.0, -0.5]) + NOISE * torch.randn(N, generator=torch.Generator().manual_seed(1))


def plain_twin(pair: Any, x: Tensor) -> Tensor:
    return of_linear(pair.decoder, 2, x, STANDARD)


def mixture_twin(pair: Any, x: Tensor) -> Tensor:
    return of_linear(pair.decoder, 2, x, components(pair))


def own_twin(pair: Any, *data: Tensor) -> Tensor:
    return pair.twin(*data)


def enumerating() -> Any:
    return pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)


INPUTS = "has random parents or depends on inputs; use fit"
LEARNERS = [
    Learner("tutorial", Tutorial, vectors, site="latent", twin=plain_twin, fills_param_store=True),
    Learner("convolutional", Convolutional, images, twin=plain_twin),
    Learner("conditional", Conditional, pairs, twin=own_twin, refused={"fit_tilt": INPUTS}),
    Learner("semi-supervised", SemiSupervised, vectors, enumerating, twin=own_twin),
    Learner("two layers", TwoLayer, vectors, site="z2", twin=own_twin),
    Learner("mixture", Mixture, vectors, twin=mixture_twin),
    Learner("VampPrior", VampPrior, vectors, twin=mixture_twin),
    Learner("flow", Flow, vectors),
    Learner("deep Markov", DeepMarkov, series, site="z_0", twin=own_twin),
    Learner(
        "regression", Regression, regression_data, site=None, fills_param_store=True,
        refused={"log_likelihood": r"latent site\(s\) \['slope'\] lie outside the plate of the data"},
    ),
    Learner("params", OfParams, vectors, twin=own_twin, fills_param_store=True),
    Learner("SVI first", svi_first, vectors, site="latent", twin=plain_twin, fills_param_store=True),
]  # fmt: skip
