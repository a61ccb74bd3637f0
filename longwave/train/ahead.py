"""Batches drawn while the steps before them run."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import torch

from longwave import own
from longwave.tasks import TASKS
from longwave.tasks.base import Task
from longwave.tasks.forms import Batch

_task: Task  # of a process that draws


def _begin(files: Sequence[str], kind: str, options: str) -> None:
    global _task
    torch.set_num_threads(1)
    for file in files:
        own.trust(file)
    assert TASKS.find(kind)
    _task = TASKS[kind].model_validate_json(options)


def _draw(size: int, seed: int, number: int) -> list[Any]:
    return [part if part is None else part.numpy() for part in _task.train_batch(size, seed, number)]


def batches(task: Task, size: int, seed: int, numbers: Iterator[int], workers: int) -> Generator[Batch, None, None]:
    """Training batches of these numbers, in their order.

    Args:
        task: prepared.
        size: rows of each.
        seed: of the rows.
        numbers: of the batches.
        workers: processes that draw them, each two batches ahead; 0 draws each when it is asked for.
    Raises:
        OSError: where such a process was lost.
    """
    if workers == 0:
        yield from (task.train_batch(size, seed, number) for number in numbers)
        return
    about = ([str(file) for file in own.trusted()], task.kind, task.model_dump_json())
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, about)
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future] = deque(pool.submit(_draw, size, seed, n) for n in islice(numbers, 2 * workers))
        while waiting:
            try:
                parts = waiting.popleft().result()
                waiting.extend(pool.submit(_draw, size, seed, number) for number in islice(numbers, 1))
            except BrokenProcessPool as error:
                raise OSError(
                    "a process that draws rows was killed, or had no memory left; go on with --resume, "
                    "and with fewer workers"
                ) from error
            tensors: list[Any] = [part if part is None else torch.from_numpy(part) for part in parts]
            yield Batch(*tensors)
