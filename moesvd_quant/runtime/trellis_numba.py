"""Products with trellis codes on a CPU: what numba compiles. A copy lies in every checkpoint."""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .lanes import LANES
from .team import pointer, take, work
from .trellis_code import groups_of
from .trellis_lanes import BIAS, WRAP, add_rings, read_ring
from .trellis_read import OPTIONS, blocks_of, copy_ring, in_order

f32 = np.float32
TOGETHER = 4  # columns whose values are added at a time
FAST: Any = {"fastmath": True, **OPTIONS}


@njit(**FAST)
def add_times(total, x, values):
    for g in range(len(values)):
        total[g] += x * values[g]


@cache
def few(twice: int):
    """Work: y[p] = values of matrix e (rows, columns) @ x[p], for each (e, first p, last p + 1) of `spans`.

    Takes the addresses of codes (e, columns, bytes), bounds (rings + 1,) of a column, x (tokens, columns) and its sums
    (tokens,), y (tokens, rows), both float32, spans, and the sizes below; per: rings that are taken at a time.
    """
    each, size = groups_of(twice)[:2]

    @work
    def products(given):
        n = carray(given, (15,), np.int64)
        codes, given_x = n[1], n[3]
        _, columns, column_bytes, rings, rows, tokens, count, per = n[7:15]
        bounds = carray(pointer(n[2]), (rings + 1,), np.int64)
        x, sums = carray(pointer(n[3]), (tokens, columns), np.float32), carray(pointer(n[4]), (tokens,), np.float32)
        y = carray(pointer(n[5]), (tokens, rows), np.float32)
        spans = carray(pointer(n[6]), (count, 3), np.int64)
        longest = blocks_of(bounds[rings] - bounds[rings - 1], each)  # none is longer than the last
        wide, step = longest * each * LANES, longest * LANES * size + WRAP
        room, values, line = np.zeros(TOGETHER * per * step, np.uint8), np.zeros(wide, f32), np.empty(wide, f32)
        ring, v, chunks = room.ctypes.data, values.ctypes.data, -(-rings // per)
        item = take(given)
        while item < count * chunks:
            e, start, stop = spans[item // chunks]
            low = item % chunks * per
            high = min(rings, low + per)
            total = np.zeros((stop - start, per, wide), f32)
            sum_of = total.ctypes.data
            for first in range(0, columns, TOGETHER):
                together = min(TOGETHER, columns - first)
                for j in range(together):
                    column = codes + (e * columns + first + j) * column_bytes
                    for r in range(low, high):
                        begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                        copy_ring(column + begin, end - begin, ring + (j * per + r - low) * step)
                for r in range(low, high):
                    blocks, own = blocks_of(bounds[r + 1] - bounds[r], each), ring + (r - low) * step
                    if stop - start > 1:
                        for j in range(together):
                            read_ring(own + j * per * step, blocks, v, twice)
                            for p in range(start, stop):
                                add_times(total[p - start, r - low], x[p, first + j], values)
                        continue
                    at, place = given_x + 4 * (start * columns + first), sum_of + 4 * (r - low) * wide
                    if together == TOGETHER:
                        add_rings(own, per * step, blocks, at, place, TOGETHER, twice)
                    else:
                        for j in range(together):
                            add_rings(own + j * per * step, 0, blocks, at + 4 * j, place, 1, twice)
            for p in range(start, stop):
                for r in range(low, high):
                    in_order(total[p - start, r - low], each, f32(BIAS) * sums[p], line[: bounds[r + 1] - bounds[r]])
                    for i in range(min(rows, bounds[r + 1]) - bounds[r]):
                        y[p, bounds[r] + i] = line[i]
            item = take(given)

    return products


@cache
def few_short(twice: int):
    """The same where `joint` columns of `length` weights share a ring: y (parts, tokens, rows), to be summed, each of
    some of the rings of a matrix."""
    each, size = groups_of(twice)[:2]

    @work
    def products(given):
        n = carray(given, (14,), np.int64)
        _, columns, joint, length, rows, tokens, count, parts = n[6:14]
        ring_bytes, rings = length * joint * twice // 16, columns // joint
        codes = n[1]
        x, sums = carray(pointer(n[2]), (tokens, columns), np.float32), carray(pointer(n[3]), (tokens,), np.float32)
        y = carray(pointer(n[4]), (parts, tokens, rows), np.float32)
        spans = carray(pointer(n[5]), (count, 3), np.int64)
        blocks, groups = blocks_of(length * joint, each), length * joint // each
        wide = blocks * each * LANES
        room, values = np.zeros(blocks * LANES * size + WRAP, np.uint8), np.zeros(wide, f32)
        ring, v = room.ctypes.data, values.ctypes.data
        by_lane, line = np.zeros(blocks * LANES, f32), np.empty(length * joint, f32)
        item = take(given)
        while item < count * parts:
            e, start, stop = spans[item // parts]
            part = item % parts
            total = np.zeros((stop - start, wide), f32)
            for r in range(part * rings // parts, (part + 1) * rings // parts):
                copy_ring(codes + (e * rings + r) * ring_bytes, ring_bytes, ring)
                read_ring(ring, blocks, v, twice)
                for p in range(start, stop):
                    for g in range(groups):
                        by_lane[g] = x[p, r * joint + g * each // length]
                    for b in range(blocks):
                        for i in range(each):
                            first = (b * each + i) * LANES
                            for lane in range(LANES):
                                total[p - start, first + lane] += by_lane[b * LANES + lane] * values[first + lane]
            for p in range(start, stop):
                in_order(total[p - start], each, f32(0), line)
                for i in range(rows):
                    y[part, p, i] = -f32(BIAS) * sums[p] if part == 0 else f32(0)
                    for c in range(joint):
                        y[part, p, i] += line[c * length + i]
            item = take(given)

    return products
