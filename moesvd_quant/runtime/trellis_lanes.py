"""Trellis codes in vector lanes. A copy lies in every checkpoint.

A block is 16 groups of 8 or 16 neighbouring weights, whole bytes; in the order of planes, plane i has the i-th weight
of every group. A group's windows lie in one or two words of 32 bits.
"""

from functools import cache
from typing import NamedTuple

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from numba import types
    from numba.extending import intrinsic
except ImportError:
    raise

from .lanes import FLOATS, LANES, add, data_of, load, moved, multiply, same, spread, store, words
from .trellis_code import FACTOR, OFFSET, WINDOW

FIT = 32 - WINDOW  # first bits of windows that a word holds whole
BIAS = 60  # values are read with it added, so that they are not negative


class Groups(NamedTuple):
    """Where the windows of a group of weights lie."""

    each: int  # weights
    size: int  # bytes
    starts: tuple[int, ...]  # the bytes that words begin with
    places: tuple[tuple[int, int], ...]  # of each weight: its word, and the first bit in it


@cache
def groups_of(twice: int) -> Groups:
    """Of a rate in half bits."""
    each = 8 if twice % 2 == 0 else 16
    starts: list[int] = []
    places = []
    for bit in (i * twice // 2 for i in range(each)):
        if not starts or bit - 8 * starts[-1] > FIT:
            starts.append(bit // 8)
        places.append((len(starts) - 1, bit - 8 * starts[-1]))
    return Groups(each, each * twice // 16, tuple(starts), tuple(places))


def _values(builder, word, first):
    """<16 x float>: the values, plus BIAS, of the windows that begin at a bit of each word."""
    window = builder.and_(builder.lshr(word, same(first)), same(2**WINDOW - 1))
    mixed = builder.add(builder.mul(window, same(FACTOR)), same(OFFSET))
    low = same(0x0F0F0F0F)
    pairs = builder.add(builder.and_(mixed, low), builder.and_(builder.lshr(mixed, same(4)), low))
    return builder.sitofp(builder.lshr(builder.mul(pairs, same(0x01010101)), same(24)), FLOATS)


def _planes(builder, codes, twice):
    """Yields the values of each plane of a block."""
    groups = groups_of(twice)
    found = [words(builder, moved(builder, codes, start), groups.size, 4) for start in groups.starts]
    for word, first in groups.places:
        yield _values(builder, found[word], first)


@intrinsic(prefer_literal=True)
def read_block(context, codes, at, out, out_at, twice):
    """Sets out (flat, from out_at on) to the values, plus BIAS, of the block whose bytes begin at `at`, in planes."""
    rate = twice.literal_value

    def code(context, builder, signature, given):
        c, o = (data_of(context, builder, signature.args[i], given[i]) for i in (0, 2))
        place = moved(builder, o, given[3])
        for i, values in enumerate(_planes(builder, moved(builder, c, given[1]), rate)):
            store(builder, values, moved(builder, place, i * LANES))
        return context.get_dummy_value()

    return types.void(codes, at, out, out_at, twice), code


@intrinsic(prefer_literal=True)
def add_block(context, codes, at, x, out, out_at, twice):
    """Adds x times those values."""
    rate = twice.literal_value

    def code(context, builder, signature, given):
        c, o = (data_of(context, builder, signature.args[i], given[i]) for i in (0, 3))
        place, factor = moved(builder, o, given[4]), spread(builder, given[2])
        for i, values in enumerate(_planes(builder, moved(builder, c, given[1]), rate)):
            one = moved(builder, place, i * LANES)
            store(builder, add(builder, load(builder, one, FLOATS), multiply(builder, values, factor)), one)
        return context.get_dummy_value()

    return types.void(codes, at, x, out, out_at, twice), code
