"""A budget for methods whose one unknown is the ratio: never more bytes than asked, and no step of rank to spare."""

import pytest

from moesvd_quant.calibration.store import fingerprint
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run


def plans(recipe, folder, out, small, *overrides):
    return plan_stages(Run(load_recipe(recipe, [*small, *overrides]), folder, out))


CASES = [
    ("moe-svd-paper", "svd", ["svd.share=equation_8"], 0.4),
    ("moe-svd-paper", "svd", ["svd.layers=[1]", "svd.share=algorithm_3"], 0.2),
    ("moe-svd-paper-gptq4", "svd", [], 0.4),
    ("svd-llm", "svd", [], 0.3),
    ("d2-paper", "d2", ["d2.shared_v=true"], 0.3),
    ("d2-gptq4", "d2", ["d2.static=0.25"], 0.4),
]


@pytest.mark.parametrize("recipe,stage,options,ratio", CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES])
def test_a_budget_finds_what_a_ratio_makes_of_as_many_bytes(recipe, stage, options, ratio, make_model, tmp_path, small):
    """A few bytes above what a ratio takes: the search has to come to that, or to more within the budget."""
    folder = make_model("mixtral")
    wanted = plans(recipe, folder, tmp_path / "ratio", small, *options, f"{stage}.ratio={ratio}")[-1]["accounting"]
    budget = wanted["disk_bytes"] + 64
    given = [*options, f"{stage}.ratio=null", f"budget={budget}B"]
    found = plans(recipe, folder, tmp_path / "budget", small, *given)[-1]["accounting"]
    assert wanted["disk_bytes"] <= found["disk_bytes"] <= budget


def test_bits_per_weight_are_met_by_a_run_as_planned(make_model, tmp_path, small):
    given = [*small, "svd.ratio=null", "budget=2.6bpw", "gptq.attention=false"]
    run = Run(load_recipe("moe-svd-paper-gptq4", given), make_model("mixtral"), tmp_path)
    first, last = run.run()
    found = run.forecasts[-1]["accounting"]
    assert 2.4 < found["bits_per_expert_weight"] <= 2.6
    assert found["disk_bytes"] == sum(file.stat().st_size for file in last.glob("*.safetensors"))
    assert fingerprint(first) != fingerprint(last)


@pytest.mark.parametrize(
    "recipe,options,said",
    [
        ("moe-svd-paper", ["budget=1kB"], "budget: 1kB cannot be met: the smallest possible is 0"),
        ("d2-paper", ["budget=1bpw"], r"budget: \d\.\d+ MB of experts cannot be met: the least is \d"),
        ("moe-svd-paper-gptq4", ["budget=2bpw", "gptq.bits=null"], "gptq.bits: is open as well as svd.ratio"),
        (
            "d2-paper",
            ["budget=9bpw", 'limits.keep=["*"]'],
            "limits.keep: matrices are chosen one by one",
        ),
    ],
)
def test_what_a_budget_cannot_decide_is_said(recipe, options, said, make_model, tmp_path, small):
    stage = recipe.partition("-")[0] if recipe.startswith("d2") else "svd"
    with pytest.raises(StageError, match=said):
        plans(recipe, make_model("mixtral"), tmp_path, small, f"{stage}.ratio=null", *options)
