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

from .lanes import (
    F32,
    FAST,
    FLOATS,
    HAS_DOT,
    I8,
    I16,
    LANES,
    WORDS,
    add,
    dot,
    in_turn,
    load,
    moved,
    multiply,
    number,
    pointer_to,
    same,
    spread,
    store,
    words,
)  # fmt: skip
from .trellis_code import FACTOR, OFFSET, WINDOW, groups_of

WRAP = 8  # bytes of a ring's beginning that are copied behind its end
MEAN = 60  # what eight hexadecimal digits sum up to, on average: values are less by it
# Values are made with BIAS added and times 2 ** SHIFT, as the machine's instructions give them soonest.
BIAS, SHIFT = (0, 4) if HAS_DOT else (MEAN, 24)
LOW, HIGH, ONES = same(0x0F0F0F0F), same(0xF0F0F0F0), same(0x01010101)


def _shifted(builder, word, first):
    """<16 x i32>: the values, plus BIAS, times 2 ** SHIFT, of the windows that begin at a bit of each word."""
    window = builder.and_(builder.lshr(word, same(first)), same(2**WINDOW - 1))
    mixed = builder.add(builder.mul(window, same(FACTOR)), same(OFFSET))
    if HAS_DOT:  # 16 times (low + high) is 16 times (low + 16 high) less 15 times (16 high)
        start = dot(builder, same(-16 * MEAN), mixed, same(0x10101010))
        return dot(builder, start, builder.and_(mixed, HIGH), same(0xF1F1F1F1))
    pairs = builder.add(builder.and_(mixed, LOW), builder.and_(builder.lshr(mixed, same(4)), LOW))
    return builder.and_(builder.mul(pairs, ONES), same(0xFF << SHIFT))  # the sum of bytes is in the highest


def _planes(builder, codes, twice):
    """Yields `_shifted` of each plane of a block."""
    groups = groups_of(twice)
    found = [words(builder, moved(builder, codes, start), groups.size, 4) for start in groups.starts]
    for word, first in groups.places:
        yield _shifted(builder, found[word], first)


def _each_block(builder, given, kind, twice):
    """given: addresses of a ring and of `out`, and blocks between them. Loops over the blocks, and yields each plane's
    `_shifted` and where its values go."""
    ring, blocks, out = given[:3]
    each, size = groups_of(twice)[:2]
    with cgutils.for_range(builder, blocks) as loop:
        own = moved(builder, pointer_to(builder, ring, I8), builder.mul(loop.index, number(LANES * size)))
        place = moved(builder, pointer_to(builder, out, kind), builder.mul(loop.index, number(LANES * each)))
        for i, values in enumerate(_planes(builder, own, twice)):
            yield values, moved(builder, place, i * LANES)


@intrinsic(prefer_literal=True)
def read_ring(context, ring, blocks, out, twice):
    """Sets out (blocks, planes, LANES) float32 to the values, plus BIAS, of a ring. ring, out: addresses; what is read
    ends less than WRAP bytes behind the last block."""

    def code(context, builder, signature, given):
        for values, place in _each_block(builder, given, F32, twice.literal_value):
            whole = builder.ashr(values, same(SHIFT))
            store(builder, builder.sitofp(whole, FLOATS), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, twice), code


@intrinsic(prefer_literal=True)
def read_ring_half(context, ring, blocks, out, twice):
    """The same as bfloat16, which has all values exactly, and without BIAS."""

    def code(context, builder, signature, given):
        for values, place in _each_block(builder, given, I16, twice.literal_value):
            whole = builder.sub(builder.ashr(values, same(SHIFT)), same(BIAS))
            upper = builder.lshr(builder.bitcast(builder.sitofp(whole, FLOATS), WORDS), same(16))
            store(builder, builder.trunc(upper, ir.VectorType(I16, LANES)), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, twice), code


@intrinsic(prefer_literal=True)
def in_order(context, planes, blocks, less, out, each, half):
    """out (blocks * LANES * each,) float32: planes (blocks, each, LANES), float32 or (`half`) bfloat16, less a float32,
    in the order of weights. planes, out: addresses."""
    rows, short = each.literal_value, half.literal_value

    def code(context, builder, signature, given):
        planes, blocks, less, out = given[:4]
        kind = I16 if short else F32
        with cgutils.for_range(builder, blocks) as loop:
            start = builder.mul(loop.index, number(LANES * rows))
            own = moved(builder, pointer_to(builder, planes, kind), start)
            found = [moved(builder, own, i * LANES) for i in range(rows)]
            if short:
                halves = [builder.zext(load(builder, one, ir.VectorType(I16, LANES)), WORDS) for one in found]
                values = [builder.bitcast(builder.shl(one, same(16)), FLOATS) for one in halves]
            else:
                values = [load(builder, one, FLOATS) for one in found]
            lessened = [builder.fsub(one, spread(builder, less), flags=FAST) for one in values]
            place = moved(builder, pointer_to(builder, out, F32), start)
            for i, vector in enumerate(in_turn(builder, lessened)):
                store(builder, vector, moved(builder, place, i * LANES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, each, half), code


@intrinsic(prefer_literal=True)
def add_rings(context, rings, step, blocks, x, out, next_out, count, tokens, twice):
    """Adds the values, plus BIAS, of `count` rings, `step` bytes from one to the next, each times its numbers of x
    (count, tokens) float32, to the sums of each token, `next_out` bytes from one to the next. x, out: addresses."""
    rate, columns, many = twice.literal_value, count.literal_value, tokens.literal_value

    def code(context, builder, signature, given):
        rings, step, blocks, x, out, next_out = given[:6]
        each, size = groups_of(rate)[:2]
        numbers = pointer_to(builder, x, F32)
        inputs = [[builder.load(moved(builder, numbers, c * many + p)) for p in range(many)] for c in range(columns)]
        small = ir.Constant(F32, 2.0**-SHIFT)
        factors = [[spread(builder, builder.fmul(one, small)) for one in column] for column in inputs]
        with cgutils.for_range(builder, blocks) as loop:
            first = builder.add(rings, builder.mul(loop.index, number(LANES * size)))
            done = builder.mul(loop.index, number(LANES * each))
            sums = [builder.add(out, builder.mul(next_out, number(p))) for p in range(many)]
            places = [moved(builder, pointer_to(builder, one, F32), done) for one in sums]
            own = [builder.add(first, builder.mul(step, number(c))) for c in range(columns)]
            planes = [_planes(builder, pointer_to(builder, ring, I8), rate) for ring in own]
            for i, column in enumerate(zip(*planes)):
                values = [builder.sitofp(one, FLOATS) for one in column]
                for p, place in enumerate(places):
                    one = moved(builder, place, i * LANES)
                    total = load(builder, one, FLOATS)
                    for value, factor in zip(values, factors):
                        total = add(builder, total, multiply(builder, value, factor[p]))
                    store(builder, total, one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, count, tokens, twice), code
