"""Matrices of which a part is zero, weights or whole rows: a bit for each, and the values of the others. A copy lies in
every checkpoint."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .formats import Format, register
from .packing import pack, unpack


@dataclass(frozen=True)
class _Masked(Format):
    """What both have in common: `kept` of what a mask says stays, and its values in the dtype of the model."""

    state: ClassVar[str] = "sparse"
    trained: ClassVar[str | None] = "values"

    kept: int

    def __str__(self) -> str:
        return "sparse"

    def mask(self, stored: dict, shape: tuple[int, int]) -> torch.Tensor:
        """(..., rows, columns) bool: the weights that have values."""
        raise NotImplementedError

    def dequantize(self, stored, shape, dtype):
        mask = self.mask(stored, shape)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, stored["values"].to(dtype))

    def trainable(self, tensor):
        return tensor.float()

    def stored(self, trained):
        return trained


@register
@dataclass(frozen=True)
class Sparse(_Masked):
    """`kept` values of each matrix, in the order of its rows, and where they are.

    Tensors: mask uint8 (..., rows, ceil(columns / 8)), a bit for each weight that has a value; values (..., kept) in
    the dtype of the model. A bit per weight is what the indices of 2:4 need as well (two of two bits in four weights):
    of 16 bits, 9 are stored where half of the weights are kept.
    """

    name: ClassVar[str] = "sparse"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        return {"mask": ((*lead, rows, -(-columns // 8)), torch.uint8), "values": ((*lead, self.kept), dtype)}

    def mask(self, stored, shape):
        return unpack(stored["mask"], 1, shape[1]).bool()

    def matrix_weights(self, shape):
        return self.kept

    def random(self, kind, tensor, generator):
        # As many bits in each byte as there are values for.
        tensor.fill_((1 << self.kept // tensor.shape[-2:].numel()) - 1)


@register
@dataclass(frozen=True)
class SparseRows(_Masked):
    """`kept` whole rows of each matrix, in order, and which they are.

    Tensors: mask uint8 (..., 1, ceil(rows / 8)), a bit for each row that has values; values (..., kept, columns) in the
    dtype of the model.
    """

    name: ClassVar[str] = "sparse_rows"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        return {"mask": ((*lead, 1, -(-rows // 8)), torch.uint8), "values": ((*lead, self.kept, columns), dtype)}

    def mask(self, stored, shape):
        rows = unpack(stored["mask"], 1, shape[0]).bool().mT
        return rows.expand(*rows.shape[:-1], shape[1])

    def matrix_weights(self, shape):
        return self.kept * shape[1]

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
