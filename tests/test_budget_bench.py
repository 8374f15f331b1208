"""Which baselines fit in the bytes of a budget, and who is compared with whom."""

import pytest
import torch

from moesvd_quant.evaluation.benchmarks import budget
from moesvd_quant.evaluation.benchmarks.budget import baselines_of, expert_bytes, least_ratio, measure, verdicts


def record(size: int, seen: float, unseen: float) -> dict:
    texts = {"seen": {"nll": 4 + seen}, "unseen": {"nll": 3 + unseen}}
    return {"memory": {"disk": {"experts": size}}, "perplexity": texts}


@pytest.fixture
def records():
    return {
        "original": record(1600, 0, 0),
        "gptq2": record(200, 0.5, 0.5),
        "gptq3": record(301, 0.1, 0.3),
        "gptq4": record(400, 0.0, 0.0),
        "fit@3.0": record(300, 0.2, 0.2),
        "gptq-fit@3.0": record(299, 0.3, 0.19),
        "uniform3@3.0": record(298, 0.199, 0.4),
        "uniform3@1.0": record(98, 0.0, 0.0),
        "fit@1.0": record(100, 0.9, 0.9),
        "gptq-fit@1.0": record(100, 0.95, 0.8),
    }


def test_only_what_fits_in_the_bytes_is_a_baseline(records):
    assert baselines_of(records, 3.0) == ["gptq-fit@3.0", "gptq2", "uniform3@3.0"]  # gptq3 is a byte too large
    records["gptq3"]["memory"]["disk"]["experts"] = 300
    assert baselines_of(records, 3.0) == ["gptq-fit@3.0", "gptq3", "uniform3@3.0"]
    assert baselines_of(records, 1.0) == ["gptq-fit@1.0", "uniform3@1.0"]


def test_the_planner_is_compared_with_the_best_on_each_text(records):
    rows = {(row[0], row[1]): row for row in verdicts(records, ["seen"], ["unseen"], (1.0, 3.0)).rows}
    assert rows[3.0, "seen"][4:] == [0.001, 0.002, "uniform3@3.0", "met"]  # counts as equal
    assert rows[3.0, "unseen"][4:] == [0.01, 0.002, "gptq-fit@3.0", "missed"]
    assert rows[1.0, "seen"][-2:] == ["uniform3@1.0", "missed"]
    assert rows[1.0, "unseen"][-1] == "(worse)"  # below 2.3 bits nothing is claimed of it


def test_differences_within_twice_the_spread_of_seeds_are_equal(records):
    again = {"fit@3.0": (0.2, 0.22), "gptq-fit@3.0": (0.19, 0.19)}  # standard deviation of 0.2, 0.2, 0.22: 0.0115
    for name, (one, two) in again.items():
        records |= {f"{name}~1": record(300, 0.2, one), f"{name}~2": record(300, 0.2, two)}
    rows = {row[1]: row for row in verdicts(records, ["seen"], ["unseen"], (3.0,)).rows}
    assert rows["unseen"][5] == pytest.approx(0.0231, abs=1e-4) and rows["unseen"][-1] == "met"


def test_ratio_that_fills_the_bytes():
    assert least_ratio(lambda ratio: int(1000 * (1 - ratio)), 600) == pytest.approx(0.4, abs=0.004)
    steps = lambda ratio: 100 * int(10 * (1 - ratio))  # noqa: E731
    assert steps(least_ratio(steps, 600)) == 600  # ranks come in steps
    assert least_ratio(lambda ratio: 1000, 600) is None  # never small enough
    assert least_ratio(lambda ratio: int(1000 * (1 - ratio)), 900) is None  # hardly anything need go


@pytest.mark.slow
def test_every_run_on_a_miniature(make_model, tmp_path, text, small, monkeypatch):
    for name, few in (("BUDGETS", (2.5,)), ("WIDTHS", (4,)), ("ONE_WIDTH", (2,))):
        monkeypatch.setattr(budget, name, few)
    folder, texts = make_model("mixtral", torch.bfloat16), {"words": str(text)}
    records, table = measure(folder, tmp_path, texts, {}, small, 64, (), "cpu", lambda what, done, total: None)
    assert set(records) == {"original", "fit@2.5", "gptq-fit@2.5", "gptq2", "uniform4@2.5"}
    limit = expert_bytes(records["fit@2.5"])
    assert 0.9 * limit < expert_bytes(records["uniform4@2.5"]) <= limit
    assert [row[:2] for row in table.rows] == [[2.5, "words"]]
