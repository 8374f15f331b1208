"""Trellis codes read and multiplied on a CPU: what numba compiles. A copy lies in every checkpoint.

Vector lanes run over groups of 8 or 16 neighbouring weights: plane i has the i-th weight of every group. A group's
windows are read from one or two words of 32 bits, which are brought together once for all planes. `shape`: (weights,
bytes) of a group; `starts`: the bytes of a group that its words begin with; `word_of`, `shifts`: where the window of
each weight is. `twice`: two times the rate.
"""

from typing import Any

import numpy as np

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.extending import intrinsic
except ImportError:
    raise

from .trellis_code import FACTOR, OFFSET

f32, u8, u16, u32 = np.float32, np.uint8, np.uint16, np.uint32
BITS = ir.IntType(32)
OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
FAST: Any = {"fastmath": True, **OPTIONS}


# numba widens all arithmetic to 64 bits, which halves the lanes: so these are said in the compiler's own terms.
@intrinsic
def value_at(context, word, shift):
    """float32 value, plus 60, of the window that begins at a bit of a word."""

    def code(context, builder, signature, given):
        def number(n):
            return ir.Constant(BITS, n)

        window = builder.and_(builder.lshr(given[0], given[1]), number(4095))
        mixed = builder.add(builder.mul(window, number(FACTOR)), number(OFFSET))
        high, low = builder.lshr(mixed, number(4)), number(0x0F0F0F0F)
        pairs = builder.add(builder.and_(mixed, low), builder.and_(high, low))
        total = builder.lshr(builder.mul(pairs, number(0x01010101)), number(24))
        return builder.sitofp(total, ir.FloatType())

    return types.float32(types.uint32, types.uint32), code


@intrinsic
def joined(context, a, b, c, d):
    """uint32 of four bytes, the lowest first."""

    def code(context, builder, signature, given):
        word = builder.zext(given[0], BITS)
        for place in (1, 2, 3):
            higher = builder.shl(builder.zext(given[place], BITS), ir.Constant(BITS, 8 * place))
            word = builder.or_(word, higher)
        return word

    return types.uint32(types.uint8, types.uint8, types.uint8, types.uint8), code


@intrinsic
def upper_half(context, value):
    """The first 16 bits of a float32: of a small whole number, it as a bfloat16."""

    def code(context, builder, signature, given):
        whole = builder.bitcast(given[0], BITS)
        return builder.trunc(builder.lshr(whole, ir.Constant(BITS, 16)), ir.IntType(16))

    return types.uint16(types.float32), code


def _words(size):
    @njit(**FAST)
    def words_of(row, start, words):
        for g in range(len(words)):
            k = g * size + start
            words[g] = joined(row[k], row[k + 1], row[k + 2], row[k + 3])

    return words_of


# A stride that the compiler knows makes these loads of whole vectors.
words1, words2, words3, words4, words5, words7 = (_words(size) for size in (1, 2, 3, 4, 5, 7))


@njit(**OPTIONS)
def words_of(row, start, size, words):
    """words (groups,) from a byte of each group of `size` bytes on."""
    if size == 1:
        words1(row, start, words)
    elif size == 2:
        words2(row, start, words)
    elif size == 3:
        words3(row, start, words)
    elif size == 4:
        words4(row, start, words)
    elif size == 5:
        words5(row, start, words)
    else:
        words7(row, start, words)


@njit(**OPTIONS)
def all_words(row, bounds, twice, shape, starts, words):
    """words (len(starts), groups) of the rings whose bounds, in weights from the first byte of row, are given."""
    (each, size), groups = shape, words.shape[1]
    back = 6 // size + 1  # groups at the end of a ring whose words reach into its beginning
    for w in range(len(starts)):
        if groups > back:
            words_of(row, starts[w], size, words[w, : groups - back])
        for r in range(len(bounds) - 1):
            begin, length = bounds[r] * twice // 16, (bounds[r + 1] - bounds[r]) * twice // 16
            count = (bounds[r + 1] - bounds[r]) // each
            for g in range(max(0, count - back), count):
                k = g * size + starts[w]
                words[w, bounds[r] // each + g] = joined(
                    row[begin + k % length],
                    row[begin + (k + 1) % length],
                    row[begin + (k + 2) % length],
                    row[begin + (k + 3) % length],
                )


@njit(**FAST)
def add_plane(words, shift, x, total):
    for g in range(len(words)):
        total[g] += x * value_at(words[g], shift)


@njit(**FAST)
def plane(words, shift, values):
    for g in range(len(words)):
        values[g] = value_at(words[g], shift)


@njit(**FAST)
def dot(values, x):
    total = f32(0)
    for g in range(len(values)):
        total += values[g] * x[g]
    return total


