"""How a training process treats the memory that it frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on; False where the C library is not glibc, and nothing changed.

    glibc gives every large temporary back to the system, and the next one is faulted in anew, page by page: that took
    between 4 % and half of a training step on a CPU, by the state of the machine. The price: the process stays as large
    as it once was.

    Source: mallopt(3).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
