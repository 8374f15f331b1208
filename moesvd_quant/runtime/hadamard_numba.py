"""Blocks of Hadamard matrices on a CPU: what numba compiles. A copy lies in every checkpoint."""

from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import carray, njit
except ImportError:
    raise

from .team import pointer, take, work

OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
STRIP = 64  # columns at a time: a block of them fits the cache


@njit(fastmath=True, **OPTIONS)
def butterflies(a, b):
    for i in range(len(a)):
        x, y = a[i], b[i]
        a[i], b[i] = x + y, x - y


@njit(fastmath=True, **OPTIONS)
def mix_eight(row, first):
    """The three first steps, of eight neighbours: the smallest ones would be loops of one, two and four."""
    a, b, c, d = row[first], row[first + 1], row[first + 2], row[first + 3]
    e, f, g, h = row[first + 4], row[first + 5], row[first + 6], row[first + 7]
    a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
    a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
    row[first], row[first + 1], row[first + 2], row[first + 3] = a + e, b + f, c + g, d + h
    row[first + 4], row[first + 5], row[first + 6], row[first + 7] = a - e, b - f, c - g, d - h


@njit(cache=True, fastmath=True, **OPTIONS)
def mix_last(x, block, signs, signs_first, scale):
    """x (tokens, n) float32, in place: signs (n,), then blocks of Hadamard matrices along n, or the other way round;
    then times scale (tokens,)."""
    for t in range(x.shape[0]):
        row = x[t]
        if signs_first:
            for i in range(len(row)):
                row[i] *= signs[i]
        half = 1
        if block >= 8:
            for first in range(0, len(row), 8):
                mix_eight(row, first)
            half = 8
        while half < block:
            for first in range(0, len(row), 2 * half):
                butterflies(row[first : first + half], row[first + half : first + 2 * half])
            half *= 2
        if not signs_first:
            for i in range(len(row)):
                row[i] *= signs[i]
        for i in range(len(row)):
            row[i] *= scale[t]


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
