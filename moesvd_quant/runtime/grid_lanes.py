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

from .grid_kernels import BLOCK, PLANES
from .lanes import (
    F32,
    FAST,
    FLOATS,
    I8,
    I16,
    I64,
    LANES,
    add,
    load,
    moved,
    multiply,
    number,
    pointer_to,
    same,
    spread_all,
    store,
    store_half,
    total,
    words,
    zeros,
)  # fmt: skip


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
def row_products(context, codes, blocks, x, scales, offs, y, step, bits, count, tokens):
    """Sets y[0], y[step] ... to the products of one row with so many inputs.

    Addresses of the row's codes; of x (tokens, blocks, PLANES, LANES), where codes keep their place times 2 ** -(bits *
    plane); of scales, and offs = scale * zero, `count` for each block; of y.
    """
    bits_, count_, tokens_ = bits.literal_value, count.literal_value, tokens.literal_value
    known = types.void(*[types.int64] * 7, bits, count, tokens)

    def code(context, builder, signature, given):
        c = pointer_to(builder, given[0], I8)
        x, s, o, y = (pointer_to(builder, given[i], F32) for i in (2, 3, 4, 5))
        blocks, step = given[1], given[6]
        sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(tokens_)]
        for place in sums:
            builder.store(zeros(), place)
        each = builder.mul(blocks, number(PLANES * LANES))
        with cgutils.for_range(builder, blocks) as loop:
            own = moved(builder, c, builder.mul(loop.index, number(BLOCK * bits_ // 8)))
            block = builder.mul(loop.index, number(PLANES * LANES))
            inputs = [moved(builder, x, builder.add(block, builder.mul(each, number(t)))) for t in range(tokens_)]
            scale = _of_groups(builder, s, loop.index, count_, bits_)
            off = _of_groups(builder, o, loop.index, count_, bits_)
            found = [zeros()] * tokens_
            for k, value in enumerate(_planes(builder, own, bits_, in_place=True)):
                if bits_ == 8:
                    value = builder.fsub(multiply(builder, value, scale(k)), off(k), flags=FAST)
                for t, place in enumerate(inputs):
                    plane = load(builder, moved(builder, place, k * LANES), FLOATS)
                    found[t] = add(builder, found[t], multiply(builder, value, plane))
            for t, place in enumerate(inputs):
                if bits_ < 8:
                    below = multiply(builder, off(0), load(builder, moved(builder, place, 8 * LANES), FLOATS))
                    found[t] = builder.fsub(multiply(builder, scale(0), found[t]), below, flags=FAST)
                builder.store(add(builder, builder.load(sums[t]), found[t]), sums[t])
        for t, place in enumerate(sums):
            builder.store(total(builder, builder.load(place)), moved(builder, y, builder.mul(step, number(t))))
        return context.get_dummy_value()

    return known, code


@intrinsic(prefer_literal=True)
def row_values(context, codes, blocks, scales, zeros, y, bits, count, half):
    """Sets y (blocks, 8, LANES) to the values of one row, (code - zero) * scale, in the order of planes: exactly, or
    (`half`) rounded to bfloat16. All but blocks are addresses."""
    bits_, count_, short = bits.literal_value, count.literal_value, half.literal_value
    known = types.void(*[types.int64] * 5, bits, count, half)

    def code(context, builder, signature, given):
        c = pointer_to(builder, given[0], I8)
        s, o = (pointer_to(builder, given[i], F32) for i in (2, 3))
        y, put = pointer_to(builder, given[4], I16 if short else F32), store_half if short else store
        with cgutils.for_range(builder, given[1]) as loop:
            own = moved(builder, c, builder.mul(loop.index, number(BLOCK * bits_ // 8)))
            out = moved(builder, y, builder.mul(loop.index, number(BLOCK)))
            scale = _of_groups(builder, s, loop.index, count_, bits_)
            off = _of_groups(builder, o, loop.index, count_, bits_)
            for k, value in enumerate(_planes(builder, own, bits_, in_place=False)):
                put(builder, builder.fmul(builder.fsub(value, off(k)), scale(k)), moved(builder, out, k * LANES))
        return context.get_dummy_value()

    return known, code


@intrinsic
def row_scales(context, levels, groups, table, base, scales):
    """Sets the scales of the groups of a row: base * table[level]. levels, table, scales: addresses."""
    known = types.void(types.int64, types.int64, types.int64, types.float32, types.int64)

    def code(context, builder, signature, given):
        levels, groups, table, base, scales = given
        level_at, step_at = pointer_to(builder, levels, I8), pointer_to(builder, table, F32)
        scale_at = pointer_to(builder, scales, F32)
        with cgutils.for_range(builder, groups) as loop:
            level = builder.zext(builder.load(moved(builder, level_at, loop.index)), I64)
            step = builder.load(moved(builder, step_at, level))
            builder.store(builder.fmul(base, step), moved(builder, scale_at, loop.index))
        return context.get_dummy_value()

    return known, code


@intrinsic
def row_zeros(context, zeros, first, last, groups, bits, offs):
    """Sets the zeros of the groups of a row: `bits` bits each from bit `first` on. zeros, last (of its last byte),
    offs: addresses."""
    known = types.void(*[types.int64] * 6)

    def code(context, builder, signature, given):
        zeros, first, last, groups, bits, offs = given
        mask, off_at = builder.sub(builder.shl(number(1), bits), number(1)), pointer_to(builder, offs, F32)
        with cgutils.for_range(builder, groups) as loop:
            bit = builder.add(first, builder.mul(loop.index, bits))
            at = builder.add(zeros, builder.lshr(bit, number(3)))
            # Two bytes are read; there are two, but not always two more.
            at = builder.select(builder.icmp_signed("<", at, last), at, builder.sub(last, number(1)))
            pair = builder.load(pointer_to(builder, at, ir.IntType(16)))
            pair.align = 1
            shift = builder.sub(bit, builder.shl(builder.sub(at, zeros), number(3)))
            zero = builder.and_(builder.lshr(builder.zext(pair, I64), shift), mask)
            builder.store(builder.sitofp(zero, F32), moved(builder, off_at, loop.index))
        return context.get_dummy_value()

    return known, code
