"""What was trained is what ships: merged by PEFT's own arithmetic, or a term that is counted, or nothing at all."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moesvd_quant
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import find_experts
from moesvd_quant.runtime.modeling_moesvd import check_digests
from moesvd_quant.runtime.stored import StoredLinear
from moesvd_quant.stages import lora_work

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def keep(monkeypatch, healed: bool) -> None:
    """Random models know no text: whether healing helped is decided here."""
    losses = iter([1.0, 0.9 if healed else 1.1])
    monkeypatch.setattr(lora_work, "validation_loss", lambda *_: next(losses))


def shapes(folder) -> dict:
    return {k: (v.shape, v.dtype) for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def record(folder) -> dict:
    return json.loads((folder / "healing.json").read_text())


@pytest.mark.parametrize(
    "recipe,architecture,more",
    [
        ("svd", "mixtral", {}),
        ("svd", "qwen2_moe", {"objective": "layerwise", "steps": 12}),
        ("d2-paper", "gpt_oss", {}),  # a base of one, in an architecture whose own weights are transposed
        pytest.param("svd", "mixtral", {"frozen": "nf4"}, marks=pytest.mark.slow),
    ],
)
def test_the_merged_checkpoint_is_its_input_with_the_peft_folder_applied(
    compressed, heal, make_model, monkeypatch, recipe, architecture, more
):
    keep(monkeypatch, True)
    ratio = "d2.ratio=0.25" if recipe == "d2-paper" else "svd.ratio=0.3"
    if "objective" in more:
        before, after = heal(make_model(architecture), "{svd: {ratio: 0.3}}, ", **more)
    else:
        before = compressed(recipe, architecture, ratio)
        after = heal(before, **more)
    adapted = PeftModel.from_pretrained(moesvd_quant.load(before), after / "adapter")
    healed, input_logits = logits(moesvd_quant.load(after)), logits(moesvd_quant.load(before))
    assert (healed - input_logits).abs().max() > 1e-2
    assert torch.allclose(healed, logits(adapted), atol=2e-5)
    assert torch.allclose(healed, logits(adapted.merge_and_unload()), atol=2e-5)
    assert shapes(after) == shapes(before)  # the form and the bytes stay
    check_digests(after)


def test_bf16_factors_are_rounded_once(compressed, heal, make_model):
    """The float32 sum of the stored factor and the adapters' product, to bfloat16: element by element."""
    before = compressed("svd", "mixtral", "svd.ratio=0.3")
    model = moesvd_quant.load(before, dtype=torch.bfloat16)
    folder = before.parent / "bf16"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((before / name).read_bytes())
    after = heal(folder)
    assert record(after)["healed"]
    was, now = (dict(moesvd_quant.load(f).named_parameters()) for f in (folder, after))
    adapters = load_file(after / "adapter" / "adapter_model.safetensors")
    checked = 0
    for name in was:
        if not name.endswith("q_proj.weight"):
            continue
        a, b = (adapters[f"base_model.model.{name.removesuffix('.weight')}.lora_{k}.weight"] for k in "AB")
        assert was[name].dtype == now[name].dtype == torch.bfloat16
        assert torch.equal(now[name], (was[name].float() + 2.0 * b @ a).bfloat16())
        checked += 1
    assert checked == 2


def test_beside_packed_weights_a_term_stays_and_is_counted(compressed, heal, tmp_path):
    before = compressed("gptq3", "mixtral")
    after = heal(before)
    account, healed = json.loads((after / "moesvd.json").read_text())["accounting"], record(after)
    assert healed["healed"] and healed["validation_perplexity_after"] < healed["validation_perplexity_before"]
    old, new = shapes(before), shapes(after)
    added = {name: shape for name, (shape, _) in new.items() if name not in old}
    assert {name: kind for name, kind in new.items() if name in old} == old
    # rank 8 times (in + out), for 4 experts' gate, up, down and the four attention matrices, in each of two layers
    expected = 2 * 8 * (4 * 3 * (64 + 96) + 2 * (64 + 64) + 2 * (64 + 32))
    assert sum(math.prod(shape) for shape in added.values()) == expected == healed["trained_parameters"]
    assert account["disk_bytes"] == sum(p.stat().st_size for p in after.glob("*.safetensors"))
    packed, stored = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items() if k in old}
        for folder in (before, after)
    )
    assert all(torch.equal(packed[name], stored[name]) for name in old)
    ours = logits(moesvd_quant.load(after))
    alone = AutoModelForCausalLM.from_pretrained(after, trust_remote_code=True)
    assert torch.equal(ours, logits(alone))
    export_checkpoint(after, tmp_path / "dense", "dense")
    assert torch.allclose(ours, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), atol=1e-4)
    with pytest.raises(ValueError, match=r"has a low-rank term beside its packed weight|is factorized"):
        export_checkpoint(after, tmp_path / "gptq", "gptq")


def test_the_effective_weight_is_codes_plus_term(compressed, heal):
    before = compressed("gptq3", "mixtral")
    after = heal(before)
    was, now = (dict(moesvd_quant.load(f).named_modules()) for f in (before, after))
    for path, module in now.items():
        if isinstance(module, StoredLinear):
            assert torch.equal(module.dense_weight(), was[path].dense_weight() + module.left @ module.right)
    for path, experts in find_experts(now[""]):
        for expert in range(4):
            left, right = experts.gate_1_left[expert], experts.gate_1_right[expert]
            assert torch.allclose(experts.dense("gate", expert), was[path].dense("gate", expert) + left @ right)


@pytest.mark.parametrize("recipe", ["svd", "gptq3"])
def test_a_healing_that_made_it_worse_is_not_committed(compressed, heal, recipe, monkeypatch):
    keep(monkeypatch, False)
    before = compressed(recipe, "mixtral", *(["svd.ratio=0.3"] if recipe == "svd" else []))
    after = heal(before)
    assert record(after)["healed"] is False and "the input stays" in record(after)["why_not"]
    for file in before.glob("model*.safetensors"):
        assert load_file(file).keys() == load_file(after / file.name).keys()
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, load_file(after / file.name)[name]), name
    assert json.loads((after / "moesvd.json").read_text())["check"]["kl"] == 0
