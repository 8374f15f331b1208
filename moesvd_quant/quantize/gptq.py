"""GPTQ through gptqmodel's core, driven by our own Gram matrices. The only module that imports gptqmodel."""

import contextlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ..model.packing import KINDS, SCALES, STEPS, dequantize, pack, scale_levels, unpack

FP16_MAX = 65504.0
# Each group's range is clipped where the sum of |error|^GRID_NORM is least; 3-bit GPTQ then loses a fifth less.
GRID_NORM = 2.4


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
        """Scales are rounded to what can be stored before anything is quantized with them."""

        base: torch.Tensor
        scale: torch.Tensor
        zero: torch.Tensor

        def find_params(self, x, weight=False):
            super().find_params(x, weight)
            found = self.scale
            self.scale = on_grid(found, self.base, self.qcfg.bits)
            if not self.qcfg.sym:  # the range stays where it was
                self.zero = (self.zero * found / self.scale).round().clamp(0, self.maxq)

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
        mse=GRID_NORM,
        offload_to_disk=False,
    )
    core = GPTQ(linear, qcfg=config)
    core.quantizer.configure(perchannel=True, bits=quant["bits"], sym=quant["sym"])
    core.quantizer.__class__, core.quantizer.base = OnGrid, _largest_scale(linear.weight.data, quant)
    # The core first searches a grid for the whole matrix, which static groups never use: half of the search.
    core.quantizer.find_params = lambda *_, **__: delattr(core.quantizer, "find_params")
    core.H = _scaled(gram).to(weight.device)
    core.nsamples = columns + 1  # of the Gram matrix' scale nothing depends; zero would mean rounding
    core._hessian_dirty = False
    dense, scale, zero, *_ = core.quantize()
    return pack_matrix(dense.float(), scale.float(), zero.float(), core.quantizer.base, quant)


def on_grid(scale: torch.Tensor, base: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest scales that can be stored under a base; at 8 bits the next larger ones, since clipping by a few
    percent would cost more than all rounding does."""
    exact = (base / scale).log2() * STEPS
    levels = (exact.floor() if bits == 8 else exact.round()).clamp(0, len(SCALES) - 1)
    return SCALES.to(scale.device)[levels.int()] * base


def _largest_scale(weight: torch.Tensor, quant: dict) -> torch.Tensor:
    """() float32: at least as large as the scale of any group of a matrix."""
    low, high = (-weight.min()).clamp(min=0), weight.max().clamp(min=0)
    span = 2 * torch.maximum(low, high) if quant["sym"] else low + high
    flat = torch.tensor(2.0, device=weight.device)  # the range that a group of zeros is given
    return torch.where(span > 0, span, flat) / (2 ** quant["bits"] - 1)


def round_to_nearest(weight: torch.Tensor, quant: dict) -> PackedMatrix:
    """Plain rounding on the min-max grid of each group: the baseline that GPTQ has to beat."""
    weight, size, top = weight.float(), quant["group_size"], 2 ** quant["bits"] - 1
    base = _largest_scale(weight, quant)
    scales, zeros = [], []
    for group in weight.split(size, dim=1):
        low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        if quant["sym"]:
            high = torch.maximum(-low, high)
            low = -high
        flat = low == high
        low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
        scale = on_grid((high - low) / top, base, quant["bits"])
        scales.append(scale)
        zeros.append(torch.full_like(scale, (top + 1) / 2) if quant["sym"] else (-low / scale).round())
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    return pack_matrix(weight, scale, zero, base, quant)


def pack_matrix(dense, scale, zero, base, quant) -> PackedMatrix:
    """Codes of `dense` (out, in) on the grid of scale (of `on_grid`) and zero (out, groups), all float32, packed."""
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
