"""Plain rounding to a grid, and what all ways to a grid share."""

import torch

from ..runtime.grids import Grid, scale_levels
from ..runtime.packing import pack
from .codec import PackedMatrix, QuantizeError
from .grid import largest_scale, whole_range

FP16_MAX = 65504.0


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


def storable(weight: torch.Tensor, form: Grid) -> torch.Tensor:
    """`largest_scale` of a matrix (out, in). QuantizeError where that cannot be stored."""
    base = largest_scale(weight, form)
    if not torch.isfinite(base):
        raise QuantizeError("the matrix has values that are not finite")
    if base > FP16_MAX:
        raise QuantizeError(f"a scale of {float(base):.3g} overflows fp16")
    return base


def packed_matrix(codes, scale, zero, base, form: Grid) -> PackedMatrix:
    """codes (out, in) uint8; scale, which can be stored, and zero (out, groups) float32; base: of `largest_scale`."""
    tensors = {
        "codes": pack(codes, form.bits),
        "scales": scale_levels(scale, base),
        "base": base.reshape(1).view(torch.int32),
    }
    if not form.sym:
        tensors["zeros"] = pack(zero.to(torch.uint8).flatten(), form.bits)
    return PackedMatrix(tensors, form, (codes.shape[0], codes.shape[1]))


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, form: Grid) -> PackedMatrix:
    """Plain rounding of (out, in) on the min-max grid of each group: the baseline that GPTQ has to beat."""
    weight = weight.float()
    base, size, top = storable(weight, form), form.group_size, 2**form.bits - 1
    grids = [whole_range(group, base, form) for group in weight.T.split(size)]
    scale, zero = (torch.stack(found, 1) for found in zip(*grids))
    index = torch.arange(weight.shape[1], device=weight.device) // size
    codes = ((weight / scale[:, index]).round() + zero[:, index]).clamp(0, top).to(torch.uint8)
    return packed_matrix(codes, scale, zero, base, form)
