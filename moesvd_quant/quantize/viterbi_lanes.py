"""A step of Viterbi's search, in the compiler's own vectors; see `viterbi_numba.py`."""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..runtime.lanes import F32, FLOATS, LANES, add, in_turn, load, moved, multiply, number, pointer_to, spread, store
from ..runtime.trellis_code import WINDOW

STATES = 2**WINDOW


def step_of(before: int, k: int):
    """step(best, arranged, target, found): addresses of float32, and a weight.

    best (STATES >> before,): least cost of the states that lead to each group of 2**before states; arranged
    [s & (2**before - 1)][s >> before]: the value of state s. Sets found (STATES >> k,): the same of the groups after a
    next step of k bits, with the error of `target` added. The costs of states are never stored.
    """
    low, ways, size, group = 2**before, 2**k, STATES >> (before + k), STATES >> before

    @intrinsic
    def step(context, best, arranged, target, found):
        def code(context, builder, signature, given):
            best, arranged, found = (pointer_to(builder, given[at], F32) for at in (0, 1, 3))
            target = spread(builder, given[2])
            with cgutils.for_range(builder, number(size // LANES)) as loop:
                q = builder.mul(loop.index, number(LANES))
                costs = [None] * low
                for p in range(ways):
                    came = load(builder, moved(builder, moved(builder, best, p * size), q), FLOATS)
                    for b in range(low):
                        at = moved(builder, moved(builder, arranged, b * group + p * size), q)
                        error = builder.fsub(target, load(builder, at, FLOATS), flags=("fast",))
                        cost = add(builder, came, multiply(builder, error, error))
                        costs[b] = cost if p == 0 else _lesser(builder, costs[b], cost)
                first = moved(builder, found, builder.mul(q, number(low)))
                for at, vector in enumerate(in_turn(builder, costs)):
                    store(builder, vector, moved(builder, first, at * LANES))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.int64), code

    return step


def _lesser(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b, flags=("fast",)), a, b)
