"""Opening a model folder, and nothing but what it says."""

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ..runtime.modeling_moesvd import MoesvdConfig
from ..runtime.stored import Stored
from .folder import ModelError, class_for
from .hf_internals import no_loading_bars
from .opened import open_folder
from .stream import StreamedModel


def load(path: str | Path, dtype: Literal["auto"] | torch.dtype = "auto", device: str = "cpu", **placement):
    """Any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    dtype: of its weights; `auto` is that of most tensors in the files, whatever the config says. What transformers
    keeps in float32 stays in float32. placement: `device_map` ("auto", or where each module goes), `max_memory`,
    `offload_folder`, as transformers and accelerate have them, in place of `device`: layers that do not fit wait in
    main memory or on disk.

    Raises ModelError where the folder is no model or tensors are missing, unexpected, damaged or misshapen.
    """
    opened = open_folder(path)
    folder, config = opened.folder, copy.deepcopy(opened.config)
    wanted = opened.dtype if dtype == "auto" else dtype
    if opened.quantizer is not None:
        if placement:
            raise ModelError(f"{folder}: is quantized as published; device_map works on plain checkpoints and ours")
        return _load_dequantized(folder, dtype, device)
    kind: Any = AutoModelForCausalLM if isinstance(config, MoesvdConfig) else class_for(config)
    try:
        with no_loading_bars():
            model, info = kind.from_pretrained(
                folder, config=config, dtype=wanted, output_loading_info=True, trust_remote_code=False, **placement
            )
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[name]:
            raise ModelError(f"{folder}: {name.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
    model = model.eval() if placement.get("device_map") else model.to(device).eval()
    for name in without_kernel(model):  # where its weights are now
        _say_slow(name, model.device.type)
    return model


def _load_dequantized(folder: Path, dtype, device: str):
    """A model whose files are quantized as published, in floating point: all layers of the streamed reader."""
    streamed = StreamedModel(folder, dtype, device)
    streamed.load_outer()
    for index in range(len(streamed.layer_names)):
        streamed.load_layer(index)
    if (folder / "generation_config.json").is_file():
        streamed.model.generation_config = GenerationConfig.from_pretrained(folder)
    return streamed.model


def without_kernel(model) -> list[str]:
    """The packed formats of a loaded model that are dequantized for each product, because no kernel on this machine
    multiplies with them as they are stored."""
    slow = set()
    for module in model.modules():
        for name, form in module.formats.items() if isinstance(module, Stored) else ():
            stored = module.bank_tensors(name)
            device = next(iter(stored.values())).device
            x = torch.empty(1, module.bank_shapes[name][1], dtype=model.dtype, device=device)
            waits = device.type == "meta"  # on disk until it is its turn
            if form.packed and not waits and not form.has_kernel(stored, x):
                slow.add(form.name)
    return sorted(slow)


@cache
def _say_slow(form: str, device: str) -> None:
    logging.getLogger(__name__).warning(
        "no kernel on this machine (%s) for weights stored as %s: each product first makes the whole matrix, which is "
        "slow",
        device,
        form,
    )
