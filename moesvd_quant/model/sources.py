"""Checkpoints that are quantized as published (DeepSeek-V3 in FP8, GPT-OSS in MXFP4), read by transformers' own
dequantization, tensor by tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

READ = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


class _Fp8Dequantize(Fp8Dequantize):
    """Also right where the last block of a matrix is short: DeepSeek-V3's kv_a_proj_with_mqa has 576 rows, in 128s.
    transformers 5.23 takes the block size from the grid of scales, which refuses such a matrix or reads it wrongly."""

    def _dequantize_one(self, quantized, scales, output_dtype=None):
        block = self.hf_quantizer.quantization_config.weight_block_size
        rows, columns = quantized.shape[-2:]
        if block is None or scales.ndim < 2:
            return super()._dequantize_one(quantized, scales, output_dtype)
        missing = -rows % block[0], -columns % block[1]
        grid = (rows + missing[0]) // block[0], (columns + missing[1]) // block[1]
        if not any(missing) or tuple(scales.shape[-2:]) != grid:
            return super()._dequantize_one(quantized, scales, output_dtype)
        padded = F.pad(quantized.view(torch.uint8), (0, missing[1], 0, missing[0])).view(quantized.dtype)
        return super()._dequantize_one(padded, scales, output_dtype)[..., :rows, :columns]


def quantization_of(config) -> dict | None:
    """The `quantization_config` of a model's config, as a dict."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    return found if found is None or isinstance(found, dict) else found.to_dict()


def dequantizing(config) -> Any:
    """What to tell from_pretrained, so that a quantized checkpoint becomes floating point; None for a plain one.

    ValueError for a kind of quantization that cannot be read.
    """
    found = quantization_of(config)
    if found is None:
        return None
    kind = found.get("quant_method")
    if kind not in READ:
        raise ValueError(
            f"the weights are quantized ({kind}); besides 16 and 32 bit, {' and '.join(READ)} are read: "
            "give the unquantized model"
        )
    return READ[kind].from_dict(found | {"dequantize": True})


def take_dequantizer(config) -> Any:
    """transformers' quantizer for the checkpoint's tensors, and the config without its quantization; None for a plain
    one. ValueError as `dequantizing`."""
    how = dequantizing(config)
    if how is None:
        return None
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=True)
    if isinstance(how, FineGrainedFP8Config):
        quantizer.get_load_operations = lambda: {"dequantize": _Fp8Dequantize}
    return quantizer
