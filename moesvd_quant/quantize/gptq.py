"""GPTQ (Frantar et al. 2022) for inputs that are known by their Gram matrix, on grids that are found for it."""

import numpy as np
import torch

from ..runtime.grids import Grid
from .codec import PackedMatrix
from .feedback import HessianFactor
from .grid import best_grid
from .rounding import packed_matrix, storable
from .threads import on_threads, parts_of

BLOCK = 128  # inputs whose errors are passed on one by one; those of whole blocks before them in one product


@torch.no_grad()
def gptq(weight: torch.Tensor, inputs: HessianFactor, form: Grid) -> PackedMatrix:
    """Quantizes weight (out, in) for given inputs.

    Columns go in order of activation, with group parameters fixed beforehand (static groups), so that no index is
    stored. QuantizeError where a scale leaves the range of fp16.
    """
    weight = weight.float()
    base, size, top = storable(weight, form), form.group_size, 2**form.bits - 1
    transposed = weight.T.contiguous()  # an input each: what is done by rows is done along the memory
    parts = zip(transposed.split(size), inputs.conditional_variance.split(size))
    grids = [best_grid(group, column_weight, base, form) for group, column_weight in parts]
    scale, zero = (torch.stack(found) for found in zip(*grids))
    rows = transposed[inputs.order]
    group = inputs.order // size
    codes = torch.empty_like(rows, dtype=torch.uint8)
    lost = torch.empty_like(rows)
    round_block = _round_block_on_gpu if rows.is_cuda else _round_block
    for first in range(0, len(rows), BLOCK):
        here = slice(first, first + BLOCK)
        wanted = torch.addmm(rows[here], inputs.upper[:first, here].T, lost[:first])
        passed_on = inputs.upper[here, here].contiguous()
        round_block(wanted, passed_on, rows[here], scale, zero, group[here], top, lost[here], codes[here])
    placed = torch.empty_like(codes).index_copy_(0, inputs.order, codes)
    return packed_matrix(placed.T, scale.T, zero.T, base, form)


def _round_block(wanted, passed_on, rest, scale, zero, group, top: int, lost, codes) -> None:
    """See `gptq_numba.round_block`; all rows."""
    from .gptq_numba import round_block

    given = [tensor.numpy() for tensor in (wanted, passed_on, rest, scale, zero, group)]
    made = lost.numpy(), codes.numpy()

    def compute(_, rows: range) -> None:
        round_block(*given, np.float32(top), rows.start, rows.stop, *made)

    on_threads(compute, parts_of(wanted.shape[1], torch.get_num_threads()))


def _round_block_on_gpu(wanted, passed_on, rest, scale, zero, group, top: int, lost, codes) -> None:
    """The same in torch."""
    units, zeros, passed_on = scale[group], zero[group], passed_on.T.contiguous()
    for i, (target, unit, offset) in enumerate(zip(wanted, units, zeros)):
        code = torch.addmv(target, lost[:i].T, passed_on[i, :i]).div_(unit).round_().add_(offset).clamp_(0, top)
        codes[i] = code
        torch.sub(rest[i], code.sub_(offset).mul_(unit), out=lost[i])
