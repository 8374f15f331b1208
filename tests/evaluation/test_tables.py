"""The paper's tables from records, in every form."""

import json
import math

import pytest

from moesvd_quant.evaluation.changes import changes
from moesvd_quant.evaluation.paper_tables import TABLES, table2, table8, table11, table12
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.recipe.tasks import SEVEN


def record(name, size, ppl, ratio=0.0, **more):
    tasks = {task: {"acc": 0.3 + 0.01 * i} for i, task in enumerate(SEVEN)}
    return {
        "name": name,
        "protocol": {"length": 64},
        "perplexity": {"wiki": {"ppl": ppl, "lm_eval": {"word_ppl": 2 * ppl}, "window_nll": [math.log(ppl)] * 4}},
        "memory": {"disk_bytes": size, "resident_bytes": size},
        "accounting": {
            "bits_per_expert_weight": 4.0, "expert_ratio": ratio, "model_ratio": 0.8 * ratio,
            "params": int(46.7e9 * (1 - 0.8 * ratio)),
        },
        "flops": {"total": 2.5e10, "context": 2048},
        "zero_shot": {"tasks": tasks, "protocol": {"limit": None}},
    } | more  # fmt: skip


RECORDS = [
    record("svd_40%", 6000, 6.1, 0.4, speed={"cells": [
        {"batch": 1, "decode": {"tokens_per_second": 3.0}}, {"batch": 8, "decode": {"tokens_per_second": 20.0}}
    ]}),
    record("original", 9000, 6.0),
]  # fmt: skip


def test_table_2_has_the_columns_of_the_paper():
    table = table2(RECORDS)
    assert table.columns == [
        "Ratio", "Method", "Runtime", "wiki ↓", "wiki (words) ↓", "Openb.", "ARC_e", "WinoG.", "HellaS.", "ARC_c",
        "PIQA", "MathQA", "Average ↑",
    ]  # fmt: skip
    assert table.rows[0][:5] == ["0%", "original", "-", 6.0, 12.0]
    assert table.rows[1][:3] == ["32%", "svd_40%", 20.0]
    assert table.rows[1][-1] == pytest.approx(0.33)
    partial = record("x", 1, 5.0)
    del partial["zero_shot"]["tasks"]["piqa"]
    assert table2([partial]).rows[0][-1] == table2([partial]).rows[0][-3] == "-"  # no mean of six


def test_table_8_has_what_was_measured_by_words():
    """Also where nothing was measured by windows: that text has no column of its own then."""
    both, words = record("both", 2, 6.0), record("words", 1, 5.0)
    del words["perplexity"]["wiki"]["ppl"]
    assert table8([both, words]).columns[-2:] == ["wiki", "wiki, per word"]
    assert [row[-2:] for row in table8([both, words]).rows] == [[6.0, 12.0], ["-", 10.0]]
    assert table8([words]).columns[-1] == "wiki, per word" and "wiki" not in table8([words]).columns


def test_a_table_in_a_terminal_is_no_wider_than_that(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    shown = render(Table("A title that is longer than the table below it is", ["a", "b"], [["x", 1.0]])).splitlines()
    assert shown[0] == "A title that is longer than the table below it is"
    wide = render(table8([record("x", 1, 5.0)])).splitlines()
    assert max(map(len, shown + wide)) <= 50 and all(line == line.rstrip() for line in shown + wide)


def test_a_table_that_goes_on_below_names_its_rows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    heads, figures = ["model", "method", *(f"figure{i}" for i in range(4))], [1.0] * 4
    shown = render(Table("", heads, [["small", "gptq", *figures], ["small", "fit", *figures]]))
    assert shown.count("model method") == shown.count("small    fit") == 2
    shown = render(Table("", heads, [["small", "fit", *figures], ["large", "fit", *figures]]))
    assert shown.count("model") == 2 and shown.count("method") == 1


def test_table_11_has_a_column_for_each_model():
    table = table11(RECORDS)
    assert table.columns == ["", "original", "svd_40%"]
    assert table.rows[0] == ["Model-size", "46.7B", "31.8B"]
    assert table.rows[2][1] == f"{2.5e10 * 2048:.3g}" and table.rows[4] == ["Runtime", "-", 20.0]


def test_table_12_gives_mean_and_spread():
    swept = [
        record("svd40", 1, ppl, sweep={"method": "svd40", "seed": seed, "samples": samples})
        for samples, values in ((64, (6.0, 6.2, 6.4)), (256, (5.0,)))
        for seed, ppl in enumerate(values)
    ]
    rows = table12([RECORDS[1], *swept]).rows
    assert rows[0][:4] == ["original", "-", 1, "6"]
    assert rows[1][:4] == ["svd40", 64, 3, "6.2 ± 0.2 (6 to 6.4)"]
    assert rows[2][:4] == ["svd40", 256, 1, "5"]


def test_changes_are_against_the_original():
    found = changes(RECORDS)["svd_40%", "wiki"]
    assert found["change"] == pytest.approx(6.1 / 6.0 - 1) and found["low"] == pytest.approx(found["high"])
    assert changes(RECORDS[:1]) == {}


@pytest.mark.parametrize("number", TABLES)
def test_every_table_in_every_form(number):
    table = TABLES[number](RECORDS)
    assert len(json.loads(render(table, "json"))) == len(table.rows)
    assert len(render(table, "csv").splitlines()) == len(table.rows) + 1
    assert all(str(row[0]) in render(table, "markdown") and str(row[0]) in render(table) for row in table.rows)
    latex = render(table, "latex")
    lines = latex.splitlines()
    assert lines[0] == r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}" and lines[-1] == r"\end{tabular}"
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == len(table.rows) + 1
    assert all(line.count(" & ") == len(table.columns) - 1 for line in body)
    assert r"svd\_40\%" in latex and "↓" not in latex


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="none of terminal, markdown, csv, json, latex"):
        render(table2(RECORDS), "html")
