"""Shared experts as experts: what they are is found, they compute the same, and bytes and statistics count them."""

import json

import pytest
import torch
from safetensors import safe_open
from test_factorized_experts import factorize
from transformers import AutoModelForCausalLM

import moesvd_quant
from architecture_check import apart, logits
from architectures import tiny_architecture
from moesvd_quant.calibration.store import Statistics, fingerprint
from moesvd_quant.checkpoint.accounting import account
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.evaluation.flops import flops_per_token
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import find_experts, find_linears, is_shared, mark_shared_experts
from moesvd_quant.model.layered import LayeredModel, _decoder_layers
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

HIDDEN, INNER, ROUTED = 64, 64, 6 * 3 * 32 * 64  # of a layer of the tiny Qwen2-MoE: its shared expert, and the others
WINDOWS = torch.randint(1, 250, (6, 32), generator=torch.Generator().manual_seed(2))


def shared_in(model) -> dict:
    return {path: module for path, module in find_experts(model) if is_shared(module)}


# With a gate; without one; its activation under another name; an MLP beside the experts, in the layer itself.
@pytest.mark.parametrize("name", ["qwen2_moe", "nemotron_h", "llama4_text", "gemma4_text"])
def test_full_rank_gives_the_same_logits(name):
    model = tiny_architecture(name)
    expected, linears = logits(model), {path for path, _ in find_linears(model)}
    assert not shared_in(model)
    for layer in _decoder_layers(model)[1]:
        mark_shared_experts(layer)
    found = shared_in(model)
    assert found
    assert linears - {path for path, _ in find_linears(model)} == {
        f"{path}.{child}"
        for path, module in found.items()
        for child, linear in module.named_children()
        if "proj" in child
    }
    for path, native in found.items():
        model.set_submodule(path, factorize(native))
    assert apart(logits(model), expected) < 1e-4
    for path in found:
        model.get_submodule(path).down_0_left.data.zero_()
    assert apart(logits(model), expected) > 0.1


def test_one_that_clamps_stays_linears():
    model = tiny_architecture("deepseek_v4")
    for layer in _decoder_layers(model)[1]:
        mark_shared_experts(layer)
    assert not shared_in(model)
    assert any("shared_experts.gate_proj" in path for path, _ in find_linears(model))


def test_statistics_are_those_of_its_linears(make_model):
    folder = make_model("qwen2_moe")
    apart, together = (Statistics(folder, fingerprint(folder), WINDOWS, shared=shared) for shared in (False, True))
    assert apart.key != together.key
    path = "mlp.shared_expert"
    for linear, expert in zip(apart.layers(), together.layers()):
        assert expert[f"{path}/tokens"].tolist() == [WINDOWS.numel()]
        for gram, name in (("gram_in", "gate_proj"), ("gram_mid", "down_proj")):
            wanted = linear[f"{path}.{name}/gram"]
            assert torch.allclose(expert[f"{path}/{gram}"][0], wanted, atol=1e-4 * float(wanted.max()))


def test_parameters_and_operations_are_counted(make_model):
    plain, shared = (LayeredModel(make_model("qwen2_moe"), shared=shared) for shared in (False, True))
    assert account(plain, layout_of(plain)).original_expert_params == 2 * ROUTED
    assert account(shared, layout_of(shared)).original_expert_params == 2 * (ROUTED + 3 * HIDDEN * INNER)
    counted = [flops_per_token(model.model, 16) for model in (plain, shared)]
    assert counted[0]["total"] == counted[1]["total"]
    assert counted[1]["experts"] - counted[0]["experts"] == 2 * 2 * 3 * HIDDEN * INNER


@pytest.fixture
def run(make_model, tmp_path, small):
    """run(name, stages, more) -> folders of the checkpoints of a recipe with `experts: all`."""

    def run(name: str, stages: str, more: str = ""):
        (tmp_path / f"{name}.yaml").write_text(f"experts: all\n{more}\nstages: [{stages}]\n")
        return Run(load_recipe(tmp_path / f"{name}.yaml", small), make_model("qwen2_moe"), tmp_path / name).run()

    return run


@pytest.mark.parametrize(
    "stages,more,bits",
    [
        ("{svd: {ratio: 0.4}}, {gptq: {bits: 3}}", "", None),
        ("{svd: {ratio: 0.4, error_aware: true}}", "", None),
        ("{svd: {}}, {gptq: {error_aware: true}}", "budget: 2.5bpw", 2.5),
        ("{svd: {method: moe_svd, ratio: 0.4}}", "", None),
        ("{gptq: {bits: 2}}, {lora: {steps: 3, batch: 4, microbatch: 2, rank: 8, validation: 4}}", "", None),
    ],
)
def test_recipes_take_them_along(run, stages, more, bits):
    folders = run("all", stages, more)
    model = moesvd_quant.load(folders[-1])
    assert [path for path in shared_in(model)] == [f"model.layers.{i}.mlp.shared_expert" for i in range(2)]
    manifest = json.loads((folders[-1] / "moesvd.json").read_text())
    assert "+shared" in manifest["name"]
    found = manifest["accounting"]
    assert found["original_expert_params"] == 2 * (ROUTED + 3 * HIDDEN * INNER)
    if "ratio" in stages:
        assert found["expert_ratio"] == pytest.approx(0.4, abs=0.03)  # ranks are in steps of 8, of 32 and 64
    if bits:
        assert bits - 0.1 < found["bits_per_expert_weight"] <= bits


def test_what_is_exported_has_the_native_names_and_the_same_logits(run, tmp_path):
    folder = run("dense", "{svd: {ratio: 0.3}}")[-1]
    export_checkpoint(folder, tmp_path / "plain", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "Moesvd" not in type(plain).__name__
    assert torch.allclose(logits(plain), logits(moesvd_quant.load(folder)), atol=2e-4)


def test_the_standard_form_is_that_of_linears(run, make_model, tmp_path, small):
    form = ["gptq.sym=true", "gptq.group_size=32"]
    routed = Run(load_recipe("gptq4", [*small, *form]), make_model("qwen2_moe"), tmp_path / "routed").run()[-1]
    shapes = []
    for folder in (run("gptq", "{gptq: {bits: 4, sym: true, group_size: 32}}")[-1], routed):
        export_checkpoint(folder, tmp_path / f"{folder.parent.name}-standard", "gptq")
        files = sorted((tmp_path / f"{folder.parent.name}-standard").glob("*.safetensors"))
        opened = [safe_open(file, "pt") for file in files]
        shapes.append({name: file.get_slice(name).get_shape() for file in opened for name in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1] and any("shared_expert.down_proj.qweight" in name for name in shapes[0])


def test_what_has_no_base_is_refused(run):
    with pytest.raises(
        StageError, match="a shared expert is alone, it has no base and no delta; leave out experts: all"
    ):
        run("d2", "{d2: {ratio: 0.2}}")
