"""``python -m benchmarks.fit_steps``: a training step of ``fit`` against a bare torch loop and Pyro's SVI.

The same VAE (784 pixels, 16 latent dimensions, one hidden layer), minibatches of 128, Adam. A pass over the data is
timed; the contenders take turns in one process, and the ratios are medians over the turns. Validation is off: it is no
step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from benchmarks.machine import describe
from pyro_ebm import VAE, CapturedLoss, fit

RESULT = Path(__file__).parent / "results" / "fit_steps.json"
NUM_DATA, BATCH, PIXELS, LATENT, EPOCHS, LR = 12_800, 128, 784, 16, 5, 1e-3
_SKIPPED = 2  # passes: the first is never from a graph, the second records it


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 400])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [compare(hidden, options.turns) for hidden in options.hidden]
    RESULT.write_text(json.dumps({**describe(), "threads": options.threads, "rows": rows}, indent=2) + "\n")
    for row in rows:
        shown = ", ".join(f"{name} {row['ratios'][name]:.2f}" for name in CONTENDERS)
        print(f"H = {row['hidden']}: bare loop {row['microseconds']['bare']:.0f} us a step; times it: {shown}")


def compare(hidden: int, turns: int) -> dict[str, Any]:
    """Microseconds of a step of each contender, and how many times the bare loop's of the same turn."""
    x = (torch.rand(NUM_DATA, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(turns):
        for name, run in CONTENDERS.items():
            pyro.clear_param_store()
            passes = list(run(VAE((PIXELS,), LATENT, hidden=(hidden,)), x))[_SKIPPED:]
            times[name].append(float(np.median(passes)) / (NUM_DATA // BATCH) * 1e6)
    bare = np.array(times["bare"])
    return {
        "hidden": hidden, "turns": turns,
        "microseconds": {name: float(np.median(found)) for name, found in times.items()},
        "ratios": {name: float(np.median(np.array(found) / bare)) for name, found in times.items()},
    }  # fmt: skip


def bare(vae: VAE, x: Tensor) -> Iterator[float]:
    """Seconds of each pass of a loop that a person writes without Pyro."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad()
        loc, scale = vae.encoder(batch)
        z = loc + scale * torch.randn_like(loc)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(vae.decoder(z), batch, reduction="sum")
        kl = 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()
        loss = (entropy + kl) / len(batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return _passes(step, x)


def svi(vae: VAE, x: Tensor) -> Iterator[float]:
    """Seconds of each pass of Pyro's own loop."""
    steps = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    return _passes(steps.step, x)


def _passes(step: Callable[[Tensor], object], x: Tensor) -> Iterator[float]:
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for rows in torch.randperm(len(x)).split(BATCH):
            step(x[rows])
        yield time.perf_counter() - start


def fitted(vae: VAE, x: Tensor, objective: Any = None) -> list[float]:
    """Seconds of each pass of ``fit``."""
    ends = [time.perf_counter()]
    fit(
        vae.model, vae.guide, x, objective=objective, epochs=EPOCHS, batch_size=BATCH, validation=None, seed=0,
        progress=False, callbacks=[lambda _: ends.append(time.perf_counter())],
    )  # fmt: skip
    return np.diff(ends).tolist()


def captured(vae: VAE, x: Tensor) -> list[float]:
    """The same, of steps from a graph."""
    loss = CapturedLoss()
    found = fitted(vae, x, loss)
    if loss.problem is not None:
        raise RuntimeError(loss.problem)
    return found


CONTENDERS: dict[str, Callable[[VAE, Tensor], Any]] = {
    "bare": bare, "SVI": svi, "fit": fitted, "fit captured": captured,
}  # fmt: skip


if __name__ == "__main__":
    main()
