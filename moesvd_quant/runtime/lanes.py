"""Vectors of 16 lanes in the compiler's own terms (LLVM), of which kernels for a CPU are made. A copy lies in every
checkpoint.

numba widens all arithmetic to 64 bits, which halves the lanes, and guards each loop. Straight code of whole vectors has
neither, and LLVM fits it to the registers that the machine has.
"""

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from llvmlite.binding import get_host_cpu_features
    from numba import config, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .numba_here import LANES

QUAD = LANES // 4
I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
WORDS, FLOATS, BYTES = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES), ir.VectorType(I8, 16)
FAST = ("fast",)  # sums in any order, as torch's own
# Whether one instruction sums four products of bytes, and numba compiles for this very machine.
HAS_DOT = not (config.CPU_NAME or config.CPU_FEATURES) and get_host_cpu_features().get("avx512vnni", False)


def number(value: int):
    return ir.Constant(I64, int(value))


def same(value: int):
    """<16 x i32> of one number."""
    return ir.Constant(WORDS, [int(value)] * LANES)


def zeros():
    return ir.Constant(FLOATS, [0.0] * LANES)


def pointer_to(builder, address, kind):
    """What lies at an address (int64)."""
    return builder.inttoptr(address, kind.as_pointer())


def moved(builder, pointer, by):
    """A pointer moved on by so many elements, a constant or a value."""
    return builder.gep(pointer, [number(by) if isinstance(by, int) else by])


def load(builder, pointer, kind):
    """A vector from any address."""
    vector = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    vector.align = 1
    return vector


def store(builder, vector, pointer) -> None:
    """A vector to any address."""
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer())).align = 1


def shuffled(builder, a, b, picked):
    """Elements of two vectors, by their number in both."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(picked)), list(picked)))


def spread(builder, scalar):
    """<16 x float> of one float."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(I32, 0))
    return shuffled(builder, one, ir.Constant(FLOATS, ir.Undefined), [0] * LANES)


def spread_all(builder, pointer, count):
    """<16 x float> of `count` neighbouring floats, each for as many lanes."""
    kind = ir.VectorType(F32, count)
    few = load(builder, pointer, kind)
    return shuffled(builder, few, ir.Constant(kind, ir.Undefined), [lane * count // LANES for lane in range(LANES)])


def store_half(builder, floats, pointer) -> None:
    """Stores <16 x float> as bfloat16, rounded to the nearest, to even where two are as near."""
    bits = builder.bitcast(floats, WORDS)
    odd = builder.and_(builder.lshr(bits, same(16)), same(1))
    rounded = builder.add(bits, builder.add(odd, same(0x7FFF)))
    store(builder, builder.trunc(builder.lshr(rounded, same(16)), ir.VectorType(I16, LANES)), pointer)


def add(builder, a, b):
    return builder.fadd(a, b, flags=FAST)


def multiply(builder, a, b):
    return builder.fmul(a, b, flags=FAST)


def dot(builder, vector, unsigned, signed):
    """vector <16 x i32> plus, in each lane, the sum of its four bytes of `unsigned` times those of `signed`; where
    HAS_DOT."""
    kind = ir.FunctionType(WORDS, [WORDS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [vector, unsigned, signed])


def total(builder, vector):
    """The sum of a vector's elements."""
    count = LANES
    while count > 1:
        count //= 2
        halves = (shuffled(builder, vector, vector, range(at, at + count)) for at in (0, count))
        vector = add(builder, *halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def in_turn(builder, vectors):
    """Elements of vectors in turn: a0 b0 ... a1 b1 ..., as many vectors."""
    if len(vectors) == 1:
        return vectors
    evens, odds = (in_turn(builder, vectors[first::2]) for first in (0, 1))
    made = []
    for a, b in zip(evens, odds):
        for start in (0, LANES // 2):
            made.append(shuffled(builder, a, b, [start + i // 2 + LANES * (i % 2) for i in range(LANES)]))
    return made


def words(builder, pointer, size, taken):
    """<16 x i32>: lane l has `taken` bytes (at most 4), the lowest first, from byte l * size on. No byte after the last
    one that is asked for is read."""
    if size == taken and size != 3:
        narrow = load(builder, pointer, ir.VectorType(ir.IntType(8 * size), LANES))
        return narrow if size == 4 else builder.zext(narrow, WORDS)
    end = (LANES - 1) * size + taken
    quads = [_quad(builder, pointer, size, taken, end, QUAD * q * size) for q in range(LANES // QUAD)]
    low, high = (shuffled(builder, a, b, range(32)) for a, b in (quads[:2], quads[2:]))
    return builder.bitcast(shuffled(builder, low, high, range(64)), WORDS)


def _quad(builder, pointer, size, taken, end, first):
    """<16 x i8> of the words of four lanes, of which the first begins at byte `first`."""
    zero = ir.Constant(BYTES, [0] * 16)
    if (QUAD - 1) * size + taken <= 16:
        back = max(0, first + 16 - end)
        picked = [back + size * lane + byte if byte < taken else 16 for lane in range(QUAD) for byte in range(4)]
        return shuffled(builder, load(builder, moved(builder, pointer, first - back), BYTES), zero, picked)
    half = first + 2 * size  # two lanes of each load
    second = max(0, half + 16 - end)
    a, b = (load(builder, moved(builder, pointer, at), BYTES) for at in (first, half - second))
    starts = (0, size, 16 + second, 16 + second + size)
    return shuffled(builder, a, b, [start + byte for start in starts for byte in range(4)])


@intrinsic
def copy(context, target, source, size):
    """Copies so many bytes from one address to another, vector after vector; where there are fewer bytes than a vector
    has, as the library does."""

    def code(context, builder, signature, given):
        target, source = (pointer_to(builder, address, I8) for address in given[:2])
        size, whole = given[2], number(BYTES.count)
        few = builder.icmp_signed("<", size, whole)
        with builder.if_else(few) as (short, long):
            with short:
                cgutils.raw_memcpy(builder, target, source, size, 1)
            with long:
                count = builder.udiv(builder.sub(size, number(1)), whole)
                with cgutils.for_range(builder, count) as loop:
                    at = builder.mul(loop.index, whole)
                    store(builder, load(builder, moved(builder, source, at), BYTES), moved(builder, target, at))
                at = builder.sub(size, whole)  # the last one overlaps
                store(builder, load(builder, moved(builder, source, at), BYTES), moved(builder, target, at))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def copy_word(context, target, source):
    """Copies eight bytes from one address to another."""

    def code(context, builder, signature, given):
        target, source = (pointer_to(builder, address, I8) for address in given)
        word = builder.load(builder.bitcast(source, I64.as_pointer()))
        word.align = 1
        builder.store(word, builder.bitcast(target, I64.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code
