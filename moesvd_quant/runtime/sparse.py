"""Matrices of which a part is zero, weights or whole rows: a bit for each, and the values of the others. A copy lies in
every checkpoint."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .formats import Format, register
from .packing import pack, unpack


@register
@dataclass(frozen=True)
class Sparse(Format):
    """`kept` values of each matrix, in the order of its rows, and where they are.

    Tensors: mask uint8 (..., rows, ceil(columns / 8)), a bit for each weight that has a value; values (..., kept) in
    the dtype of the model. A bit per weight is what the indices of 2:4 need as well (two of two bits in four weights):
    of 16 bits, 9 are stored where half of the weights are kept.
    """

    name: ClassVar[str] = "sparse"
    state: ClassVar[str] = "sparse"
    trained: ClassVar[str | None] = "values"

    kept: int

    def __str__(self) -> str:
        return "sparse"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        return {"mask": ((*lead, rows, -(-columns // 8)), torch.uint8), "values": ((*lead, self.kept), dtype)}

    def dequantize(self, stored, shape, dtype):
        mask = unpack(stored["mask"], 1, shape[1]).bool()
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, stored["values"].to(dtype))

    def matrix_weights(self, shape):
        return self.kept

    def trainable(self, tensor):
        return tensor.float()

    def stored(self, trained):
        return trained

    def random(self, kind, tensor, generator):
        # As many bits in each byte as there are values for.
        tensor.fill_((1 << self.kept // tensor.shape[-2:].numel()) - 1)


@register
@dataclass(frozen=True)
class SparseRows(Format):
    """`kept` whole rows of each matrix, in order, and which they are.

    Tensors: mask uint8 (..., 1, ceil(rows / 8)), a bit for each row that has values; values (..., kept, columns) in the
    dtype of the model.
    """

    name: ClassVar[str] = "sparse_rows"
    state: ClassVar[str] = "sparse"
    trained: ClassVar[str | None] = "values"

    kept: int

    def __str__(self) -> str:
        return "sparse"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        return {"mask": ((*lead, 1, -(-rows // 8)), torch.uint8), "values": ((*lead, self.kept, columns), dtype)}

    def dequantize(self, stored, shape, dtype):
        mask = unpack(stored["mask"], 1, shape[0]).bool().mT
        mask = mask.expand(*mask.shape[:-1], shape[1])
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, stored["values"].to(dtype))

    def matrix_weights(self, shape):
        return self.kept * shape[1]

    def trainable(self, tensor):
        return tensor.float()

    def stored(self, trained):
        return trained

    def random(self, kind, tensor, generator):
        tensor.fill_((1 << self.kept // tensor.shape[-1]) - 1)


def pack_rows(weight: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of `SparseRows` of a matrix (rows, columns), by kind: those rows for which `rows` (rows,) bool is
    true."""
    return {"mask": pack(rows.to(torch.uint8), 1)[None], "values": weight[rows]}


def pack_sparse(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of `Sparse` of a matrix (rows, columns), by kind: the values where the mask (bool, the same shape) is
    true."""
    return {"mask": pack(mask.to(torch.uint8), 1), "values": weight[mask]}
