"""Trellis codes read on a CPU: what numba compiles. A copy lies in every checkpoint.

A ring that is read is copied, with its beginning at its end, since the last windows reach into the first bytes; blocks
are then read wherever they begin. `twice`: two times the rate.
"""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .lanes import LANES
from .team import pointer, take, work
from .trellis_lanes import BIAS, groups_of, read_block

f32, u16, u32 = np.float32, np.uint16, np.uint32
WRAP = 8  # bytes of a ring's beginning that follow its end
EACH_TIME = 64  # rings of a stream that a thread takes at a time
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


@njit(**OPTIONS)
def blocks_of(weights, each):
    """Blocks of a ring."""
    return -(-weights // (each * LANES))


@njit(**OPTIONS)
def copy_ring(codes, begin, size, ring, at):
    """Copies the bytes of a ring to `at`, and its beginning behind them."""
    for k in range(size):
        ring[at + k] = codes[begin + k]
    if size >= WRAP:
        for k in range(WRAP):
            ring[at + size + k] = codes[begin + k]
    else:
        for k in range(WRAP):
            ring[at + size + k] = codes[begin + k % size]


@njit(**OPTIONS)
def in_order(planes, each, less, out):
    """out: values, less something, in their order."""
    for group in range(len(out) // each):
        start = group // LANES * each * LANES + group % LANES
        for i in range(each):
            out[group * each + i] = planes[start + i * LANES] - less


@njit(**OPTIONS)
def upper_half(values, out):
    """The first 16 bits of small whole numbers, less BIAS: they as bfloat16."""
    whole = (values - f32(BIAS)).view(u32)
    for i in range(len(out)):
        out[i] = u16(whole[i] >> u32(16))


@cache
def tile(twice: int):
    """Work: values of the rings low ... high of every column as bfloat16, (columns, rings, blocks, planes, lanes), as
    many blocks for each ring as for the longest. Takes the addresses of the codes of one matrix, bounds, out, and the
    sizes below."""
    each, size = groups_of(twice)[:2]

    @work
    def read_tile(given):
        n = carray(given, (9,), np.int64)
        columns, column_bytes, low, high, blocks = n[4:9]
        codes = carray(pointer(n[1]), (columns * column_bytes,), np.uint8)
        bounds = carray(pointer(n[2]), (high + 1,), np.int64)
        wide = blocks * each * LANES
        out = carray(pointer(n[3]), (columns, high - low, wide), np.uint16)
        ring, values = np.zeros(blocks * LANES * size + 2 * WRAP, np.uint8), np.zeros(wide, f32)
        j = take(given)
        while j < columns:
            for r in range(low, high):
                begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                copy_ring(codes, j * column_bytes + begin, end - begin, ring, 0)
                for b in range(blocks):
                    read_block(ring, b * LANES * size, values, b * each * LANES, twice)
                upper_half(values, out[j, r - low])
            j = take(given)

    return read_tile


@cache
def read(twice: int):
    """Work: values of all rings of a stream of bytes, float32 in their order. Takes the addresses of the stream, bounds
    (in weights), out, and the sizes below; longest: blocks of the longest ring."""
    each, size = groups_of(twice)[:2]

    @work
    def read_all(given):
        n = carray(given, (6,), np.int64)
        rings, longest = n[4:6]
        bounds = carray(pointer(n[2]), (rings + 1,), np.int64)
        codes = carray(pointer(n[1]), (bounds[rings] * twice // 16,), np.uint8)
        out = carray(pointer(n[3]), (bounds[rings],), np.float32)
        ring, values = np.zeros(longest * LANES * size + 2 * WRAP, np.uint8), np.zeros(longest * each * LANES, f32)
        item = take(given)
        while item * EACH_TIME < rings:
            for r in range(item * EACH_TIME, min(rings, (item + 1) * EACH_TIME)):
                begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                copy_ring(codes, begin, end - begin, ring, 0)
                for b in range(blocks_of(bounds[r + 1] - bounds[r], each)):
                    read_block(ring, b * LANES * size, values, b * each * LANES, twice)
                in_order(values, each, f32(BIAS), out[bounds[r] : bounds[r + 1]])
            item = take(given)

    return read_all
