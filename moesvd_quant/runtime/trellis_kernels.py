"""Trellis codes on a CPU, without dense matrices where there are few tokens. A copy lies in every checkpoint.

Where numba is missing, `trellis.py` reads codes with torch. What is turned stays turned: inputs are, and outputs are
turned back.
"""

import numpy as np
import torch

from .numba_here import HERE, LANES, dtype_of_products
from .spans import MANY, Span, few_and_many
from .trellis_code import blocks_of, column_bounds, groups_of, joint_columns, padded, ring_bounds

TILE = 2**22  # bytes of values that are made at a time, where a matrix has many tokens


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels can be had for a tensor."""
    return HERE and tensor.device.type == "cpu"


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
        given = [stream.data_ptr(), bounds.ctypes.data, values.data_ptr(), len(bounds) - 1, longest]
        run(read(twice), given)
    return out.view(*codes.shape[:-2], bounds[-1])


def mixed_first(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., m, n) float32, contiguous, which is changed: times blocks of Hadamard matrices along m."""
    from .hadamard_numba import mix_first
    from .team import run

    for one in x.view(-1, *x.shape[-2:]):
        run(mix_first, [one.data_ptr(), *one.shape, block])
    return x


def mix_rows(x: torch.Tensor, block: int, signs: torch.Tensor, signs_first: bool, scale: np.ndarray) -> None:
    """x (tokens, n) float32, in place: signs (n,), then blocks of Hadamard matrices along n, or the other way round;
    then times scale (tokens,)."""
    from .hadamard_numba import mix_last
    from .team import run

    run(mix_last(block, signs_first), [x.data_ptr(), signs.data_ptr(), scale.ctypes.data, *x.shape])


def products(codes: torch.Tensor, rate: float, rows: int, x: torch.Tensor, sizes: list[int], dtype) -> torch.Tensor:
    """x (tokens, columns) float32, contiguous, sorted by matrix, sizes[e] tokens of matrix e; codes uint8 (matrices,
    columns, bytes) -> float32 (tokens, rows): products with the values as they are stored, turned and without scale.
    dtype: of the tokens as they came."""
    limit = MANY if codes.shape[1] % joint_columns(rows) == 0 else 0  # rings of different lengths: one by one
    few, many = few_and_many(sizes, limit)
    y = _few(codes, int(2 * rate), rows, x, few) if few else torch.empty(len(x), rows)
    kind = dtype_of_products(dtype)
    for e, start, stop in many:
        _by_tiles(codes[e], rate, x[start:stop].to(kind), y[start:stop])
    return y


def _few(codes, twice: int, rows: int, x, spans: list[Span]) -> torch.Tensor:
    """y (tokens, rows) of the tokens of `spans`; others are not set."""
    from .team import run
    from .trellis_numba import few, few_short

    bounds, joint, asked, sums = column_bounds(rows), joint_columns(rows), torch.tensor(spans), x.sum(1)
    items = 2 * torch.get_num_threads()  # at least, so that no thread waits long for the last
    if joint == 1:
        y, rings = torch.empty(len(x), rows), len(bounds) - 1
        per = max(1, min(4, len(spans) * rings // items))
        tensors, sizes = (x, sums, y, asked), [*codes.shape, rings, rows, len(x), len(spans), per]
        run(few(twice), [codes.data_ptr(), bounds.ctypes.data, *(t.data_ptr() for t in tensors), *sizes])
        return y
    parts = -(-items // len(spans))
    y = torch.empty(parts, len(x), rows)
    sizes = [*codes.shape[:2], joint, padded(rows), rows, len(x), len(spans), parts]
    run(few_short(twice), [codes.data_ptr(), *(t.data_ptr() for t in (x, sums, y, asked)), *sizes])
    return y.sum(0)


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
        run(tile(twice), [codes.data_ptr(), bounds.ctypes.data, out.data_ptr(), columns, size, low, high, blocks])
        done = x @ out.to(x.dtype)
        sizes = [*y.shape[:1], y.stride(0), rows, low, high, blocks]
        addresses = [done.data_ptr(), bounds.ctypes.data, y.data_ptr()]
        run(ordered(twice, int(done.dtype == torch.bfloat16)), [*addresses, *sizes])
