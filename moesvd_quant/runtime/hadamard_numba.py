"""Blocks of Hadamard matrices on a CPU: what numba compiles. A copy lies in every checkpoint."""

from functools import cache
from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .hadamard_lanes import mix_blocks
from .lanes import LANES
from .team import pointer, take, work

f32 = np.float32
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
STRIP = 64  # columns at a time: a block of them fits the cache


@njit(fastmath=True, **OPTIONS)
def butterflies(a, b):
    for i in range(len(a)):
        x, y = a[i], b[i]
        a[i], b[i] = x + y, x - y


@njit(fastmath=True, **OPTIONS)
def mix_small(row, block, signs, scale, signs_first):
    """`mix_blocks` where blocks are smaller than a vector."""
    for i in range(len(row)):
        row[i] *= signs[i] * scale if signs_first else f32(1)
    half = 1
    while half < block:
        for i in range(len(row)):
            if i & half == 0:
                x, y = row[i], row[i + half]
                row[i], row[i + half] = x + y, x - y
        half *= 2
    for i in range(len(row)):
        row[i] *= f32(1) if signs_first else signs[i] * scale


@cache
def mix_last(block: int, signs_first: bool):
    """Work: x (tokens, n) float32, in place: signs (n,), then blocks of Hadamard matrices along n, or the other way
    round; all times scale (tokens,). Takes the addresses of x, signs and scale, and tokens and n."""

    wide, first = max(block, LANES), int(signs_first)

    @work
    def mix(given):
        n = carray(given, (6,), np.int64)
        tokens, size = n[4:6]
        x = carray(pointer(n[1]), (tokens, size), np.float32)
        signs, scale = carray(pointer(n[2]), (size,), np.float32), carray(pointer(n[3]), (tokens,), np.float32)
        t = take(given)
        while t < tokens:
            if block < LANES:
                mix_small(x[t], block, signs, scale[t], signs_first)
            else:
                mix_blocks(n[1] + 4 * t * size, size // block, n[2], scale[t], first, wide)
            t = take(given)

    return mix


@work
def mix_first(given):
    """Work: x (m, n) float32 times blocks along m, in place. Takes its address, m, n, and the size of a block."""
    n = carray(given, (5,), np.int64)
    rows, columns, block = n[2:5]
    x = carray(pointer(n[1]), (rows, columns), np.float32)
    strips = -(-columns // STRIP)
    item = take(given)
    while item < rows // block * strips:
        first, left = item // strips * block, item % strips * STRIP
        right = min(columns, left + STRIP)
        half = 1
        while half < block:
            for i in range(first, first + block):
                if (i - first) & half == 0:
                    butterflies(x[i, left:right], x[i + half, left:right])
            half *= 2
        item = take(given)
