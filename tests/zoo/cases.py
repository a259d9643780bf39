"""The zoo: how users write models, each with what is known about it. Tests are parametrized over ``CASES``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.zoo.case import Case
from tests.zoo.composition import COMPOSITION
from tests.zoo.discrete import DISCRETE
from tests.zoo.habits import HABITS
from tests.zoo.harder import HARDER
from tests.zoo.kinds import KINDS
from tests.zoo.shapes import SHAPES
from tests.zoo.supports import SUPPORTS

CASES: list[Case] = [*SHAPES, *SUPPORTS, *COMPOSITION, *DISCRETE, *KINDS, *HARDER, *HABITS]


def cases(wanted: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """The cases as parameters of a test, with their names and the marks they need."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.uses_param_store] if case.fills_param_store else [])
        for case in CASES
        if wanted(case)
    ]
