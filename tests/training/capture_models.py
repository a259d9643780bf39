"""Models whose training is, and is not, played back from a graph: dice, counters, branches, buffers."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Net(nn.Module):
    """x = f(z) + noise, with a layer to try and one global scale."""

    def __init__(self, layer=None):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 6), layer or nn.Identity(), nn.Linear(6, 4))
        self.outer = nn.Linear(4, 2)
        self.spread = nn.Parameter(torch.zeros(2))

    def weight(self, x):
        return 1.0

    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            loc = self.inner(z) * self.weight(x)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("scale", dist.LogNormal(self.spread[0], self.spread[1].exp()))
        loc, raw = self.outer(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Reads(Net):
    def weight(self, x):
        return 1.0 if x.mean() > 0.49 else 2.0


class Lists(Net):
    def weight(self, x):
        return sum(x.detach().flatten().tolist()) / 16


class Counts(Net):
    calls = 0

    def weight(self, x):
        self.calls += 1
        return 1.0 if self.calls < 20 else 2.0


class Holds(Net):
    def weight(self, x):
        self.last = x.mean()
        return 1.0


class Writes(Net):
    def __init__(self):
        super().__init__()
        self.total = [torch.zeros(())]

    def weight(self, x):
        self.total[0].add_(1.0)
        return 1.0


class Rolls(Net):
    def weight(self, x):
        return 1.0 + random.random()


class RollsNumpy(Net):
    def weight(self, x):
        return 1.0 + np.random.rand()


class RollsItsOwn(Net):
    """Rolls what it holds itself, to no effect at the steps at hand."""

    def __init__(self, dice):
        super().__init__()
        self.dice = dice

    def weight(self, x):
        rolled = torch.rand((), generator=self.dice) if isinstance(self.dice, torch.Generator) else self.dice.random()
        return 2.0 if isinstance(rolled, float) and rolled < 1e-12 else 1.0


CALLS = 0


def counted():
    global CALLS
    CALLS += 1
    return 1.0 if CALLS < 10_000 else 2.0


class CountsElsewhere(Net):
    def weight(self, x):
        return counted()


class Seeded(Net):
    """Draws from a generator of its own, so that no graph gives its numbers."""

    def weight(self, x):
        generator = torch.Generator().manual_seed(int(1e6) + len(x))
        return 1.0 + torch.rand((), generator=generator) * torch.rand(())


class Masks(Net):
    def weight(self, x):
        return 1.0 + x[x > 0.5].sum()


class Replaces(Net):
    """A buffer that is another tensor after each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def weight(self, x):
        self.mean = 0.9 * self.mean + 0.1
        return 1.0 + self.mean


class Asks(Net):
    def weight(self, x):
        return 2.0 if torch.isnan(x).any() else 1.0


class Discrete(Net):
    def model(self, x):
        pyro.sample("k", dist.Bernoulli(0.5))
        super().model(x)

    def guide(self, x):
        pyro.sample("k", dist.Bernoulli(torch.sigmoid(self.spread[0])))
        super().guide(x)
