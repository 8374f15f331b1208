"""Products with packed grids on a CPU, which never make a dense matrix. A copy lies in every checkpoint.

Compiled by numba at their first use; where numba is missing, formats dequantize. Eight codes lie in one word of `bits`
bytes. Vector lanes run over neighbouring words: plane k has the k-th code of every word, so inputs are brought into the
order of planes, once for all rows. A group's zero is taken off once, with the sum of its inputs.
"""

from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = find_spec("numba") is not None
MANY = 16  # tokens per matrix from which on tiles are dequantized and multiplied by torch
TILE = 512  # rows of such a tile
CHUNK = 32  # rows that a thread takes at a time
WORDS = {2: np.uint16, 4: np.uint32}  # 3 bits have no word, 8 bits need none


@cache
def kernels(bits: int) -> SimpleNamespace:
    """`few` and `tile` for codes of so many bits."""
    from numba import get_num_threads, njit, prange, set_num_threads

    f32, i32, u32 = np.float32, np.int32, np.uint32
    options: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    mask, three, eight = u32(2**bits - 1), bits == 3, bits == 8
    s1, s2, s3, s4, s5, s6, s7 = (u32(bits * k if not eight else 0) for k in range(1, 8))

    @njit(inline="always", **options)
    def word(row, i):
        if three:
            return u32(row[3 * i]) | (u32(row[3 * i + 1]) << u32(8)) | (u32(row[3 * i + 2]) << u32(16))
        return u32(row[i])

    @njit(inline="always", **options)
    def value(code):
        return f32(i32(code & mask))

    @njit(fastmath=True, **options)
    def dot(row, x, scales, words):
        x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
        total = f32(0)
        for i in range(words):
            w = word(row, i)
            part = value(w) * x0[i] + value(w >> s1) * x1[i] + value(w >> s2) * x2[i] + value(w >> s3) * x3[i]
            part += value(w >> s4) * x4[i] + value(w >> s5) * x5[i] + value(w >> s6) * x6[i] + value(w >> s7) * x7[i]
            total += part * scales[i]
        return total

    @njit(fastmath=True, **options)
    def four(row, x, scales, words, y):
        """The same for four tokens, whose codes are taken apart once."""
        a0, a1, a2, a3 = f32(0), f32(0), f32(0), f32(0)
        for i in range(words):
            w, s = word(row, i), scales[i]
            c0, c1, c2, c3 = value(w) * s, value(w >> s1) * s, value(w >> s2) * s, value(w >> s3) * s
            c4, c5, c6, c7 = value(w >> s4) * s, value(w >> s5) * s, value(w >> s6) * s, value(w >> s7) * s
            a0 += c0 * x[0, 0, i] + c1 * x[0, 1, i] + c2 * x[0, 2, i] + c3 * x[0, 3, i]
            a0 += c4 * x[0, 4, i] + c5 * x[0, 5, i] + c6 * x[0, 6, i] + c7 * x[0, 7, i]
            a1 += c0 * x[1, 0, i] + c1 * x[1, 1, i] + c2 * x[1, 2, i] + c3 * x[1, 3, i]
            a1 += c4 * x[1, 4, i] + c5 * x[1, 5, i] + c6 * x[1, 6, i] + c7 * x[1, 7, i]
            a2 += c0 * x[2, 0, i] + c1 * x[2, 1, i] + c2 * x[2, 2, i] + c3 * x[2, 3, i]
            a2 += c4 * x[2, 4, i] + c5 * x[2, 5, i] + c6 * x[2, 6, i] + c7 * x[2, 7, i]
            a3 += c0 * x[3, 0, i] + c1 * x[3, 1, i] + c2 * x[3, 2, i] + c3 * x[3, 3, i]
            a3 += c4 * x[3, 4, i] + c5 * x[3, 5, i] + c6 * x[3, 6, i] + c7 * x[3, 7, i]
        y[0], y[1], y[2], y[3] = a0, a1, a2, a3

    @njit(fastmath=True, **options)
    def dot_bytes(row, x, scales, size):
        total = f32(0)
        for g in range(len(scales)):
            part = f32(0)
            for j in range(g * size, min(len(row), (g + 1) * size)):
                part += f32(row[j]) * x[j]
            total += part * scales[g]
        return total

    @njit(inline="always", **options)
    def zero_of(zeros, index):
        bit = index * bits
        at = bit >> 3
        found = u32(zeros[at])
        if at + 1 < len(zeros):
            found |= u32(zeros[at + 1]) << u32(8)
        return value(found >> u32(bit & 7))

    @njit(inline="always", **options)
    def groups_of(levels, zeros, sym, base, table, r, scales, offs):
        """Scale and zero of each group of a row."""
        groups = len(levels)
        for g in range(groups):
            scales[g] = base * table[levels[g]]
            offs[g] = f32(2 ** (bits - 1)) if sym else zero_of(zeros, r * groups + g)

    @njit(**options)
    def widen(values, per, out):
        """The value of its group for each word."""
        for g in range(len(values)):
            one = values[g]
            for i in range(g * per, min(len(out), (g + 1) * per)):
                out[i] = one

    @njit(parallel=True, cache=True, **options)
    def few(codes, levels, base, zeros, sym, size, table, x, sums, starts, used, chunk, y):
        """y[p] = weight of matrix e @ x[p], for the tokens p from starts[e] to starts[e + 1]; e of `used`.

        codes (e, rows, words), levels (e, rows, groups), base (e,), zeros (e, bytes), x (tokens, 8, words) in planes,
        sums (tokens, groups) of the inputs of each group.
        """
        rows, groups = levels.shape[1], levels.shape[2]
        words = codes.shape[2] // 3 if three else codes.shape[2]
        chunks = (rows + chunk - 1) // chunk
        for item in prange(len(used) * chunks):
            e, first = used[item // chunks], (item % chunks) * chunk
            scales, offs, quad = np.empty(groups, f32), np.empty(groups, f32), np.empty(4, f32)
            wide = np.empty(words, f32)
            start, stop = starts[e], starts[e + 1]
            for r in range(first, min(rows, first + chunk)):
                row = codes[e, r]
                groups_of(levels[e, r], zeros[e], sym, base[e], table, r, scales, offs)
                widen(scales, size // 8, wide)
                p = start
                if not eight:
                    while p + 4 <= stop:
                        four(row, x[p : p + 4], wide, words, quad)
                        y[p, r], y[p + 1, r], y[p + 2, r], y[p + 3, r] = quad[0], quad[1], quad[2], quad[3]
                        p += 4
                while p < stop:
                    y[p, r] = dot_bytes(row, x[p].reshape(-1), scales, size) if eight else dot(row, x[p], wide, words)
                    p += 1
                for q in range(start, stop):
                    below = f32(0)
                    for g in range(groups):
                        below += scales[g] * offs[g] * sums[q, g]
                    y[q, r] -= below

    @njit(**options)
    def plane(whole, shift, offs, scales, out):
        for i in range(len(whole)):
            out[i] = (value(whole[i] >> shift) - offs[i]) * scales[i]

    @njit(parallel=True, cache=True, **options)
    def tile(codes, levels, base, zeros, sym, size, table, first, out):
        """Rows from `first` on of one matrix, (rows, 8 * words) float32, columns in the order of planes; exactly
        (code - zero) * scale."""
        groups = levels.shape[1]
        words = codes.shape[1] // 3 if three else codes.shape[1]
        for at in prange(len(out)):
            r = first + at
            scales, offs = np.empty(groups, f32), np.empty(groups, f32)
            wide, wide_offs, whole = np.empty(words, f32), np.empty(words, f32), np.empty(words, u32)
            groups_of(levels[r], zeros, sym, base, table, r, scales, offs)
            widen(scales, size // 8, wide)
            widen(offs, size // 8, wide_offs)
            row = codes[r]
            if eight:
                for g in range(groups):
                    for j in range(g * size, min(len(row), (g + 1) * size)):
                        out[at, j] = (f32(row[j]) - offs[g]) * scales[g]
            else:
                for i in range(words):
                    whole[i] = word(row, i)
                for k in range(8):
                    plane(whole, u32(bits * k), wide_offs, wide, out[at, k * words : (k + 1) * words])

    return SimpleNamespace(few=few, tile=tile, set_threads=set_num_threads, most_threads=get_num_threads())


def usable(form, stored: dict, x: torch.Tensor) -> bool:
    """Whether these products can be had: on a CPU, without gradients, of integers, groups of whole words."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not x.requires_grad
    return HERE and plain and not stored["scales"].is_floating_point() and form.group_size % 8 == 0


def products(form, stored: dict, columns: int, x: torch.Tensor, sizes: list[int], table) -> torch.Tensor:
    """x (tokens, columns), sorted by matrix, sizes[e] tokens of matrix e -> (tokens, rows) in the dtype of x."""
    made = kernels(form.bits)
    made.set_threads(min(torch.get_num_threads(), made.most_threads))
    codes = stored["codes"].numpy().view(WORDS.get(form.bits, np.uint8))
    levels, base = stored["scales"].numpy(), stored["base"].view(torch.float32)[..., 0].numpy()
    zeros = np.zeros((len(codes), 1), np.uint8) if form.sym else stored["zeros"].numpy()
    matrix = (levels, base, zeros)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    planes, sums = _in_planes(x, form, columns, levels.shape[2])
    y = x.new_empty((len(x), codes.shape[1]))
    used = np.array([e for e, size in enumerate(sizes) if 0 < size < MANY])
    if len(used):
        found = np.empty(y.shape, np.float32)
        asked = planes.float().numpy(), sums.numpy(), starts, used, CHUNK, found
        made.few(codes, *matrix, form.sym, form.group_size, table, *asked)
        y.copy_(torch.from_numpy(found))
    for e, size in enumerate(sizes):
        if size >= MANY:
            rows = slice(starts[e], starts[e + 1])
            own = codes[e], levels[e], base[e], zeros[e]
            y[rows] = _by_tiles(made, own, form, table, planes[rows].flatten(1))
    return y


def _by_tiles(made, own: tuple, form, table, x: torch.Tensor) -> torch.Tensor:
    """x (tokens, 8 * words) in planes, by torch's product with one tile of rows after the other."""
    count, done = len(own[0]), []
    for first in range(0, count, TILE):
        out = np.empty((min(TILE, count - first), x.shape[1]), np.float32)
        made.tile(*own, form.sym, form.group_size, table, first, out)
        done.append(F.linear(x, torch.from_numpy(out).to(x.dtype)))
    return torch.cat(done, 1)


def _in_planes(x: torch.Tensor, form, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, 8, words) of the inputs, and (tokens, groups) float32 sums of each group's."""
    words = -(-columns // 8)
    padded = F.pad(x, (0, 8 * words - columns))
    whole = F.pad(x.float(), (0, groups * form.group_size - columns))
    sums = whole.view(len(x), groups, form.group_size).sum(-1)
    if form.bits == 8:
        return padded.reshape(len(x), 8, words).contiguous(), sums
    return padded.view(len(x), words, 8).transpose(1, 2).contiguous(), sums
