"""The best path through a trellis code, as numba compiles it; see `viterbi.py`."""

from typing import Any

import numpy as np
from numba import njit

from ..runtime.trellis_code import WINDOW
from .viterbi_lanes import step_of

f32, i64, u8 = np.float32, np.int64, np.uint8
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
FAST: Any = {"fastmath": True, **OPTIONS}
STATES = 2**WINDOW
FAR = f32(1e9)
FINE = f32(8)  # parts of the code's unit that weights are rounded to
FARTHEST = f32(96)  # values are between -60 and 60: what lies farther out is as far as this
OVERLAP = 64  # bits around the ends of a ring after which how they meet is known


# The cost of state s after a step of k bits is at [s & (2**k - 1)][s >> k]: all innermost loops are then over
# neighbours.
def added(k):
    """Cost of each state: that of its group, and its own error."""
    count, group = 2**k, STATES >> k

    @njit(**FAST)
    def add(target, values, best, cost):
        for b in range(count):
            for i in range(group):
                error = target - values[b * group + i]
                cost[b * group + i] = best[i] + error * error

    return add


s11, s12, s21, s22, s23 = step_of(1, 1), step_of(1, 2), step_of(2, 1), step_of(2, 2), step_of(2, 3)
s32, s33, s34, s43, s44 = step_of(3, 2), step_of(3, 3), step_of(3, 4), step_of(4, 3), step_of(4, 4)
add1, add2, add3, add4 = added(1), added(2), added(3), added(4)


@njit(**OPTIONS)
def step(before, k, best, arranged, target, found):
    """See `viterbi_lanes.step_of`; addresses, and a weight."""
    if before == 1:
        s11(best, arranged, target, found) if k == 1 else s12(best, arranged, target, found)
    elif before == 2:
        if k == 2:
            s22(best, arranged, target, found)
        else:
            s21(best, arranged, target, found) if k == 1 else s23(best, arranged, target, found)
    elif before == 3:
        if k == 3:
            s33(best, arranged, target, found)
        else:
            s32(best, arranged, target, found) if k == 2 else s34(best, arranged, target, found)
    else:
        s44(best, arranged, target, found) if k == 4 else s43(best, arranged, target, found)


@njit(**OPTIONS)
def add(k, target, arranged, best, cost):
    if k == 1:
        add1(target, arranged[0], best, cost)
    elif k == 2:
        add2(target, arranged[1], best, cost)
    elif k == 3:
        add3(target, arranged[2], best, cost)
    else:
        add4(target, arranged[3], best, cost)


@njit(**OPTIONS)
def lowest_state(cost, k, meet, opening):
    """The first state of least cost, after a step of k bits; of those whose `opening` low bits are `meet`, unless that
    is -1."""
    state, lowest = 0, FAR * f32(2)
    if meet >= 0:
        for high in range(STATES >> opening):
            end = (high << opening) | meet
            found = cost[(end & ((1 << k) - 1)) * (STATES >> k) + (end >> k)]
            if found < lowest:
                state, lowest = end, found
        return state
    for at in range(STATES):
        lowest = min(lowest, cost[at])
    while cost[(state & ((1 << k) - 1)) * (STATES >> k) + (state >> k)] != lowest:
        state += 1
    return state


