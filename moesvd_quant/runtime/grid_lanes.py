"""Rows of packed grids in vector lanes. A copy lies in every checkpoint.

A block is 16 words of eight codes. In the order of planes, which inputs are brought into, plane k has the k-th code of
every word. Codes of 8 bits are bytes, and stay in their order.
"""

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .lanes import (
    FLOATS,
    LANES,
    add,
    data_of,
    load,
    moved,
    multiply,
    number,
    same,
    spread_all,
    store,
    total,
    words,
    zeros,
)

BLOCK = 8 * LANES
PLANES = 9  # of an input's block: the last has each lane's sum


def kept_place(bits: int, plane: int) -> bool:
    """Whether a code is used where it stands in its word: times 2 ** (bits * plane), which the input makes up for. The
    highest bit of a word would be a sign."""
    return bits < 8 and bits * (plane + 1) < 32


def _planes(builder, codes, bits, in_place):
    """Yields the codes of each plane of a block, as floats."""
    if bits == 8:
        narrow = ir.VectorType(ir.IntType(8), LANES)
        for k in range(8):
            yield builder.uitofp(load(builder, moved(builder, codes, k * LANES), narrow), FLOATS)
        return
    word = words(builder, codes, bits, bits)
    for k in range(8):
        if in_place and kept_place(bits, k):
            code = builder.and_(word, same((2**bits - 1) << bits * k))
        else:
            code = builder.and_(builder.lshr(word, same(bits * k)), same(2**bits - 1))
        yield builder.sitofp(code, FLOATS)


def _of_groups(builder, values, block, count, bits):
    """For each plane the value of its group in each lane: a function of the plane. count: groups of a block."""
    first = moved(builder, values, builder.mul(block, number(count)))
    if bits < 8:
        found = spread_all(builder, first, count)
        return lambda plane: found
    return lambda plane: spread_all(builder, moved(builder, first, plane * count // 8), max(1, count // 8))


@intrinsic(prefer_literal=True)
def row_products(context, codes, at, blocks, x, x_at, scales, offs, y, bits, count, tokens):
    """Sets y[0 ... tokens - 1], the products of one row with inputs.

    codes: flat, the row's begin at `at`; x: flat, from x_at on (tokens, blocks, PLANES, LANES), where codes keep their
    place times 2 ** -(bits * plane); scales, and offs = scale * zero: `count` for each block.
    """
    bits_, count_, tokens_ = bits.literal_value, count.literal_value, tokens.literal_value
    known = types.void(codes, at, blocks, x, x_at, scales, offs, y, bits, count, tokens)

    def code(context, builder, signature, given):
        kinds = signature.args
        c, x, s, o, y = (data_of(context, builder, kinds[i], given[i]) for i in (0, 3, 5, 6, 7))
        at, blocks, x_at = given[1], given[2], given[4]
        sums = [cgutils.alloca_once_value(builder, zeros()) for _ in range(tokens_)]
        for place in sums:
            builder.store(zeros(), place)
        step = builder.mul(blocks, number(PLANES * LANES))
        with cgutils.for_range(builder, blocks) as loop:
            own = moved(builder, c, builder.add(at, builder.mul(loop.index, number(BLOCK * bits_ // 8))))
            block = builder.add(x_at, builder.mul(loop.index, number(PLANES * LANES)))
            inputs = [moved(builder, x, builder.add(block, builder.mul(step, number(t)))) for t in range(tokens_)]
            scale = _of_groups(builder, s, loop.index, count_, bits_)
            off = _of_groups(builder, o, loop.index, count_, bits_)
            found = [zeros()] * tokens_
            for k, value in enumerate(_planes(builder, own, bits_, in_place=True)):
                if bits_ == 8:
                    value = builder.fsub(multiply(builder, value, scale(k)), off(k), flags=("fast",))
                for t, place in enumerate(inputs):
                    plane = load(builder, moved(builder, place, k * LANES), FLOATS)
                    found[t] = add(builder, found[t], multiply(builder, value, plane))
            for t, place in enumerate(inputs):
                if bits_ < 8:
                    each = load(builder, moved(builder, place, 8 * LANES), FLOATS)
                    below = multiply(builder, off(0), each)
                    found[t] = builder.fsub(multiply(builder, scale(0), found[t]), below, flags=("fast",))
                builder.store(add(builder, builder.load(sums[t]), found[t]), sums[t])
        for t, place in enumerate(sums):
            builder.store(total(builder, builder.load(place)), moved(builder, y, t))
        return context.get_dummy_value()

    return known, code


@intrinsic(prefer_literal=True)
def row_values(context, codes, at, blocks, scales, offs, y, y_at, bits, count):
    """Sets y (flat, from y_at on) to the values of one row, exactly (code - zero) * scale, in the order of planes,
    block after block. offs: the zeros."""
    bits_, count_ = bits.literal_value, count.literal_value
    known = types.void(codes, at, blocks, scales, offs, y, y_at, bits, count)

    def code(context, builder, signature, given):
        kinds = signature.args
        c, s, o, y = (data_of(context, builder, kinds[i], given[i]) for i in (0, 3, 4, 5))
        at, blocks, y_at = given[1], given[2], given[6]
        with cgutils.for_range(builder, blocks) as loop:
            own = moved(builder, c, builder.add(at, builder.mul(loop.index, number(BLOCK * bits_ // 8))))
            out = moved(builder, y, builder.add(y_at, builder.mul(loop.index, number(BLOCK))))
            scale = _of_groups(builder, s, loop.index, count_, bits_)
            off = _of_groups(builder, o, loop.index, count_, bits_)
            for k, value in enumerate(_planes(builder, own, bits_, in_place=False)):
                store(builder, builder.fmul(builder.fsub(value, off(k)), scale(k)), moved(builder, out, k * LANES))
        return context.get_dummy_value()

    return known, code
