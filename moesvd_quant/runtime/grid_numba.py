"""Products with packed grids on a CPU: what numba compiles. A copy lies in every checkpoint."""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .grid_kernels import BLOCK, PLANES
from .grid_lanes import kept_place, row_products, row_scales, row_values, row_zeros
from .lanes import LANES, copy
from .team import pointer, take, work

f32 = np.float32
CHUNK = 32  # rows that a thread takes at a time
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


@njit(cache=True, **OPTIONS)
def in_planes(x, bits, weights, out):
    """x (tokens, columns) float32 -> out (tokens, blocks, PLANES, LANES): of columns 8 * word + plane, times the weight
    of the plane; the last plane has the sums of the others as they were. 8 bits: columns in their order."""
    for t in range(x.shape[0]):
        for b in range(out.shape[1]):
            for lane in range(LANES):
                whole = f32(0)
                for k in range(8):
                    at = b * BLOCK + (k * LANES + lane if bits == 8 else 8 * lane + k)
                    value = x[t, at] if at < x.shape[1] else f32(0)
                    whole += value
                    out[t, b, k, lane] = value * weights[k]
                out[t, b, 8, lane] = whole


@cache
def plane_weights(bits: int) -> np.ndarray:
    """(8,) float32: what makes up for codes that are used where they stand."""
    return np.array([2.0 ** -(bits * k) if kept_place(bits, k) else 1.0 for k in range(8)], f32)


@njit(**OPTIONS)
def spread_groups(values, groups, wide):
    """Gives the value of a group to each of its `wide` blocks."""
    for at in range(len(values) - 1, -1, -1):
        values[at] = values[min(at // wide, groups - 1)]


@njit(**OPTIONS)
def set_groups(levels, zeros, zero_bytes, r, groups, wide, table, base, bits, scales, offs):
    """Scale and zero of the groups of row r, whose levels are at an address; of a matrix without zeros `offs` stays."""
    row_scales(levels, groups, table, base, scales.ctypes.data)
    if zero_bytes:
        row_zeros(zeros, r * groups * bits, zeros + zero_bytes - 1, groups, bits, offs.ctypes.data)
    if wide > 1:
        spread_groups(scales, groups, wide)
        spread_groups(offs, groups, wide)


@njit(**OPTIONS)
def whole_blocks(row, row_bytes, room):
    """The address of a row; of a copy in `room`, filled up with zeros, where it ends within a block."""
    if row_bytes == len(room):
        return row
    copy(room.ctypes.data, row, row_bytes)
    return room.ctypes.data


@cache
def few(bits: int, per_block: int):
    """Work: y[p] = weight of matrix e @ x[p], for each (e, first p, last p + 1) of `spans`.

    per_block: groups of a block, 1 where they are as large or larger. Takes the addresses of codes (e, rows, bytes),
    levels (e, rows, groups), base (e,), zeros (e, bytes; none of a symmetric grid), table (of scales by level), x as
    `in_planes` makes it, y (tokens, rows) float32, spans, and the sizes below; wide: blocks of a group.
    """
    block_bytes, middle = BLOCK * bits // 8, f32(1 << (bits - 1))

    @work
    def products(given):
        n = carray(given, (18,), np.int64)
        codes, levels, zeros, table, x, y = n[1], n[2], n[4], n[5], n[6], n[7]
        matrices, rows, row_bytes, groups, zero_bytes, wide, blocks, _, count = n[9:18]
        base, spans = carray(pointer(n[3]), (matrices,), np.float32), carray(pointer(n[8]), (count, 3), np.int64)
        scales, offs = np.zeros(blocks * per_block, f32), np.full(blocks * per_block, middle, f32)
        below, room = np.zeros(blocks * per_block, f32), np.zeros(blocks * block_bytes, np.uint8)
        s, o, each, chunks = scales.ctypes.data, below.ctypes.data, 4 * blocks * PLANES * LANES, -(-rows // CHUNK)
        item = take(given)
        while item < count * chunks:
            e, start, stop = spans[item // chunks]
            first, zero = item % chunks * CHUNK, zeros + e * zero_bytes
            for r in range(first, min(rows, first + CHUNK)):
                own = levels + (e * rows + r) * groups
                set_groups(own, zero, zero_bytes, r, groups, wide, table, base[e], bits, scales, offs)
                for g in range(len(scales)):
                    below[g] = scales[g] * offs[g]
                row = whole_blocks(codes + (e * rows + r) * row_bytes, row_bytes, room)
                p = start
                while p + 4 <= stop:
                    place = y + 4 * (p * rows + r)
                    row_products(row, blocks, x + p * each, s, o, place, rows, bits, per_block, 4)
                    p += 4
                while p < stop:
                    place = y + 4 * (p * rows + r)
                    row_products(row, blocks, x + p * each, s, o, place, rows, bits, per_block, 1)
                    p += 1
            item = take(given)

    return products


@cache
def tile(bits: int, per_block: int, half: int):
    """Work: `count` rows of one matrix from `first` on, (count, blocks * BLOCK) float32 or (`half`) bfloat16, columns
    in the order of planes: (code - zero) * scale. Takes what `few` takes, of one matrix."""
    block_bytes, middle, size = BLOCK * bits // 8, f32(1 << (bits - 1)), 2 if half else 4

    @work
    def values(given):
        n = carray(given, (15,), np.int64)
        codes, levels, zeros, table, out = n[1], n[2], n[4], n[5], n[6]
        _, row_bytes, groups, zero_bytes, wide, blocks, first, count = n[7:15]
        base = carray(pointer(n[3]), (1,), np.float32)[0]
        scales, offs = np.zeros(blocks * per_block, f32), np.full(blocks * per_block, middle, f32)
        room, s, o = np.zeros(blocks * block_bytes, np.uint8), scales.ctypes.data, offs.ctypes.data
        item = take(given)
        while item < -(-count // CHUNK):
            for at in range(item * CHUNK, min(count, (item + 1) * CHUNK)):
                r = first + at
                own = levels + r * groups
                set_groups(own, zeros, zero_bytes, r, groups, wide, table, base, bits, scales, offs)
                row = whole_blocks(codes + r * row_bytes, row_bytes, room)
                row_values(row, blocks, s, o, out + size * at * blocks * BLOCK, bits, per_block, half)
            item = take(given)

    return values
