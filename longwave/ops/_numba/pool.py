"""Kernels on all threads that torch may use, over slices of their tasks."""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba.jit import tell_once

SLICES_A_THREAD = 4  # enough for balance, few enough that taking the GIL for each does not count

_local = threading.local()
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _forget_pool() -> None:
    """A forked child has none of its parent's threads, and no lock that one of them may hold."""
    global _pool, _lock
    _pool, _lock, _results.lock = None, threading.Lock(), threading.RLock()


os.register_at_fork(after_in_child=_forget_pool)


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="longwave")
        return _pool


class _Memory:
    """A tensor's memory to numpy, which keeps the tensor alive. Tensor.numpy() would forbid its storage to be resized,
    as FSDP2 does with the parameters it gathers."""

    def __init__(self, tensor: Tensor, size: int):
        self.tensor = tensor
        kind = f"<f{tensor.dtype.itemsize}"
        self.__array_interface__ = {"data": (tensor.data_ptr(), False), "shape": (size,), "typestr": kind, "version": 3}


def memory(tensor: Tensor, size: int) -> np.ndarray:
    """The ``size`` numbers in memory from the first element of a real tensor on, whatever its strides."""
    return np.asarray(_Memory(tensor.detach(), size))


def flat(tensor: Tensor | None) -> np.ndarray:
    """A tensor as a flat float32 array: the memory of a contiguous float32 tensor, else a copy; None is empty."""
    if tensor is None or tensor.numel() == 0:
        return np.empty(0, np.float32)
    return memory(tensor.to(torch.float32).contiguous(), tensor.numel())


class _Results:
    """Memory of results that are no longer used, kept for the next ones of the same size.

    Fresh memory is faulted in page by page, which takes longer than most kernels do (50 MB: 21 ms), and what is freed
    often goes back to the system. Up to LIMIT bytes are kept, the oldest go first.
    """

    LEAST, LIMIT = 2**20, 2**29  # bytes

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []
        self.lock = threading.RLock()  # a garbage collection inside may free another result

    def take(self, size: int) -> np.ndarray:
        with self.lock:
            for i in range(len(self.kept) - 1, -1, -1):
                if self.kept[i].size == size:
                    return self.kept.pop(i)
        return np.empty(size, np.float32)

    def give(self, memory: np.ndarray) -> None:
        with self.lock:
            self.kept.append(memory)
            while sum(m.nbytes for m in self.kept) > self.LIMIT:
                del self.kept[0]


_results = _Results()


class _Result:
    """The memory of one result, to numpy; it comes back when the last tensor that shows it is gone."""

    def __init__(self, size: int):
        self.memory = _results.take(size)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self, give: Callable[[np.ndarray], None] = _results.give) -> None:
        give(self.memory)


def empty(*shape: int) -> Tensor:
    """A float32 tensor for a result, contents undefined."""
    size = math.prod(shape)
    if size * 4 < _Results.LEAST:
        return torch.empty(shape, dtype=torch.float32)
    return torch.from_numpy(np.asarray(_Result(size))).view(shape)


def release() -> None:
    """Give back all memory that is kept for later calls: this thread's scratch and unused results."""
    _local.scratch = None
    with _results.lock:
        _results.kept.clear()


def scratch(size: int) -> np.ndarray:
    """This thread's float32 scratch of at least ``size`` elements, contents undefined; kept for the next call."""
    held: np.ndarray | None = getattr(_local, "scratch", None)
    if held is None or held.size < size:
        held = _local.scratch = np.empty(size, np.float32)
    return held


def run(kernel: Callable[..., None], tasks: int, *args: Any, scratch_size: int = 0) -> None:
    """kernel(start, stop, scratch, *args) over slices of range(tasks), on up to torch.get_num_threads() threads.

    Args:
        kernel: compiled by :func:`longwave.ops._numba.jit.kernel`, so it releases the GIL.
        tasks: how many there are; they write to different places.
        args: arrays and scalars for every call.
        scratch_size: float32 elements of scratch that a thread needs; each thread has its own.
    """
    _share_out(lambda start, stop: kernel(start, stop, scratch(scratch_size), *args), tasks)


def run_addresses(kernel: Callable[..., None], tasks: int, *args: Any) -> None:
    """The same of kernel(start, stop, *args), without scratch: an array costs one token more than its arithmetic."""
    if tasks == 1:
        tell_once()
        kernel(0, 1, *args)
    else:
        _share_out(lambda start, stop: kernel(start, stop, *args), tasks)


def _share_out(kernel: Callable[[int, int], None], tasks: int) -> None:
    tell_once()
    threads = min(torch.get_num_threads(), tasks) if tasks > 1 else 1
    if threads <= 1 or getattr(_local, "inside", False):
        if tasks:
            kernel(0, tasks)
        return
    width = -(-tasks // (SLICES_A_THREAD * threads))
    starts = iter(range(0, tasks, width))
    lock = threading.Lock()

    def work() -> None:
        _local.inside = True  # a call from within runs on this thread alone
        try:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                kernel(start, min(start + width, tasks))
        finally:
            _local.inside = False

    others = [_threads().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()


def share(kernel: Callable[..., None], threads: int, *args: Any) -> None:
    """kernel(*args) on this thread, and the same on others that come in time; it shares out its work itself.

    Args:
        kernel: compiled by :func:`longwave.ops._numba.jit.kernel`; it returns when nothing is left to take.
        threads: how many at most, this one included.
    """
    if threads <= 1 or getattr(_local, "inside", False):
        kernel(*args)
        return
    others = [_threads().submit(kernel, *args) for _ in range(threads - 1)]
    try:
        kernel(*args)
    finally:
        for other in others:
            if not other.cancel():
                other.result()
