"""Time and memory of the ops beside their baselines: interleaved in one process, medians, ratios."""

import ctypes
import functools
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from longwave.bench.cases import CASES, Case
from longwave.errors import choose
from longwave.train.memory import keep_freed_memory

HAS_NUMBA = importlib.util.find_spec("numba") is not None
PACKAGES = {"mambapy pscan": "mambapy", "transformers' chunks": "transformers"}


def why_not(case: Case) -> str | None:
    """Why a case cannot be run here, or None."""
    package = PACKAGES.get(case.baseline)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install -e '.[bench]'"
    return None


def _sides(case: Case, L: int, mode: str) -> list[Callable[[], None]]:
    inputs = case.inputs(L)
    return [runner(run, given, mode) for run, given in ((case.ours, inputs), (case.theirs, case.layout(inputs)))]


def runner(run: Callable[..., Any], inputs: list[Any], mode: str) -> Callable[[], None]:
    """A call of the forward pass, or of both."""
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    cotangents: list[torch.Tensor] = []  # made once: in a model they come from elsewhere

    def both() -> None:
        outputs = [t for t in tree_leaves(run(*inputs)) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not cotangents:
            cotangents.extend(torch.ones_like(t) for t in outputs)
        torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)

    return both if mode == "both" else forward


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _settled(run: Callable[[], None]) -> float:
    """How long a call takes that follows one of its own kind, where that is soon done.

    Else a short call would be charged for the memory that the long one before it has returned to the system.
    """
    first = seconds(run)
    return seconds(run) if first < 1 else first


def peak(run: Callable[[], None]) -> float:
    """MB that a call needs at its peak above what is held before; Linux only, else nan."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    gc.collect()
    if HAS_NUMBA:
        from longwave.ops._numba.pool import release

        release()  # what the kernels keep counts as well
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    run()
    return max(0.0, (_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@functools.cache
def bandwidth() -> float:
    """Bytes read and written a nanosecond, which is GB/s, by a copy of 256 MB on one thread: the best of nine, in the
    thread's own time, as a copy is long enough to be interrupted on a busy machine.
    """
    source = torch.ones(2**26)
    target, threads = torch.zeros_like(source), torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(9):
        start = time.thread_time()
        target.copy_(source)
        times.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return 2 * source.nbytes / min(times) / 1e9


def traffic(case: Case, L: int, mode: str) -> tuple[int, int]:
    """Elements of the results, and the least bytes to be moved: forward, inputs and results once; backward, inputs and
    the gradients of the results again, and those of the inputs.
    """
    inputs = case.inputs(L)
    with torch.no_grad():
        results = [t for t in tree_leaves(case.ours(*inputs)) if isinstance(t, torch.Tensor)]
    given = [t for t in inputs if isinstance(t, torch.Tensor)]
    into, out = (sum(t.nbytes for t in tensors) for tensors in (given, results))
    moved = into + out if mode == "forward" else 3 * into + 2 * out
    return sum(t.numel() for t in results), moved


def measure(case: Case, L: int, mode: str, malloc: str, repeats: int = 7) -> dict[str, Any]:
    """One row: medians of ours and theirs, in turn, the median of the pairs' ratios, and peak memory.

    Args:
        case, L, mode: what.
        malloc: default | tuned, how this process is set, for the record and the target.
        repeats: pairs.
    """
    ours, theirs = _sides(case, L, mode)
    for side in (ours, theirs):
        side()  # warm up, and compile
    memory = [peak(side) if malloc == "default" else float("nan") for side in (ours, theirs)]
    pairs = [(_settled(ours), _settled(theirs)) for _ in range(repeats)]
    a, b = (statistics.median(column) * 1e3 for column in zip(*pairs))
    target = case.targets.get((mode, malloc)) if case.target_from <= L else None
    elements, moved = traffic(case, L, mode)
    return {
        "op": case.name,
        "against": case.baseline,
        "L": L,
        "mode": mode,
        "malloc": malloc,
        "threads": torch.get_num_threads(),
        "ms": round(a, 4),
        "baseline_ms": round(b, 4),
        "ratio": round(statistics.median(theirs / ours for ours, theirs in pairs), 2),
        "target": target if torch.get_num_threads() == 1 else None,
        "peak_mb": round(memory[0], 1),
        "baseline_peak_mb": round(memory[1], 1),
        "elements": elements,
        "bytes": moved,
        "gb_per_second": round(bandwidth(), 1),
        "note": case.note,
    }


def _measure_alone(name: str, against: str, malloc: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """All rows of a case, in a process of its own: what malloc does depends on all that was freed before."""
    if malloc == "tuned":
        keep_freed_memory()
    torch.set_num_threads(threads)
    case = next(case for case in CASES if (case.name, case.baseline) == (name, against))
    return [measure(case, L, mode, malloc, repeats) for L in case.lengths for mode in case.modes]


def bench_ops(names: list[str], threads: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """All rows, with malloc as it comes and with freed memory kept, on each number of threads.

    Raises:
        ValueError: for a name that no measured op has.
    """
    known = dict.fromkeys(case.name.split()[0] for case in CASES)
    for name in names:
        choose("op in the bench", name, known)
    return _rows([c for c in CASES if not why_not(c) and c.name.split()[0] in (names or known)], threads, repeats)


def _rows(chosen: list[Case], threads: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    for malloc, count, case in itertools.product(("default", "tuned"), threads, chosen):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            yield from process.submit(_measure_alone, case.name, case.baseline, malloc, count, repeats).result()
