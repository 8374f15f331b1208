"""Modules whose weights are banks in any format. A copy lies in every checkpoint."""

import torch
import torch.nn.functional as F
from torch import nn

from .formats import FLOAT, Format, tensor_name
from .parts import LinearLayout


class Stored(nn.Module):
    """Base of modules whose weights are banks. `formats` says how each bank is stored, `kinds` which tensors it
    has, `bank_shapes` (rows, columns) of its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: dict[str, Format] = {}
        self.kinds: dict[str, tuple[str, ...]] = {}
        self.bank_shapes: dict[str, tuple[int, int]] = {}

    def add_bank(self, name: str, shape: tuple, form: Format, dtype, device) -> None:
        """Empty tensors of a bank (..., rows, columns)."""
        tensors = form.tensors(shape, dtype)
        self.formats[name], self.kinds[name], self.bank_shapes[name] = form, tuple(tensors), tuple(shape[-2:])
        for kind, (size, stored) in tensors.items():
            tensor = torch.empty(size, dtype=stored, device=device)
            parameter = nn.Parameter(tensor, requires_grad=stored.is_floating_point)
            self.register_parameter(tensor_name(name, kind), parameter)

    def bank_tensors(self, name: str, row: int | None = None) -> dict[str, torch.Tensor]:
        """{kind: tensor} of a bank, or of one of its matrices."""
        # An adapter may stand in front of the parameter: getattr asks it.
        found = {kind: getattr(self, tensor_name(name, kind)) for kind in self.kinds[name]}
        return found if row is None else {kind: tensor[row] for kind, tensor in found.items()}

    @torch.no_grad()
    def fill_bank(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Sets the tensors of a bank, by kind."""
        for kind in self.kinds[name]:
            self._parameters[tensor_name(name, kind)].copy_(tensors[kind])

    def products(self, name: str, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """x (tokens, columns), sorted by the matrices of a bank, sizes[i] tokens of matrix i -> (tokens, rows)."""
        stored = self.aligned(name) if self.formats[name].packed else self.bank_tensors(name)
        if stored[self.kinds[name][0]].ndim == 2:  # a single matrix
            stored = {kind: tensor.unsqueeze(0) for kind, tensor in stored.items()}
        return self.formats[name].products(stored, self.bank_shapes[name], x, sizes)

    def aligned(self, name: str) -> dict[str, torch.Tensor]:
        """{kind: tensor} of a bank. Kernels read whole words, and products differ in the last bit with the address:
        tensors that were mapped from a file are copied to where any tensor begins, once."""
        for kind in self.kinds[name]:
            parameter = self._parameters.get(tensor_name(name, kind))
            if parameter is not None and parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return self.bank_tensors(name)

    def stored_tensors(self) -> dict[str, tuple[Format, str]]:
        """{name of each tensor of a bank: (its format, its kind)}."""
        return {tensor_name(n, kind): (self.formats[n], kind) for n, kinds in self.kinds.items() for kind in kinds}

    @property
    def device(self):
        """Of its tensors. A module that lost all of them is nowhere, and its zeros may be anywhere."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def weight_rows(self, name: str, dtype: torch.dtype, row: int | None = None) -> torch.Tensor:
        """The matrices of a bank (row None) or one of them, in `dtype`."""
        return self.formats[name].dequantize(self.bank_tensors(name, row), self.bank_shapes[name], dtype)


class StoredLinear(Stored):
    """nn.Linear whose weight (out, in) is in any format, with an optional float bias. Where the layout names a rank, it
    has a float low-rank term beside the weight: left (out, rank) @ right (rank, in). `weight` serves modules that
    multiply with it themselves."""

    def __init__(self, in_features, out_features, bias, layout: LinearLayout, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        self.add_bank("weight", (out_features, in_features), layout.form, dtype, device)
        if self.rank:
            self.add_bank("left", (out_features, self.rank), FLOAT, dtype, device)
            self.add_bank("right", (self.rank, in_features), FLOAT, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)  # follows casts

    @classmethod
    def empty_like(cls, linear: nn.Linear, layout: LinearLayout) -> "StoredLinear":
        """Of the shape, dtype and device of a linear; its tensors are empty."""
        kind = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        return cls(linear.in_features, linear.out_features, linear.bias is not None, layout, **kind)

    @classmethod
    def in_place_of(cls, linear: nn.Linear, layout: LinearLayout, weight: dict[str, torch.Tensor]) -> "StoredLinear":
        """The same with a weight, its tensors by kind, and the bias of the linear."""
        made = cls.empty_like(linear, layout)
        made.fill_bank("weight", weight)
        made.bias = linear.bias
        return made

    @property
    def rank(self) -> int:
        return self.layout.rank

    def packed_weight(self, dtype=torch.float32):
        return self.weight_rows("weight", dtype)

    @property
    def weight(self):
        return self.dense_weight(self.like.dtype)

    def dense_weight(self, dtype=torch.float32):
        """Effective weight (out, in)."""
        weight = self.packed_weight(dtype)
        return weight + self.left.to(dtype) @ self.right.to(dtype) if self.rank else weight

    def forward(self, x):
        if self.layout.form.has_kernel(self.bank_tensors("weight"), x):
            flat = x.reshape(-1, self.in_features)
            y = self.products("weight", flat, [len(flat)]).view(*x.shape[:-1], self.out_features)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(x, self.packed_weight(x.dtype), self.bias)
        if not self.rank:
            return y
        return y + F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))
