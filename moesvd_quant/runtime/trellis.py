"""Trellis codes: 1 to 4 bits a weight, in steps of a half. A copy lies in every checkpoint.

As in QTIP (Tseng et al. 2024) and EXL3: a ring of bits holds the weights of a sequence, and each weight is read from a
window of 12 neighbouring bits. From one weight to the next the window moves on by `rate` bits, on average: where that
is no whole number, the moves take turns (1.5 bits: 1, 2, 1, 2 ...). So windows overlap, any of them can be read alone,
and one table of values serves all rates.

The matrix is stored turned: signs, then Hadamard matrices in blocks, on its rows or columns or both. Values are whole
numbers, and so is what turning them back adds up to: every machine and every order of sums gives the same bits.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from .formats import Format, Link, register
from .numba_here import on_gpu, usable
from .trellis_code import VALUES, WINDOW, joint_columns, padded, ring_bounds
from .trellis_kernels import read_all
from .trellis_parts import fit_together, project
from .turning import block_of, mixed_before, signs, turn, turn_back


@lru_cache(maxsize=64)
def places_of(rate: float, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each weight of a few columns: the three bytes that its window lies in (3, weights) int64, and its first bit in
    them (weights,) int32."""
    bounds = ring_bounds(rows, columns)
    sizes = np.diff(bounds)
    start = np.repeat(bounds[:-1], sizes)
    bit = ((np.arange(bounds[-1]) - start) * rate).astype(np.int64)
    first, length = (start * rate).astype(np.int64) // 8, np.repeat(sizes * rate, sizes).astype(np.int64) // 8
    places = np.stack([first + (bit // 8 + byte) % length for byte in range(3)])
    return torch.from_numpy(places).to(device), torch.from_numpy((bit % 8).astype(np.int32)).to(device)


def read_windows(codes: torch.Tensor, rate: float, rows: int) -> torch.Tensor:
    """Values float32 (..., columns, rows) of codes uint8 (..., columns, bytes)."""
    columns, joint = codes.shape[-2], joint_columns(rows)
    if usable(codes):
        values = read_all(codes, rate, ring_bounds(rows, columns))
    else:
        whole = columns - columns % joint
        apart = (codes[..., :whole, :], joint), (codes[..., whole:, :], columns - whole)
        values = torch.cat([_read_rings(part, rate, rows, count) for part, count in apart if part.numel()], -1)
    return values.unflatten(-1, (columns, padded(rows)))[..., :rows]


def _read_rings(codes: torch.Tensor, rate: float, rows: int, joint: int) -> torch.Tensor:
    """Values float32 (..., weights) of codes uint8 (..., columns, bytes), of which each `joint` columns share rings or
    have the same ones."""
    (low, middle, high), first = places_of(rate, rows, joint, codes.device)
    stream = codes.unflatten(-2, (-1, joint)).flatten(-2).int()
    windows = (stream[..., low] | stream[..., middle] << 8 | stream[..., high] << 16) >> first & (2**WINDOW - 1)
    return torch.from_numpy(VALUES).to(codes.device)[windows].float().flatten(-2)


@register
@dataclass(frozen=True)
class Trellis(Format):
    """A trellis code of `rate` bits with one scale for a matrix. rows, columns: which sides are stored turned.

    Tensors: codes uint8 (..., columns, bytes), rings along the rows of a column; scale int32 (..., 1), the bits of an
    fp32: what a value of 1 stands for, before turning back.
    """

    name: ClassVar[str] = "trellis"
    trained: ClassVar[str | None] = "scale"

    rate: float
    rows: bool
    columns: bool

    def __str__(self) -> str:
        return f"{self.rate:g} bit trellis"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        size = int(padded(rows) * self.rate) // 8
        return {"codes": ((*lead, columns, size), torch.uint8), "scale": ((*lead, 1), torch.int32)}

    def dequantize(self, stored, shape, dtype):
        return (self._turned_back(stored["codes"], shape) * self.scale(stored, shape)).to(dtype)

    def _turned_back(self, codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Values (..., rows, columns) float32, turned back but for the norm: whole numbers."""
        rows, columns = shape
        values = read_windows(codes, self.rate, rows)  # (..., columns, rows)
        values = mixed_before(values) if self.columns else values
        values = values.transpose(-1, -2)
        values = mixed_before(values) if self.rows else values.contiguous()
        if self.rows:
            values = values * signs(rows, values.device)[:, None]
        return values * signs(columns, values.device) if self.columns else values

    def has_kernel(self, stored, x):
        if on_gpu(x, stored["codes"]):  # the last ring is another one where columns do not share evenly
            columns, size = stored["codes"].shape[-2:]
            whole = columns % joint_columns(int(8 * size / self.rate)) == 0
            return whole and not stored["scale"].is_floating_point()
        plain = x.dtype in (torch.float32, torch.bfloat16) and not x.requires_grad
        return plain and usable(stored["codes"]) and not stored["scale"].is_floating_point()

    def products(self, stored, shape, x, sizes):
        if not self.has_kernel(stored, x) or (x.is_cuda and not on_gpu(x, stored["codes"], sizes)):
            return super().products(stored, shape, x, sizes)
        if x.is_cuda:
            return self._products_on_gpu(stored, shape, x, sizes)
        every = Link(self, shape, stored, list(range(len(sizes))))
        return self.project([[every]], x, torch.arange(len(x)), sizes)

    @classmethod
    def fit_together(cls, chains):
        return fit_together(chains)

    @classmethod
    def project(cls, chains, x, token, sizes):
        return project(chains, x, token, sizes)

    def _products_on_gpu(self, stored, shape, x, sizes):
        from .trellis_triton import products as by_triton

        rows = shape[0]
        given = turn(x.float()).to(x.dtype) if self.columns else x
        joint = joint_columns(rows)
        y = by_triton(stored["codes"], *places_of(self.rate, rows, joint, x.device), joint, rows, given, sizes)
        y = turn_back(y) if self.rows else y
        whole = stored["scale"].view(torch.float32).flatten()
        return (y * whole.repeat_interleave(torch.tensor(sizes, device=x.device))[:, None]).to(x.dtype)

    def scale(self, stored: dict, shape: tuple[int, int]) -> torch.Tensor:
        """(..., 1, 1) float32: what a value stands for, after turning back."""
        scale = stored["scale"]
        whole = torch.exp(scale) if scale.is_floating_point() else scale.view(torch.float32)
        return (whole * self._norm(shape)).unsqueeze(-1)

    def scales(self, stored: dict, shape: tuple[int, int]) -> np.ndarray:
        """(matrices,) float32: the same of each matrix of a bank on a CPU."""
        return stored["scale"].view(torch.float32).flatten().numpy() * self._norm(shape)

    def _norm(self, shape: tuple[int, int]) -> np.float32:
        """What turning back is times, since it is done in whole numbers: a power of two, or one and its root."""
        rows, columns = (block_of(size) if turned else 1 for size, turned in zip(shape, (self.rows, self.columns)))
        return np.float32((rows * columns) ** -0.5)

    def trainable(self, tensor):
        """log(scale)."""
        return tensor.view(torch.float32).log()

    def stored(self, trained):
        return torch.exp(trained.float()).contiguous().view(torch.int32)

    def random(self, kind: str, tensor: torch.Tensor, generator: Any) -> None:
        if kind == "scale":
            tensor.view(torch.float32).fill_(0.001)
        else:
            super().random(kind, tensor, generator)
