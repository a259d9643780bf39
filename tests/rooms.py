"""A pytest plugin, `-p tests.rooms`: the CPU time of the tests by folder, against the budgets in CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

BUDGETS = Path(__file__).parents[1] / "CONTRIBUTING.md"
SLOWEST = 12


def cpu_seconds() -> float:
    """Of this process and of those it has waited for: a busy machine stretches it less than wall-clock time."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def budgets(text: str) -> dict[str, tuple[float, float]]:
    """Seconds by folder, of all tests but the slow ones and of the slow ones: rows ``| `tests/x/` | 30 | 10 |``."""
    rows = re.findall(r"^ *\| `(tests/[\w/]*)` \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    return {room: (float(quick), float(slow)) for room, quick, slow in rows}


def room(nodeid: str) -> str:
    """The folder right below ``tests/`` that a test lies in, or ``tests/`` itself."""
    parts = nodeid.split("::")[0].split("/")
    return "/".join(parts[: min(2, len(parts) - 1)]) + "/"


def table(spent: Counter[tuple[str, bool]], allowed: dict[str, tuple[float, float]]) -> list[str]:
    """One line a folder that ran; what lies over its budget says so."""
    lines = [f"{'CPU seconds':<24}{'quick':>8}{'budget':>8}{'slow':>8}{'budget':>8}"]
    for name in sorted({name for name, _ in spent}):
        quick, slow = spent[name, False], spent[name, True]
        most_quick, most_slow = allowed.get(name, (0.0, 0.0))
        over = "  OVER" if quick > most_quick or slow > most_slow else ""
        lines.append(f"{name:<24}{quick:8.1f}{most_quick:8.0f}{slow:8.1f}{most_slow:8.0f}{over}")
    return lines


class Rooms:
    """Adds up what each test reports; under xdist the workers measure and the controller adds."""

    def __init__(self) -> None:
        self.last = 0.0
        self.by_test: Counter[str] = Counter()
        self.by_room: Counter[tuple[str, bool]] = Counter()

    def pytest_collection_finish(self) -> None:
        self.last = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.by_test[report.nodeid] += report.cpu_seconds
        self.by_room[room(report.nodeid), "slow" in report.keywords] += report.cpu_seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("CPU time by folder")
        for line in table(self.by_room, budgets(BUDGETS.read_text())):
            write(line)
        write(f"{'all':<24}{sum(n for (_, slow), n in self.by_room.items() if not slow):8.1f}"
              f"{'':8}{sum(n for (_, slow), n in self.by_room.items() if slow):8.1f}")
        for name, seconds in self.by_test.most_common(SLOWEST):
            write(f"{seconds:8.1f}  {name}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Rooms(), "rooms")
