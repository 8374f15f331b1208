"""The interfaces of transformers that are not public: what reading a model needs of them.

`tests/model/test_hf_internals.py` holds what is expected of them. No other file imports these.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

__all__ = ["revert_weight_conversion"]


def conversions(model: nn.Module, quantizer=None) -> list:
    """How tensors on disk become parameters of the model's class: transformers' renamings and converters."""
    return get_model_conversion_mapping(model, None, quantizer)


def renamed(names, model: nn.Module, mapping: list) -> Iterator[tuple[str, list[str], bool]]:
    """(name on disk, parameters of the model that it goes to, whether its values are converted on the way), in the
    order in which transformers renames."""
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    outputs = {source: m.target_patterns for m in converters for source in m.source_patterns}
    meta, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        made = outputs[pattern] if pattern is not None else []
        yield name, [target, *(target.replace(made[0], other) for other in made[1:])], pattern is not None


def fill(model: nn.Module, tensors: dict[str, Any], mapping: list, dtype, device, quantizer=None):
    """Loads tensors, or slices of them, by their names on disk; each becomes the dtype of its parameter. Returns
    transformers' record of keys that are missing, unexpected, misshapen or not convertible."""
    how = LoadStateDictConfig(
        weight_mapping=deepcopy(mapping), device_map={"": device}, dtype=dtype, hf_quantizer=quantizer
    )
    with no_loading_bars(), _one_tensor_at_a_time():
        return convert_and_load_state_dict_in_model(model, tensors, how)[0]


def ignored_missing(model: nn.Module, name: str) -> bool:
    """Whether the class expects that this parameter may not be on disk."""
    return _matches(getattr(model, "_keys_to_ignore_on_load_missing", None), name)


def ignored_unexpected(model: nn.Module, name: str) -> bool:
    """Whether the class knows that checkpoints have this tensor, and does not use it."""
    patterns = {*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())}
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return _matches(patterns, name)


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern | None:
    """What matches the parameters that transformers keeps in float32 in a model of `dtype`; None for none."""
    plan = model._get_dtype_plan(dtype)
    return build_glob_alternation(list(plan))[0] if plan else None


def set_eager_experts(config) -> None:
    """Models of this config compute experts one by one, which takes matrices of any size."""
    config._experts_implementation = "eager"


def tied_weights(model: nn.Module) -> dict[str, str]:
    """{parameter: the one that it shares its tensor with}, by the config of the model."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _matches(patterns, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


@contextmanager
def no_loading_bars():
    """transformers draws a bar for each call that reads or writes weights, which is one for each layer here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_tensor_at_a_time():
    """transformers reads all tensors ahead by threads otherwise: one more layer in memory."""
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})
