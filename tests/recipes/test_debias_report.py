"""What the report of a debias job says: what was done, what came out, and what not to trust."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch

from pyro_ebm import DebiasConfig, class_balance
from pyro_ebm.recipes.debias_report import debias_report
from pyro_ebm.recipes.report import Report

COLUMNS = ["target", "method", "ess_bulk", "r_hat", "pareto_k", "worst_error_in_se", "verdict"]


def result(**changes: Any) -> Any:
    """A job as far as the report reads it."""
    methods = ("snis", "nuts")
    rows = [
        (target, method, ess, r_hat, k, 1.25, verdict)
        for target in ("prior", "posterior")
        for method, ess, r_hat, k, verdict in (
            ("snis", 20_888.0, None, 0.2, "ok"), ("nuts", 750.0, 1.0071, None, "ok"),
        )
    ]  # fmt: skip
    comparison = pd.DataFrame(rows, columns=COLUMNS)
    few = class_balance(torch.arange(10) % 2, (0, 1))
    parts = {
        "config": DebiasConfig(digits=(0, 1), proportions=(0.3, 0.7), methods=methods),
        "split": SimpleNamespace(sizes={"biased": 330, "reference": 105}, classes=(0, 1)),
        "classifier": SimpleNamespace(accuracy=0.992),
        "summary": {
            "tv": {"prior": 0.1881, "snis": 0.0361, "nuts": 0.054}, "log_z": {"value": -0.513, "se": 0.005},
            "importance": {"ess_fraction": 0.52, "pareto_k": 0.2, "pareto_k_limit": 0.7}, "seconds": {"total": 61.7},
            "log_likelihood_gain": {"tilted": {"value": 0.2134, "se": 0.0712}},
        },
        "comparison": comparison,
        "balances": {"biased_data": few, "snis": few, "nuts": few},
        "best_method": "snis", "remarks": [], "resumed": (),
    } | changes  # fmt: skip
    return SimpleNamespace(**parts)


def table(report: Report, caption: str) -> dict[str, dict[str, str]]:
    found = next(t for section in report.sections for t in section.tables if t.caption.startswith(caption))
    return {row.name: dict(zip(found.columns, [c.text for c in row.cells], strict=True)) for row in found.rows}


def test_the_story_says_what_was_done_and_the_headlines_what_came_out():
    report = debias_report(result(), {}, "out/demo")
    words = " ".join(report.story)
    expected = ["330 images of digits", "30 % of class 0, 70 % of class 1", "105 reference images", "snis and nuts"]
    assert [said for said in expected if said not in words] == []
    assert "0.188 for the prior and 0.036 for the tilted prior (by snis" in words
    values = ["0.188", "0.036", "+0.21 ± 0.07", "-0.513 ± 0.005", "52 %"]
    assert [headline.value for headline in report.headlines] == values
    assert report.provenance["Command"] == result().config.command("out/demo")
    assert report.provenance["Time taken"] == "62 s" and report.provenance["Date"].endswith("UTC")
    assert re.search(r"pyro_ebm \d.*torch \d.*Pyro \d.*ArviZ \d.*Python 3", report.provenance["Versions"])
    assert report.notices == []


def test_pictures_come_before_tables():
    sections = debias_report(result(), {}).sections
    first_table = next(i for i, section in enumerate(sections) if section.tables)
    assert not any(section.figures for section in sections[first_table:])


def test_samplers_are_rows_and_labels_have_their_worth():
    report = debias_report(result(), {})
    assert table(report, "Samplers of the tilted prior")["nuts"] == {
        "verdict": "ok", "effective draws": "750", "R-hat": "1.007", "Pareto k": "-",
        "largest error, in se": "1.250",
    }  # fmt: skip
    assert table(report, "Every diagnostic, the tilted prior")["ess_bulk"] == {"snis": "20,888", "nuts": "750"}
    balance = table(report, "Distance from balance")
    assert balance["tilted prior by nuts"]["worth in labels"] == "10"
    assert balance["biased training images"]["TV without chance"] == "0.000"
    assert float(balance["tilted prior by nuts"]["TV of chance"]) > 0.05
    assert table(report, "Proportion")["tilted prior by snis"] == {"class 0": "0.500", "class 1": "0.500"}


def test_reference_means_the_reference_images_only():
    report = debias_report(result(), {})
    texts = [*report.story, *(h.label for h in report.headlines)]
    for each in (each for section in report.sections for each in section.tables):
        texts += [each.caption, each.note, *each.columns, *(text for row in each.rows for text in (row.name, row.note))]
    found = [text for text in texts if re.search(r"reference(?! images)", text)]
    assert found == []


COMPARISON = result().comparison


def test_what_makes_numbers_mean_less_is_said_first():
    remarks = ["A quick run: its numbers mean nothing.", "nuts was cut short on the prior."]
    one_bad = COMPARISON.assign(verdict=["ok", "r_hat 1.2 > 1.01", "ok", "ok"])
    *said, verdicts = debias_report(result(remarks=remarks, comparison=one_bad), {}).notices
    assert said == remarks
    assert verdicts == "Not to be trusted on the tilted prior: nuts; the verdicts below say why."


def test_a_resumed_run_names_the_steps_it_did_not_compute_again():
    report = debias_report(result(resumed=("vae", "prior_snis")), {})
    assert report.provenance["Resumed"] == "finished before, and read again: vae, prior_snis"
    assert "Resumed" not in debias_report(result(), {}).provenance


def test_a_best_method_not_to_be_trusted_is_not_called_so():
    words = " ".join(debias_report(result(comparison=COMPARISON.assign(verdict="r_hat 1.2 > 1.01")), {}).story)
    assert "no sampler is to be trusted" in words
