"""A matrix in few bits, and plain rounding to one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..model.packing import KINDS, SCALES, dequantize, pack, scale_levels
from .grid import largest_scale, whole_range

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


class Quantizer(NamedTuple):
    """How a matrix is quantized. inputs: all that there is to know of inputs with a Gram matrix (n, n), which serves
    every matrix that has them; pack: (matrix (out, n), inputs, {"bits", "group_size", "sym"}) -> PackedMatrix."""

    inputs: Callable
    pack: Callable


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


def storable(weight: torch.Tensor, quant: dict) -> torch.Tensor:
    """`largest_scale` of a matrix (out, in). QuantizeError where that cannot be stored."""
    base = largest_scale(weight, quant)
    if not torch.isfinite(base):
        raise QuantizeError("the matrix has values that are not finite")
    if base > FP16_MAX:
        raise QuantizeError(f"a scale of {float(base):.3g} overflows fp16")
    return base


def packed_matrix(codes, scale, zero, base, quant: dict) -> PackedMatrix:
    """codes (out, in) uint8; scale, which can be stored, and zero (out, groups) float32; base: of `largest_scale`."""
    tensors = {
        "codes": pack(codes, quant["bits"]),
        "scales": scale_levels(scale, base),
        "base": base.reshape(1).view(torch.int32),
    }
    if not quant["sym"]:
        tensors["zeros"] = pack(zero.to(torch.uint8).flatten(), quant["bits"])
    return PackedMatrix(tensors, quant, codes.shape[1])


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, quant: dict) -> PackedMatrix:
    """Plain rounding of (out, in) on the min-max grid of each group: the baseline that GPTQ has to beat."""
    weight = weight.float()
    base, size, top = storable(weight, quant), quant["group_size"], 2 ** quant["bits"] - 1
    grids = [whole_range(group, base, quant) for group in weight.T.split(size)]
    scale, zero = (torch.stack(found, 1) for found in zip(*grids))
    index = torch.arange(weight.shape[1], device=weight.device) // size
    codes = ((weight / scale[:, index]).round() + zero[:, index]).clamp(0, top).to(torch.uint8)
    return packed_matrix(codes, scale, zero, base, quant)
