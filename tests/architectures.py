"""A tiny random model of every MoE architecture that transformers can build: its default config, shrunk by the names
of its fields, plus what an architecture needs besides."""

import copy

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesvd_quant.runtime.modeling_moesvd import native_class
from tiny import enlarge

# Values by field name. Fields that a config does not have are left out.
SMALL: dict = {
    "vocab_size": 320, "hidden_size": 64, "d_model": 64, "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "max_seq_len": 256, "intermediate_size": 64, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "intermediate_size_mlp": 64,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6, "num_routed_experts": 6,
    "num_experts_per_tok": 2, "moe_top_k": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "num_limited_groups": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 32,
    "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16,
    "mamba_num_heads": 8, "mamba_n_heads": 8, "mamba_head_dim": 16, "mamba_d_head": 16, "mamba_d_state": 16,
    "ssm_state_size": 16, "mamba_expand": 2, "mamba_dt_rank": 32, "mamba_chunk_size": 16, "chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16, "swa_num_attention_heads": 4, "swa_head_dim": 16,
    "swa_num_key_value_heads": 2,
    "zero_expert_num": 2, "unpadded_vocab_size": 320,
    "sliding_window": 16, "attention_chunk_size": 16,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "image_token_id": 301, "video_token_id": 302, "vision_start_token_id": 303, "vision_end_token_id": 304,
    "image_token_index": 301, "audio_token_id": 305, "depth": 2,
    "out_hidden_size": 64, "num_heads": 4, "text_hidden_size": 64,
}  # fmt: skip
# Fields that default to nothing and are needed.
NEEDED = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
# What a default config says for each of its many layers.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "moe_layers",
    "layers_block_type",
    "sliding_window_pattern",
    "per_layer_config",
    "num_attention_heads_per_layer",
    "kv_source_layers",
)


# What an architecture needs besides; values for a nested config stand under its name.
GEMMA = dict(
    enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=32, vocab_size_per_layer_input=320,
    hidden_size_per_layer_input=32, num_hidden_layers=4, num_kv_shared_layers=1, global_head_dim=32,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
STEP = dict(sliding_window=16, num_sliding_attention_heads=4, share_expert_dim=32, num_hidden_layers=4)
# One layer with a state, and one whose keys the cache holds: `generate` asks it for its length.
BOTH = ["linear_attention", "full_attention"]
INDEXED = dict(
    layer_types=BOTH, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16,
    indexer_compress_ratio=4,
)  # fmt: skip
MORE: dict[str, dict] = {
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=6, moe_top_k=2, hidden_size=64),
    ),
    "bailing_hybrid": dict(layer_group_size=2, num_hidden_layers=4),
    "beam": dict(num_hidden_layers=4),
    "flint": dict(num_hidden_layers=4),
    "gemma4_text": GEMMA,
    "gemma4": dict(text_config=GEMMA),
    "glm4v_moe": dict(text_config=dict(rope_parameters=MROPE)),
    "glm5_next": dict(
        text_config=dict(qk_rope_head_dim=0, head_dim=0, num_hidden_layers=4),
        vision_config=dict(projection_intermediate_size=64),
    ),
    "dots1": dict(n_group=1, topk_group=1, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2),
    "ernie4_5_vl_moe": dict(
        text_config=dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]})
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "hunyuan_v1_moe": dict(head_dim=16),
    "inkling2": dict(vision_config=dict(text_hidden_size=64)),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "kimi_linear": dict(layer_types=BOTH),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mistral4": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
    "muse_spark": dict(
        audio_config=dict(num_hidden_layers=4, out_hidden_size=64, hidden_sizes=[16] * 4), projector_hidden_size=64,
        out_hidden_size=64, text_config=dict(moe_hidden_size=64),
    ),
    "qwen3_5_moe": dict(text_config=dict(layer_types=BOTH)),
    "qwen3_5_moe_text": dict(layer_types=BOTH),
    "qwen3_next": dict(layer_types=BOTH),
    "qwen3_omni_moe_thinker": dict(
        vision_start_token_id=303, vision_end_token_id=304, audio_start_token_id=306, audio_end_token_id=307,
        position_id_per_seconds=25,
        audio_config=dict(
            encoder_attention_heads=4, encoder_layers=2, encoder_ffn_dim=64, output_dim=64, downsample_hidden_size=16,
            n_window=8,
        ),
        vision_config=dict(deepstack_visual_indexes=[0, 1]),
        text_config=dict(rope_parameters=MROPE),
    ),
    "qwen4_exp": dict(text_config=INDEXED),
    "qwen4_exp_text": INDEXED,
    "step3p7": dict(text_config=STEP),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=32, num_hidden_layers=3),
}  # fmt: skip


# Every mixture of experts in transformers that predicts text, by model type.
NAMES = """
afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe
glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
hunyuan_v1_moe hy_v3 hy_v4 inkling_mm_model inkling_text inkling2 inkling2_text jamba jetmoe kimi_linear kolibri1
laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
minimax_m3_vl_text mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text solar_open step3p7
unlimited_ocr zaya bamba doge
"""
SURVEY = NAMES.split()
# (step, reason) of those that are refused.
REFUSED = {"bamba": ("svd", "a dense model"), "doge": ("svd", "a dense model")}
# The rest of the survey: no class that predicts text from text (`class_for` says so), or nothing to try here.
NO_CLASS = ("openai_privacy_filter", "qwen3_omni_moe", "switch_transformers", "nllb-moe")
NOT_BUILT = {
    "openai_privacy_filter, vitpose_backbone": "classifiers: they predict no text",
    "switch_transformers, nllb_moe": "encoder and decoder: only decoders are read",
    "qwen3_omni_moe": "thinker and talker in one; the thinker (`qwen3_omni_moe_thinker`) is in the table",
    "diffusion_gemma": "predicts by diffusion, not token by token",
    "deepseek_ocr2, dots3_note (the composite one)": "no miniature could be built from its default config: untried",
}


def shrink(values: dict) -> dict:
    """A config's dict with small sizes; lists per layer are left out, so that the class fills them anew."""
    small = {}
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrink(value)
        elif key in PER_LAYER or key in ("architectures", "transformers_version", "dtype"):
            continue
        elif key in SMALL and (value is not None or key in NEEDED):
            small[key] = SMALL[key] if not isinstance(value, list) else [SMALL[key]] * len(value)
        else:
            small[key] = copy.deepcopy(value)
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def tiny_config(name: str):
    made = CONFIG_MAPPING[name]
    values = shrink(made().to_dict())
    more = dict(MORE.get(name, {}))
    for part in [k for k, v in values.items() if isinstance(v, dict) and isinstance(more.get(k), dict)]:
        values[part] |= more.pop(part)
    return made(**(values | more))


def tiny_architecture(name: str, dtype=torch.float32, seed: int = 0):
    """A random model of the architecture whose weights are large enough that experts matter."""
    config = tiny_config(name)
    torch.manual_seed(seed)
    model = native_class(type(config))._from_config(config).eval()
    enlarge(model)
    return model.to(dtype)
