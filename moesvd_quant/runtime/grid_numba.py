"""Products with packed grids on a CPU: what numba compiles. A copy lies in every checkpoint."""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .grid_lanes import BLOCK, PLANES, kept_place, row_products, row_values
from .lanes import LANES
from .team import pointer, take, work

f32, u32 = np.float32, np.uint32
CHUNK = 32  # rows that a thread takes at a time
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


@njit(**OPTIONS)
def zero_of(zeros, index, bits):
    bit = index * bits
    at = bit >> 3
    found = u32(zeros[at])
    if at + 1 < len(zeros):
        found = found | (u32(zeros[at + 1]) << u32(8))
    return f32((found >> u32(bit & 7)) & u32(2**bits - 1))


@njit(**OPTIONS)
def groups_of(levels, zeros, base, table, bits, r, wide, scales, offs):
    """Scale and zero of each group of a row; of a group of several blocks, for each of `wide`. No zeros: symmetric."""
    groups = len(levels)
    for g in range(groups):
        scale = base * table[levels[g]]
        off = zero_of(zeros, r * groups + g, bits) if len(zeros) else f32(1 << (bits - 1))
        for at in range(g * wide, min(len(scales), (g + 1) * wide)):
            scales[at], offs[at] = scale, off


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
def padded(codes, at, count, room):
    """Where to read a row: (codes, at), or room, to which it is copied where it ends within a block."""
    if count == len(room):
        return codes, at
    room[:count] = codes[at : at + count]
    return room, 0


@cache
def few(bits: int, per_block: int):
    """Work: y[p] = weight of matrix e @ x[p], for each (e, first p, last p + 1) of `spans`.

    per_block: groups of a block, 1 where they are as large or larger. Takes the addresses of codes (e, rows, bytes),
    levels (e, rows, groups), base (e,), zeros (e, bytes), table (of scales by level), x as `in_planes` makes it, y
    (tokens, rows) float32, spans, and the sizes below; wide: blocks of a group.
    """
    block_bytes = BLOCK * bits // 8

    @work
    def products(given):
        n = carray(given, (18,), np.int64)
        matrices, rows, row_bytes, groups, zero_bytes, wide, blocks, tokens, count = n[9:18]
        codes = carray(pointer(n[1]), (matrices * rows * row_bytes,), np.uint8)
        levels = carray(pointer(n[2]), (matrices, rows, groups), np.uint8)
        base = carray(pointer(n[3]), (matrices,), np.float32)
        zeros = carray(pointer(n[4]), (matrices, zero_bytes), np.uint8)
        table = carray(pointer(n[5]), (256,), np.float32)
        x = carray(pointer(n[6]), (tokens * blocks * PLANES * LANES,), np.float32)
        y = carray(pointer(n[7]), (tokens, rows), np.float32)
        spans = carray(pointer(n[8]), (count, 3), np.int64)
        scales, offs, found = np.zeros(blocks * per_block, f32), np.zeros(blocks * per_block, f32), np.empty(4, f32)
        room, each, chunks = np.zeros(blocks * block_bytes, np.uint8), blocks * PLANES * LANES, -(-rows // CHUNK)
        item = take(given)
        while item < count * chunks:
            e, start, stop = spans[item // chunks]
            first = item % chunks * CHUNK
            for r in range(first, min(rows, first + CHUNK)):
                groups_of(levels[e, r], zeros[e], base[e], table, bits, r, wide, scales, offs)
                for g in range(len(offs)):
                    offs[g] *= scales[g]
                row, at = padded(codes, (e * rows + r) * row_bytes, row_bytes, room)
                p = start
                while p + 4 <= stop:
                    row_products(row, at, blocks, x, p * each, scales, offs, found, bits, per_block, 4)
                    for t in range(4):
                        y[p + t, r] = found[t]
                    p += 4
                while p < stop:
                    row_products(row, at, blocks, x, p * each, scales, offs, found, bits, per_block, 1)
                    y[p, r] = found[0]
                    p += 1
            item = take(given)

    return products


@cache
def tile(bits: int, per_block: int):
    """Work: `count` rows of one matrix from `first` on, (count, blocks * BLOCK) float32, columns in the order of
    planes, exactly (code - zero) * scale. Takes what `few` takes, of one matrix."""
    block_bytes = BLOCK * bits // 8

    @work
    def values(given):
        n = carray(given, (15,), np.int64)
        rows, row_bytes, groups, zero_bytes, wide, blocks, first, count = n[7:15]
        codes = carray(pointer(n[1]), (rows * row_bytes,), np.uint8)
        levels = carray(pointer(n[2]), (rows, groups), np.uint8)
        base = carray(pointer(n[3]), (1,), np.float32)[0]
        zeros = carray(pointer(n[4]), (zero_bytes,), np.uint8)
        table = carray(pointer(n[5]), (256,), np.float32)
        out = carray(pointer(n[6]), (count * blocks * BLOCK,), np.float32)
        scales, offs = np.zeros(blocks * per_block, f32), np.zeros(blocks * per_block, f32)
        room = np.zeros(blocks * block_bytes, np.uint8)
        item = take(given)
        while item < -(-count // CHUNK):
            for own in range(item * CHUNK, min(count, (item + 1) * CHUNK)):
                r = first + own
                groups_of(levels[r], zeros, base, table, bits, r, wide, scales, offs)
                row, at = padded(codes, r * row_bytes, row_bytes, room)
                row_values(row, at, blocks, scales, offs, out, own * blocks * BLOCK, bits, per_block)
            item = take(given)

    return values
