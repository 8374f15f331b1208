"""Blocks of Hadamard matrices in vector lanes. A copy lies in every checkpoint."""

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .lanes import F32, FAST, FLOATS, LANES, add, load, moved, multiply, number, pointer_to, shuffled, spread, store


def _within(builder, vector, half):
    """One step within a vector: each lane and the one `half` beside it become their sum and their difference."""
    partner = shuffled(builder, vector, vector, [lane ^ half for lane in range(LANES)])
    signs = ir.Constant(FLOATS, [-1.0 if lane & half else 1.0 for lane in range(LANES)])
    return add(builder, partner, multiply(builder, vector, signs))


def _mixed(builder, vectors):
    """A block of LANES * len(vectors) numbers times a Hadamard matrix."""
    half = 1
    while half < LANES:
        vectors = [_within(builder, one, half) for one in vectors]
        half *= 2
    step = 1
    while step < len(vectors):
        done = list(vectors)
        for i, one in enumerate(vectors):
            other = vectors[i ^ step]
            done[i] = builder.fsub(other, one, flags=FAST) if i & step else add(builder, one, other)
        vectors, step = done, 2 * step
    return vectors


@intrinsic(prefer_literal=True)
def mix_blocks(context, x, count, signs, scale, signs_first, block):
    """x (count * block,) float32, in place: signs, then Hadamard matrices of size `block` (at least LANES), or, unless
    `signs_first`, the other way round; all times scale. x, signs: addresses."""
    size, first = block.literal_value, bool(signs_first.literal_value)

    def code(context, builder, signature, given):
        x, count, signs, scale = given[:4]
        factor = spread(builder, scale)
        with cgutils.for_range(builder, count) as loop:
            start = builder.mul(loop.index, number(size))
            places = [
                moved(builder, moved(builder, pointer_to(builder, x, F32), start), i) for i in range(0, size, LANES)
            ]
            own = moved(builder, pointer_to(builder, signs, F32), start)
            turns = [load(builder, moved(builder, own, i), FLOATS) for i in range(0, size, LANES)]
            turns = [multiply(builder, one, factor) for one in turns]
            vectors = [load(builder, place, FLOATS) for place in places]
            if first:
                vectors = [multiply(builder, one, turn) for one, turn in zip(vectors, turns)]
            vectors = _mixed(builder, vectors)
            if not first:
                vectors = [multiply(builder, one, turn) for one, turn in zip(vectors, turns)]
            for vector, place in zip(vectors, places):
                store(builder, vector, place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, signs_first, block), code
