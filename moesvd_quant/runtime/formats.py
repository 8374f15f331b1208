"""How matrices are stored. A copy lies in every checkpoint.

A bank is a stack of matrices of one shape in one format. It is one tensor, or several, whose names are the bank's name
and a kind: `up_0_dense_codes`.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F


class Link(NamedTuple):
    """A bank of a part, and the matrix of it that each expert uses, -1 where it uses none."""

    form: Any
    shape: tuple[int, int]  # rows, columns of a matrix
    stored: dict[str, torch.Tensor]
    rows: list[int]


@dataclass(frozen=True)
class Format:
    """How a matrix (rows, columns) is stored; its fields are the format's parameters, and stand in the layout.

    A packed format stores something else than the matrix: codes and places are integers, which no cast of the model can
    change.
    """

    name: ClassVar[str]
    packed: ClassVar[bool] = True
    state: ClassVar[str] = "quantized"  # what a matrix in a packed format is
    trained: ClassVar[str | None] = None  # the kind of tensor that training may change

    def tensors(self, shape: tuple, dtype: torch.dtype) -> dict[str, tuple[tuple, torch.dtype]]:
        """{kind: (shape, dtype)} of a bank of `shape` (..., rows, columns) in a model of `dtype`."""
        raise NotImplementedError

    def dequantize(self, stored: dict, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """(..., rows, columns) in `dtype`, from the tensors by kind; shape: (rows, columns)."""
        raise NotImplementedError

    def has_kernel(self, stored: dict, x: torch.Tensor) -> bool:
        """Whether `products` multiplies without making dense matrices."""
        return False

    def products(self, stored: dict, shape: tuple[int, int], x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """x (tokens, columns), sorted by the matrices (rows, columns) = shape of a bank, sizes[i] tokens of matrix i ->
        (tokens, rows). Here one dense matrix is made at a time."""
        done = []
        for row, own in enumerate(x.split(sizes)):
            if len(own):
                matrix = {kind: tensor[row] for kind, tensor in stored.items()}
                done.append(F.linear(own, self.dequantize(matrix, shape, x.dtype)))
        if len(done) < 2:  # of a bank that all experts share there is one: no copy
            return done[0] if done else x.new_zeros(0, shape[0])
        return torch.cat(done)

    @classmethod
    def fit_together(cls, chains: list[list[Link]]) -> bool:
        """Whether `project` serves such parts of a projection, all in this format, each a chain of banks as an input
        meets them."""
        return False

    @classmethod
    def project(cls, chains: list[list[Link]], x: torch.Tensor, token: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """x (tokens, in) -> (pairs, out), for pairs of a token and an expert, sorted by expert, sizes[e] of expert e;
        token: the row of x of each. Takes all parts of a projection at once; each expert belongs to one at most."""
        raise NotImplementedError

    def trainable(self, tensor: torch.Tensor) -> torch.Tensor:
        """float32 that training may change, in place of the tensor of kind `trained`; `dequantize` takes it as well."""
        raise NotImplementedError

    def stored(self, trained: torch.Tensor) -> torch.Tensor:
        """The tensor nearest to what `trainable` gave and training changed."""
        raise NotImplementedError

    def random(self, kind: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        """Fills a tensor of a kind so that weights have a usual size, to measure speed without a checkpoint."""
        tensor.random_(0, 256, generator=generator)

    def bank_bytes(self, shape: tuple, dtype: torch.dtype) -> int:
        """Bytes of a bank of `shape`."""
        sizes = self.tensors(shape, dtype).values()
        return sum(torch.Size(size).numel() * kind.itemsize for size, kind in sizes)

    def matrix_weights(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix (rows, columns) are stored, in whatever bits."""
        return shape[0] * shape[1]

    def to_dict(self) -> dict[str, Any]:
        """As a layout has it; `format_from` is the inverse."""
        return {"format": self.name} | asdict(self)


FORMATS: dict[str, type[Format]] = {}


def register(kind: type[Format]) -> type[Format]:
    """Makes a format known to layouts by its name. ValueError where another format has that name."""
    if FORMATS.get(kind.name, kind) is not kind:
        raise ValueError(f"two formats are named {kind.name!r}: {FORMATS[kind.name]} and {kind}")
    FORMATS[kind.name] = kind
    return kind


def format_from(entry: Any) -> Format:
    """The format that a layout names; ValueError where it is none that is known."""
    name = entry.get("format") if isinstance(entry, dict) else entry
    if name not in FORMATS:
        raise ValueError(f"config.json: format {name!r} of a matrix is none of {', '.join(FORMATS)}")
    try:
        return FORMATS[name](**{key: value for key, value in entry.items() if key != "format"})
    except TypeError as error:
        raise ValueError(f"config.json: format {entry}: {error}") from None


@register
@dataclass(frozen=True)
class Float(Format):
    """Floating point, in the dtype of the model."""

    name: ClassVar[str] = "float"
    packed: ClassVar[bool] = False

    def tensors(self, shape, dtype):
        return {"": (tuple(shape), dtype)}

    def dequantize(self, stored, shape, dtype):
        return stored[""].to(dtype)


FLOAT = Float()


def tensor_name(bank: str, kind: str) -> str:
    """Name of the tensor of a kind in a bank."""
    return f"{bank}_{kind}" if kind else bank
