"""The best path through a trellis code, as numba compiles it; see `viterbi.py`."""

from typing import Any

import numpy as np
from numba import njit, prange

from ..runtime.trellis_code import WINDOW

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
def least_of(k_before, k):
    """Least cost of the states that lead to each group of 2**k states."""
    low, count, size, group = 2**k_before, 2**k, STATES >> (k_before + k), STATES >> k_before

    @njit(**FAST)
    def least(cost, best):
        for q in range(size):
            for b in range(low):
                found = cost[b * group + q]
                for p in range(1, count):
                    found = min(found, cost[b * group + p * size + q])
                best[q * low + b] = found

    return least


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


l11, l12, l21, l22, l23 = least_of(1, 1), least_of(1, 2), least_of(2, 1), least_of(2, 2), least_of(2, 3)
l32, l33, l34, l43, l44 = least_of(3, 2), least_of(3, 3), least_of(3, 4), least_of(4, 3), least_of(4, 4)
add1, add2, add3, add4 = added(1), added(2), added(3), added(4)


@njit(**OPTIONS)
def least(before, k, cost, best):
    if before == 1:
        l11(cost, best) if k == 1 else l12(cost, best)
    elif before == 2:
        if k == 2:
            l22(cost, best)
        else:
            l21(cost, best) if k == 1 else l23(cost, best)
    elif before == 3:
        if k == 3:
            l33(cost, best)
        else:
            l32(cost, best) if k == 2 else l34(cost, best)
    else:
        l44(cost, best) if k == 4 else l43(cost, best)


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
def search(targets, moves, first, count, meet, values, arranged, cost, best, path):
    """The best `count` states from place `first` of a ring on, in `path`. meet: the bits that the state before the
    first one hands on, which the last one has to hand on as well; -1: any."""
    length = len(targets)
    k = moves[first % length]
    best[0, : STATES >> k] = f32(0) if meet < 0 else FAR
    if meet >= 0:
        best[0, meet] = f32(0)
    add(k, targets[first % length], arranged, best[0], cost)
    for i in range(1, count):
        at = (first + i) % length
        least(k, moves[at], cost, best[i])
        k = moves[at]
        add(k, targets[at], arranged, best[i], cost)
    state, lowest, opening = 0, FAR * f32(2), WINDOW - moves[first % length]
    for end in range(STATES):
        if meet < 0 or end & ((1 << opening) - 1) == meet:
            found = cost[(end & ((1 << k) - 1)) * (STATES >> k) + (end >> k)]
            if found < lowest:
                state, lowest = end, found
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


@njit(**OPTIONS)
def one_after_the_other(x, bounds, twice, values, arranged, cost, best, chosen, codes):
    """The rings x[bounds[i] : bounds[i + 1]]."""
    for ring in range(len(bounds) - 1):
        start, stop = bounds[ring], bounds[ring + 1]
        own = codes[start * twice // 16 : stop * twice // 16]
        encode_ring(x[start:stop], twice, values, arranged, cost[0], best[0], chosen[start:stop], own)


@njit(parallel=True, **OPTIONS)
def side_by_side(x, bounds, twice, values, arranged, cost, best, chosen, codes):
    """The same, with a thread for each row of `cost` and `best`."""
    threads, rings = len(cost), len(bounds) - 1
    for thread in prange(threads):
        for ring in range(thread, rings, threads):
            start, stop = bounds[ring], bounds[ring + 1]
            own = codes[start * twice // 16 : stop * twice // 16]
            encode_ring(x[start:stop], twice, values, arranged, cost[thread], best[thread], chosen[start:stop], own)


@njit(cache=True, **OPTIONS)
def encode_columns(wanted, passed_on, rest, edges, joint, bounds, twice, values, arranged, cost, best, lost, codes):
    """Columns in the order of quantization, those between two edges in one ring or several together.

    wanted (columns, rows) float32: what is to be coded, with the errors of all earlier columns but these; passed_on
    (columns, columns): the share of the error of column i that column j > i takes up; rest (columns, rows): the columns
    themselves. Sets lost (columns, rows), their errors, and codes uint8 (columns, bytes). joint: columns between two
    edges, but for the last of the matrix; bounds: of their rings.
    """
    rows = rest.shape[1]
    length = bounds[-1] // joint
    size = length * twice // 16
    x, chosen, bits = np.empty(bounds[-1], f32), np.empty(bounds[-1], f32), np.empty(joint * size, u8)
    for e in range(len(edges) - 1):
        start, stop = edges[e], edges[e + 1]
        for c in range(start, stop):
            own = x[(c - start) * length : (c - start + 1) * length]
            for r in range(length):
                own[r] = wanted[c, r] if r < rows else f32(0)
            for i in range(start):
                share = passed_on[i, c]
                for r in range(rows):
                    own[r] += share * lost[i, r]
        end = (stop - start) * length
        here = bounds if stop - start == joint else np.array([0, end])
        if len(cost) > 1 and len(here) > 2:
            side_by_side(x[:end], here, twice, values, arranged, cost, best, chosen, bits)
        else:
            one_after_the_other(x[:end], here, twice, values, arranged, cost, best, chosen, bits)
        for c in range(start, stop):
            for r in range(rows):
                lost[c, r] = rest[c, r] - chosen[(c - start) * length + r]
            codes[c] = bits[(c - start) * size : (c - start + 1) * size]
