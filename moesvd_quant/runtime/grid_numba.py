"""Products with packed grids on a CPU: what numba compiles. A copy lies in every checkpoint."""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .grid_lanes import BLOCK, PLANES, kept_place, row_products, row_scales, row_values, row_zeros
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


def plane_weights(bits: int) -> np.ndarray:
    """(8,) float32: what makes up for codes that are used where they stand."""
    return np.array([2.0 ** -(bits * k) if kept_place(bits, k) else 1.0 for k in range(8)], f32)


@njit(**OPTIONS)
def spread_groups(values, groups, wide):
    """Gives the value of a group to each of its `wide` blocks."""
    for at in range(len(values) - 1, -1, -1):
        values[at] = values[min(at // wide, groups - 1)]


@cache
def few(bits: int, per_block: int, sym: bool):
    """Work: y[p] = weight of matrix e @ x[p], for each (e, first p, last p + 1) of `spans`.

    per_block: groups of a block, 1 where they are as large or larger. Takes the addresses of codes (e, rows, bytes),
    levels (e, rows, groups), base (e,), zeros (e, bytes), table (of scales by level), x as `in_planes` makes it, y
    (tokens, rows) float32, spans, and the sizes below; wide: blocks of a group.
    """
    block_bytes, middle = BLOCK * bits // 8, f32(1 << (bits - 1))

    @work
    def products(given):
        n = carray(given, (18,), np.int64)
        codes, levels, zeros, table, x, y = n[1], n[2], n[4], n[5], n[6], n[7]
        matrices, rows, row_bytes, groups, zero_bytes, wide, blocks, _, count = n[9:18]
        base, spans = carray(pointer(n[3]), (matrices,), np.float32), carray(pointer(n[8]), (count, 3), np.int64)
        scales, offs = np.zeros(blocks * per_block, f32), np.full(blocks * per_block, middle, f32)
        room, each, chunks = np.zeros(blocks * block_bytes, np.uint8), 4 * blocks * PLANES * LANES, -(-rows // CHUNK)
        s, o, aside = scales.ctypes.data, offs.ctypes.data, room.ctypes.data
        item = take(given)
        while item < count * chunks:
            e, start, stop = spans[item // chunks]
            first = item % chunks * CHUNK
            for r in range(first, min(rows, first + CHUNK)):
                row = codes + (e * rows + r) * row_bytes
                if row_bytes < len(room):  # it ends within a block
                    copy(aside, row, row_bytes)
                    row = aside
                own = levels + (e * rows + r) * groups
                if sym:
                    row_scales(own, groups, table, base[e], s)
                    if wide > 1:
                        spread_groups(scales, groups, wide)
                    for g in range(len(scales)):
                        offs[g] = scales[g] * middle
                else:
                    low = zeros + e * zero_bytes
                    row_scales(own, groups, table, base[e], s)
                    row_zeros(low, r * groups * bits, low + zero_bytes - 1, groups, bits, o)
                    if wide > 1:
                        spread_groups(scales, groups, wide)
                        spread_groups(offs, groups, wide)
                    for g in range(len(scales)):
                        offs[g] *= scales[g]
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
def tile(bits: int, per_block: int, sym: bool):
    """Work: `count` rows of one matrix from `first` on, (count, blocks * BLOCK) float32, columns in the order of
    planes, exactly (code - zero) * scale. Takes what `few` takes, of one matrix."""
    block_bytes, middle = BLOCK * bits // 8, f32(1 << (bits - 1))

    @work
    def values(given):
        n = carray(given, (15,), np.int64)
        codes, levels, zeros, table, out = n[1], n[2], n[4], n[5], n[6]
        _, row_bytes, groups, zero_bytes, wide, blocks, first, count = n[7:15]
        base = carray(pointer(n[3]), (1,), np.float32)[0]
        scales, offs = np.zeros(blocks * per_block, f32), np.full(blocks * per_block, middle, f32)
        room = np.zeros(blocks * block_bytes, np.uint8)
        s, o, aside = scales.ctypes.data, offs.ctypes.data, room.ctypes.data
        item = take(given)
        while item < -(-count // CHUNK):
            for at in range(item * CHUNK, min(count, (item + 1) * CHUNK)):
                r = first + at
                row = codes + r * row_bytes
                if row_bytes < len(room):
                    copy(aside, row, row_bytes)
                    row = aside
                row_scales(levels + r * groups, groups, table, base, s)
                if not sym:
                    row_zeros(zeros, r * groups * bits, zeros + zero_bytes - 1, groups, bits, o)
                if wide > 1:
                    spread_groups(scales, groups, wide)
                    spread_groups(offs, groups, wide)
                row_values(row, blocks, s, o, out + 4 * at * blocks * BLOCK, bits, per_block)
            item = take(given)

    return values
