"""``python -m benchmarks.run``: every contender on every target, each in a fresh process, one at a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, settings
from benchmarks.machine import describe
from benchmarks.report import write_report
from benchmarks.targets import NAMES

FOLDER = Path(__file__).parent
RESULTS, QUICK_RESULTS = FOLDER / "results", FOLDER / "cache" / "quick"
QUICK_TARGETS = ("tilted_prior_2d", "gaussian_10d")
QUICK_LEFT_OUT = ("pyro-nuts", "numpyro-nuts-1024", "ours-chees-compiled")
EXTRAS = ("images", "scaling", "lean")
TIMEOUT = 300


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    begin = time.perf_counter()
    folder = QUICK_RESULTS if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    _store(folder / "machine.json", describe())
    targets = options.only or (QUICK_TARGETS if options.quick else NAMES)
    for target in targets:
        run_target(target, options, folder)
    extras = options.extras if options.extras is not None else ([] if options.only or options.quick else EXTRAS)
    for extra in extras:
        print(f"\n{extra}", flush=True)
        _store(folder / f"{extra}.json", {"rows": globals()[f"_{extra}"](options)})
    report = folder / "RESULTS.md" if options.quick else FOLDER / "RESULTS.md"
    write_report(folder, report)
    print(f"\n{report.relative_to(FOLDER.parent)} after {(time.perf_counter() - begin) / 60:.1f} minutes")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    only = "these targets, and no extras unless named"
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="TARGET", help=only)
    parser.add_argument("--samplers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="SAMPLER")
    parser.add_argument("--extras", nargs="*", choices=EXTRAS, help="only these; none without a name")
    parser.add_argument("--quick", action="store_true", help="two minutes: two targets, fewer draws, results apart")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender; the median one is shown")
    parser.add_argument("--threads", type=int, help="of torch, in place of each contender's own choice")
    return parser.parse_args(arguments)


def run_target(target: str, options: argparse.Namespace, folder: Path) -> None:
    """One table; rows of samplers that are not run again stay as they are."""
    print(f"\n{target}: ", end="", flush=True)
    prepared = child("case.prepare", threads=2, target_name=target)
    agreed = child("case.agree", target_name=target)
    if "failed" in prepared or "failed" in agreed:
        sys.exit(f"cannot start: {prepared.get('failed') or agreed.get('failed')}")
    print(f"reference: {prepared['reference']}; versions agree to {agreed['disagreement']:.1g}")
    file = folder / f"{target}.json"
    stored = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    for name in options.samplers:
        contender = CONTENDERS[name]
        if settings(name, target) is None or (options.quick and name in QUICK_LEFT_OUT):
            continue
        if not contender.installed():
            print(f"  {name:22} not installed")
            continue
        row = _repeated(name, target, options)
        stored["rows"][name] = row
        print(f"  {name:22} {_line(row)}", flush=True)
        _store(file, {"target": target, "disagreement": agreed["disagreement"], "rows": stored["rows"]})


def _repeated(name: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """The run with the median effective draws a second, all-in; with how all of them did."""
    threads = options.threads or CONTENDERS[name].threads
    rows = [
        child("case.run", threads=threads, name=name, target_name=target, seed=1 + i, quick=options.quick)
        for i in range(options.repeats)
    ]
    failed = [row for row in rows if "failed" in row]
    if failed:
        return failed[0]
    rows.sort(key=lambda row: row["ess_per_second"])
    speeds = [row["ess_per_second"] for row in rows]
    return {**rows[len(rows) // 2], "repeats": len(rows), "ess_per_second_of_all": speeds}


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    r_hat = "" if row["r_hat"] is None else f", R-hat {row['r_hat']:.3f}"
    return (
        f"{row['ess_per_second']:>10,.0f} ESS/s all-in, {row['ess_per_second_draws']:>10,.0f} draws alone, "
        f"{row['seconds']:.1f} s{r_hat}, error {row['error']:.1f} se"
    )


def _images(options: argparse.Namespace) -> list[dict[str, Any]]:
    num = 10 if options.quick else 100
    picked = [0] if options.quick else list(range(0, 100, 50))
    short = {"limit": 10.0} if options.quick else {}
    jobs = {
        "ours, all at once": ("images.ours", None, {"num_images": num}),
        "Pyro NUTS jit, all as one density": ("images.pyro_joint", 1, {"num_images": num, **short}),
        "Pyro NUTS jit, one by one": ("images.pyro_single", 1, {"images": picked, **short}),
    }
    return [
        _shown({"name": name, **child(function, threads=options.threads or threads, **arguments)})
        for name, (function, threads, arguments) in jobs.items()
    ]


def _scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.scaling import CONTENDERS as LIBRARIES

    return [
        _shown({"axis": axis, "name": name, **child("scaling.measure", threads=options.threads, axis=axis, name=name,
                                                   quick=options.quick)})
        for axis in ("chains", "dimensions", "images")
        for name in LIBRARIES
    ]  # fmt: skip


def _lean(options: argparse.Namespace) -> list[dict[str, Any]]:
    targets = ("tilted_prior_2d",) if options.quick else ("tilted_prior_2d", "tilted_prior_32d", "posterior_1")
    draws = (100, 200, 400) if options.quick else (1_000, 2_000, 4_000)
    rows = [child("lean.time_per_gradient", threads=options.threads, target_name=target) for target in targets]
    return [_shown(row) for row in rows + [child("lean.memory", threads=options.threads, draws=n) for n in draws]]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    parts = [f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}" for key, value in row.items()]
    print("  " + ", ".join(parts), flush=True)
    return row


def child(function: str, *, threads: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Call a function of this folder in a fresh process; what it returns, or ``{"failed": why}``."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.case", function, str(file), json.dumps(arguments)]
        try:
            done = subprocess.run(
                command, cwd=FOLDER.parent, env=environment, timeout=TIMEOUT, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {TIMEOUT} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
        return json.loads(file.read_text())


def _store(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
