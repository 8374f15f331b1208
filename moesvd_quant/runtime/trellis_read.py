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

from . import trellis_code
from .lanes import LANES, copy, copy_word
from .team import pointer, take, work
from .trellis_code import groups_of
from .trellis_lanes import BIAS, WRAP, in_order, read_ring, read_ring_half

f32 = np.float32
EACH_TIME = 64  # rings of a stream that a thread takes at a time
COLUMNS = 32  # of a matrix
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


blocks_of = njit(**OPTIONS)(trellis_code.blocks_of)


@njit(**OPTIONS)
def copy_ring(source, size, target):
    """Copies the bytes of a ring, and its beginning behind them. Addresses."""
    copy(target, source, size)
    if size >= WRAP:
        copy_word(target + size, source)
        return
    done = 0
    while done < WRAP:  # the ring is shorter
        copy(target + size + done, source, min(size, WRAP - done))
        done += size


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
        codes = n[1]
        bounds = carray(pointer(n[2]), (high + 1,), np.int64)
        wide, step = blocks * each * LANES, blocks * LANES * size + WRAP
        room = np.zeros((high - low) * step, np.uint8)
        rings = room.ctypes.data
        item = take(given)
        while item * COLUMNS < columns:
            for j in range(item * COLUMNS, min(columns, (item + 1) * COLUMNS)):
                for r in range(low, high):
                    begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                    copy_ring(codes + j * column_bytes + begin, end - begin, rings + (r - low) * step)
                for r in range(high - low):
                    read_ring_half(rings + r * step, blocks, n[3] + 2 * (j * (high - low) + r) * wide, twice)
            item = take(given)

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
        codes = n[1]
        out = carray(pointer(n[3]), (bounds[rings],), np.float32)
        room = np.zeros(longest * LANES * size + WRAP, np.uint8)
        values, line = np.zeros(longest * each * LANES, f32), np.zeros(longest * each * LANES, f32)
        ring, v = room.ctypes.data, values.ctypes.data
        item = take(given)
        while item * EACH_TIME < rings:
            for r in range(item * EACH_TIME, min(rings, (item + 1) * EACH_TIME)):
                begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                copy_ring(codes + begin, end - begin, ring)
                weights = bounds[r + 1] - bounds[r]
                read_ring(ring, blocks_of(weights, each), v, twice)
                in_order(v, blocks_of(weights, each), f32(BIAS), line.ctypes.data, each, 0)
                out[bounds[r] : bounds[r + 1]] = line[:weights]
            item = take(given)

    return read_all


@cache
def ordered(twice: int, half: int):
    """Work: sets what belongs to the rings low ... high of y (tokens, rows) float32, whose rows are `step` numbers
    apart, to the products with a `tile`, (tokens, rings, blocks, planes, lanes), bfloat16 where `half`, else float32.
    Takes the addresses of the products, bounds and y, and the sizes below."""
    each = groups_of(twice).each

    @work
    def order(given):
        n = carray(given, (10,), np.int64)
        tokens, step, rows, low, high, blocks = n[4:10]
        bounds, y = carray(pointer(n[2]), (high + 1,), np.int64), carray(pointer(n[3]), (tokens, step), np.float32)
        wide = blocks * each * LANES
        line = np.zeros(wide, f32)
        size = 2 if half else 4
        t = take(given)
        while t < tokens:
            for r in range(low, high):
                own = n[1] + size * (t * (high - low) + r - low) * wide
                weights = min(rows, bounds[r + 1]) - bounds[r]
                in_order(own, blocks_of(weights, each), f32(0), line.ctypes.data, each, half)
                y[t, bounds[r] : bounds[r] + weights] = line[:weights]
            t = take(given)

    return order
