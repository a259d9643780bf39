"""Figures: the axes given are used, nothing global changes, and what is drawn is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pyro_ebm import plots  # noqa: E402
from pyro_ebm.energies import LinearEnergy  # noqa: E402
from pyro_ebm.inference.draws import Draws  # noqa: E402

MODE = torch.tensor([1.0, 0.5])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def balance(*proportions: float) -> SimpleNamespace:
    p = torch.tensor(proportions)
    return SimpleNamespace(classes=(0, 1), proportions=p, lower=p - 0.05, upper=p + 0.05, n=100, prob=0.9)


def history(best: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        train_loss=[3.0, 2.0, 1.5, 1.4], validation_loss=[3.1, 2.3, 2.1, 2.2], kept_epoch=best
    )


def chains(shift: float = 0.0, num_chains: int = 2, num_draws: int = 200, dim: int = 2) -> Draws:
    z = normal(num_chains, num_draws, dim, seed=3)
    z[-1] += shift
    return Draws({"z": z}, "nuts")


def weighted(num_draws: int = 500) -> Draws:
    return Draws(
        {"z": normal(1, num_draws, 2, seed=4)},
        "snis",
        log_weights=-torch.full((1, num_draws), num_draws).log(),
    )


def exact(mean: float = 0.0) -> Draws:
    grid = torch.linspace(-5, 5, 41).expand(2, -1)
    points = torch.stack(torch.meshgrid(*grid, indexing="ij"), -1).reshape(1, -1, 2)
    log_density = -0.5 * (points - mean).square().sum(-1)
    return Draws(
        {"z": points}, "quadrature", log_weights=log_density - log_density.logsumexp(-1, keepdim=True)
    )


FIGURES: dict[str, Callable[..., Any]] = {
    "label_histograms": lambda **k: plots.plot_label_histograms(
        {"a": [0, 1, 1], "b": torch.tensor([0, 1])}, **k
    ),
    "latent_scatter": lambda **k: plots.plot_latent_scatter(normal(40, 2), torch.arange(40) % 10, **k),
    "latent_scatter_5d": lambda **k: plots.plot_latent_scatter(normal(40, 5), torch.arange(40) % 3, **k),
    "images": lambda **k: plots.plot_images(normal(6, 1, 8, 8), num_rows=2, title="decoded", **k),
    "energy_landscape": lambda **k: plots.plot_energy_landscape(
        LinearEnergy(MODE), draws=normal(20, 2), num_points=21, **k
    ),
    "latent_overlay": lambda **k: plots.plot_latent_overlay(normal(9, 3), normal(8, 3), normal(7, 3), **k),
    "class_balance": lambda **k: plots.plot_class_balance(
        {"prior": balance(0.7, 0.3), "snis": balance(0.5, 0.5)}, **k
    ),
    "training_curves": lambda **k: plots.plot_training_curves(history(), **k),
    "training_curves_two": lambda **k: plots.plot_training_curves({"a": history(), "b": history(2)}, **k),
}
single = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


@pytest.fixture(autouse=True)
def no_figure_left_and_style_untouched() -> Iterator[None]:
    plt.close("all")
    plt.figure()  # pyplot settles its backend with the first figure
    plt.close("all")
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


@single
def test_draws_on_given_axes_only(draw: Callable[..., Any]) -> None:
    ax = Figure().subplots()
    assert draw(ax=ax) is ax
    assert ax.has_data()
    assert plt.get_fignums() == []


@single
def test_opens_one_figure_without_axes_and_can_be_rendered(draw: Callable[..., Any]) -> None:
    ax = draw()
    assert isinstance(ax, Axes)
    assert len(plt.get_fignums()) == 1
    ax.figure.canvas.draw()
    assert ax.axison is False or (ax.get_xlabel() and ax.get_ylabel())


@single
def test_global_generator_is_untouched(draw: Callable[..., Any]) -> None:
    state = torch.get_rng_state()
    draw(ax=Figure().subplots())
    assert torch.equal(state, torch.get_rng_state())


def test_histograms_show_proportions_in_the_order_asked_for() -> None:
    ax = plots.plot_label_histograms(
        {"a": [0, 1, 1, 1], "b": [0, 0, 2, 2]}, classes=[2, 1, 0], ax=Figure().subplots()
    )
    assert [bar.get_height() for bar in ax.patches] == [0.0, 0.75, 0.25, 0.5, 0.0, 0.5]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "1", "0"]


@pytest.fixture
def contoured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    original = Axes.contourf

    def spy(self: Axes, *args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(self, *args, **options)

    monkeypatch.setattr(Axes, "contourf", spy)
    return calls


def test_landscape_peaks_where_the_tilted_density_does(contoured: list[tuple[Any, ...]]) -> None:
    # N(0, I) tilted by E = -a.z is N(a, I); E + log p instead of -E + log p would peak at -a.
    plots.plot_energy_landscape(LinearEnergy(MODE), num_points=81, ax=Figure().subplots())
    x, y, values = contoured[0]
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (x[column], y[row]) == pytest.approx((1.0, 0.5), abs=1e-6)
    assert values.max() == 0.0
    at = [values[np.abs(y - 0.5).argmin(), np.abs(x - v).argmin()] for v in (2.0, -1.0)]
    assert at == pytest.approx([-0.5, -2.0], abs=1e-5)


def test_landscape_uses_the_base_and_the_energys_dtype(contoured: list[tuple[Any, ...]]) -> None:
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.tensor([0.0, 2.0]).double(), 0.5), 1
    )
    energy = LinearEnergy(torch.zeros(2)).double()
    plots.plot_energy_landscape(
        energy, base, limits=(-2.0, 2.0, 0.0, 4.0), num_points=41, ax=Figure().subplots()
    )
    x, y, values = contoured[0]
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (x[column], y[row]) == pytest.approx((0.0, 2.0), abs=1e-6)


def test_highest_density_lines_of_a_normal_have_the_right_radius() -> None:
    ax = plots.plot_energy_landscape(
        LinearEnergy(torch.zeros(2)), num_points=201, prob=0.8, ax=Figure().subplots()
    )
    line = ax.collections[-1].get_paths()[0].vertices
    # |z|^2 is chi squared with two degrees of freedom
    assert np.hypot(*line.T) == pytest.approx(np.sqrt(-2 * np.log(0.2)), abs=0.03)


def test_class_balance_marks_target_and_total_variation() -> None:
    ax = plots.plot_class_balance({"prior": balance(0.7, 0.3)}, target=[0.6, 0.4], ax=Figure().subplots())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["target", "prior (TV 0.100)"]
    assert "90 % interval" in ax.get_ylabel()


def test_class_balance_accepts_an_interval_that_misses_its_estimate() -> None:
    odd = balance(0.5, 0.5)
    odd.lower = odd.proportions + 0.01
    plots.plot_class_balance({"odd": odd}, ax=Figure().subplots())


def test_training_curves_mark_the_best_epoch_and_number_epochs_from_one() -> None:
    ax = plots.plot_training_curves(history(best=3), ax=Figure().subplots())
    training, validation, best = ax.lines
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    assert list(validation.get_ydata()) == [3.1, 2.3, 2.1, 2.2]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (3, 2.1)


def test_training_curves_leave_out_a_steep_start_but_nothing_low() -> None:
    result = SimpleNamespace(train_loss=[1e3, *np.linspace(3, 2, 29)], validation_loss=[], kept_epoch=30)
    ax = plots.plot_training_curves(result, ax=Figure().subplots())
    low, high = ax.get_ylim()
    assert low < 2 and 3 < high < 10


def test_training_and_validation_differ_by_more_than_the_line() -> None:
    training, validation, kept = plots.plot_training_curves(history(), ax=Figure().subplots()).lines
    assert validation.get_marker() != training.get_marker() and validation.get_color() != training.get_color()
    assert kept.get_marker() == "*"


def test_training_curves_say_what_the_loss_is() -> None:
    ax = plots.plot_training_curves(history(), label="minus the log likelihood gained", ax=Figure().subplots())
    assert ax.get_ylabel() == "minus the log likelihood gained"


def test_comparison_has_one_rank_panel_for_each_chain_method() -> None:
    axes = plots.plot_compare({"snis": weighted(), "nuts": chains()}, reference=exact())
    assert len(axes) == 3
    assert all(ax.get_xlabel() and ax.get_title() for ax in axes)
    assert axes[0].get_title().startswith("nuts")
    axes[0].figure.canvas.draw()


def test_comparison_draws_on_given_axes_only() -> None:
    given = Figure().subplots(1, 3)
    assert list(plots.plot_compare({"snis": weighted(), "nuts": chains()}, axes=given)) == list(given)
    assert plt.get_fignums() == []


def test_comparison_ranks_the_component_that_mixes_worst() -> None:
    draws = chains()
    draws.values["z"][-1, :, 1] += 50.0
    ranks, *_ = plots.plot_compare({"nuts": draws}, axes=Figure().subplots(1, 3))
    assert ranks.get_title() == "nuts: ranks of z[1]"
    lower, upper = ([t for t in stairs.get_data().values] for stairs in ranks.patches)
    half = len(lower) // 2
    assert max(lower[half:]) == 0.0 and min(lower[:half]) > 0.4  # the first chain has all the low ranks
    assert max(upper[:half]) == 1.0 and min(upper[half:]) > 1.4


def test_comparison_error_is_in_standard_errors() -> None:
    draws = Draws({"z": normal(4, 2500, 1)}, "nuts")  # independent draws: se of the mean is about 0.01
    wrong = Draws(
        {"z": torch.full((1, 10, 1), 0.5)}, "quadrature", log_weights=torch.full((1, 10), 0.1).log()
    )
    errors = plots.plot_compare({"nuts": draws}, reference=wrong, axes=Figure().subplots(1, 3))[-1]
    drawn = errors.lines[1].get_ydata()[0]
    assert drawn == pytest.approx((draws.mean("z").item() - 0.5) / 0.01, rel=0.1)
    low, high = errors.get_ylim()
    assert low < drawn < 4 < high
    assert "error against quadrature" in errors.get_title()


def test_comparison_without_reference_shows_two_standard_errors() -> None:
    means = plots.plot_compare({"snis": weighted(10_000)}, axes=Figure().subplots(1, 2))[-1]
    bars = means.collections[0].get_segments()
    assert np.diff(bars[0][:, 1]) == pytest.approx(4 * 0.01, rel=0.1)


def test_comparison_ess_counts_weights_and_leaves_grids_out() -> None:
    axes = plots.plot_compare({"snis": weighted(500), "grid": exact()}, axes=Figure().subplots(1, 2))
    assert [bar.get_width() for bar in axes[0].patches] == pytest.approx([500.0])


def test_comparison_keeps_to_few_chains_and_components() -> None:
    draws = {"nuts": chains(num_chains=20, num_draws=40, dim=30), "hmc": chains(num_chains=1, dim=30)}
    many, one, _, means = plots.plot_compare(draws, axes=Figure().subplots(1, 4))
    assert len(many.patches) == 8 and "8 of 20, by mean rank" in many.get_ylabel()
    assert [tick.get_text() for tick in one.get_yticklabels()] == ["first half", "second half"]
    assert len(means.get_xticks()) == 12 and "12 largest of 30" in means.get_xlabel()


def test_comparison_of_many_chains_shows_those_that_lie_lowest_and_highest():
    draws = chains(num_chains=200, num_draws=40, dim=1)
    draws.values["z"][77] -= 3.0
    draws.values["z"][77, 0] = 100.0  # one draw does not make a chain high
    draws.values["z"][11] += 3.0
    ranks = plots.plot_compare({"chees": draws}, axes=Figure().subplots(1, 3))[0]
    labels = [tick.get_text() for tick in ranks.get_yticklabels()]
    assert len(labels) == 8
    assert (labels[0], labels[-1]) == ("77", "11")


def particles(num_islands: int = 8) -> Draws:
    """Particles that are all the same on an island: worth one draw each."""
    z = normal(num_islands, 1, 2, seed=5).expand(num_islands, 100, 2)
    logs = torch.full(z.shape[:2], -float(np.log(100 * num_islands)))
    return Draws({"z": z}, "smc", log_weights=logs)


def test_comparison_ess_of_islands_is_that_of_compare():
    axes = plots.plot_compare({"smc": particles(32)}, axes=Figure().subplots(1, 2))
    assert [bar.get_width() for bar in axes[0].patches] == pytest.approx([31.0])


def test_comparison_of_seven_methods_keeps_its_panels_apart():
    draws = {name: chains(num_chains=16) for name in ("nuts", "hmc", "chees", "mala", "ula", "long")}
    draws |= {"snis": weighted(), "smc": particles()}
    axes = plots.plot_compare(draws, reference="long")
    assert len(axes) == 8
    axes[0].figure.canvas.draw()
    boxes = [ax.get_window_extent() for ax in axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert min(box.width for box in boxes) > 150  # of 960 or more
    assert len({round(box.y0) for box in boxes[:6]}) == 2  # six rank panels in two rows of three
    assert len(axes[-1].get_legend().get_texts()) == 7  # all but the reference


def test_comparison_compresses_errors_far_off_the_band():
    far = plots.plot_compare({"a": chains(), "b": weighted()}, reference=exact(9.0), axes=Figure().subplots(1, 3))[-1]
    assert far.get_yscale() == "symlog"
    low, high = far.get_ylim()
    drawn = np.concatenate([line.get_ydata() for line in far.lines[1:]])
    assert low < drawn.min() < -50 and drawn.max() < high
    assert {"4", "-4", "0"} <= {tick.get_text() for tick in far.get_yticklabels()}
    near = plots.plot_compare({"a": chains()}, reference=exact(), axes=Figure().subplots(1, 3))[-1]
    assert near.get_yscale() == "linear"


def test_comparison_survives_chains_that_never_moved() -> None:
    stuck = Draws({"z": torch.zeros(2, 50, 2)}, "hmc")
    plots.plot_compare({"hmc": stuck}, reference=exact())[0].figure.canvas.draw()


BAD_INPUT: dict[str, tuple[Callable[[], Any], str]] = {
    "empty label set": (lambda: plots.plot_label_histograms({"a": []}), "at least one label each"),
    "labels and points": (lambda: plots.plot_latent_scatter(normal(5, 2), [0, 1]), "each of 5 points, got 2"),
    "one latent dimension": (lambda: plots.plot_latent_scatter(normal(5, 1), [0] * 5), "d >= 2"),
    "overlay of two widths": (
        lambda: plots.plot_latent_overlay(normal(5, 3), normal(5, 2), normal(5, 3)),
        r"prior must have shape \(n, 3\)",
    ),
    "flat images": (lambda: plots.plot_images(normal(6, 64)), "reshape flat pixels"),
    "too many rows": (
        lambda: plots.plot_images(normal(6, 8, 8), num_rows=7),
        "num_rows must lie between 1 and",
    ),
    "limits the wrong way": (
        lambda: plots.plot_energy_landscape(LinearEnergy(MODE), limits=(1, -1)),
        "limits must be",
    ),
    "energy of the wrong shape": (
        lambda: plots.plot_energy_landscape(lambda z: z, num_points=5),
        r"shape \(25,\)",
    ),
    "energy with NaN": (
        lambda: plots.plot_energy_landscape(lambda z: z.sum(-1) * torch.nan, num_points=5),
        "finite log density",
    ),
    "base of another shape": (
        lambda: plots.plot_energy_landscape(LinearEnergy(MODE), torch.distributions.Normal(0.0, 1.0)),
        r"event_shape \(2,\)",
    ),
    "draws of another shape": (
        lambda: plots.plot_energy_landscape(LinearEnergy(MODE), draws=normal(5, 3)),
        r"draws must have shape",
    ),
    "no balances": (lambda: plots.plot_class_balance({}), "balances is empty"),
    "target of another length": (
        lambda: plots.plot_class_balance({"a": balance(0.5, 0.5)}, target=[1.0]),
        "each of 2 classes",
    ),
    "no epochs": (
        lambda: plots.plot_training_curves(SimpleNamespace(train_loss=[], validation_loss=[], kept_epoch=0)),
        "holds no epoch",
    ),
    "no draws": (lambda: plots.plot_compare({}), "draws is empty"),
    "draws of two shapes": (lambda: plots.plot_compare({"a": chains(), "b": chains(dim=3)}), "same sites"),
    "reference of another shape": (
        lambda: plots.plot_compare({"a": chains(dim=3)}, reference=exact()),
        "reference must have the components",
    ),
    "reference of no entry": (
        lambda: plots.plot_compare({"a": chains()}, reference="b"),
        r"reference 'b' is not among the draws; names: \['a'\]",
    ),
    "too few axes": (
        lambda: plots.plot_compare({"a": chains()}, axes=[Figure().subplots()]),
        "must hold 3 axes",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named_and_opens_no_figure(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert plt.get_fignums() == []
