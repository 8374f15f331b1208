"""What moesvd_quant expects of interfaces of transformers that are not public. If one of these fails after an upgrade,
`model/hf_internals.py` is the one file to change."""

import pytest
import torch
from accelerate import init_empty_weights
from transformers import DeepseekV3ForCausalLM, MixtralForCausalLM

from architectures import tiny_config
from moesvd_quant.model.hf_internals import (
    conversions,
    fill,
    ignored_missing,
    ignored_unexpected,
    kept_in_float32,
    renamed,
    revert_weight_conversion,
    set_eager_experts,
    tied_weights,
)
from tiny import tiny_model

EXPERT = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"


def empty(kind, name: str, dtype=torch.float32):
    with init_empty_weights(include_buffers=False):
        return kind._from_config(tiny_config(name), dtype=dtype)


@pytest.fixture
def mixtral():
    return empty(MixtralForCausalLM, "mixtral")


def on_disk(model) -> dict[str, torch.Tensor]:
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    return revert_weight_conversion(model, state)


def test_names_on_disk_become_parameters(mixtral):
    mapping = conversions(mixtral)
    found = {
        name: (targets, is_converted) for name, targets, is_converted in renamed(on_disk(mixtral), mixtral, mapping)
    }
    assert found[EXPERT.format(3, "w1")] == (["model.layers.0.mlp.experts.gate_up_proj"], True)
    assert found["model.layers.0.block_sparse_moe.gate.weight"] == (["model.layers.0.mlp.gate.weight"], False)
    assert {target for targets, _ in found.values() for target in targets} == set(mixtral.state_dict())


def test_one_tensor_may_become_several():
    model = empty(DeepseekV3ForCausalLM, "deepseek_v3")
    named = {name: targets for name, targets, _ in renamed(on_disk(model), model, conversions(model))}
    assert set(model.state_dict()) == {target for targets in named.values() for target in targets}


def test_a_load_without_data_tells_what_is_wrong(mixtral):
    tensors, mapping = on_disk(mixtral), conversions(mixtral)
    info = fill(mixtral, dict(tensors), mapping, torch.float32, "meta")
    assert not (info.missing_keys or info.unexpected_keys or info.mismatched_keys or info.conversion_errors)
    tensors.pop("model.norm.weight")
    tensors.pop(EXPERT.format(2, "w3"))
    tensors |= {"strange": torch.empty(1, device="meta"), "lm_head.weight": torch.empty(3, 4, device="meta")}
    info = fill(mixtral, tensors, mapping, torch.float32, "meta")
    assert "model.norm.weight" in info.missing_keys and info.unexpected_keys == {"strange"}
    assert [key for key, *_ in info.mismatched_keys] == ["lm_head.weight"]
    assert list(info.conversion_errors) == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_what_is_loaded_becomes_the_dtype_of_its_parameter():
    model = empty(MixtralForCausalLM, "mixtral", torch.bfloat16)
    norm = model.state_dict(keep_vars=True)["model.norm.weight"]
    norm.data = norm.data.to(torch.float32)
    given = {name: torch.ones(2, 2)[0, 0].expand(64).clone() for name in ("model.norm.weight",)}
    given["model.layers.0.input_layernorm.weight"] = torch.ones(64)
    fill(model, given, conversions(model), torch.bfloat16, "cpu")
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_what_classes_say_of_their_tensors():
    model = empty(DeepseekV3ForCausalLM, "deepseek_v3", torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert kept_in_float32(model, torch.bfloat16).search(bias)
    assert not kept_in_float32(model, torch.bfloat16).search("model.layers.1.mlp.experts.down_proj")
    assert kept_in_float32(model, torch.float32) is None
    assert ignored_unexpected(model, "model.layers.61.mlp.gate.weight")
    assert ignored_unexpected(model, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not ignored_unexpected(model, "model.layers.60.mlp.gate.weight")
    assert not ignored_missing(model, bias)


def test_ties_are_those_of_the_config():
    assert tied_weights(tiny_model("mixtral", tie_word_embeddings=True)) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    assert tied_weights(tiny_model("mixtral")) == {}


def test_eager_experts_take_any_size():
    config = tiny_model("mixtral", hidden_size=60, intermediate_size=75, num_attention_heads=2).config
    set_eager_experts(config)
    model = MixtralForCausalLM(config)
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()
    assert "experts_implementation" not in str(model.config.to_dict())