@njit(parallel=True, cache=True, **OPTIONS)
def few(codes, twice, shape, starts, word_of, shifts, bounds, per, x, sums, begins, used, y):
    """y[p] = x[p] @ values of matrix e, for the tokens p from begins[e] to begins[e + 1]; e of `used`.

    codes (e, columns, bytes), bounds (rings + 1,) of a column, per: rings that a thread takes at a time, x (tokens,
    columns), sums (tokens,) of x, y (tokens, rows).
    """
    each, rings = shape[0], len(bounds) - 1
    chunks = (rings + per - 1) // per
    for item in prange(len(used) * chunks):
        e, low = used[item // chunks], item % chunks * per
        own = bounds[low : min(rings, low + per) + 1] - bounds[low]
        begin, groups, count = bounds[low], own[-1] // each, begins[e + 1] - begins[e]
        words, values = np.empty((len(starts), groups), u32), np.empty(groups, f32)
        total = np.zeros((count, each, groups), f32)
        for j in range(codes.shape[1]):
            all_words(codes[e, j, begin * twice // 16 :], own, twice, shape, starts, words)
            for i in range(each):
                if count == 1:
                    add_plane(words[word_of[i]], shifts[i], x[begins[e], j], total[0, i])
                else:
                    plane(words[word_of[i]], shifts[i], values)
                    for q in range(count):
                        one, row = x[begins[e] + q, j], total[q, i]
                        for g in range(groups):
                            row[g] += one * values[g]
        for q in range(count):
            p = begins[e] + q
            for g in range(groups):
                for i in range(each):
                    at = begin + g * each + i
                    if at < y.shape[1]:
                        y[p, at] = total[q, i, g] - f32(60) * sums[p]


@njit(parallel=True, cache=True, **OPTIONS)
def few_short(codes, twice, shape, starts, word_of, shifts, length, joint, x, sums, begins, used, y):
    """The same where `joint` columns of `length` weights share a ring; x (tokens, joint, rings)."""
    each, size = shape
    rings, ring_bytes = x.shape[2], length * joint * twice // 16
    parts = length // each
    for item in prange(len(used) * parts):
        e, part = used[item // parts], item % parts
        stream = codes[e].reshape(-1)
        words, values = np.empty((len(starts), rings), u32), np.empty(rings, f32)
        for p in range(begins[e], begins[e + 1]):
            for i in range(each):
                if part * each + i < y.shape[1]:
                    y[p, part * each + i] = -f32(60) * sums[p]
        for column in range(joint):
            first = (column * parts + part) * size
            for w in range(len(starts)):
                for r in range(rings):
                    k, home = first + starts[w], r * ring_bytes
                    words[w, r] = joined(
                        stream[home + k % ring_bytes],
                        stream[home + (k + 1) % ring_bytes],
                        stream[home + (k + 2) % ring_bytes],
                        stream[home + (k + 3) % ring_bytes],
                    )
            for i in range(each):
                at = part * each + i
                if at < y.shape[1]:
                    plane(words[word_of[i]], shifts[i], values)
                    for p in range(begins[e], begins[e + 1]):
                        y[p, at] += dot(values, x[p, column])


@njit(parallel=True, cache=True, **OPTIONS)
def tile(codes, twice, shape, starts, word_of, shifts, bounds, low, high, out):
    """Values of the rings low ... high of every column as bfloat16, (columns, weights) in planes."""
    each, own = shape[0], bounds[low : high + 1] - bounds[low]
    groups = own[-1] // each
    for j in prange(codes.shape[0]):
        words, values = np.empty((len(starts), groups), u32), np.empty(groups, f32)
        all_words(codes[j, bounds[low] * twice // 16 :], own, twice, shape, starts, words)
        for i in range(each):
            plane(words[word_of[i]], shifts[i], values)
            row = out[j, i * groups : (i + 1) * groups]
            for g in range(groups):
                row[g] = upper_half(values[g] - f32(60))


@njit(parallel=True, cache=True, **OPTIONS)
def read(codes, twice, shape, starts, word_of, shifts, bounds, out):
    """Values of all rings of a stream of bytes, float32 in their order; bounds in weights."""
    each = shape[0]
    for r in prange(len(bounds) - 1):
        begin, count = bounds[r], bounds[r + 1] - bounds[r]
        own = np.array([0, count])
        words, values = np.empty((len(starts), count // each), u32), np.empty(count // each, f32)
        all_words(codes[begin * twice // 16 : bounds[r + 1] * twice // 16], own, twice, shape, starts, words)
        for i in range(each):
            plane(words[word_of[i]], shifts[i], values)
            for g in range(count // each):
                out[begin + g * each + i] = values[g] - f32(60)


@njit(**FAST)
def butterflies(a, b):
    for i in range(len(a)):
        x, y = a[i], b[i]
        a[i], b[i] = x + y, x - y


@njit(parallel=True, cache=True, **OPTIONS)
def mix_first(x, block):
    """x (m, n): blocks of Hadamard matrices along m, in place."""
    rows, columns = x.shape
    wide = 64  # columns at a time: a block of them fits the cache
    strips = (columns + wide - 1) // wide
    for item in prange(rows // block * strips):
        first, left = item // strips * block, item % strips * wide
        right = min(columns, left + wide)
        half = 1
        while half < block:
            for i in range(first, first + block):
                if (i - first) & half == 0:
                    butterflies(x[i, left:right], x[i + half, left:right])
            half *= 2
