"""Random models of any size in the hub's format, written layer by layer: never more than one layer in memory."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moesvd_quant.model.hf_internals import no_loading_bars
from tiny import tiny_tokenizer

_COMMON = dict(
    vocab_size=32000,
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
# 50 M float32 parameters a layer, as Mixtral divides them (few wide experts) and as Qwen3-MoE does (many narrow ones).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=1792, num_local_experts=8, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            moe_intermediate_size=512, intermediate_size=4096, num_experts=32, num_experts_per_tok=4, head_dim=64,
            decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        ),
    ),
}  # fmt: skip


def synthetic(folder: Path, architecture: str, layers: int, dtype=torch.float32, **more) -> Path:
    """Writes a model of `layers` layers with a byte tokenizer; `more` goes to the config."""
    name, options = SHAPES[architecture]
    make = getattr(transformers, name)
    torch.manual_seed(0)
    kept: dict[str, Any] = {**_COMMON, **options, **more}
    folder.mkdir(parents=True)
    one = AutoModelForCausalLM.from_config(make(**kept, num_hidden_layers=1), dtype=torch.float32)
    with no_loading_bars():
        one.save_pretrained(folder / "one")
    del one
    with safe_open(folder / "one" / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    index: dict[str, str] = {}
    total = 0
    for layer in [*range(layers), None]:
        wanted = {k: s for k, s in shapes.items() if (".layers.0." in k) == (layer is not None)}
        made = {k.replace(".layers.0.", f".layers.{layer}."): _random(k, shape) for k, shape in wanted.items()}
        tensors = {k: tensor.to(dtype) for k, tensor in made.items()}
        file_name = f"model-{'outer' if layer is None else layer}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file_name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config = json.loads((folder / "one" / "config.json").read_text()) | {"num_hidden_layers": layers}
    config["dtype"] = str(dtype).removeprefix("torch.")
    for path in (folder / "one").iterdir():
        path.unlink()
    (folder / "one").rmdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_types"}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _random(name: str, shape: tuple) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape)
    scale = 1.0 if "embed" in name else 1 / math.sqrt(shape[-1])
    made = torch.randn(*shape) * scale
    if len(shape) == 2 and "embed" not in name:
        made *= torch.logspace(0, -1.5, shape[-1])  # trained weights are no white noise
    return made
