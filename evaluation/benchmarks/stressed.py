"""Models that are hard to compress, made from a Mixtral: what large models are known for, in small.

Scales are powers of two, so that moving them between weights changes no bit of what the original computes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moesvd_quant.model.hf_internals import no_loading_bars

OUTLIERS, SCALE = 4, 32.0  # channels, and how much larger than others they become
SLICES = 16  # experts that are made of one
COLD = 2  # experts that hardly any token is sent to
HOT = 0.6  # share of the tokens that are sent to one expert


def hidden_outliers(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """A few channels of what experts and routers read are SCALE times the original's."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[:OUTLIERS] *= SCALE
        layer.mlp.experts.gate_up_proj[:, :, :OUTLIERS] /= SCALE
        layer.mlp.gate.weight[:, :OUTLIERS] /= SCALE
    return model


def inner_outliers(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """A few channels between up and down are SCALE times the original's."""
    inner = model.config.intermediate_size
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj[:, inner : inner + OUTLIERS] *= SCALE
        layer.mlp.experts.down_proj[:, :, :OUTLIERS] /= SCALE
    return model


def cold_experts(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """The router's rows of COLD experts are the mean of the others': hardly ever among the largest."""
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight
        rows[:COLD] = rows[COLD:].mean(0)
    return model


def hot_expert(model: MixtralForCausalLM, ids: torch.Tensor) -> MixtralForCausalLM:
    """The first expert of each layer takes HOT of the tokens: its router row moves along the mean input. ids: (windows,
    length) int64, of the text that is counted."""
    for layer in model.model.layers:
        seen: list[torch.Tensor] = []
        hook = layer.mlp.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0].flatten(0, 1)))
        model(ids)
        hook.remove()
        rows = layer.mlp.gate.weight
        inputs, held = torch.cat(seen).float(), rows.float()
        push, top = inputs.mean(0), model.config.num_experts_per_tok
        others = (inputs @ held[1:].T).topk(top).values[:, -1]  # what a logit has to pass
        missing = (others - inputs @ held[0]) / (inputs @ push)
        rows[0] += push * missing[inputs @ push > 0].quantile(HOT)
    return model


def top_1(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """Each token goes to one expert."""
    return _with_config(model, num_experts_per_tok=1)


def untied(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """The head has a matrix of its own, of a scale for each word."""
    made = _with_config(model, tie_word_embeddings=False)
    made.lm_head.weight.copy_(model.model.embed_tokens.weight)
    made.lm_head.weight[::2] *= 2
    return made


def many_experts(model: MixtralForCausalLM) -> MixtralForCausalLM:
    """SLICES experts for each one, of a slice of its inner channels each, to which tokens are sent together: they
    compute what the one did."""
    config = model.config
    inner, experts, top = config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    size = dict(intermediate_size=inner // SLICES, num_local_experts=experts * SLICES, num_experts_per_tok=top * SLICES)
    made = MixtralForCausalLM(MixtralConfig(**config.to_dict() | size)).to(model.dtype)
    own, other = made.state_dict(), model.state_dict()
    own |= {name: tensor for name, tensor in other.items() if tensor.shape == own[name].shape}
    for i in range(config.num_hidden_layers):
        mlp = f"model.layers.{i}.mlp."
        gate, up = (
            part.unflatten(1, (SLICES, -1)).flatten(0, 1) for part in other[mlp + "experts.gate_up_proj"].chunk(2, 1)
        )
        down = other[mlp + "experts.down_proj"].unflatten(2, (SLICES, -1)).movedim(2, 1).flatten(0, 1)
        own[mlp + "experts.gate_up_proj"] = torch.cat([gate, up], 1)
        own[mlp + "experts.down_proj"] = down * SLICES  # a slice has a share of its expert's weight
        own[mlp + "gate.weight"] = other[mlp + "gate.weight"].repeat_interleave(SLICES, 0)
    made.load_state_dict(own)
    return made


def shared_expert(model: MixtralForCausalLM) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE whose shared expert, the first one of each layer, outweighs those that a token is sent to."""
    config = model.config
    size = dict(
        num_experts=config.num_local_experts, moe_intermediate_size=config.intermediate_size, norm_topk_prob=True,
        shared_expert_intermediate_size=config.intermediate_size, decoder_sparse_step=1, mlp_only_layers=[],
        layer_types=["full_attention"] * config.num_hidden_layers, sliding_window=None, model_type="qwen2_moe",
        architectures=["Qwen2MoeForCausalLM"], head_dim=config.hidden_size // config.num_attention_heads,
    )  # fmt: skip
    made = Qwen2MoeForCausalLM(Qwen2MoeConfig(**config.to_dict() | size)).to(model.dtype)
    own, other = made.state_dict(), model.state_dict()
    own |= {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith("bias")}
    own |= {name: tensor for name, tensor in other.items() if name in own}
    for i in range(config.num_hidden_layers):
        mlp = f"model.layers.{i}.mlp."
        gate, up = other[mlp + "experts.gate_up_proj"][0].chunk(2)
        shared = {"gate_proj": gate, "up_proj": up, "down_proj": other[mlp + "experts.down_proj"][0]}
        own |= {f"{mlp}shared_expert.{name}.weight": tensor for name, tensor in shared.items()}
        own[mlp + "shared_expert_gate.weight"] = torch.zeros_like(own[mlp + "shared_expert_gate.weight"])  # a half
        own[mlp + "experts.down_proj"] = other[mlp + "experts.down_proj"] / 4
    made.load_state_dict(own)
    return made


STRESSES: dict[str, Callable] = {
    "hidden-outliers": hidden_outliers,
    "inner-outliers": inner_outliers,
    "cold-experts": cold_experts,
    "hot-expert": hot_expert,
    "top-1": top_1,
    "128-experts": many_experts,
    "shared-expert": shared_expert,
    "untied": untied,
}


@torch.no_grad()
def write_stressed(source: Path, stress: str, folder: Path, ids: torch.Tensor) -> Path:
    """Writes the model that a stress makes of the Mixtral in a folder; ids: see `hot_expert`."""
    with no_loading_bars():
        model = MixtralForCausalLM.from_pretrained(source).eval()
        given = (ids,) if stress == "hot-expert" else ()
        STRESSES[stress](model, *given).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _with_config(model: MixtralForCausalLM, **changed) -> MixtralForCausalLM:
    made = MixtralForCausalLM(MixtralConfig(**model.config.to_dict() | changed)).to(model.dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    return made
