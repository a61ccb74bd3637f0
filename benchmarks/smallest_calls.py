"""What a call of an op costs above its kernel, for the smallest inputs of the tests."""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_ops import KERNELS, flat

torch.set_num_threads(1)


def microseconds(*runs: Callable[[], object], repeats: int = 500) -> list[float]:
    """Medians of runs that take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times):
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(found) for found in times]


print(f"{'op, backend, inputs':56} {'call':>7} {'kernel':>7} {'above':>7}  us")
for op, name, make in (case.values for case in KERNELS):
    args, kwargs = make(1, 1, torch.float32)
    if op.why_not(name, *args, **kwargs):
        continue
    inputs = flat(op, args, kwargs)
    given, kernel = dict(zip(op.arguments, inputs)), op.backends[name]
    call, bare = microseconds(functools.partial(op, **given, backend=name), functools.partial(kernel.direct, *inputs))
    print(f"{f'{op.__name__}, {name}, {make.__name__}':56} {call:7.1f} {bare:7.1f} {call - bare:7.1f}")
