"""Grids of groups of weights, as GPTQ has them: 2, 3, 4 or 8 bits. A copy lies in every checkpoint."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .formats import Format, register
from .grid_kernels import products, usable
from .numba_here import on_gpu
from .packing import unpack

STEPS = 16  # levels of scales to an octave
SCALES = torch.tensor([2.0 ** (-level / STEPS) for level in range(256)])  # a table, so that all routes give equal bits


def scale_levels(scale: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """uint8 level of each scale (at most base): the nearest of base * SCALES, in the logarithm."""
    return ((base / scale).log2() * STEPS).round().clamp(0, 255).to(torch.uint8)


@register
@dataclass(frozen=True)
class Grid(Format):
    """(code - zero) * scale, with a scale and a zero for each group of `group_size` columns (the last may be short).

    Tensors: codes uint8 (..., rows, packed); scales uint8 (..., rows, groups), levels of SCALES below the matrix's
    base; base int32 (..., 1), the bits of an fp32; zeros packed along rows and groups together, none where `sym` (the
    zero is then 2**(bits-1)).
    """

    name: ClassVar[str] = "grid"
    trained: ClassVar[str | None] = "scales"

    bits: int
    group_size: int
    sym: bool

    def __str__(self) -> str:
        return f"{self.bits} bit"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        groups = -(-columns // self.group_size)
        tensors = {
            "codes": ((*lead, rows, -(-columns // 8) * self.bits), torch.uint8),
            "scales": ((*lead, rows, groups), torch.uint8),
            "base": ((*lead, 1), torch.int32),
        }
        if not self.sym:
            tensors["zeros"] = ((*lead, -(-rows * groups // 8) * self.bits), torch.uint8)
        return tensors

    def scale(self, stored: dict) -> torch.Tensor:
        """The step of each group, (..., rows, groups) float32."""
        scales = stored["scales"]
        below = torch.exp(-scales) if scales.is_floating_point() else SCALES.to(scales.device)[scales.int()]
        return below * stored["base"].view(torch.float32).unsqueeze(-1)

    def dequantize(self, stored, shape, dtype):
        columns = shape[1]
        codes, scale = stored["codes"], self.scale(stored).unsqueeze(-1)
        bits, size, (rows, groups) = self.bits, self.group_size, stored["scales"].shape[-2:]
        zero: Any = 2 ** (bits - 1)
        if not self.sym:
            zero = unpack(stored["zeros"], bits, rows * groups).unflatten(-1, (rows, groups)).float().unsqueeze(-1)
        value = F.pad(unpack(codes, bits, columns).float(), (0, groups * size - columns)).unflatten(-1, (groups, size))
        return ((value - zero) * scale).flatten(-2)[..., :columns].to(dtype)

    def has_kernel(self, stored, x):
        return usable(self, stored, x)

    def products(self, stored, shape, x, sizes):
        if on_gpu(x, stored["codes"], sizes):
            from .grid_triton import products as by_triton

            return by_triton(self, stored, x, sizes, SCALES)
        if x.is_cuda or not self.has_kernel(stored, x):
            return super().products(stored, shape, x, sizes)
        return products(self, stored, shape[1], x, sizes, SCALES)

    def trainable(self, tensor):
        """-log(scale / base) of levels."""
        return tensor.float() * (math.log(2) / STEPS)

    def stored(self, trained):
        return scale_levels(torch.exp(-trained), torch.ones((), device=trained.device))

    def random(self, kind, tensor, generator):
        if kind == "base":
            tensor.view(torch.float32).fill_(0.01)
        else:
            super().random(kind, tensor, generator)
