"""The grid of each group of weights: scales that can be stored, and zeros.

GPTQ loses sum_j d_j e_j^2 on a row, with e_j the rounding error of input j and d_j what is left of that input's
variance once those that take up its error are known (`feedback.innovations`; Frantar et al., eq. 2). So that is what
the grid is chosen for, among all scales that can be stored from the one that covers the group downwards, and both
zeros beside the ideal one. Searching for the least |error|^2.4 of all inputs alike, as GPTQ's implementations do, and
rounding the scale found to one that can be stored, loses 4 to 5 % more (docs/results.md).
"""

import torch

from ..runtime.grids import SCALES, STEPS, Grid, scale_levels

OCTAVES = 2.5  # how far a range is clipped at most: to a sixth
AT_ONCE = 8  # scales that are tried before the rows that are done are left out


def slack(bits: int) -> float:
    """By how much a scale may have to exceed range / (2^bits - 1): zero is a whole number of steps from both ends, and
    on a symmetric grid the upper end is a step nearer to it."""
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
    span = 2 * torch.maximum(low, high) * slack(form.bits) if form.sym else low + high
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
    group: torch.Tensor, matter: torch.Tensor, base: torch.Tensor, form: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), each (out,) float32, with the least sum_j matter_j e_j^2 of rounding a group (size, out) float32.

    matter (size,): weight of each input's squared error; base: of `largest_scale`; form: the grid.
    """
    top = 2**form.bits - 1
    low, high = bounds(group, form.sym)
    exact = (high - low) / top
    ideal = torch.full_like(exact, (top + 1) / 2) if form.sym else -low / exact
    zeros = ideal[None] if form.sym else torch.stack([ideal.floor(), ideal.ceil().clamp(max=top)])
    first = ((base / exact / slack(form.bits)).log2() * STEPS).floor().int()
    table, matter = SCALES.to(group.device) * base, matter.to(group)
    found = torch.stack([torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)])
    rows = torch.arange(len(low), device=group.device)  # whose best scale may yet be a smaller one
    for level in range(0, int(OCTAVES * STEPS), AT_ONCE):
        steps = torch.arange(level, level + AT_ONCE, device=group.device)[:, None]
        scales = table[(first[rows] + steps).clamp(0, len(SCALES) - 1)]
        found[:, rows], least = _best_of(group[:, rows], matter, scales, zeros[:, rows], top, found[:, rows])
        # What is clipped loses more with every step, and rounding, which gains, is no more than half of this.
        rows = rows[least <= 2 * found[0, rows]]
        if not len(rows):
            break
    _, scale, zero = found
    return scale, zero


def _best_of(group, matter, scales, zeros, top: int, found) -> tuple[torch.Tensor, torch.Tensor]:
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
            loss = (matter @ error.sub_(ratio).square_()) * tried.square()
            better = loss < best
            best, least = torch.where(better, loss, best), torch.minimum(least, loss)
            scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return torch.stack([best, scale, zero]), least
