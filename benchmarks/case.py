"""One contender on one target, in a process of its own: ``python -m benchmarks.case FUNCTION FILE ARGUMENTS``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, settings
from benchmarks.measure import measures
from benchmarks.references import reference
from benchmarks.targets import load


def run(name: str, target_name: str, *, seed: int = 1, quick: bool = False) -> dict[str, Any]:
    """Load everything, then start the clock: the row of one contender on one target."""
    contender, chosen = CONTENDERS[name], settings(name, target_name, quick=quick)
    if chosen is None:
        raise ValueError(f"{name} does not run on {target_name}")
    function, target = contender.resolve(), load(target_name)
    start = target.start(chosen["chains"], np.random.default_rng(seed))
    limit = {"limit": 5.0 if quick else 30.0} if name.startswith("pyro-") else {}
    found = function(
        target, start, warmup=chosen["warmup"], draws=chosen["draws"], seed=seed, **contender.options, **limit
    )
    return {"sampler": name, "target": target_name, "threads": threads(), **measures(found, reference(target))}


def prepare(target_name: str) -> dict[str, Any]:
    """Train what the target needs and find its reference, so that no run pays for it."""
    found = reference(load(target_name))
    return {"target": target_name, "reference": found.kind}


def agree(target_name: str) -> dict[str, Any]:
    """Check that all versions of a target are the same density."""
    from benchmarks.agree import disagreement

    return {"target": target_name, "disagreement": disagreement(load(target_name))}


def threads() -> int:
    """How many threads the contender may use: what the parent process said, else one per core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def main() -> None:
    function, file, arguments = sys.argv[1:]
    module, name = function.rsplit(".", 1)
    found = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**json.loads(arguments))
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
