"""Opening a model folder, and nothing but what it says."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .modeling_moesvd import MoesvdConfig
from .sources import dequantizing
from .stream import ModelError, class_for, no_loading_bars, read_config, weight_files


def load(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu", **placement):
    """Any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    placement: `device_map` ("auto", or where each module goes), `max_memory`, `offload_folder`, as transformers and
    accelerate have them, in place of `device`: layers that do not fit wait in main memory or on disk.

    Raises ModelError where the folder is no model or tensors are missing, unexpected, damaged or misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    weight_files(folder)
    kind: Any = AutoModelForCausalLM if isinstance(config, MoesvdConfig) else class_for(config)
    try:
        with no_loading_bars():
            how = {"quantization_config": found} if (found := dequantizing(config)) else {}
            model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **how, **placement)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[kind]:
            raise ModelError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
    return model.eval() if placement.get("device_map") else model.to(device).eval()
