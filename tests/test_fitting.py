"""Budgets: exact bytes, never above, better than what anyone would choose by hand."""

import json

import pytest
import torch

import moesvd_quant
from moesvd_quant.fitting import bank_bytes
from moesvd_quant.model.experts import find_experts
from moesvd_quant.planning import plan_stages
from moesvd_quant.recipe import load_recipe
from moesvd_quant.runner import Run, RunError
from moesvd_quant.stages.base import StageError


def make(recipe, folder, out, small, *overrides):
    return Run(load_recipe(recipe, [*small, *overrides]), folder, out)


def disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_bank_bytes_are_those_of_the_stored_tensors():
    quant = {"bits": 3, "group_size": 64, "sym": False}
    # 100 columns: 13 x 3 bytes of codes, 2 scales of 2 bytes, 1 x 3 bytes of zeros, in each of 6 rows
    assert bank_bytes((6, 100), quant, torch.float32) == 6 * (39 + 4 + 3)
    assert bank_bytes((6, 100), None, torch.bfloat16) == 1200


@pytest.mark.parametrize("recipe", ["fit", "gptq-fit"])
@pytest.mark.parametrize("budget", [1.2, 2.3, 3.3])
def test_bits_per_weight_are_met(recipe, budget, make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    checkpoint = make(recipe, folder, tmp_path, small, f"budget={budget}bpw").run()[-1]
    account = json.loads((checkpoint / "moesvd.json").read_text())["accounting"]
    # the experts' tensors on disk, over the original's expert weights
    model = moesvd_quant.load(checkpoint)
    stored = sum(p.numel() * p.element_size() for _, m in find_experts(model) for p in m.parameters())
    weights = 2 * 4 * 3 * 64 * 96
    assert account["bits_per_expert_weight"] == pytest.approx(8 * stored / weights)
    assert 0.97 * budget <= account["bits_per_expert_weight"] <= budget


@pytest.mark.parametrize("recipe", ["fit", "gptq-fit"])
def test_bytes_on_disk_are_met(recipe, make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    budget = int(0.3 * disk(folder))
    checkpoint = make(recipe, folder, tmp_path, small, f"budget={budget}B").run()[-1]
    assert 0.98 * budget <= disk(checkpoint) <= budget


def test_an_impossible_budget_is_refused_with_the_smallest(make_model, tmp_path, small):
    run = make("fit", make_model("mixtral", torch.bfloat16), tmp_path, small, "budget=20KB")
    with pytest.raises(StageError, match=r"budget: 20KB cannot be met: without any expert the files take 0\.\d+ MB"):
        plan_stages(run)


def test_open_rank_with_fixed_bits_and_open_rank_alone(make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    fixed = plan_stages(make("fit", folder, tmp_path, small, "budget=2bpw", "gptq.bits=3"))
    parts = [p for m in fixed[-1]["layout"]["experts"].values() for ps in m.values() for p in ps]
    assert {q["bits"] for part in parts for q in part["quant"].values()} == {3}
    assert fixed[-1]["accounting"]["bits_per_expert_weight"] <= 2
    (tmp_path / "ranks.yaml").write_text("budget: 8bpw\nstages: [svd]")
    alone = plan_stages(make(tmp_path / "ranks.yaml", folder, tmp_path, small))
    assert 7.5 < alone[-1]["accounting"]["bits_per_expert_weight"] <= 8


def test_a_first_stage_planned_for_other_widths_is_noticed(make_model, tmp_path, small, monkeypatch):
    folder = make_model("mixtral", torch.bfloat16)
    monkeypatch.setattr("moesvd_quant.stages.gptq.run_layer", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        make("fit", folder, tmp_path, small, "budget=2bpw").run()
    assert (tmp_path / "01-svd").is_dir() and not (tmp_path / "02-gptq").exists()
    with pytest.raises(RunError, match="made with another budget"):
        make("fit", folder, tmp_path, small, "budget=2bpw", "gptq.bits=3").run()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fit_beats_one_width_at_equal_bytes_on_the_reference_model(tmp_path):
    from moesvd_quant.bench import compare
    from moesvd_quant.demo import CALIBRATION, TEXTS
    from moesvd_quant.reference import path

    (tmp_path / "fit.yaml").write_text("budget: 2.28bpw\nstages: [svd, gptq]")
    (tmp_path / "fit33.yaml").write_text("budget: 3.32bpw\nstages: [svd, gptq]")
    recipes = ["gptq2", "gptq3", tmp_path / "fit.yaml", tmp_path / "fit33.yaml"]
    records, _ = compare(path(), recipes, tmp_path / "out", TEXTS, 256, CALIBRATION)
    found = {r["name"]: {name: text["ppl"] for name, text in r["perplexity"].items()} for r in records}
    for text in TEXTS:
        assert found["svd-gptq@2.28bpw"][text] < found["gptq2"][text]
        assert found["svd-gptq@3.32bpw"][text] < found["gptq3"][text]
