"""GPTQ through gptqmodel's core, driven by our own Gram matrices. The only module that imports gptqmodel."""

import contextlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ..model.packing import KINDS, SCALES, dequantize, pack, scale_levels, unpack
from .grid import Grids, largest_scale, whole_range
from .noise import innovations

FP16_MAX = 65504.0


class QuantizeError(ValueError):
    """A matrix that cannot be quantized as asked; the message says why."""


@dataclass
class PackedMatrix:
    """A quantized (out, in) matrix in our packing. tensors: see `dequantize`."""

    tensors: dict[str, torch.Tensor]
    quant: dict
    columns: int

    def dense(self, dtype=torch.float64) -> torch.Tensor:
        codes, scales, base, zeros = map(self.tensors.get, KINDS)
        return dequantize(codes, scales, base, zeros, self.quant, self.columns, dtype)

    def scale(self) -> torch.Tensor:
        """(out, groups) float32."""
        return SCALES[self.tensors["scales"].int()] * self.tensors["base"].view(torch.float32)


@lru_cache
def _core():
    """gptqmodel's classes. It prints a banner, sets environment variables and takes seconds to import."""
    os.environ.setdefault("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        from gptqmodel.quantization import GPTQ, GPTQConfig
        from gptqmodel.quantization.quantizer import Quantizer

    class OnGrid(Quantizer):
        """Its grids are found beforehand."""

        grids: Grids

        def find_params(self, x, weight=False):
            self.scale, self.zero = (found.unsqueeze(1) for found in self.grids.next())

    return GPTQ, GPTQConfig, OnGrid


def resolve_group_size(group_size: int | str, columns: int, rank_axis: bool = False) -> int:
    """`auto`: the largest of 128, 64, 32 that divides; along a rank axis at most the rank, the last group may
    be short. QuantizeError where an explicit size does not divide an input dimension."""
    if group_size == "auto":
        if rank_axis:
            return min(64, columns)
        return next((size for size in (128, 64, 32) if columns % size == 0), columns)
    if rank_axis:
        return min(int(group_size), columns)
    if columns % int(group_size):
        raise QuantizeError(f"group_size {group_size} does not divide {columns} input features; use auto")
    return int(group_size)


def quant_format(options, columns: int, rank_axis: bool, bits: int) -> dict:
    """The layout's description of a packed bank with this many columns; `options` are those of stage gptq."""
    return {"bits": bits, "group_size": resolve_group_size(options.group_size, columns, rank_axis), "sym": options.sym}


def gptq(weight: torch.Tensor, gram: torch.Tensor, quant: dict, damp: float) -> PackedMatrix:
    """Quantizes weight (out, in) for inputs with Gram matrix gram (in, in).

    quant: {"bits", "group_size", "sym"}; columns go in order of activation, with group parameters fixed
    beforehand (static groups), so that no index is stored. QuantizeError where the Hessian cannot be
    inverted or a scale leaves the range of fp16.
    """
    GPTQ, GPTQConfig, OnGrid = _core()
    out, columns = weight.shape
    linear = nn.Linear(columns, out, bias=False, device=weight.device)
    linear.weight.data = weight.float().clone()
    config = GPTQConfig(
        bits=quant["bits"],
        group_size=quant["group_size"],
        sym=quant["sym"],
        desc_act=True,
        act_group_aware=False,
        static_groups=True,
        damp_percent=damp,
        offload_to_disk=False,
    )
    core = GPTQ(linear, qcfg=config)
    core.quantizer.configure(perchannel=True, bits=quant["bits"], sym=quant["sym"])
    core.H = _scaled(gram).to(weight.device)
    base = largest_scale(linear.weight.data, quant)
    core.quantizer.__class__ = OnGrid
    core.quantizer.grids = Grids(linear.weight.data, innovations(core.H, damp), base, quant)
    # The core first asks for a grid for the whole matrix, which static groups never use.
    core.quantizer.find_params = lambda *_, **__: delattr(core.quantizer, "find_params")
    core.nsamples = columns + 1  # of the Gram matrix' scale nothing depends; zero would mean rounding
    core._hessian_dirty = False
    dense, scale, zero, *_ = core.quantize()
    return pack_matrix(dense.float(), scale.float(), zero.float(), base, quant)


def round_to_nearest(weight: torch.Tensor, quant: dict) -> PackedMatrix:
    """Plain rounding on the min-max grid of each group: the baseline that GPTQ has to beat."""
    weight = weight.float()
    base = largest_scale(weight, quant)
    grids = [whole_range(group, base, quant) for group in weight.split(quant["group_size"], dim=1)]
    scale, zero = (torch.stack(found, 1) for found in zip(*grids))
    return pack_matrix(weight, scale, zero, base, quant)


def pack_matrix(dense, scale, zero, base, quant) -> PackedMatrix:
    """Codes of `dense` (out, in) on the grid of scale (out, groups), which can be stored, and zero; float32, packed."""
    columns, size, top = dense.shape[1], quant["group_size"], 2 ** quant["bits"] - 1
    if not torch.isfinite(dense).all() or not torch.isfinite(scale).all():
        raise QuantizeError("quantization gave values that are not finite")
    if scale.max() > FP16_MAX:
        raise QuantizeError(f"a scale of {float(scale.max()):.3g} overflows fp16")
    levels = scale_levels(scale, base)
    scale = SCALES.to(scale.device)[levels.int()] * base
    index = torch.arange(columns, device=dense.device) // size
    codes = (dense / scale[:, index] + zero[:, index]).round().clamp(0, top).to(torch.uint8)
    tensors = {"codes": pack(codes, quant["bits"]), "scales": levels, "base": base.reshape(1).view(torch.int32)}
    if not quant["sym"]:
        tensors["zeros"] = pack(zero.round().clamp(0, top).to(torch.uint8).flatten(), quant["bits"])
    return PackedMatrix(tensors, quant, columns)


def _scaled(gram: torch.Tensor) -> torch.Tensor:
    """gram in float32 with a mean diagonal of 1, symmetric: far from under- and overflow."""
    gram = gram.double()
    gram = (gram + gram.T) / 2
    mean = gram.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise QuantizeError("the Gram matrix of the inputs is zero or not finite")
    return (gram / mean).float()


def to_standard(packed: PackedMatrix, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales, g_idx (and bias) of the GPTQ format v1, as gptqmodel packs them.

    QuantizeError where the format cannot hold the matrix.
    """
    _core()
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    quant, columns, out = packed.quant, packed.columns, packed.tensors["scales"].shape[0]
    if columns % 32 or out % 32 or columns % quant["group_size"]:
        raise QuantizeError(f"the GPTQ format needs multiples of 32 and whole groups, the matrix is {out} x {columns}")
    scale = packed.scale()
    if scale.half().min() == 0:
        raise QuantizeError("a scale underflows fp16, which the GPTQ format stores")
    if quant["sym"]:
        zero = torch.full_like(scale, 2.0 ** (quant["bits"] - 1))
    else:
        zero = unpack(packed.tensors["zeros"], quant["bits"], scale.numel()).view_as(scale).float()
        if (zero == 0).any():
            raise QuantizeError("a zero point of 0 cannot be stored in the GPTQ format v1; quantize with sym: true")
    linear = nn.Linear(columns, out, bias=bias is not None)
    linear.weight.data = packed.dense(torch.float32)
    if bias is not None:
        linear.bias.data = bias.float()
    kind = dict(bits=quant["bits"], group_size=quant["group_size"], sym=quant["sym"], desc_act=False)
    module = TorchLinear(**kind, in_features=columns, out_features=out, bias=bias is not None)
    index = torch.arange(columns, dtype=torch.int32) // quant["group_size"]
    module.pack_block(linear, scale, zero, index)
    _, GPTQConfig, _ = _core()
    convert_gptq_v2_to_v1_format_module(
        module, GPTQConfig(bits=quant["bits"], group_size=quant["group_size"], offload_to_disk=False)
    )
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
