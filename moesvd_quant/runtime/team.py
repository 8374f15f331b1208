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
from typing import Any, TypeAlias

import numpy as np
import torch

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    from llvmlite import ir
    from numba import carray, cfunc, types
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


@intrinsic
def call(context, function, given):
    """Does the work at an address with what it takes, at another."""

    def code(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte])
        function, given = arguments
        builder.call(builder.inttoptr(function, kind.as_pointer()), [builder.inttoptr(given, byte)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@work
def one_by_one(given):
    """Work: several works in turn. A thread that finds nothing left of one goes on with the next."""
    count = carray(given, (2,), np.int64)[1]
    pairs = carray(given, (2 + 2 * count,), np.int64)
    for i in range(count):
        call(pairs[2 + 2 * i], pairs[3 + 2 * i])


Given: TypeAlias = int | torch.Tensor | np.ndarray  # of a tensor or an array, its address


def run_all(jobs: list[tuple[Any, list[Given]]]) -> None:
    """Has several compiled works done, none of which waits for another, as `run` does one."""
    if len(jobs) == 1:
        run(*jobs[0])
        return
    numbers = [_numbers(given) for _, given in jobs]
    pairs = [(done_by.address, own.buffer_info()[0]) for (done_by, _), own in zip(jobs, numbers)]
    run(one_by_one, [len(jobs), *(number for pair in pairs for number in pair)])


def run(done_by, given: list[Given], alone: bool = False) -> None:
    """Has compiled work done by as many threads as torch uses; returns when all have. alone: by this thread, where
    there is less to do than it takes to wake another."""
    numbers, threads = _numbers(given), torch.get_num_threads()
    address = numbers.buffer_info()[0]
    if threads == 1 or alone:
        WORK(done_by.address)(address)
    elif openmp := _openmp():
        openmp(done_by.address, address, threads, 0)
    else:
        list(_pool(threads, os.getpid()).map(lambda _: WORK(done_by.address)(address), range(threads)))


def _numbers(given: list[Given]) -> array:
    """A counter, and what is given."""
    return array("q", [0, *map(_number, given)])


def _number(one: Given) -> int:
    if isinstance(one, torch.Tensor):
        return one.data_ptr()
    return one.ctypes.data if isinstance(one, np.ndarray) else one


@cache
def _openmp():
    """GNU OpenMP's entry for a parallel region, of the library that torch loaded."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "GOMP_parallel"):
        return None
    return TEAM(("GOMP_parallel", library))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
