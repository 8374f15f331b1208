"""Trellis codes on a CPU, without dense matrices where there are few tokens. A copy lies in every checkpoint.

Where numba is missing, `trellis.py` reads codes with torch. What is turned stays turned: inputs are, and outputs are
turned back.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from .numba_here import LANES, dtype_of_products
from .spans import MANY, Span, few_and_many
from .trellis_code import blocks_of, column_bounds, groups_of, joint_columns, padded, ring_bounds

TILE = 2**23  # bytes of values that are made at a time, where a matrix has many tokens


def read_all(codes: torch.Tensor, rate: float, bounds: np.ndarray) -> torch.Tensor:
    """Values float32 (..., weights), in their order, of codes uint8 (..., columns, bytes) of matrices whose rings have
    these bounds."""
    from .team import run
    from .trellis_read import read

    twice = int(2 * rate)
    flat = codes.reshape(-1, codes.shape[-2] * codes.shape[-1])
    out = torch.empty(len(flat), bounds[-1])
    longest = blocks_of(int(np.diff(bounds).max()), groups_of(twice).each)
    for stream, values in zip(flat, out):
        run(read(twice), [stream, bounds, values, len(bounds) - 1, longest])
    return out.view(*codes.shape[:-2], bounds[-1])


class Job(NamedTuple):
    """Sets y[p] (rows,) = matrix e, as it is stored, turned and without scale, times x[p] (columns,), both float32, for
    each (e, first p, last p + 1) of `spans`. codes: uint8 (matrices, columns, bytes)."""

    codes: torch.Tensor
    rate: float
    x: torch.Tensor
    y: torch.Tensor
    spans: list[Span]


def multiply(jobs: list[Job], dtype: torch.dtype) -> None:
    """Does jobs, none of which needs what another one makes. dtype: of the tokens as they came."""
    together, partial = [], []
    for codes, rate, x, y, spans in jobs:
        rows, twice = y.shape[1], int(2 * rate)
        limit = MANY if codes.shape[1] % joint_columns(rows) == 0 else 0  # rings of different lengths: one by one
        few, many = few_and_many(spans, limit)
        if few and joint_columns(rows) == 1:
            together.append(_few(codes, twice, x, y, torch.tensor(few)))
        elif few:
            asked, parts = torch.tensor(few), -(-_items() // len(few))
            room = torch.zeros(parts, *y.shape)
            together.append(_few_short(codes, twice, x, room, asked))
            partial.append((y, room, few))
        for e, start, stop in many:
            _by_tiles(codes[e], rate, x[start:stop].to(dtype_of_products(dtype)), y[start:stop])
    if together:
        from .team import run_all

        run_all(together)
    for y, room, few in partial:
        for _, start, stop in few:
            y[start:stop] = room[:, start:stop].sum(0)


def _items() -> int:
    """Pieces of work, at least, so that no thread waits long for the last."""
    return 2 * torch.get_num_threads()


def _sums(x: torch.Tensor) -> torch.Tensor:
    """(tokens,): what makes up for the BIAS of values, where they have one."""
    from .trellis_lanes import BIAS

    return x.sum(1) if BIAS else x.new_zeros(len(x))


def _few(codes, twice: int, x, y, asked) -> tuple[Any, list]:
    from .trellis_numba import few

    bounds, rows = column_bounds(y.shape[1]), y.shape[1]
    rings = len(bounds) - 1
    per = max(1, min(4, len(asked) * rings // _items()))
    numbers = [*codes.shape, rings, rows, len(x), len(asked), per]
    return few(twice), [codes, bounds, x, _sums(x), y, asked, *numbers]


def _few_short(codes, twice: int, x, room, asked) -> tuple[Any, list]:
    from .trellis_numba import few_short

    parts, _, rows = room.shape
    numbers = [*codes.shape[:2], joint_columns(rows), padded(rows), rows, len(x), len(asked), parts]
    return few_short(twice), [codes, x, _sums(x), room, asked, *numbers]


def _by_tiles(codes: torch.Tensor, rate: float, x: torch.Tensor, y: torch.Tensor) -> None:
    """Sets y (tokens, rows): x (tokens, columns) by torch's product with one tile of rows of a matrix after the other;
    values are exact in bfloat16."""
    from .team import run
    from .trellis_read import ordered, tile

    (columns, size), rows, twice = codes.shape, y.shape[1], int(2 * rate)
    if joint_columns(rows) > 1:
        values = read_all(codes, rate, ring_bounds(rows, columns)).view(columns, -1)
        y.copy_((x @ values.to(x.dtype))[:, :rows])
        return
    bounds = column_bounds(rows)
    blocks = blocks_of(int(np.diff(bounds).max()), groups_of(twice).each)
    wide = blocks * groups_of(twice).each * LANES
    rings = max(1, min(TILE // (2 * columns * wide), len(bounds) - 1))
    room = torch.empty(columns * rings * wide, dtype=torch.bfloat16)
    for low in range(0, len(bounds) - 1, rings):
        high = min(low + rings, len(bounds) - 1)
        out = room[: columns * (high - low) * wide].view(columns, -1)
        run(tile(twice), [codes, bounds, out, columns, size, low, high, blocks])
        done = x @ out.to(x.dtype)
        sizes = [*y.shape[:1], y.stride(0), rows, low, high, blocks]
        run(ordered(twice, int(done.dtype == torch.bfloat16)), [done, bounds, y, *sizes])
