"""``python -m benchmarks.kills``: jobs that are killed at random times and go on to the same bits.

Each job (``fit`` with a checkpoint, ``debias``, ``debias_study``) runs once in peace. Then it runs in folders of its
own and gets SIGKILL after a random part of the time it took, again and again, up to ``--lives`` times, until it is let
through. What it leaves must be the same to the last bit: weights, losses, tables, all but seconds and dates. Writes
``benchmarks/KILLS.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_ebm import VAE, Checkpoint, debias, debias_study, fit, save_weights
from pyro_ebm.files import write_whole

FILE = Path(__file__).with_name("KILLS.md")
_TIMES = ["seconds", "ess_per_second"]
_DEADLINE = 600.0


def train(folder: Path) -> None:
    """A VAE on synthetic data; its file is written after each epoch."""
    torch.manual_seed(3)
    vae, data = VAE((16,), 2, hidden=(32,)), torch.rand(1500, 16)
    kept = Checkpoint(folder / "run.pt", every=1, resume="auto")
    options = {"epochs": 12, "batch_size": 100, "patience": None, "seed": 0, "progress": False}
    found = fit(vae.model, vae.guide, data, checkpoint=kept, **options)
    save_weights(vae, folder / "vae.pt")
    write_whole(folder / "losses.json", json.dumps([found.train_loss, found.validation_loss]))


def debiased(folder: Path) -> None:
    """The main job, short."""
    begun = (folder / "steps" / "job.json").is_file()
    debias(out=folder, resume=begun, quick=True, methods=("snis",), num_samples=100, progress=False)


def studied(folder: Path) -> None:
    """Three ways to debias, short."""
    ways = ("biased", "fine_tuned", "tilt")
    debias_study(out=folder, quick=True, methods=ways, latent_dims=(2,), seeds=(0,), progress=False)


def left(folder: Path) -> dict[str, str]:
    """A digest of each file of results, but for what tells times."""
    found = {}
    for path in sorted(folder.glob("[!.]*")):  # debris is counted, not compared
        if path.suffix == ".pt" and path.name != "run.pt":
            content = path.read_bytes()
        elif path.name == "summary.json":
            summary = json.loads(path.read_text())
            content = json.dumps({k: v for k, v in summary.items() if k not in ("seconds", "mcmc")}).encode()
        elif path.suffix == ".csv":
            table = pd.read_csv(path)
            content = table[[c for c in table if not str(c).startswith(tuple(_TIMES))]].to_csv().encode()
        elif path.name == "losses.json":
            content = path.read_bytes()
        else:
            continue
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


JOBS: dict[str, Callable[[Path], None]] = {"fit": train, "debias": debiased, "debias-study": studied}


@dataclass
class Tally:
    """What happened to one job."""

    job: str
    seconds: float
    kills: int = 0
    whole: int = 0
    same: int = 0
    different: list[str] = field(default_factory=list)
    debris: int = 0


def start(job: str, folder: Path) -> int:
    """A process that does the job; its imports are this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore")
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        JOBS[job](folder)
        code = 0
    except BaseException as error:  # a child must not come back
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def ended(child: int, within: float) -> bool:
    """Whether the process came to its end in that time; a failure of its own is one of the job."""
    deadline = time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code:
                raise RuntimeError(f"the job failed by itself (status {code}); see its log.txt")
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)


def killed(job: str, kills: int, lives: int, seed: int, root: Path) -> Tally:
    """One job, killed so many times in all."""
    began = time.monotonic()
    peace = root / f"{job}-peace"
    ended(start(job, peace), _DEADLINE)
    tally, expected = Tally(job, time.monotonic() - began), left(peace)
    chance = random.Random(seed)
    while tally.kills < kills:
        folder = root / f"{job}-{tally.whole}"
        through = False
        for life in range(min(lives, kills - tally.kills)):
            child, began = start(job, folder), time.monotonic()
            if through := ended(child, chance.uniform(0, tally.seconds)):
                if life == 0:  # the machine has become quicker
                    tally.seconds = min(tally.seconds, time.monotonic() - began)
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            tally.kills += 1
        if not through:
            ended(start(job, folder), _DEADLINE)
        found = left(folder)
        tally.whole += 1
        tally.same += found == expected
        tally.different += [name for name in expected if found.get(name) != expected[name]]
        tally.debris += len([path for path in folder.rglob(".pyro_ebm-*")])
        if found == expected:
            shutil.rmtree(folder)
        sys.stdout.write(f"{tally}\n")
        sys.stdout.flush()
    return tally


def table(tallies: list[Tally], seed: int) -> str:
    """The page."""
    rows = [
        f"| {t.job} | {t.seconds:.1f} | {t.kills} | {t.whole} | {t.same} | "
        f"{', '.join(sorted(set(t.different))) or '-'} | {t.debris} |"
        for t in tallies
    ]
    head = [
        "# Jobs that are killed", "",
        "Each job gets SIGKILL at random times and goes on until it is through; what it leaves is compared bit by bit",
        f"with what a run in peace leaves (`python -m benchmarks.kills`, seed {seed}; no part of the tests). Debris:",
        "files of writes that a kill cut short; they have names of their own and nobody reads them.", "",
        "| job | seconds in peace | kills | runs that came through | the same bits | different | debris |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    return "\n".join([*head, *rows]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Kill, compare, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of all jobs together")
    parser.add_argument("--lives", type=int, default=4, help="kills of one run before it is let through")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    each = -(-options.kills // len(options.jobs))
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        tallies = [killed(job, each, options.lives, options.seed, Path(root)) for job in options.jobs]
    write_whole(FILE, table(tallies, options.seed))
    if any(tally.same != tally.whole for tally in tallies):
        raise SystemExit("some runs left other bits")


if __name__ == "__main__":
    main()
