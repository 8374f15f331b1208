"""The grids of groups, and GPTQ's feedback within a block of inputs, as numba compiles them; see `grid.py`, `gptq.py`.

Both go through rows in tiles that the first cache holds. A row's result does not depend on its neighbours.
"""

from typing import Any

import numpy as np
from numba import njit

f32, i64, u8 = np.float32, np.int64, np.uint8
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
GRID_ROWS, FEEDBACK_ROWS = 32, 64  # of a tile
FAR = f32(np.inf)


@njit(fastmath={"contract", "reassoc", "nsz"}, **OPTIONS)
def _losses(tile, column_weight, scale, low, high, loss):
    """loss[r] = sum_j column_weight[j] (clamp(round(x), low, high) - x)^2 scale^2, with x = tile[j, r] / scale[r]."""
    for r in range(GRID_ROWS):
        loss[r] = f32(0)
    for j in range(len(tile)):
        matter = column_weight[j]
        for r in range(GRID_ROWS):
            ratio = tile[j, r] / scale[r]
            error = min(max(np.rint(ratio), low[r]), high[r]) - ratio
            loss[r] += matter * (error * error)
    for r in range(GRID_ROWS):
        loss[r] *= scale[r] * scale[r]


@njit(**OPTIONS)
def best_grids(group, column_weight, first, zeros, table, top, levels, at_once, begin, end, scale, zero):
    """Sets scale and zero (rows,) float32 of rows `begin` to `end` of a group (size, rows) float32.

    column_weight (size,); first (rows,): the largest level that is tried; zeros (1 or 2, rows): zeros that are; table:
    scales by level. See `grid.best_grid`, whose loop this is.
    """
    size = len(group)
    for start in range(begin, end, GRID_ROWS):
        count = min(GRID_ROWS, end - start)
        tile = np.zeros((size, GRID_ROWS), f32)
        for j in range(size):
            for r in range(count):
                tile[j, r] = group[j, start + r]
        tried, low, high = np.ones(GRID_ROWS, f32), np.zeros(GRID_ROWS, f32), np.zeros(GRID_ROWS, f32)
        loss, least = np.empty(GRID_ROWS, f32), np.empty(GRID_ROWS, f32)
        best, going = np.full(GRID_ROWS, FAR), np.zeros(GRID_ROWS, u8)
        for r in range(count):
            going[r] = u8(1)
        for level in range(levels):
            for r in range(count):
                tried[r] = table[min(max(first[start + r] + level, 0), len(table) - 1)]
                least[r] = FAR
            for z in range(len(zeros)):
                for r in range(count):
                    low[r], high[r] = -zeros[z, start + r], top - zeros[z, start + r]
                _losses(tile, column_weight, tried, low, high, loss)
                for r in range(count):
                    least[r] = min(least[r], loss[r])
                    if going[r] and loss[r] < best[r]:
                        best[r] = loss[r]
                        scale[start + r], zero[start + r] = tried[r], zeros[z, start + r]
            if level % at_once == at_once - 1:
                left = 0
                for r in range(count):
                    if least[r] > 2 * best[r]:
                        going[r] = u8(0)
                    left += going[r]
                if left == 0:
                    break


@njit(fastmath={"contract", "reassoc", "nsz"}, **OPTIONS)
def round_block(wanted, passed_on, rest, scale, zero, group, top, begin, end, lost, codes):
    """Rounds the inputs of a block one after the other, each with its share of the errors of those before it, in rows
    `begin` to `end`.

    wanted (block, rows) float32: what is to be rounded, with the errors of all inputs before the block; passed_on
    (block, block): the share of the error of input i that input j > i takes up; rest (block, rows): the inputs
    themselves; scale, zero (groups, rows) of the group (block,) that each is in. Sets lost (block, rows), their errors,
    and codes (block, rows) uint8.
    """
    block = len(wanted)
    for start in range(begin, end, FEEDBACK_ROWS):
        count = min(FEEDBACK_ROWS, end - start)
        errors = np.zeros((block, FEEDBACK_ROWS), f32)
        target = np.zeros(FEEDBACK_ROWS, f32)
        for j in range(block):
            for r in range(count):
                target[r] = wanted[j, start + r]
            for i in range(j):
                share = passed_on[i, j]
                for r in range(FEEDBACK_ROWS):
                    target[r] += share * errors[i, r]
            g = group[j]
            for r in range(count):
                unit, offset = scale[g, start + r], zero[g, start + r]
                code = min(max(np.rint(target[r] / unit) + offset, f32(0)), top)
                errors[j, r] = rest[j, start + r] - (code - offset) * unit
                lost[j, start + r] = errors[j, r]
                codes[j, start + r] = u8(code)
