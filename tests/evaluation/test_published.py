"""Tables as printed: Table 8 of several models, Table 12's tests, Figure 6 by calibration text."""

import math
from math import comb

import pytest

from moesvd_quant.errors import UsageError
from moesvd_quant.evaluation.paper_tables import table2, table8, table12
from moesvd_quant.evaluation.plot import sweep_lines
from moesvd_quant.evaluation.published import column_of, mcnemar, table8_as_printed, table12_paired


def of(model, name, size, ppl, **more):
    return {
        "name": name,
        "base_model": model,
        "protocol": {"length": 64},
        "perplexity": {"wiki": {"ppl": ppl, "window_nll": [math.log(ppl)] * 4}},
        "memory": {"disk_bytes": size, "resident_bytes": size},
        "accounting": {"bits_per_expert_weight": 4.0, "expert_ratio": 0.0, "model_ratio": 0.0},
    } | more


TWO_MODELS = [
    of("mixtral", "original", 93e9, 4.0),
    of("phi", "original", 84e9, 3.5),
    of("phi", "gptq3", 16e9, 6.7),
    of("mixtral", "moe-svd-paper20-of-model-gptq4", 19e9, 6.9),
    of("mixtral", "gptq4", 25e9, 4.35),
    of("phi", "moe-svd-paper30-of-model-gptq4", 15e9, 6.6),
    of("mixtral", "svd40-gptq4", 17e9, 5.0),
]


def test_table_8_has_a_block_for_each_model_and_a_column_for_each_method():
    table = table8_as_printed(TWO_MODELS)
    assert table.rows == [
        ["phi", "GPTQ (4bit)", "GPTQ (3bit)", "MoE-SVD (4bit)", "MoE-SVD (3bit)"],
        ["Memory (GB)", "-", 16.0, 15.0, "-"],
        ["Perplexity, wiki", "-", 6.7, 6.6, "-"],
        ["mixtral", "GPTQ (4bit)", "GPTQ (3bit)", "MoE-SVD (4bit)", "MoE-SVD (3bit)"],
        ["Memory (GB)", 25.0, "-", 19.0, "-"],
        ["Perplexity, wiki", 4.35, "-", 6.9, "-"],
    ]
    assert table.title.endswith("3 records of other methods are in table 8")
    both = [*TWO_MODELS, of("phi", "moe-svd-paper40-gptq4", 1e9, 9.0)]
    with pytest.raises(UsageError, match="phi: moe-svd-paper30-of-model-gptq4 and moe-svd-paper40-gptq4 are both"):
        table8_as_printed(both)
    assert column_of("svd40-gptq4") is None and column_of("gptq2") is None


def test_rows_of_two_models_are_told_apart():
    table = table8(TWO_MODELS)
    assert table.columns[:2] == ["model", "method"]
    assert [row[0] for row in table.rows] == ["mixtral"] * 4 + ["phi"] * 3


def test_the_factor_beside_the_runtime_is_to_the_models_own_original():
    cells = lambda rate: {"cells": [{"batch": 8, "length": 32, "decode": {"tokens_per_second": rate}}]}  # noqa: E731
    records = [
        of("a", "original", 9, 4.0, speed=cells(80.0)),
        of("b", "original", 8, 4.0, speed=cells(10.0)),
        of("a", "svd20", 7, 4.5, speed=cells(100.0)),
    ]
    assert [row[2] for row in table2(records).rows] == [80.0, 10.0, "100.0 (1.25x)"]


def test_mcnemar_is_the_binomial_of_the_documents_that_changed():
    own, base = "1110010000", "1001111111"
    lost, gained = 6, 2  # by eye
    tail = sum(comb(8, k) for k in range(gained + 1)) / 2**8
    assert mcnemar(own, base) == pytest.approx(2 * tail) and lost + gained == 8
    assert mcnemar(base, base) == 1.0
    with pytest.raises(UsageError, match="10 documents against 9"):
        mcnemar(own, base[:9])


def test_table_12s_differences_are_tested_in_pairs():
    tasks = lambda acc, correct: {"tasks": {"piqa": {"acc": acc, "correct": correct}}}  # noqa: E731
    records = [
        of("a", "original", 9, 4.0, zero_shot=tasks(0.7, "1111111000")),
        of("a", "svd20", 7, 4.4, zero_shot=tasks(0.1, "1000000000")),
    ]
    (row,) = table12_paired(records).rows
    assert row[:2] == ["a", "svd20"] and row[2].startswith("+10.00%")
    assert row[3] == "-0.6000 (p 0.031)"  # 2 / 2^6
    with pytest.raises(UsageError, match="no record has the original"):
        table12_paired(records[1:])


def test_a_figure_has_a_line_for_each_calibration_text_and_table_12_a_row():
    swept = [
        of("a", "svd40", 7, ppl, sweep={"method": "svd40", "seed": s, "samples": 64, "recipe": text, "digest": text})
        for text, values in (("wiki", (6.0, 6.2)), ("code", (9.0, 9.2)))
        for s, ppl in enumerate(values)
    ]
    lines = sweep_lines(swept)
    assert {label: len(members) for label, members in lines.items()} == {"svd40 (wiki)": 2, "svd40 (code)": 2}
    assert [row[:3] for row in table12(swept).rows] == [["svd40 (wiki)", 64, 2], ["svd40 (code)", 64, 2]]


def test_table_12_shows_the_standard_error_beside_the_spread():
    tasks = {"tasks": {"piqa": {"acc": 0.8, "acc_stderr": 0.0093}}}
    (row,) = table12([of("a", "x", 1, 4.0, zero_shot=tasks)]).rows
    assert row[-1] == "0.8, se 0.0093"
