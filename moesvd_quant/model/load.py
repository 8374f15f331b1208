"""Opening a model folder, and nothing but what it says."""

from pathlib import Path
from typing import Any

import torch

from .modeling_moesvd import MoesvdConfig, MoesvdForCausalLM
from .sources import dequantizing
from .stream import ModelError, class_for, no_loading_bars, read_config, weight_files


def load(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu"):
    """Any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    Raises ModelError where the folder is no model or tensors are missing, unexpected, damaged or misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    weight_files(folder)
    kind: Any = MoesvdForCausalLM if isinstance(config, MoesvdConfig) else class_for(config)
    try:
        with no_loading_bars():
            how = {"quantization_config": found} if (found := dequantizing(config)) else {}
            model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **how)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[kind]:
            raise ModelError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
    return model.to(device).eval()
