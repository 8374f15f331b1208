"""How weights are brought into a format: what a format is to compression."""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MoesvdError
from ..runtime.formats import Format


class QuantizeError(MoesvdError, ValueError):
    """A matrix that cannot be quantized as asked; the message says why."""


@dataclass
class PackedMatrix:
    """A quantized (out, in) matrix: its tensors by kind, see `Format.tensors`."""

    tensors: dict[str, torch.Tensor]
    form: Format
    columns: int

    def dense(self, dtype=torch.float64) -> torch.Tensor:
        return self.form.dequantize(self.tensors, self.columns, dtype)


class Codec:
    """Makes matrices of one format, at any of its rates. options: of the stage that quantizes."""

    def __init__(self, options):
        self.options = options

    def form(self, rate: float, columns: int, rank_axis: bool = False) -> Format:
        """The format of a matrix with so many columns; rank_axis: they are the rank of a left factor. QuantizeError
        where there is none."""
        raise NotImplementedError

    def noise(self, form: Format) -> float:
        """Mean squared rounding error of a unit Gaussian."""
        raise NotImplementedError

    def inputs(self, gram: torch.Tensor) -> Any:
        """All that `pack` has to know of inputs with a Gram matrix (n, n). It serves every matrix that has them."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor, inputs: Any, form: Format) -> PackedMatrix:
        """Quantizes a matrix (out, n). QuantizeError where that cannot be."""
        raise NotImplementedError
