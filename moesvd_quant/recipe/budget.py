"""Budgets as people write them."""

import re
from typing import Literal, NamedTuple

from ..errors import UsageError


class Budget(NamedTuple):
    """amount in bytes of all files ("bytes"), or in bits per original expert weight ("bpw")."""

    amount: float
    unit: Literal["bytes", "bpw"]


UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}


def parse_budget(text: str) -> Budget:
    """`20GB`, `512MiB`, `1.5bpw`; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = found[2].upper() if found else ""
    if not found or float(found[1]) <= 0 or (unit != "BPW" and unit not in UNITS):
        raise UsageError(f"{text!r} is no budget; write bytes (20GB, 512MiB) or bits per expert weight (1.5bpw)")
    return Budget(float(found[1]), "bpw") if unit == "BPW" else Budget(float(found[1]) * UNITS[unit], "bytes")


def kv_cache_bytes(config, context: int, batch: int, item_bytes: int) -> int:
    """Bytes of the keys and values that transformers caches for `batch` sequences of `context` tokens.

    config: of the (text) model. Layers with a sliding window keep no more than that; latent attention (DeepSeek) is
    cached compressed. A recurrent layer counts as an attention layer: an upper bound.
    """
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        width = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    tokens = sum(min(context, window) if kind == "sliding_attention" and window else context for kind in kinds)
    return tokens * width * batch * item_bytes
