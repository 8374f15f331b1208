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
from .trellis_lanes import BIAS, WRAP, add_rings, in_order, read_ring
from .trellis_read import OPTIONS, blocks_of, copy_ring

f32 = np.float32
TOGETHER = 4  # columns whose values are added at a time
AT_ONCE = 4  # tokens for which they are read once
FAST: Any = {"fastmath": True, **OPTIONS}


@njit(**FAST)
def gathered(x, low, high, out):
    """out (columns, tokens): the inputs of tokens low ... high - 1, zeros where there are no more."""
    out[:] = f32(0)
    for p in range(low, high):
        for c in range(x.shape[1]):
            out[c, p - low] = x[p, c]


@cache
def few(twice: int):
    """Work: y[p] = values of matrix e (rows, columns) @ x[p], for each (e, first p, last p + 1) of `spans`.

    Takes the addresses of codes (e, columns, bytes), bounds (rings + 1,) of a column, x (tokens, columns) and its sums
    (tokens,), y (tokens, rows), both float32, spans, and the sizes below; per: rings that are taken at a time. Values
    are read once for AT_ONCE tokens, and TOGETHER columns; columns that there are not meet zeros.
    """
    each, size = groups_of(twice)[:2]

    @work
    def products(given):
        n = carray(given, (15,), np.int64)
        codes = n[1]
        _, columns, column_bytes, rings, rows, tokens, count, per = n[7:15]
        bounds = carray(pointer(n[2]), (rings + 1,), np.int64)
        x, sums = carray(pointer(n[3]), (tokens, columns), np.float32), carray(pointer(n[4]), (tokens,), np.float32)
        y = carray(pointer(n[5]), (tokens, rows), np.float32)
        spans = carray(pointer(n[6]), (count, 3), np.int64)
        longest = blocks_of(bounds[rings] - bounds[rings - 1], each)  # none is longer than the last
        wide, step = longest * each * LANES, longest * LANES * size + WRAP
        room, line = np.zeros(TOGETHER * per * step, np.uint8), np.empty(wide, f32)
        inputs = np.zeros((columns + TOGETHER) * AT_ONCE, f32)
        total = np.zeros((AT_ONCE, per, wide), f32)
        ring, given_x, sum_of, next_token = room.ctypes.data, inputs.ctypes.data, total.ctypes.data, 4 * per * wide
        chunks = -(-rings // per)
        item = take(given)
        while item < count * chunks:
            e, start, stop = spans[item // chunks]
            low = item % chunks * per
            high = min(rings, low + per)
            while start < stop:
                some = min(stop - start, AT_ONCE)
                room_for = 1 if some == 1 else 2 if some == 2 else AT_ONCE
                gathered(x, start, start + some, inputs[: (columns + TOGETHER) * room_for].reshape(-1, room_for))
                total[:some] = f32(0)
                for first in range(0, columns, TOGETHER):
                    for j in range(min(TOGETHER, columns - first)):
                        column = codes + (e * columns + first + j) * column_bytes
                        for r in range(low, high):
                            begin, end = bounds[r] * twice // 16, bounds[r + 1] * twice // 16
                            copy_ring(column + begin, end - begin, ring + (j * per + r - low) * step)
                    at = given_x + 4 * first * room_for
                    for r in range(low, high):
                        blocks, own = blocks_of(bounds[r + 1] - bounds[r], each), ring + (r - low) * step
                        place = sum_of + 4 * (r - low) * wide
                        if room_for == 1:
                            add_rings(own, per * step, blocks, at, place, next_token, TOGETHER, 1, twice)
                        elif room_for == 2:
                            add_rings(own, per * step, blocks, at, place, next_token, TOGETHER, 2, twice)
                        else:
                            add_rings(own, per * step, blocks, at, place, next_token, TOGETHER, AT_ONCE, twice)
                for p in range(some):
                    less = f32(BIAS) * sums[start + p]
                    for r in range(low, high):
                        weights = min(rows, bounds[r + 1]) - bounds[r]
                        own = sum_of + p * next_token + 4 * (r - low) * wide
                        in_order(own, blocks_of(weights, each), less, line.ctypes.data, each, 0)
                        y[start + p, bounds[r] : bounds[r] + weights] = line[:weights]
                start += some
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
        by_lane, line = np.zeros(blocks * LANES, f32), np.empty(wide, f32)
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
                in_order(total[p - start].ctypes.data, blocks, f32(0), line.ctypes.data, each, 0)
                for i in range(rows):
                    y[part, p, i] = -f32(BIAS) * sums[p] if part == 0 else f32(0)
                    for c in range(joint):
                        y[part, p, i] += line[c * length + i]
            item = take(given)

    return products
