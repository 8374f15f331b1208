"""When the C library gives freed memory back to the system. Imports no torch."""

import ctypes
import os

M_MMAP_THRESHOLD, MAPPED = -3, 2**20  # of glibc's mallopt; bytes


def _c_library(function: str, *arguments: int) -> None:
    """Calls a function of the C library where it has one (glibc)."""
    found = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    if found is not None:
        found(*arguments)


def disable_malloc_cache() -> None:
    """From now on tensors go back to the system when they are freed. The C library would keep those below 32 MB for
    later, in pieces: a hundred MB and more, of which no forecast could be made.

    It changes the whole process and cannot be undone: for processes of our own, which are the command line's, its
    workers, and programs that measure memory.
    """
    _c_library("mallopt", M_MMAP_THRESHOLD, MAPPED)


def malloc_trim() -> None:
    """Gives back what was freed of smaller things."""
    _c_library("malloc_trim", 0)
