"""Trellis codes in vector lanes. A copy lies in every checkpoint.

A block is 16 groups of 8 or 16 neighbouring weights, whole bytes; in the order of planes, plane i has the i-th weight
of every group. A group's windows lie in one or two words of 32 bits.
"""

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .lanes import F32, FLOATS, I8, LANES, add, load, moved, multiply, number, pointer_to, same, spread, store, words
from .trellis_code import FACTOR, OFFSET, WINDOW, groups_of

WRAP = 8  # bytes of a ring's beginning that are copied behind its end
IN_PLACE = 24  # the bit at which a value, never above 120, comes out of its sum
BIAS = 60  # values are read with it added, so that they are not negative


def _values(builder, word, first, place):
    """<16 x float>: the values, plus BIAS, times 2 ** place, of the windows that begin at a bit of each word."""
    window = builder.and_(builder.lshr(word, same(first)), same(2**WINDOW - 1))
    mixed = builder.add(builder.mul(window, same(FACTOR)), same(OFFSET))
    low = same(0x0F0F0F0F)
    pairs = builder.add(builder.and_(mixed, low), builder.and_(builder.lshr(mixed, same(4)), low))
    summed = builder.mul(pairs, same(0x01010101))  # in the highest byte
    if place == IN_PLACE:
        return builder.sitofp(builder.and_(summed, same(0xFF << IN_PLACE)), FLOATS)
    return builder.sitofp(builder.lshr(summed, same(IN_PLACE)), FLOATS)


def _planes(builder, codes, twice, place=0):
    """Yields the values of each plane of a block, plus BIAS, times 2 ** place (0 or IN_PLACE)."""
    groups = groups_of(twice)
    found = [words(builder, moved(builder, codes, start), groups.size, 4) for start in groups.starts]
    for word, first in groups.places:
        yield _values(builder, found[word], first, place)


@intrinsic(prefer_literal=True)
def read_ring(context, ring, blocks, out, twice):
    """Sets out (blocks, planes, LANES) float32 to the values, plus BIAS, of a ring. ring, out: addresses; what is read
    ends less than WRAP bytes behind the last block."""
    rate = twice.literal_value

    def code(context, builder, signature, given):
        ring, blocks, out, _ = given
        each, size = groups_of(rate)[:2]
        with cgutils.for_range(builder, blocks) as loop:
            own = moved(builder, pointer_to(builder, ring, I8), builder.mul(loop.index, number(LANES * size)))
            place = moved(builder, pointer_to(builder, out, F32), builder.mul(loop.index, number(LANES * each)))
            for i, values in enumerate(_planes(builder, own, rate)):
                store(builder, values, moved(builder, place, i * LANES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, twice), code


@intrinsic(prefer_literal=True)
def add_rings(context, rings, step, blocks, x, out, count, twice):
    """Adds those values of `count` rings, `step` bytes from one to the next, each times its number of x (float32, whose
    address is given)."""
    rate, columns = twice.literal_value, count.literal_value

    def code(context, builder, signature, given):
        rings, step, blocks, x, out = given[:5]
        each, size = groups_of(rate)[:2]
        inputs = [builder.load(moved(builder, pointer_to(builder, x, F32), c)) for c in range(columns)]
        small = ir.Constant(F32, 2.0**-IN_PLACE)
        factors = [spread(builder, builder.fmul(one, small)) for one in inputs]
        with cgutils.for_range(builder, blocks) as loop:
            first = builder.add(rings, builder.mul(loop.index, number(LANES * size)))
            place = moved(builder, pointer_to(builder, out, F32), builder.mul(loop.index, number(LANES * each)))
            own = [builder.add(first, builder.mul(step, number(c))) for c in range(columns)]
            planes = [_planes(builder, pointer_to(builder, ring, I8), rate, IN_PLACE) for ring in own]
            for i, values in enumerate(zip(*planes)):
                one = moved(builder, place, i * LANES)
                total = load(builder, one, FLOATS)
                for value, factor in zip(values, factors):
                    total = add(builder, total, multiply(builder, value, factor))
                store(builder, total, one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, count, twice), code
