"""One token of a long convolution behind t others: the online convolution beside the direct sum over all taps."""

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from longwave.nn.module import append_time
from longwave.nn.online_conv import BLOCK, Taps, online_conv
from longwave.ops.online_conv import parts_for

_TIMES = ("median_us", "mean_us", "p99_us", "worst_us", "direct_us")
ONLINE_COLUMNS = ("t", "batch", "channels", *_TIMES, "ratio", "first_ms")
DIRECT = 16  # how many direct sums are timed between the steps


@torch.inference_mode()
def bench_online(
    lengths: tuple[int, ...] = (1024, 8192, 65536), channels: int = 768, batch: int = 1, steps: int = 2000
) -> Iterator[dict[str, Any]]:
    """A row a length: microseconds of ``steps`` steps in turn behind t inputs, on one thread, and of direct sums.

    The filter has 2 t + steps taps, so that blocks of every length are in work. Times are those of the thread, so what
    other processes take of the core does not count. ``first_ms`` is the step behind a past that nothing was computed
    ahead for; ``ratio`` is that of a direct sum to the mean step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for t in lengths:
            gc.collect()
            yield _row(t, channels, batch, steps)
    finally:
        torch.set_num_threads(threads)


def _row(t: int, channels: int, batch: int, steps: int) -> dict[str, Any]:
    taps = Taps(torch.randn(channels, 2 * t + steps) / t**0.5)
    past = append_time(torch.zeros(batch, 0, channels), torch.randn(batch, t, channels), room=len(taps.k))
    u = torch.randn(steps + 1, batch, 1, channels)
    _, ready, near = parts_for(past, taps.k, BLOCK)
    began = time.thread_time()
    past = online_conv(u[steps], past, taps)[1]
    first, times, direct = time.thread_time() - began, [], []
    for i in range(steps):
        began = time.thread_time()
        past = online_conv(u[i], past, taps)[1]
        times.append(time.thread_time() - began)
        if i % (steps // DIRECT) == 0:
            began = time.thread_time()
            near(past, taps.k, ready([]), past.shape[1] - 1, 1, 0)
            direct.append(time.thread_time() - began)
    mean, sums = statistics.mean(times), statistics.median(direct)
    found = statistics.median(times), mean, statistics.quantiles(times, n=100)[98], max(times), sums
    micro = {name: round(value * 1e6, 1) for name, value in zip(_TIMES, found)}
    rates = {"ratio": round(sums / mean, 1), "first_ms": round(first * 1e3, 1)}
    return {"t": t, "batch": batch, "channels": channels, **micro, **rates}
