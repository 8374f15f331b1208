"""The bars of `make bench-quality` on made-up records: which figure is compared with which."""

import math

import pytest

from moesvd_quant.evaluation.benchmarks.increases import SEEDS, Increases
from moesvd_quant.evaluation.benchmarks.quality import BUDGETS, RATIOS, RESEEDED, bars_of, percent, recipes
from moesvd_quant.recipe.load import load_recipe


def record(increase: float, other: float) -> dict:
    return {"perplexity": {"seen": {"nll": 4.0 + increase}, "unseen": {"nll": 3.0 + other}}}


@pytest.fixture
def records():
    made = {"original": record(0.0, 0.0), "gptq2": record(0.2, 0.4), "gptq3": record(0.04, 0.05)}
    made |= {"trellis2": record(0.08, 0.1), "trellis3": record(0.02, 0.03)}
    made |= {f"fit-grids@{bits}": record(0.1, 0.8) for bits in BUDGETS}
    for ratio in RATIOS:
        made |= {f"svd{percent(ratio)}": record(0.01, 0.02)}
        made |= {f"svd-llm{percent(ratio)}": record(0.3, 0.3), f"d2{percent(ratio)}": record(0.02, 0.3)}
    made |= {f"fit@{bits}": record(0.05, 0.5) for bits in BUDGETS}
    made |= {f"gptq-fit@{bits}": record(0.1, 0.5) for bits in BUDGETS}
    made |= {f"{name}~{seed}": made[name] for name in RESEEDED for seed in SEEDS}
    return made


def test_bars_compare_increases_of_log_perplexity(records):
    bars = {bar.claim: bar for bar in bars_of(Increases(records, ["seen"], ["unseen"], RESEEDED))}
    assert bars["fit at 2.28 bits against 2 bit GPTQ"].figure == pytest.approx(0.25)
    assert bars["fit at 1.5 bits against widths allocated alone"].figure == pytest.approx(0.5)
    assert bars["fit at 2.28 bits against gptq2, uncalibrated unseen"].figure == pytest.approx(1.25)
    assert not bars["fit at 2.28 bits against gptq2, uncalibrated unseen"].met
    assert bars["fit at 1.0 bits against fit on grids, seen"].figure == pytest.approx(0.5)
    assert bars["fit at 1.5 bits against fit on grids, unseen"].figure == pytest.approx(0.625)
    assert bars["trellis2 against gptq2"].figure == pytest.approx(0.4)
    assert bars["fit at 1.0 bits against gptq2, unseen"].figure == pytest.approx(1.25)
    assert bars["svd, 40% removed, against svd-llm, calibrated text"].figure == pytest.approx(1 / 30)
    assert bars["svd, 40% removed, against d2, calibrated text"].figure == pytest.approx(0.5)


def test_differences_within_the_spread_of_seeds_count_as_equal(records):
    records["fit@3.32"] = record(0.041, 0.06)  # 0.01 above gptq3 on text that was not calibrated on
    found = Increases(records, ["seen"], ["unseen"], RESEEDED)
    assert found.over("fit@3.32", "gptq3", ["unseen"]) == pytest.approx(1.2)
    records["gptq2~1"] = record(0.2, 0.42)  # standard deviation of 0.4, 0.42, 0.4: 0.0115
    found = Increases(records, ["seen"], ["unseen"], RESEEDED)
    assert found.spread(["unseen"]) == pytest.approx(0.02 / math.sqrt(3))
    assert found.over("fit@3.32", "gptq3", ["unseen"]) == 1.0


def test_every_run_is_a_valid_recipe():
    for recipe, overrides in recipes().values():
        load_recipe(recipe, overrides)
