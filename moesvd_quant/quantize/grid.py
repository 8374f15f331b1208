"""The grid of each group of weights: scales that can be stored, and zeros.

GPTQ's loss on a row is sum_j d_j e_j^2. e_j is the rounding error of input j. d_j is the variance of that input given
the inputs that take up its error (`feedback.conditional_variance`; Frantar et al., eq. 2). Each grid is chosen for
this loss. It is tried with every scale that can be stored, from the one that covers the group downwards, and with the
two zeros next to the ideal one. GPTQ's implementations search for the least |error|^2.4 with equal weights and then
round the scale to one that can be stored; that loses 4 to 5 % more (docs/results/choices.md).
"""

import numpy as np
import torch

from ..runtime.grids import SCALES, STEPS, Grid, scale_levels
from .threads import on_threads, parts_of

OCTAVES = 2.5  # how far a range is clipped at most: to a sixth
AT_ONCE = 8  # scales that are tried before the rows that are done are left out


def range_margin(bits: int) -> float:
    """By how much a scale may have to exceed range / (2^bits - 1).

    Rounding the zero point can widen the range by one step, and a symmetric grid has one step less above zero."""
    return (2**bits - 1) / (2**bits - 2)


def bounds(group: torch.Tensor, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high), each (out,): the ends of the range of a group (size, out), zero included, never equal."""
    low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    flat = low == high
    return torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)


def largest_scale(weight: torch.Tensor, form: Grid) -> torch.Tensor:
    """() float32: at least as large as the best scale of any group of a matrix."""
    low, high = (-weight.min()).clamp(min=0), weight.max().clamp(min=0)
    span = 2 * torch.maximum(low, high) * range_margin(form.bits) if form.sym else low + high
    flat = torch.tensor(2.0, device=weight.device)  # the range that a group of zeros is given
    return torch.where(span != 0, span, flat) / (2**form.bits - 1)


def whole_range(group: torch.Tensor, base: torch.Tensor, form: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), each (out,), of a group (size, out) from least to largest weight: the scale nearest to that which
    can be stored under `base`; at 8 bits the next larger one, since clipping would cost more than all rounding."""
    top = 2**form.bits - 1
    low, high = bounds(group, form.sym)
    exact = (high - low) / top
    if form.bits == 8:
        exact = exact * 2 ** (0.5 / STEPS)
    scale = SCALES.to(group.device)[scale_levels(exact, base).int()] * base
    zero = torch.full_like(scale, (top + 1) / 2) if form.sym else (-low / scale).round()
    return scale, zero.clamp(max=top)


def best_grid(
    group: torch.Tensor, column_weight: torch.Tensor, base: torch.Tensor, form: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), each (out,) float32, with the least sum_j matter_j e_j^2 of rounding a group (size, out) float32.

    column_weight (size,): weight of each input's squared error; base: of `largest_scale`; form: the grid.
    """
    top = 2**form.bits - 1
    low, high = bounds(group, form.sym)
    exact = (high - low) / top
    ideal = torch.full_like(exact, (top + 1) / 2) if form.sym else -low / exact
    zeros = ideal[None] if form.sym else torch.stack([ideal.floor(), ideal.ceil().clamp(max=top)])
    first = ((base / exact / range_margin(form.bits)).log2() * STEPS).floor().int()
    table, column_weight = SCALES.to(group.device) * base, column_weight.to(group)
    if not group.is_cuda:
        return _on_cpu(group, column_weight, first, zeros, table, top)
    found = torch.stack([torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)])
    rows = torch.arange(len(low), device=group.device)  # whose best scale may yet be a smaller one
    for level in range(0, int(OCTAVES * STEPS), AT_ONCE):
        steps = torch.arange(level, level + AT_ONCE, device=group.device)[:, None]
        scales = table[(first[rows] + steps).clamp(0, len(SCALES) - 1)]
        found[:, rows], least = _best_of(group[:, rows], column_weight, scales, zeros[:, rows], top, found[:, rows])
        # What is clipped loses more with every step, and rounding, which gains, is no more than half of this.
        rows = rows[least <= 2 * found[0, rows]]
        if not len(rows):
            break
    _, scale, zero = found
    return scale, zero


def _on_cpu(group, column_weight, first, zeros, table, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop of `best_grid`, compiled."""
    from .gptq_numba import best_grids

    scale, zero = torch.empty(2, group.shape[1])
    given = [tensor.contiguous().numpy() for tensor in (group, column_weight, first, zeros, table)]
    settings = np.float32(top), int(OCTAVES * STEPS), AT_ONCE

    def search(_, rows: range) -> None:
        best_grids(*given, *settings, rows.start, rows.stop, scale.numpy(), zero.numpy())

    on_threads(search, parts_of(group.shape[1], torch.get_num_threads()))
    return scale, zero


def _best_of(group, column_weight, scales, zeros, top: int, found) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, scale, zero) (3, out), the best of `found` and all pairs of scales and zeros, each (any, out); and the
    least loss of the last scale (out,)."""
    best, scale, zero = found
    ratio, nearest, error = (torch.empty_like(group) for _ in range(3))
    for tried in scales:
        torch.div(group, tried, out=ratio)
        torch.round(ratio, out=nearest)
        least = torch.full_like(best, torch.inf)
        for offset in zeros:
            torch.clamp(nearest, -offset, top - offset, out=error)
            loss = (column_weight @ error.sub_(ratio).square_()) * tried.square()
            better = loss < best
            best, least = torch.where(better, loss, best), torch.minimum(least, loss)
            scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return torch.stack([best, scale, zero]), least
