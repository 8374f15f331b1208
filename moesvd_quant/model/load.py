"""Opening a model folder, and nothing but what it says."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ..runtime.modeling_moesvd import MoesvdConfig
from .folder import ModelError, class_for, read_config, weight_files
from .sources import dequantizing
from .stream import StreamedModel
from .weights import no_loading_bars


def load(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu", **placement):
    """Any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    placement: `device_map` ("auto", or where each module goes), `max_memory`, `offload_folder`, as transformers and
    accelerate have them, in place of `device`: layers that do not fit wait in main memory or on disk.

    Raises ModelError where the folder is no model or tensors are missing, unexpected, damaged or misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    weight_files(folder)
    try:
        if dequantizing(config) is not None:
            if placement:
                raise ModelError(f"{folder}: is quantized as published; device_map works on plain checkpoints and ours")
            return _load_dequantized(folder, dtype, device)
        kind: Any = AutoModelForCausalLM if isinstance(config, MoesvdConfig) else class_for(config)
        with no_loading_bars():
            model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **placement)
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[name]:
            raise ModelError(f"{folder}: {name.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
    return model.eval() if placement.get("device_map") else model.to(device).eval()


def _load_dequantized(folder: Path, dtype, device: str):
    """A model whose files are quantized as published, in floating point: all layers of the streamed reader."""
    streamed = StreamedModel(folder, None if dtype == "auto" else dtype, device)
    streamed.load_outer()
    for index in range(len(streamed.layer_names)):
        streamed.load_layer(index)
    if (folder / "generation_config.json").is_file():
        streamed.model.generation_config = GenerationConfig.from_pretrained(folder)
    return streamed.model
