"""Results at a glance: what the texts and tables say is what the results hold, and nothing in them is markup."""

from __future__ import annotations

import html.parser
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import VAE, Draws, Estimate, FitResult, LinearEnergy, MLPEnergy, fit, fit_tilt, tilt
from pyro_ebm.display import number, table
from pyro_ebm.inference.importance import LogLikelihood


class Cells(html.parser.HTMLParser):
    """The texts of a table by row, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags[-1] in ("td", "th") and self.rows:
            self.rows[-1][-1] += data


def read(result):
    text = result._repr_html_()
    assert "http" not in text and "<script" not in text and "<style" not in text
    return Cells(text)


def chains(**changes):
    generator = torch.Generator().manual_seed(0)
    values = {"mu": torch.randn(4, 200, generator=generator) + 5, "z": torch.randn(4, 200, 2, generator=generator)}
    return Draws(values, "nuts", **changes)


def test_draws_of_chains():
    diverging = torch.zeros(4, 200, dtype=torch.bool)
    diverging[0, :3] = True
    draws = chains(stats={"diverging": diverging}, seconds=12.34, notes={"interrupted": True})
    assert repr(draws) == "Draws('nuts', 4 chains of 200 draws, {mu: (), z: (2,)})"
    found = read(draws)
    assert found.rows[0] == ["site", "mean", "sd", "ESS", "R-hat"]
    assert [row[0] for row in found.rows[1:]] == ["mu", "z[0]", "z[1]"]
    mean, sd, ess, hat = map(float, found.rows[1][1:])
    assert mean == pytest.approx(float(draws.mean("mu")), rel=1e-3) and sd == pytest.approx(1, abs=0.1)
    assert 400 < ess < 1200 and hat == pytest.approx(1, abs=0.02)
    assert "4 chains × 200 draws" in found.text and "12.3 s" in found.text
    assert "3 of 800 transitions diverged" in found.text and "interrupted" in found.text


def test_what_is_wrong_is_noted():
    apart = Draws({"z": torch.randn(4, 100) + 3 * torch.arange(4.0)[:, None]}, "chees")
    assert "chains disagree: R-hat 2" in read(apart).text
    assert "disagree" not in read(chains()).text
    logs = torch.zeros(1, 200).log_softmax(-1)
    for k, wrong in ((0.4, False), (0.6, True), (float("nan"), True)):  # 200 draws: at most .57
        found = read(Draws({"z": torch.zeros(1, 200)}, "snis", log_weights=logs, pareto_k=k))
        assert ("not reliable: Pareto k = " in found.text) == wrong


def test_weighted_draws_have_no_r_hat():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    log_z = Estimate(torch.tensor(-1.5), torch.tensor(0.25))
    draws = Draws({"z": torch.arange(4.0)[None]}, "snis", log_weights=weights, pareto_k=0.0, log_z=log_z)
    assert repr(draws) == "Draws('snis', 1 chain of 4 draws, weighted, {z: ()})"
    found = read(draws)
    assert found.rows == [["site", "mean", "sd"], ["z", "0.5000", "0.5000"]]
    for fact in ("worth 2 draws", "Pareto k 0.00", "log Z -1.500 ± 0.2500"):
        assert fact in found.text


def test_large_sites_take_one_row_each():
    values = {"image": torch.ones(1, 2, 28, 28), "w": torch.arange(8.0).reshape(1, 2, 4), "none": torch.ones(1, 2, 0)}
    draws = Draws(values, "nuts")
    assert read(draws).rows == [
        ["site", "shape", "mean", "sd"],
        ["image", "28 × 28", "1.000", "0"],
        ["w", "4", "2.000 to 5.000", "2.000"],
        ["none", "0", "–", "–"],
    ]


def test_names_are_text_and_not_markup():
    found = read(Draws({"<b>&": torch.zeros(1, 8)}, "<i>"))
    assert found.rows[1][0] == "<b>&" and not {"b", "i"} & {*found.tags}
    assert "&lt;b&gt;" in table("<b>", ["<b>"], ["<b>"], [["<b>"]], ["<b>"])
    assert "<b>" not in table("<b>", ["<b>"], ["<b>"], [["<b>"]], ["<b>"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234567, "1,234,567"), (12345.6, "12,346"), (0.000123456, "0.0001235"), (float("nan"), "–")],
)
def test_numbers(value, text):
    assert number(value) == text


def model():
    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("normalize", "text"),
    [(True, "estimated at each call (importance, 1,024 draws)"), (False, "left out"), (1.25, "1.250")],
)
def test_tilted_model(normalize, text):
    tilted = tilt(model, {"z": LinearEnergy([1.0, 0.0])}, normalize=normalize)
    assert repr(tilted) == f"TiltedModel(model, {{z: LinearEnergy}}, log Z: {text})"
    found = read(tilted)
    assert text in found.text and "of model" in found.text
    assert found.rows[1][:2] == ["z", "LinearEnergy"]


def test_parameters_of_an_energy_are_counted():
    energy = MLPEnergy((2,), hidden=(3,))
    (row,) = read(tilt(model, {"z": energy})).rows[1:]
    assert row[2] == str(sum(parameter.numel() for parameter in energy.parameters()))


def test_fit_result():
    result = FitResult([3.0, 2.0, 1.5], [3.5, 2.5, 2.75], 2, 3, "early stopping", 1.5, 7, kept_epoch=2)
    assert "train_loss" not in repr(result) and "best_epoch=2" in repr(result)
    found = read(result)
    assert found.rows[1:] == [["training", "3.000", "2.000", "1.500"], ["validation", "3.500", "2.500", "2.750"]]
    assert "early stopping" in found.text and "epoch 2" in found.text
    untrained = FitResult([], [], 0, 0, "interrupted", 0.1, 7)
    assert read(untrained).rows[1:] == [["training", "–", "–", "–"]]


def test_log_likelihood():
    value = torch.tensor([-1.0, -2.0, -6.0])
    se = torch.full((3,), 0.3)
    result = LogLikelihood(value, se, torch.tensor([0.1, 0.2, 0.9]), torch.full((3,), 50.0), torch.zeros(3))
    assert repr(result) == "LogLikelihood(3 data: mean -3.0000 +- 0.1732 nats, Pareto k up to 0.90)"
    found = read(result)
    assert found.rows[1] == ["log p(x), nats", "-6.000", "-2.000", "-1.000"]
    assert "mean -3.000 ± 0.1732 nats" in found.text
    assert repr(result) == repr(pickle.loads(pickle.dumps(result)))


def train_vae():
    vae = VAE((2,), latent_dim=1, hidden=(2,))
    return fit(vae.model, vae.guide, torch.rand(4, 2), epochs=1, validation=None, seed=0)


def train_tilt():
    vae = VAE((2,), latent_dim=1, hidden=(2,))
    tilted = tilt(vae.model, {"z": MLPEnergy((1,), hidden=(2,))})
    return fit_tilt(tilted, vae.guide, torch.rand(16, 2), max_steps=1, tolerance=None, folds=0, seed=0)


def train_function():
    weight = torch.nn.Linear(1, 1)

    def regression(x):
        return weight(x)

    def nothing(x):
        pass

    def loss(model, guide, x):
        return model(x).square().sum()

    return fit(regression, nothing, torch.rand(4, 1), objective=loss, train=weight, epochs=1, validation=None, seed=0)


@pytest.mark.parametrize(("job", "name"), [(train_vae, "vae"), (train_tilt, "tilt"), (train_function, "regression")])
def test_bars_are_named_by_what_they_do(job, name, capsys):
    job()
    assert capsys.readouterr().err.lstrip("\r").startswith(f"{name}:")
