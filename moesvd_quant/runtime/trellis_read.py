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
from .lanes import LANES, copy
from .team import pointer, take, work
from .trellis_code import groups_of
from .trellis_lanes import BIAS, WRAP, read_ring

f32, u16, u32 = np.float32, np.uint16, np.uint32
EACH_TIME = 64  # rings of a stream that a thread takes at a time
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


blocks_of = njit(**OPTIONS)(trellis_code.blocks_of)


@njit(**OPTIONS)
def copy_ring(source, size, target):
    """Copies the bytes of a ring, and its beginning behind them. Addresses."""
    copy(target, source, size)
    done = 0
    while done < WRAP:  # more than once where the ring is shorter
        copy(target + size + done, source, min(size, WRAP - done))
        done += size


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
        codes = n[1]
        bounds = carray(pointer(n[2]), (high + 1,), np.int64)
        wide = blocks * each * LANES
        out = carray(pointer(n[3]), (columns, high - low, wide), np.uint16)
        room, values = np.zeros(blocks * LANES * size + WRAP, np.uint8), np.zeros(wide, f32)
        ring, v = room.ctypes.data, values.ctypes.data
        j = take(given)
        while j < columns:
            for r in range(low, high):
                begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                copy_ring(codes + j * column_bytes + begin, end - begin, ring)
                read_ring(ring, blocks, v, twice)
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
        codes = n[1]
        out = carray(pointer(n[3]), (bounds[rings],), np.float32)
        room, values = np.zeros(longest * LANES * size + WRAP, np.uint8), np.zeros(longest * each * LANES, f32)
        ring, v = room.ctypes.data, values.ctypes.data
        item = take(given)
        while item * EACH_TIME < rings:
            for r in range(item * EACH_TIME, min(rings, (item + 1) * EACH_TIME)):
                begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                copy_ring(codes + begin, end - begin, ring)
                read_ring(ring, blocks_of(bounds[r + 1] - bounds[r], each), v, twice)
                in_order(values, each, f32(BIAS), out[bounds[r] : bounds[r + 1]])
            item = take(given)

    return read_all
