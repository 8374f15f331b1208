"""The one reading of a model folder: config, tensors and ties as they are, before a weight is read."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.modeling_moesvd import MoesvdConfig, model_class
from .census import Census, take_census
from .experts import find_experts, weight_parameters
from .folder import class_for, read_config, require_routing, require_whole
from .headers import FLOATS, StoredTensor, read_headers, same_on_disk, signature
from .hf_internals import conversions, set_eager_experts, tied_weights
from .sources import take_dequantizer


@dataclass(frozen=True)
class Opened:
    """What a folder holds. config: as the tensors have it: its dtype is that of most weights, and it ties embeddings
    only where the files do not hold two that differ. quantizer: transformers' own, of a checkpoint that was published
    quantized. dtype: of the model, which is that of most of its weights."""

    folder: Path
    config: Any
    dtype: torch.dtype
    embedding_rows: int  # tokens that the model knows
    quantizer: Any
    mapping: list
    census: Census
    tensors: dict[str, StoredTensor]

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model on the meta device, as its class makes it in `dtype` (default: the model's own)."""
        return empty_model(copy.deepcopy(self.config), dtype or self.dtype)


def open_folder(folder: str | Path) -> Opened:
    """Reads what a model folder holds, and refuses what cannot be a whole model.

    Raises ModelError that names file and tensor: missing, damaged, misshapen, without a place in the model, quantized
    in a way that is not read.
    """
    folder = Path(folder)
    config = read_config(folder)  # says what is missing where this is no model
    require_whole(folder)
    return _open(folder, config.to_json_string(), signature(folder))


@lru_cache(maxsize=8)
def _open(folder: Path, described: str, signature: tuple) -> Opened:
    config = read_config(folder)
    try:
        quantizer = take_dequantizer(config)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from error
    tensors = read_headers(folder)
    dtype = _dtype_of(folder, config, quantizer, tensors)
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = dtype
    require_routing(folder, config)
    try:
        model = empty_model(config, dtype)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}: no model can be made of config.json: {error!r}") from error
    if not _fits_grouped_products(model):
        set_eager_experts(config)
    mapping = conversions(model, quantizer)
    census = take_census(folder, model, mapping, quantizer, tensors)
    if differing := _differing_ties(folder, model, census, tensors):
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
        model = empty_model(config, dtype)
        if still := sorted(set(differing) & set(tied_weights(model))):
            raise ModelError(
                f"{folder}: {still[0]} is tied to {differing[still[0]]} by the model's class, and the files hold "
                "different values for them"
            )
        census = take_census(folder, model, mapping, quantizer, tensors)
    rows = model.get_input_embeddings().weight.shape[0]
    return Opened(folder, config, dtype, rows, quantizer, mapping, census, tensors)


def empty_model(config, dtype: torch.dtype) -> nn.Module:
    """The model of a config on the meta device, in evaluation mode, as its class makes it in `dtype`."""
    with init_empty_weights(include_buffers=False), _NoValues():
        if isinstance(config, MoesvdConfig):
            made = model_class(config.moesvd["native_type"])._from_config(config, dtype=dtype)
        else:
            made = class_for(config)._from_config(config, dtype=dtype)
    return made.eval().requires_grad_(False)


# What torch and transformers draw and set first values by.
_FILLS = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "fill_", "zero_", "copy_"}


class _NoValues(TorchFunctionMode):
    """Tensors on the meta device get no first values: there is nothing to fill, and it would take half of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        filled = args[0] if args else given.get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **given)


def _fits_grouped_products(model: nn.Module) -> bool:
    """Whether transformers' grouped products take the experts: rows have to be multiples of 16 bytes, in 16 bit too."""
    native = [experts for _, experts in find_experts(model) if not isinstance(experts, FactorizedExperts)]
    fused = [weight for experts in native for weight in weight_parameters(experts) if weight.ndim == 3]
    return all(size % 8 == 0 for weight in fused for size in weight.shape[1:])


def _dtype_of(folder: Path, config, quantizer, tensors: dict[str, StoredTensor]) -> torch.dtype:
    """Of most weights. A checkpoint that is quantized, by us or as published, says it in its config."""
    said = config.dtype or config.get_text_config(decoder=True).dtype
    if said in FLOATS and (quantizer is not None or isinstance(config, MoesvdConfig)):
        return said
    counts = dict.fromkeys(FLOATS, 0)
    for tensor in tensors.values():
        if tensor.dtype in counts:
            counts[tensor.dtype] += tensor.numel
    if not any(counts.values()):
        raise ModelError(f"{folder}: has no tensor in floating point, and config.json has no dtype")
    return max(counts, key=lambda dtype: counts[dtype])


def _differing_ties(folder: Path, model, census: Census, tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """{parameter: the one that it is tied to} of ties that the config has and the files contradict."""
    found = {}
    for target, source in tied_weights(model).items():
        names = [*census.sources.get(target, []), *census.sources.get(source, [])]
        if len(names) > 1 and not (
            len(names) == 2 and same_on_disk(folder, tensors, names[0], folder, tensors, names[1])
        ):
            found[target] = source
    return found
