"""Budgets: exact bytes, never above, better than what anyone would choose by hand."""

import json

import pytest
import torch

import moesvd_quant
from moesvd_quant.model.experts import find_experts
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.output import RunError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.formats import FLOAT
from moesvd_quant.runtime.grids import Grid


def make(recipe, folder, out, small, *overrides):
    return Run(load_recipe(recipe, [*small, *overrides]), folder, out)


def disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_bank_bytes_are_those_of_the_stored_tensors():
    # 100 columns: 13 x 3 bytes of codes, 2 scales of a byte in each of 6 rows; 4 bytes of base, 2 x 3 of 12 zeros
    assert Grid(3, 64, False).bank_bytes((6, 100), torch.float32) == 6 * (39 + 2) + 4 + 6
    assert FLOAT.bank_bytes((6, 100), torch.bfloat16) == 1200


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
    with pytest.raises(StageError, match=r"budget: 20KB cannot be met: the smallest possible is 0\.\d+ MB"):
        plan_stages(run)


def test_open_rank_with_fixed_bits_and_open_rank_alone(make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    fixed = plan_stages(make("fit", folder, tmp_path, small, "budget=2bpw", "gptq.bits=3"))
    parts = [p for m in fixed[-1]["layout"]["experts"].values() for ps in m.values() for p in ps]
    assert {q.get("bits", q.get("rate")) for part in parts for q in part["formats"].values()} == {3}
    assert fixed[-1]["accounting"]["bits_per_expert_weight"] <= 2
    (tmp_path / "ranks.yaml").write_text("budget: 8bpw\nstages: [svd]")
    alone = plan_stages(make(tmp_path / "ranks.yaml", folder, tmp_path, small))
    assert 7.5 < alone[-1]["accounting"]["bits_per_expert_weight"] <= 8


def test_a_first_stage_planned_for_other_widths_is_noticed(make_model, tmp_path, small, monkeypatch):
    folder = make_model("mixtral", torch.bfloat16)
    monkeypatch.setattr("moesvd_quant.stages.gptq_work.run_layer", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        make("fit", folder, tmp_path, small, "budget=2bpw").run()
    assert (tmp_path / "01-svd").is_dir() and not (tmp_path / "02-gptq").exists()
    with pytest.raises(RunError, match="made with another budget"):
        make("fit", folder, tmp_path, small, "budget=2bpw", "gptq.bits=3").run()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fit_beats_one_width_at_equal_bytes_on_the_reference_model(tmp_path):
    from moesvd_quant.comparison.bench import compare
    from moesvd_quant.comparison.demo import CALIBRATION, TEXTS
    from moesvd_quant.reference import path

    (tmp_path / "fit.yaml").write_text("budget: 2.28bpw\nstages: [svd, gptq]")
    (tmp_path / "fit33.yaml").write_text("budget: 3.32bpw\nstages: [svd, gptq]")
    recipes = ["gptq2", "gptq3", tmp_path / "fit.yaml", tmp_path / "fit33.yaml"]
    records, _ = compare(path(), recipes, tmp_path / "out", TEXTS, 256, CALIBRATION)
    found = {r["name"]: {name: text["ppl"] for name, text in r["perplexity"].items()} for r in records}
    for text in TEXTS:
        assert found["svd-gptq@2.28bpw"][text] < found["gptq2"][text]
        assert found["svd-gptq@3.32bpw"][text] < found["gptq3"][text]


def layout_bits(stages, name=""):
    """Bits of each bank of the last stage's experts whose name contains `name`; 16 where it is floating point."""
    found = {}
    for path, projections in stages[-1]["layout"]["experts"].items():
        for projection, parts in projections.items():
            if name in f"{path}.{projection}":
                banks = [(p, bank) for p in parts for bank in ("dense", "left", "right") if bank in p]
                forms = [p["formats"].get(bank, {"bits": 16}) for p, bank in banks]
                found[f"{path}.{projection}"] = [form.get("bits", form.get("rate")) for form in forms]
    return found


def test_limits_are_respected(make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    limits = ["limits.widths=[3,4]", "limits.one_width_per_layer=true", "limits.min_bits={'*.down': 4}"]
    plan = plan_stages(make("fit", folder, tmp_path, small, "budget=3bpw", *limits))
    for layer in range(2):
        widths = {bits for found in layout_bits(plan, f"layers.{layer}.").values() for bits in found}
        assert widths == {4}  # one width, and down has at least four
    kept = plan_stages(make("fit", folder, tmp_path, small, "budget=9bpw", "limits.keep=['*.layers.0.*.up']"))
    assert all(set(bits) == {16} for bits in layout_bits(kept, "layers.0.mlp.experts.up").values())
    assert any(set(bits) != {16} for bits in layout_bits(kept, "layers.1.").values())
    with pytest.raises(StageError, match="the least possible is"):
        plan_stages(make("fit", folder, tmp_path, small, "budget=1bpw", "limits.keep=['*.up']"))


def test_what_a_budget_leaves_in_16_bit_stays_as_it_is_and_is_named(make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    last = make("gptq-fit", folder, tmp_path, small, "budget=7bpw", "limits.keep=['*.layers.1.*.gate']").run()[-1]
    original, made = (moesvd_quant.load(f).get_submodule("model.layers.1.mlp.experts") for f in (folder, last))
    gate = original.gate_up_proj.chunk(2, 1)[0]
    assert torch.equal(torch.stack([made.dense("gate", e, gate.dtype) for e in range(4)]), gate)
    kept = json.loads((last / "moesvd.json").read_text())["notes"]["kept in 16 bit"]
    assert "model.layers.1.mlp.experts.gate" in kept


def test_a_budget_of_loaded_bytes_with_room_for_keys_and_values(make_model, tmp_path, small):
    from moesvd_quant.evaluation.memory import resident_bytes
    from moesvd_quant.recipe.budget import kv_cache_bytes

    folder = make_model("mixtral", torch.bfloat16)
    limits = ["limits.of=resident", "limits.kv_cache={context: 64, batch: 2}"]
    last = make("gptq-fit", folder, tmp_path, small, "budget=170KB", *limits).run()[-1]
    model = moesvd_quant.load(last)
    cache = kv_cache_bytes(model.config, 64, 2, 2)
    assert cache == 2 * 2 * 2 * 16 * 64 * 2 * 2  # layers, keys and values, heads, head size, tokens, sequences, bytes
    assert 0.98 * 170e3 <= resident_bytes(model) + cache <= 170e3


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_keys_and_values_take_what_transformers_caches(architecture, make_model):
    from moesvd_quant.recipe.budget import kv_cache_bytes

    model = moesvd_quant.load(make_model(architecture))
    cache = model(torch.zeros(2, 100, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(model.config, 100, 2, 4) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("method", ["global", "svd_llm"])
def test_a_ratio_counts_experts_that_no_token_reaches(make_model, tmp_path, small, monkeypatch, method):
    """Two layers, of which the second sees no token: the first one alone has to give what the ratio asks of both."""
    calls = []
    for module in ("planning.choices", "stages.svd_work"):
        monkeypatch.setattr(f"moesvd_quant.{module}.reached", lambda *_: calls.append(1) or len(calls) % 2 == 1)
    overrides = [f"svd.method={method}", f"seed={len(method)}"]
    folder = make_model("mixtral")
    (planned,) = plan_stages(make("svd", folder, tmp_path, small, "svd.ratio=0.3", *overrides))
    assert planned["accounting"]["expert_ratio"] == pytest.approx(0.3, abs=0.02)
    calls.clear()
    with pytest.raises(StageError, match=r"no calibration token reaches 50\.0% of the expert parameters"):
        plan_stages(make("svd", folder, tmp_path / "b", small, "svd.ratio=0.6", *overrides))
