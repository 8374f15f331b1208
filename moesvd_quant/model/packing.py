"""Banks of weights packed in 2, 3, 4 or 8 bits. A copy lies in every checkpoint.

All that is packed is integers, so that no cast of the model can touch it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("codes", "scales", "base", "zeros")  # tensors of a packed bank, see `dequantize`
STEPS = 16  # levels of scales to an octave
SCALES = torch.tensor([2.0 ** (-level / STEPS) for level in range(256)])  # a table, so that all routes give equal bits


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values (..., n) below 2**bits -> uint8 (..., ceil(n/8)*bits): eight values fill `bits` bytes."""
    values = F.pad(values, (0, -values.shape[-1] % 8))
    if bits == 8:
        return values
    values = values.unflatten(-1, (-1, 8))
    word = sum(values[..., i].int() << i * bits for i in range(8)).unsqueeze(-1)
    shift = torch.arange(bits, device=values.device, dtype=torch.int32) * 8
    return (word >> shift & 255).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 (..., n)."""
    if bits == 8:
        return packed[..., :n]
    if bits in (2, 4):  # values do not cross bytes
        shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return (packed.unsqueeze(-1) >> shift & (1 << bits) - 1).flatten(-2)[..., :n]
    parts = packed.unflatten(-1, (-1, bits)).int()
    word = sum(parts[..., i] << 8 * i for i in range(bits))
    shift = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    return (word.unsqueeze(-1) >> shift & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :n]


def scale_levels(scale: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """uint8 level of each scale (at most base): the nearest of base * SCALES, in the logarithm."""
    return ((base / scale).log2() * STEPS).round().clamp(0, 255).to(torch.uint8)


def trainable_scales(levels: torch.Tensor) -> torch.Tensor:
    """float32 in place of the levels of scales, which `dequantize` takes as well: -log(scale / base)."""
    return levels.float() * (math.log(2) / STEPS)


def stored_scales(trained: torch.Tensor) -> torch.Tensor:
    """The levels nearest to `trainable_scales`, which may have changed."""
    return scale_levels(torch.exp(-trained), torch.ones((), device=trained.device))


def dequantize(codes, scales, base, zeros, quant: dict, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(codes - zero) * scale per group of `group_size` columns (the last one may be short).

    codes uint8 (..., rows, packed); scales uint8 (..., rows, groups), levels of SCALES below the matrix's base, or
    float32 while they are trained (`trainable_scales`); base int32 (..., 1), the bits of fp32; zeros packed along rows
    and groups together, or None where symmetric (zero = 2**(bits-1)). Returns (..., rows, columns) in `dtype`.
    """
    bits, size, (rows, groups) = quant["bits"], quant["group_size"], scales.shape[-2:]
    below = torch.exp(-scales) if scales.is_floating_point() else SCALES.to(scales.device)[scales.int()]
    scale = (below * base.view(torch.float32).unsqueeze(-1)).unsqueeze(-1)
    zero: Any = 2 ** (bits - 1)
    if zeros is not None:
        zero = unpack(zeros, bits, rows * groups).unflatten(-1, (rows, groups)).float().unsqueeze(-1)
    value = F.pad(unpack(codes, bits, columns).float(), (0, groups * size - columns)).unflatten(-1, (groups, size))
    return ((value - zero) * scale).flatten(-2)[..., :columns].to(dtype)


def bank_tensors(name: str, shape: tuple, quant: dict | None, dtype: torch.dtype) -> dict:
    """Tensors that store a bank of `shape` (..., rows, columns): {name: (shape, dtype)}."""
    if quant is None:
        return {name: (tuple(shape), dtype)}
    *lead, rows, columns = shape
    bits, groups = quant["bits"], -(-columns // quant["group_size"])
    tensors = {
        f"{name}_codes": ((*lead, rows, -(-columns // 8) * bits), torch.uint8),
        f"{name}_scales": ((*lead, rows, groups), torch.uint8),
        f"{name}_base": ((*lead, 1), torch.int32),
    }
    if not quant["sym"]:
        tensors[f"{name}_zeros"] = ((*lead, -(-rows * groups // 8) * bits), torch.uint8)
    return tensors


class Packed(nn.Module):
    """Base of modules whose weights are float or packed banks."""

    def add_bank(self, name, shape, quant, dtype, device):
        for key, (size, kind) in bank_tensors(name, shape, quant, dtype).items():
            tensor = torch.empty(size, dtype=kind, device=device)
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=kind.is_floating_point))

    @property
    def device(self):
        """Of its tensors; what lost all of them is nowhere, and its zeros may be anywhere."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def weight_rows(self, name: str, quant: dict | None, columns: int, dtype: torch.dtype, row: int | None):
        """Bank `name` (row None) or one row of it, dequantized into `dtype` where it is packed."""
        if quant is None:
            bank = getattr(self, name)  # an adapter may stand in front of the parameter
            return (bank if row is None else bank[row]).to(dtype)
        stored = [self._parameters.get(f"{name}_{kind}") for kind in KINDS]
        codes, scales, base, zeros = (t if row is None or t is None else t[row] for t in stored)
        return dequantize(codes, scales, base, zeros, quant, columns, dtype)


class PackedLinear(Packed):
    """nn.Linear with a packed weight (out, in), an optional float bias, and where `quant` names a rank a float
    low-rank term beside the weight: left (out, rank) @ right (rank, in). `weight` serves modules that
    multiply with it themselves."""

    def __init__(self, in_features, out_features, bias, quant, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features, self.quant = in_features, out_features, quant
        self.add_bank("weight", (out_features, in_features), quant, dtype, device)
        if self.rank:
            self.add_bank("left", (out_features, self.rank), None, dtype, device)
            self.add_bank("right", (self.rank, in_features), None, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)  # follows casts

    @property
    def rank(self) -> int:
        return self.quant.get("rank", 0)

    def packed_weight(self, dtype=torch.float32):
        return self.weight_rows("weight", self.quant, self.in_features, dtype, None)

    @property
    def weight(self):
        return self.dense_weight(self.like.dtype)

    def dense_weight(self, dtype=torch.float32):
        """Effective weight (out, in)."""
        weight = self.packed_weight(dtype)
        return weight + self.left.to(dtype) @ self.right.to(dtype) if self.rank else weight

    def forward(self, x):
        y = F.linear(x, self.packed_weight(x.dtype), self.bias)
        if not self.rank:
            return y
        return y + F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))
