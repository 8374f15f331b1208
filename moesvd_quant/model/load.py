"""Opening a model folder, and nothing but what it says."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .stream import ModelError, no_loading_bars, read_config, weight_files


def load(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu"):
    """Any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    Raises ModelError where the folder is no model or tensors are missing, unexpected, damaged or misshapen.
    """
    folder = Path(path)
    read_config(folder)
    weight_files(folder)
    try:
        with no_loading_bars():
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[kind]:
            raise ModelError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
    return model.to(device).eval()
