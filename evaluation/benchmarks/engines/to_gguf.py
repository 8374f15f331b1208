"""A Mixtral folder of Hugging Face as a GGUF file in float32, without a tokenizer: engines are given tokens here."""

import json
from pathlib import Path

import gguf
import numpy as np

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERT = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def convert(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights, heads, kv = read(folder), config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(width := weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // heads)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, own in OUTER.items():
        if f"{name}.weight" in weights:
            writer.add_tensor(f"{own}.weight", weights[f"{name}.weight"])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, own in LAYER.items():
            tensor = weights[f"{prefix}.{name}.weight"]
            if own in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, heads if own == "attn_q" else kv)
            writer.add_tensor(f"blk.{layer}.{own}.weight", tensor)
        for name, own in EXPERT.items():
            each = range(config["num_local_experts"])
            bank = np.stack([weights[f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight"] for e in each])
            writer.add_tensor(f"blk.{layer}.{own}.weight", bank)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of llama.cpp's rotary embedding, which turns neighbours and not halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def read(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a folder's safetensors files in float32. They may be bfloat16, which numpy does not know."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, about in json.loads(content[8:begin]).items():
            if name == "__metadata__":
                continue
            raw = content[slice(*(begin + at for at in about["data_offsets"]))]
            found[name] = as_float(raw, about["dtype"]).reshape(about["shape"])
    return found


def as_float(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F32":
        return np.frombuffer(raw, np.float32)
    raise SystemExit(f"{dtype}: only BF16 and F32 are converted")
