"""The code of trellis formats: the value of each window of bits, and where rings begin and end. A copy lies in every
checkpoint."""

from functools import cache
from typing import NamedTuple

import numpy as np

from .numba_here import LANES

WINDOW = 12  # bits of which a weight is read
FIT = 32 - WINDOW  # first bits of windows that a word of 32 bits holds whole
STEP = 16  # rows of a column are filled up to a multiple: a ring is then whole bytes at every rate
RING = 256  # weights of a ring, at most
SHORT = 64  # columns of fewer rows share a ring
# Of 5800 pairs that were tried, the one with the least error at 1, 2 and 3 bits: that of a table of normal numbers.
FACTOR, OFFSET = 0xD3472ADF, 0xD67A9CC9


def window_values() -> np.ndarray:
    """(2**WINDOW,) int8: the value of each window, the sum of the eight hexadecimal digits of a hash of it: nearly
    normal, and a few instructions where a table would be slow."""
    window = np.arange(2**WINDOW, dtype=np.uint64)
    hashed = ((window * np.uint64(FACTOR) + np.uint64(OFFSET)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    digits = hashed[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    return (digits.sum(1).astype(np.int32) - 60).astype(np.int8)


VALUES = window_values()


def padded(rows: int) -> int:
    """Weights that a column of so many rows takes."""
    return -(-rows // STEP) * STEP


def column_bounds(rows: int) -> np.ndarray:
    """Where the rings of one long column begin and end, (rings + 1,) int64, in its weights: nearly equal parts."""
    units = padded(rows) // STEP
    count = -(-units * STEP // RING)
    return np.arange(count + 1) * units // count * STEP


def joint_columns(rows: int) -> int:
    """Columns that share a ring: 1, 2 or 4."""
    return {1: 4, 2: 2, 3: 2}.get(padded(rows) // STEP, 1)


def ring_bounds(rows: int, columns: int) -> np.ndarray:
    """Where rings begin and end, (rings + 1,) int64, in the weights of a matrix, column by column, `padded(rows)` each.
    Long columns are cut into rings, short ones share a ring."""
    length, joint = padded(rows), joint_columns(rows)
    if joint > 1:
        return np.append(np.arange(0, columns * length, joint * length), columns * length)
    starts = np.arange(columns)[:, None] * length + column_bounds(rows)[:-1]
    return np.append(starts.ravel(), columns * length)


class Groups(NamedTuple):
    """Where the windows of a group of weights lie."""

    each: int  # weights
    size: int  # bytes
    starts: tuple[int, ...]  # the bytes that words begin with
    places: tuple[tuple[int, int], ...]  # of each weight: its word, and the first bit in it


@cache
def groups_of(twice: int) -> Groups:
    """Of a rate in half bits: whole bytes."""
    each = 8 if twice % 2 == 0 else 16
    starts: list[int] = []
    places = []
    for bit in (i * twice // 2 for i in range(each)):
        if not starts or bit - 8 * starts[-1] > FIT:
            starts.append(bit // 8)
        places.append((len(starts) - 1, bit - 8 * starts[-1]))
    return Groups(each, each * twice // 16, tuple(starts), tuple(places))


def blocks_of(weights: int, each: int) -> int:
    """Blocks of LANES groups of `each` weights that a ring takes."""
    return -(-weights // (each * LANES))
