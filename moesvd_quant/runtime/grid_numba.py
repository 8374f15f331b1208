"""Products with packed grids on a CPU: what numba compiles. A copy lies in every checkpoint.

Eight codes lie in one word of `bits` bytes. Vector lanes run over neighbouring words: plane k has the k-th code of
every word, so inputs are brought into the order of planes, once for all rows. A group's zero is taken off once, with
the sum of its inputs.
"""

from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.extending import intrinsic
except ImportError:
    raise

f32, u32 = np.float32, np.uint32
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
FAST: Any = {"fastmath": True, **OPTIONS}


# numba widens all arithmetic to 64 bits, which halves the lanes: so this is said in the compiler's own terms.
@intrinsic
def code_at(context, word, shift, mask):
    """float32 of the code that begins at a bit of a word."""

    def code(context, builder, signature, given):
        found = builder.and_(builder.lshr(given[0], given[1]), given[2])
        return builder.sitofp(found, ir.FloatType())

    return types.float32(types.uint32, types.uint32, types.uint32), code


@njit(**FAST)
def words_of(row, bits, words):
    """words (words,) uint32 of the bytes of a row."""
    if bits == 2:
        for i in range(len(words)):
            words[i] = u32(row[2 * i]) | (u32(row[2 * i + 1]) << u32(8))
    elif bits == 3:
        for i in range(len(words)):
            words[i] = u32(row[3 * i]) | (u32(row[3 * i + 1]) << u32(8)) | (u32(row[3 * i + 2]) << u32(16))
    else:
        for i in range(len(words)):
            low = u32(row[4 * i]) | (u32(row[4 * i + 1]) << u32(8))
            words[i] = low | (u32(row[4 * i + 2]) << u32(16)) | (u32(row[4 * i + 3]) << u32(24))


@njit(**FAST)
def dot(words, x, scales, bits):
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    mask, s0, s1, s2, s3 = u32(2**bits - 1), u32(0), u32(bits), u32(2 * bits), u32(3 * bits)
    s4, s5, s6, s7 = u32(4 * bits), u32(5 * bits), u32(6 * bits), u32(7 * bits)
    total = f32(0)
    for i in range(len(words)):
        w = words[i]
        part = code_at(w, s0, mask) * x0[i] + code_at(w, s1, mask) * x1[i]
        part += code_at(w, s2, mask) * x2[i] + code_at(w, s3, mask) * x3[i]
        part += code_at(w, s4, mask) * x4[i] + code_at(w, s5, mask) * x5[i]
        part += code_at(w, s6, mask) * x6[i] + code_at(w, s7, mask) * x7[i]
        total += part * scales[i]
    return total


@njit(**FAST)
def four(words, x, scales, bits, y):
    """The same for four tokens, whose codes are taken apart once."""
    mask, s0, s1, s2, s3 = u32(2**bits - 1), u32(0), u32(bits), u32(2 * bits), u32(3 * bits)
    s4, s5, s6, s7 = u32(4 * bits), u32(5 * bits), u32(6 * bits), u32(7 * bits)
    a0, a1, a2, a3 = f32(0), f32(0), f32(0), f32(0)
    for i in range(len(words)):
        w, s = words[i], scales[i]
        c0, c1 = code_at(w, s0, mask) * s, code_at(w, s1, mask) * s
        c2, c3 = code_at(w, s2, mask) * s, code_at(w, s3, mask) * s
        c4, c5 = code_at(w, s4, mask) * s, code_at(w, s5, mask) * s
        c6, c7 = code_at(w, s6, mask) * s, code_at(w, s7, mask) * s
        a0 += c0 * x[0, 0, i] + c1 * x[0, 1, i] + c2 * x[0, 2, i] + c3 * x[0, 3, i]
        a0 += c4 * x[0, 4, i] + c5 * x[0, 5, i] + c6 * x[0, 6, i] + c7 * x[0, 7, i]
        a1 += c0 * x[1, 0, i] + c1 * x[1, 1, i] + c2 * x[1, 2, i] + c3 * x[1, 3, i]
        a1 += c4 * x[1, 4, i] + c5 * x[1, 5, i] + c6 * x[1, 6, i] + c7 * x[1, 7, i]
        a2 += c0 * x[2, 0, i] + c1 * x[2, 1, i] + c2 * x[2, 2, i] + c3 * x[2, 3, i]
        a2 += c4 * x[2, 4, i] + c5 * x[2, 5, i] + c6 * x[2, 6, i] + c7 * x[2, 7, i]
        a3 += c0 * x[3, 0, i] + c1 * x[3, 1, i] + c2 * x[3, 2, i] + c3 * x[3, 3, i]
        a3 += c4 * x[3, 4, i] + c5 * x[3, 5, i] + c6 * x[3, 6, i] + c7 * x[3, 7, i]
    y[0], y[1], y[2], y[3] = a0, a1, a2, a3


