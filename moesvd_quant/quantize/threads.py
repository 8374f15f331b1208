"""Compiled work on Python's threads.

numba's own ones would wait for their next work by spinning, on the cores that torch's threads want.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Part = TypeVar("Part")


def parts_of(count: int, threads: int) -> list[range]:
    """The numbers below `count` in nearly equal runs, at most one for each thread."""
    threads = max(1, min(threads, count))
    return [range(count * i // threads, count * (i + 1) // threads) for i in range(threads)]


def on_threads(work: Callable[[int, Part], None], parts: Sequence[Part]) -> None:
    """work(i, parts[i]) of all parts at a time; it has to let Python's lock go. The first part is this thread's."""
    others = [_pool(os.getpid()).submit(work, i, part) for i, part in enumerate(parts) if i]
    work(0, parts[0])
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor()
