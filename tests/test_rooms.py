"""The table of CPU time by folder, and the rule that its budgets keep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.rooms import BUDGETS, budgets, room, table

TESTS = Path(__file__).parent
MOST = 12 * 60  # CPU seconds: two workers on two quiet cores are then done in six minutes


def test_every_folder_has_a_budget_and_all_together_keep_the_rule():
    allowed = budgets(BUDGETS.read_text())
    folders = {f"tests/{path.name}/" for path in TESTS.iterdir() if any(path.rglob("test_*.py"))}
    assert not folders - allowed.keys(), "give the folder a row in CONTRIBUTING.md, of the seconds that are left"
    assert sum(quick for quick, _ in allowed.values()) <= MOST, "see CONTRIBUTING.md: the suite in six minutes"
    assert sum(slow for _, slow in allowed.values()) <= MOST * 0.6


def test_time_is_charged_to_the_folder_a_test_lies_in():
    assert room("tests/inference/chains/test_loop.py::TestA::test_b[1/2]") == "tests/inference/"
    assert room("tests/test_cli.py::test_a") == "tests/"


def test_what_lies_over_its_budget_says_so():
    allowed = budgets("| `tests/a/` | 10 | 5 |\n| `tests/b/` | 10 | 5 |\n| `a/` | 10 |\n")
    assert allowed == {"tests/a/": (10.0, 5.0), "tests/b/": (10.0, 5.0)}
    spent = Counter({("tests/a/", False): 9.0, ("tests/b/", True): 6.0, ("tests/c/", False): 1.0})
    over = {line.split()[0]: line.endswith("OVER") for line in table(spent, allowed)[1:]}
    assert over == {"tests/a/": False, "tests/b/": True, "tests/c/": True}


def test_the_plugin_adds_up_what_tests_take(pytester: pytest.Pytester):
    pytester.makeini("[pytest]\nmarkers =\n  slow\n")
    busy = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
    for name, mark, seconds in (("quick", "", 0.2), ("long", "@pytest.mark.slow\n", 0.3)):
        test = f"import pytest\n{mark}def test_it():\n    exec({busy.format(seconds)!r})\n"
        pytester.makepyfile(**{f"tests/x/test_{name}": test})
    result = pytester.runpytest_inprocess("-p", "tests.rooms", "-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=2)
    line = next(line for line in result.outlines if line.startswith("tests/x/ "))
    _, quick, _, slow, _, flag = line.split()
    assert 0.2 <= float(quick) < 0.3 <= float(slow) < 0.4 and flag == "OVER"
