"""Compiled work on several threads. A copy lies in every checkpoint.

torch's own threads do it where they are GNU OpenMP's: they are awake, and a second pool would take turns with them on
the same cores. Elsewhere Python's threads do it.
"""

import ctypes
import os
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import cfunc, types
    from numba.extending import intrinsic
except ImportError:
    raise

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

# Work takes the address of whole numbers of 64 bits: a counter, from which threads take what is next, and what `run`
# was given.
work = cfunc(types.void(types.voidptr), cache=True, boundscheck=False, error_model="numpy")


@intrinsic
def pointer(context, address):
    """Address (int64) -> what `carray` takes."""

    def code(context, builder, signature, given):
        return builder.inttoptr(given[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def take(context, counter):
    """The number that is next, from 0 on; no two threads get the same one."""

    def code(context, builder, signature, given):
        place = builder.bitcast(given[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), code


def run(done_by, numbers: list[int]) -> None:
    """Has compiled work done by as many threads as torch uses; returns when all have."""
    given = array("q", [0, *numbers])
    address, threads = given.buffer_info()[0], torch.get_num_threads()
    if threads == 1:
        WORK(done_by.address)(address)
    elif openmp := _openmp():
        openmp(done_by.address, address, threads, 0)
    else:
        list(_pool(threads, os.getpid()).map(lambda _: WORK(done_by.address)(address), range(threads)))


@cache
def _openmp():
    """GNU OpenMP's entry for a parallel region, of the library that torch loaded."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "GOMP_parallel"):
        return None
    return TEAM(("GOMP_parallel", library))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
