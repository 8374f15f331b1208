"""Trellis codes through whole runs: planned, packed, loaded, evaluated, trained, and resumed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesvd_quant
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.record import evaluate
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.folder import ModelError
from moesvd_quant.quantize.trellis_codec import TrellisCodec
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.trellis import Trellis
from stranger import logits_without_package

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))
FIT = "budget: 2.3bpw\nstages: [svd, {gptq: {format: best, error_aware: true}}]"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def make(tmp_path, folder, small, text, out="out", **kwargs):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return Run(load_recipe(file, small), folder, tmp_path / out, **kwargs)


def forms_of(plan) -> set[str]:
    """Names of the formats of a planned stage's experts and linears."""
    parts = [p for m in plan["layout"]["experts"].values() for parts in m.values() for p in parts]
    forms = [form for part in parts for form in part["formats"].values()]
    forms += list(plan["layout"].get("linears", {}).values())
    return {form["format"] for form in forms}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_budget_of_both_formats_is_met_and_loads_by_all_routes(make_model, tmp_path, small, architecture):
    run = make(tmp_path, make_model(architecture, torch.bfloat16), small, FIT)
    planned = plan_stages(run)
    assert "trellis" in forms_of(planned[-1])
    checkpoint = run.run()[-1]
    assert planned[-1]["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert json.loads((checkpoint / "moesvd.json").read_text())["accounting"]["bits_per_expert_weight"] <= 2.3
    model = moesvd_quant.load(checkpoint)
    expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint)), expected)
    done, found = logits_without_package(checkpoint, IDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(found, expected)
    export_checkpoint(checkpoint, tmp_path / "dense", "dense")
    exact, dense = (logits(moesvd_quant.load(f, dtype=torch.float32)) for f in (checkpoint, tmp_path / "dense"))
    # Its weights are rounded to bfloat16; a few tokens may then go to another expert.
    assert float(((dense - exact).norm(dim=-1) / exact.norm(dim=-1)).median()) < 0.02
    with pytest.raises(ModelError, match="format"):
        export_checkpoint(checkpoint, tmp_path / "gptq", "gptq")


def test_limits_keep_a_budget_to_formats(make_model, tmp_path, small):
    folder = make_model("mixtral", torch.bfloat16)
    for formats in ("grid", "trellis"):
        run = make(tmp_path, folder, [*small, f"limits.formats=[{formats}]"], FIT, formats)
        assert forms_of(plan_stages(run)[-1]) == {formats}
    for wrong in ("limits.formats=[gptq]", "limits.formats=[]"):
        with pytest.raises(RecipeError, match=r"limits\.formats: give some of grid, trellis"):
            make(tmp_path, folder, [*small, wrong], FIT)
    with pytest.raises(RecipeError, match=r"limits\.widths: give some of 2, 3, 4, 8, 1, 1\.5, 2\.5, 3\.5, 16"):
        make(tmp_path, folder, [*small, "limits.widths=[5]"], FIT)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_interrupted_resumed_and_in_workers_the_files_are_the_same(make_model, tmp_path, small, monkeypatch):
    folder = make_model("mixtral", torch.bfloat16)
    one_rate = "stages: [{gptq: {format: trellis, bits: 1.5}}]"
    whole = make(tmp_path, folder, small, one_rate, "whole").run()[-1]
    pack, done = TrellisCodec.pack, []

    def stop(self, *given):
        done.append(1)
        if len(done) == 20:
            raise KeyboardInterrupt
        return pack(self, *given)

    monkeypatch.setattr(TrellisCodec, "pack", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, folder, small, one_rate).run()
    monkeypatch.setattr(TrellisCodec, "pack", pack)
    resumed = make(tmp_path, folder, small, one_rate).run()[-1]
    in_workers = make(tmp_path, folder, small, one_rate, "workers", workers=2).run()[-1]
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes() == (in_workers / file.name).read_bytes()


@pytest.mark.parametrize("before", ["svd: {ratio: 0.4}", "svd: {method: moe_svd, ratio: 0.3}", "d2: {ratio: 0.4}"])
def test_factors_shared_factors_bases_and_deltas(make_model, tmp_path, small, before):
    folder = make_model("mixtral", torch.bfloat16)
    lost = {}
    for name in ("grid", "trellis"):
        text = f"stages: [{{{before}}}, {{gptq: {{format: {name}, bits: 3}}}}]"
        first, second = make(tmp_path, folder, small, text, name).run()
        whole, packed = (logits(moesvd_quant.load(checkpoint)).double() for checkpoint in (first, second))
        lost[name] = float((packed - whole).square().sum() / whole.square().sum())
        assert json.loads((second / "moesvd.json").read_text())["accounting"]["bits_per_expert_weight"] < 4
    assert lost["trellis"] < 0.8 * lost["grid"]


def test_the_scales_of_a_trellis_can_be_trained(make_model, tmp_path, small):
    steps = "steps: 6, batch: 4, validation: 4, validate_every: 2, lr: 0.005"
    lora = f"{{lora: {{train: scales, objective: distill, {steps}}}}}"
    text = f"stages: [{{gptq: {{format: trellis, bits: 1}}}}, {lora}]"
    first, second = make(tmp_path, make_model("mixtral"), small, text).run()
    assert json.loads((second / "healing.json").read_text())["healed"]
    was, now = (moesvd_quant.load(f).state_dict() for f in (first, second))
    changed = {name.rpartition("_")[2] for name in was if not torch.equal(was[name], now[name])}
    assert "scale" in changed and "codes" not in changed


def test_evaluated_it_is_what_its_dense_matrices_are(make_model, tmp_path, small, text):
    folder = make_model("mixtral")
    checkpoint = make(tmp_path, folder, small, "stages: [{gptq: {format: trellis, bits: 3}}]").run()[-1]
    export_checkpoint(checkpoint, tmp_path / "dense", "dense")
    spec = EvalSpec({"words": str(text)}, length=64)
    packed, dense = (evaluate(f, spec)["perplexity"]["words"]["ppl"] for f in (checkpoint, tmp_path / "dense"))
    assert packed == pytest.approx(dense, rel=1e-4)


def test_what_a_recipe_says_of_trellises_is_checked(make_model, tmp_path, small):
    folder = make_model("mixtral")
    for options, problem in (
        ("bits: 5", "5 is none of the 1, 1.5, 2, 2.5, 3, 3.5, 4 bits of format trellis"),
        ("bits: 2, rtn: true", "rtn: rounds to grids"),
        ("bits: 2, sym: true", "sym: only with format: grid"),
    ):
        with pytest.raises(RecipeError, match=problem):
            make(tmp_path, folder, small, f"stages: [{{gptq: {{format: trellis, {options}}}}}]")
    assert str(Trellis(1.5, True, True)) == "1.5 bit trellis"
