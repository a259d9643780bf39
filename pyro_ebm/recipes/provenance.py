"""Where a result comes from: the command that makes it again, versions, date, time taken."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path

from pyro_ebm.recipes.debias_config import DebiasConfig

__all__ = ["provenance"]

_PACKAGES = {"pyro_ebm": "pyro-ebm", "torch": "torch", "Pyro": "pyro-ppl", "ArviZ": "arviz"}


def provenance(config: DebiasConfig, out: str | Path | None = None, *, seconds: float) -> dict[str, str]:
    """What a reader needs to repeat a job: name -> text.

    Args:
        config: of the job.
        out: its folder.
        seconds: it took.
    """
    versions = [f"{name} {_version(package)}" for name, package in _PACKAGES.items()]
    return {
        "Command": config.command(out),
        "Versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Time taken": f"{seconds:,.0f} s",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        import pyro_ebm

        return pyro_ebm.__version__