@njit(**OPTIONS)
def search(targets, moves, first, count, meet, values, arranged, cost, best, path):
    """The best `count` states from place `first` of a ring on, in `path`. meet: the bits that the state before the
    first one hands on, which the last one has to hand on as well; -1: any."""
    length = len(targets)
    k = moves[first % length]
    best[0, : STATES >> k] = f32(0) if meet < 0 else FAR
    if meet >= 0:
        best[0, meet] = f32(0)
    tables, rows = arranged.ctypes.data, best.ctypes.data
    for i in range(1, count):
        before, k = k, moves[(first + i) % length]
        table, row = tables + (before - 1) * arranged.strides[0], rows + (i - 1) * best.strides[0]
        step(before, k, row, table, targets[(first + i - 1) % length], row + best.strides[0])
    add(k, targets[(first + count - 1) % length], arranged, best[count - 1], cost)
    state = lowest_state(cost, k, meet, WINDOW - moves[first % length])
    for i in range(count - 1, 0, -1):
        path[i] = state
        # Which state led here is not kept: the costs of those that can are made again.
        before, k = (first + i - 1) % length, moves[(first + i) % length]
        group, lowest = state >> k, FAR * f32(2)
        for p in range(1 << k):
            candidate = (p << (WINDOW - k)) | group
            error = targets[before] - values[candidate]
            found = best[i - 1, candidate >> moves[before]] + error * error
            if found < lowest:
                state, lowest = candidate, found
    path[0] = state


@njit(**OPTIONS)
def encode_ring(x, twice, values, arranged, cost, best, chosen, codes):
    """A ring of weights x -> the values that are nearest to it, in place of `chosen`, and its bits in `codes`."""
    length = len(x)
    targets, moves, path = np.empty(length, f32), np.empty(length, i64), np.empty(length, i64)
    for i in range(length):
        t = length - 1 - i
        targets[i] = np.rint(min(max(x[t], -FARTHEST), FARTHEST) * FINE) / FINE
        moves[i] = (t + 1) * twice // 2 - t * twice // 2
    margin = min(length // 2, 2 * OVERLAP // twice)
    search(targets, moves, length - margin, 2 * margin, -1, values, arranged, cost, best, path)
    meet = path[margin] >> moves[0]
    search(targets, moves, 0, length, meet, values, arranged, cost, best, path)
    for b in range(len(codes)):
        codes[b] = u8(0)
    for i in range(length):
        t = length - 1 - i
        chosen[t] = values[path[i]]
        place = t * twice // 2
        word = (path[i] & ((1 << moves[i]) - 1)) << (place & 7)
        codes[place >> 3] |= u8(word & 255)
        if word > 255:
            codes[(place >> 3) + 1] |= u8(word >> 8)


@njit(cache=True, **OPTIONS)
def encode_columns(wanted, passed_on, rest, edges, joint, bounds, twice, values, arranged, cost, best, lost, codes):
    """Columns in the order of quantization, those between two edges in one ring or several together.

    wanted (columns, rows) float32: what is to be coded, with the errors of all earlier columns but these; passed_on
    (columns, columns): the share of the error of column i that column j > i takes up; rest (columns, rows): the columns
    themselves. Sets lost (columns, rows), their errors, and codes uint8 (columns, bytes). joint: columns between two
    edges, but for the last of the matrix; bounds: of those of their rings that are to be coded.
    """
    rows, first, last = rest.shape[1], bounds[0], bounds[-1]
    length = (last - first) // joint  # of a column's part
    until = min(first + length, rows)
    size = length * twice // 16
    x, chosen, bits = np.empty(last - first, f32), np.empty(last - first, f32), np.empty(joint * size, u8)
    for e in range(len(edges) - 1):
        start, stop = edges[e], edges[e + 1]
        for c in range(start, stop):
            own = x[(c - start) * length : (c - start + 1) * length]
            for r in range(length):
                own[r] = wanted[c, first + r] if first + r < rows else f32(0)
            for i in range(start):
                share = passed_on[i, c]
                for r in range(until - first):
                    own[r] += share * lost[i, first + r]
        here = bounds if stop - start == joint else np.array([0, (stop - start) * length])
        for ring in range(len(here) - 1):
            begin, end = here[ring] - first, here[ring + 1] - first
            own = bits[begin * twice // 16 : end * twice // 16]
            encode_ring(x[begin:end], twice, values, arranged, cost, best, chosen[begin:end], own)
        for c in range(start, stop):
            for r in range(until - first):
                lost[c, first + r] = rest[c, first + r] - chosen[(c - start) * length + r]
            place = first * twice // 16
            codes[c, place : place + size] = bits[(c - start) * size : (c - start + 1) * size]