@njit(**FAST)
def dot_bytes(row, x, scales, size):
    total = f32(0)
    for g in range(len(scales)):
        part = f32(0)
        for j in range(g * size, min(len(row), (g + 1) * size)):
            part += f32(row[j]) * x[j]
        total += part * scales[g]
    return total


@njit(**OPTIONS)
def zero_of(zeros, index, bits):
    bit = index * bits
    at = bit >> 3
    found = u32(zeros[at])
    if at + 1 < len(zeros):
        found = found | (u32(zeros[at + 1]) << u32(8))
    return code_at(found, u32(bit & 7), u32(2**bits - 1))


@njit(**OPTIONS)
def groups_of(levels, zeros, sym, base, table, bits, r, scales, offs):
    """Scale and zero of each group of a row."""
    groups = len(levels)
    for g in range(groups):
        scales[g] = base * table[levels[g]]
        offs[g] = f32(2.0 ** (bits - 1)) if sym else zero_of(zeros, r * groups + g, bits)


@njit(**OPTIONS)
def widen(values, per, out):
    """The value of its group for each word."""
    for g in range(len(values)):
        one = values[g]
        for i in range(g * per, min(len(out), (g + 1) * per)):
            out[i] = one


@njit(parallel=True, cache=True, **OPTIONS)
def few(codes, levels, base, zeros, bits, sym, size, table, x, sums, starts, used, chunk, y):
    """y[p] = weight of matrix e @ x[p], for the tokens p from starts[e] to starts[e + 1]; e of `used`.

    codes (e, rows, bytes), levels (e, rows, groups), base (e,), zeros (e, bytes), x (tokens, 8, words) in planes,
    sums (tokens, groups) of the inputs of each group.
    """
    rows, groups = levels.shape[1], levels.shape[2]
    words, eight = codes.shape[2] // bits, bits == 8
    chunks = (rows + chunk - 1) // chunk
    for item in prange(len(used) * chunks):
        e, first = used[item // chunks], (item % chunks) * chunk
        scales, offs, quad = np.empty(groups, f32), np.empty(groups, f32), np.empty(4, f32)
        wide, whole = np.empty(words, f32), np.empty(words, u32)
        start, stop = starts[e], starts[e + 1]
        for r in range(first, min(rows, first + chunk)):
            row = codes[e, r]
            groups_of(levels[e, r], zeros[e], sym, base[e], table, bits, r, scales, offs)
            widen(scales, size // 8, wide)
            if not eight:
                words_of(row, bits, whole)
            p = start
            if not eight:
                while p + 4 <= stop:
                    four(whole, x[p : p + 4], wide, bits, quad)
                    y[p, r], y[p + 1, r], y[p + 2, r], y[p + 3, r] = quad[0], quad[1], quad[2], quad[3]
                    p += 4
            while p < stop:
                y[p, r] = dot_bytes(row, x[p].reshape(-1), scales, size) if eight else dot(whole, x[p], wide, bits)
                p += 1
            for q in range(start, stop):
                below = f32(0)
                for g in range(groups):
                    below += scales[g] * offs[g] * sums[q, g]
                y[q, r] -= below


@njit(**OPTIONS)
def plane(words, shift, mask, offs, scales, out):
    for i in range(len(words)):
        out[i] = (code_at(words[i], shift, mask) - offs[i]) * scales[i]


@njit(parallel=True, cache=True, **OPTIONS)
def tile(codes, levels, base, zeros, bits, sym, size, table, first, out):
    """Rows from `first` on of one matrix, (rows, 8 * words) float32, columns in the order of planes; exactly
    (code - zero) * scale."""
    groups = levels.shape[1]
    words, eight = codes.shape[1] // bits, bits == 8
    for at in prange(len(out)):
        r = first + at
        scales, offs = np.empty(groups, f32), np.empty(groups, f32)
        wide, wide_offs, whole = np.empty(words, f32), np.empty(words, f32), np.empty(words, u32)
        groups_of(levels[r], zeros, sym, base, table, bits, r, scales, offs)
        widen(scales, size // 8, wide)
        widen(offs, size // 8, wide_offs)
        row = codes[r]
        if eight:
            for g in range(groups):
                for j in range(g * size, min(len(row), (g + 1) * size)):
                    out[at, j] = (f32(row[j]) - offs[g]) * scales[g]
        else:
            words_of(row, bits, whole)
            for k in range(8):
                plane(whole, u32(bits * k), u32(2**bits - 1), wide_offs, wide, out[at, k * words : (k + 1) * words])
