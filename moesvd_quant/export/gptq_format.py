"""Packed matrices in the format that GPTQ's kernels read. The only module that imports gptqmodel."""

import contextlib
import io
import os
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..quantize.codec import PackedMatrix, QuantizeError
from ..runtime.grids import Grid


@lru_cache
def _gptqmodel() -> Any:
    """It prints a banner, sets environment variables and takes seconds to import."""
    os.environ.setdefault("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        import gptqmodel.nn_modules.qlinear.torch
        import gptqmodel.utils.model
    return gptqmodel


def to_standard(packed: PackedMatrix, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales, g_idx (and bias) of the GPTQ format v1, as gptqmodel packs them.

    packed: on a symmetric grid, in multiples of 32 and whole groups. QuantizeError where its scales do not fit.
    """
    form, (out, columns) = packed.form, packed.shape
    assert isinstance(form, Grid) and form.sym
    scale = form.scale(packed.tensors)
    if scale.half().min() == 0:
        raise QuantizeError("a scale underflows fp16, which the GPTQ format stores")
    zero = torch.full_like(scale, 2.0 ** (form.bits - 1))
    linear = nn.Linear(columns, out, bias=bias is not None)
    linear.weight.data = packed.dense(torch.float32)
    if bias is not None:
        linear.bias.data = bias.float()
    gptqmodel = _gptqmodel()
    kind = {"bits": form.bits, "group_size": form.group_size}
    module = gptqmodel.nn_modules.qlinear.torch.TorchLinear(
        **kind, sym=True, desc_act=False, in_features=columns, out_features=out, bias=bias is not None
    )
    index = torch.arange(columns, dtype=torch.int32) // form.group_size
    module.pack_block(linear, scale, zero, index)
    config = gptqmodel.quantization.GPTQConfig(**kind, offload_to_disk=False)
    gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module(module, config)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
