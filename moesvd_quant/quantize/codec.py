"""How weights are brought into a format: what a format is to compression."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import MoesvdError
from ..runtime.formats import Format
from .registry import Storage

Bank = Literal["dense", "left", "right"]  # a whole matrix, or a factor: (out, rank) or (rank, in)


class QuantizeError(MoesvdError, ValueError):
    """A matrix that cannot be quantized as asked; the message says why."""


@dataclass
class PackedMatrix:
    """A quantized (out, in) matrix: its tensors by kind, see `Format.tensors`."""

    tensors: dict[str, torch.Tensor]
    form: Format
    shape: tuple[int, int]

    def dense(self, dtype=torch.float64) -> torch.Tensor:
        return self.form.dequantize(self.tensors, self.shape, dtype)


class Codecs:
    """Makes matrices of several formats: `of` has the codec of each by its name."""

    def __init__(self, of: dict[str, "Codec"]):
        self.of = of

    def form(self, storage: Storage, columns: int, bank: Bank = "dense", pruned: bool = False) -> Format:
        """See `Codec.form`."""
        return self.of[storage.format].form(storage.rate, columns, bank, pruned)

    def noise(self, form: Format) -> float:
        """See `Codec.noise`."""
        return self.of[form.name].noise(form)

    def inputs(self, gram: torch.Tensor, form: Format) -> Any:
        """See `Codec.inputs`."""
        return self.of[form.name].inputs(gram, form)

    def pack(self, weight: torch.Tensor, inputs: Any, form: Format) -> PackedMatrix:
        """See `Codec.pack`."""
        return self.of[form.name].pack(weight, inputs, form)


class Codec:
    """Makes matrices of one format, at any of its rates. options: of the stage that quantizes."""

    def __init__(self, options):
        self.options = options

    def form(self, rate: float, columns: int, bank: Bank = "dense", pruned: bool = False) -> Format:
        """The format of a matrix with so many columns. bank: what the matrix is; pruned: its columns are what is left
        of an input dimension. QuantizeError where there is none."""
        raise NotImplementedError

    def noise(self, form: Format) -> float:
        """Mean squared rounding error of a unit Gaussian."""
        raise NotImplementedError

    def inputs(self, gram: torch.Tensor, form: Format) -> Any:
        """All that `pack` has to know of inputs with a Gram matrix (n, n). It serves every matrix in this format that
        has them."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor, inputs: Any, form: Format) -> PackedMatrix:
        """Quantizes a matrix (out, n). QuantizeError where that cannot be."""
        raise NotImplementedError
