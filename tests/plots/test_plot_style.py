"""One color and one marker a sampler, in every figure."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pyro_ebm import plots  # noqa: E402
from pyro_ebm.inference.draws import Draws  # noqa: E402
from pyro_ebm.plots.style import class_style, looks  # noqa: E402
from pyro_ebm.recipes.debias_config import METHODS  # noqa: E402


def balance(*proportions: float) -> SimpleNamespace:
    p = torch.tensor(proportions)
    return SimpleNamespace(classes=(0, 1), proportions=p, lower=p - 0.05, upper=p + 0.05, n=100, prob=0.9)


def chains(seed: int) -> Draws:
    return Draws({"z": torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(seed))}, "user's own")


def test_a_sampler_has_one_color_and_marker_in_every_figure() -> None:
    at = plots.plot_class_balance({"hmc": balance(0.5, 0.5), "nuts": balance(0.4, 0.6)}, ax=Figure().subplots())
    axes = plots.plot_compare({"nuts": chains(0), "hmc": chains(1)}, axes=Figure().subplots(1, 4))

    def drawn(ax: Axes) -> dict[str, tuple[str, str]]:
        handles = {c.get_label().split(" (")[0]: c.lines[0] for c in ax.containers}
        return {name: (line.get_color(), line.get_marker()) for name, line in handles.items()}

    assert drawn(at) == drawn(axes[-1]) and len({*drawn(at).values()}) == 2
    bars = {name: to_hex(bar.get_facecolor()) for name, bar in zip(("nuts", "hmc"), axes[-2].patches, strict=True)}
    assert bars == {name: look[0].lower() for name, look in drawn(at).items()}


def test_looks_differ_and_do_not_depend_on_what_is_beside_them() -> None:
    every = looks([*METHODS, "prior", "biased_data", "fine_tuned", "reference_only", "mine", "another"])
    assert len({*every.values()}) == len(every)
    assert looks(["smc"])["smc"] == every["smc"]
    several = looks(["short", "long"], {"short": "chees", "long": "chees"})
    assert several["short"] == every["chees"] != several["long"]


def test_ten_classes_have_ten_colors_and_ten_markers() -> None:
    colors, markers = zip(*map(class_style, range(10)), strict=True)
    assert len({*colors}) == len({*markers}) == 10
    assert len({class_style(i) for i in range(100)}) == 100
