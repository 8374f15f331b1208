"""The packed matrices of a checkpoint as other software counts them: one for each linear, and one for each projection
of each expert."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ModelError
from ..model.experts import find_experts, is_shared
from ..quantize.codec import PackedMatrix
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.grids import Grid
from ..runtime.packing import pack, unpack
from ..runtime.parts import JOINT, DensePart
from ..runtime.stored import Stored, StoredLinear

ADVICE = "export it --to dense"


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix (out, in) of the native model.

    home: path of its linear, or of the experts module in which `expert` and `projection` name it. row: of the bank that
    holds it. half: 0 for the rows of gate and 1 for those of up, where the bank's matrices are both.
    """

    module: Stored
    bank: str
    home: str
    form: Grid
    row: int | None = None
    half: int | None = None
    expert: int | None = None
    projection: str | None = None

    def __str__(self) -> str:
        return self.home if self.expert is None else f"{self.home}: expert {self.expert}, {self.projection}"

    @property
    def key(self) -> tuple[str, int | None, str | None]:
        """Which matrix of the native model it is."""
        return self.home, self.expert, self.projection

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.bank_shapes[self.bank]
        return rows if self.half is None else rows // 2, columns

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias if isinstance(self.module, StoredLinear) else None

    def matrix(self) -> PackedMatrix:
        """Its tensors; its layer has to be in memory."""
        tensors = self.module.bank_tensors(self.bank, self.row)
        whole = PackedMatrix(tensors, self.form, self.module.bank_shapes[self.bank])
        return whole if self.half is None else _rows_of_half(whole, self.half)


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Every packed matrix of one of our models, whose weights may be on the meta device. ModelError where an expert is
    anything else than one whole matrix on a grid for each projection, or a linear has more than its packed weight."""
    linears = [_of_linear(path, m) for path, m in model.named_modules() if isinstance(m, StoredLinear)]
    return linears + [weight for path, module in find_experts(model) for weight in _of_experts(path, module)]


def _of_linear(path: str, module: StoredLinear) -> PackedWeight:
    if module.rank:
        raise ModelError(f"{path}: has a low-rank term beside its packed weight; {ADVICE}")
    return PackedWeight(module, "weight", path, _grid(path, module.layout.form))


def _of_experts(path: str, module: nn.Module) -> Iterator[PackedWeight]:
    if not isinstance(module, FactorizedExperts):
        raise ModelError(f"{path}: is not quantized; {ADVICE}")
    if module.flags.has_bias:
        raise ModelError(f"{path}: experts with biases have no such form; {ADVICE}")
    for name, parts in module.layout.items():
        where = f"{path}.{name}"
        if sorted(expert for part in parts for expert in part.experts) != list(range(module.experts)):
            raise ModelError(f"{where}: is a sum of several matrices, or lacks experts; {ADVICE}")
        for i, part in enumerate(parts):
            if not isinstance(part, DensePart) or not part.packed:
                raise ModelError(f"{where}: is factorized or not quantized; {ADVICE}")
            if part.rows or part.columns:
                raise ModelError(f"{where}: has some of its channels only; {ADVICE}")
            form = _grid(where, part.form("dense"))
            for expert, row in zip(part.experts, part.users("dense")):
                for half, own in enumerate(("gate", "up")) if name == JOINT else ((None, name),):
                    place = (path, expert, own) if not is_shared(module) else (f"{path}.{own}_proj", None, None)
                    home, number, projection = place
                    yield PackedWeight(module, f"{name}_{i}_dense", home, form, row, half, number, projection)


def _grid(where: str, form) -> Grid:
    if not isinstance(form, Grid):
        raise ModelError(f"{where}: is in format {form.name}, and other software reads grids; {ADVICE}")
    return form


def _rows_of_half(packed: PackedMatrix, half: int) -> PackedMatrix:
    """The upper or the lower half of a matrix's rows."""
    form = packed.form
    assert isinstance(form, Grid)
    tensors = {kind: packed.tensors[kind].chunk(2)[half] for kind in ("codes", "scales")}
    tensors["base"] = packed.tensors["base"]
    if "zeros" in packed.tensors:  # packed along rows and groups together
        values = unpack(packed.tensors["zeros"], form.bits, packed.tensors["scales"].numel())
        tensors["zeros"] = pack(values.chunk(2)[half], form.bits)
    return PackedMatrix(tensors, form, (packed.shape[0] // 2, packed.shape[1]))


def require_one_form(weights: Iterable[PackedWeight], why: str) -> None:
    """ModelError, with what gives it, where not all of them are on grids of one kind. why: who wants that."""
    first: PackedWeight | None = None
    for weight in weights:
        first = first or weight
        if weight.form == first.form:
            continue
        if weight.form.bits != first.form.bits:
            named = (f"{weight.form.bits} bits", f"{first.form.bits} bits")
            advice = "limits.one_width_per_layer=true" if weight.home == first.home else "one width for gptq.bits"
        else:
            named = (f"groups of {weight.form.group_size}", f"groups of {first.form.group_size}")
            advice = f"gptq.group_size={min(weight.form.group_size, first.form.group_size)}"
        raise ModelError(f"{weight} has {named[0]}, {first} has {named[1]}; {why}. Quantize again with {advice}")
