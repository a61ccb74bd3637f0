"""Speed and memory beside named peers: rows in, a table, JSON lines and plots out."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from longwave.bench.device import DEVICE_COLUMNS, bench_device
from longwave.bench.generate import GENERATE_COLUMNS, bench_generate
from longwave.bench.memory import MEMORY_COLUMNS, bench_memory
from longwave.bench.models import bench_models
from longwave.bench.online import ONLINE_COLUMNS, bench_online
from longwave.bench.ops import bench_ops
from longwave.bench.report import COLUMNS, lines, plot, save
from longwave.errors import choose, shown, unknown

__all__ = ["ONLINE_COLUMNS", "bench_generate", "bench_memory", "bench_online", "lines", "measured", "plot", "save"]


def measured(what: str, only: list[str], repeats: int, device: str) -> tuple[Iterable[dict[str, Any]], Sequence[str]]:
    """Rows of a bench as they are measured, and its columns.

    Args:
        what: "ops", "models", "memory", "generate" or "online".
        only: names of ops or mixers; none is all.
        repeats: interleaved pairs a row.
        device: "cpu", or of ops "cuda".
    Raises:
        ValueError: for what there is not, or what a bench does not take.
    """
    threads = sorted({1, torch.get_num_threads()})
    kinds = ("ops", "models", "memory", "generate", "online")
    if what not in kinds:
        raise ValueError(unknown("bench", what, kinds))
    on_device = choose("device of the bench", device, {"cpu": False, "cuda": True})
    if on_device and what != "ops":
        raise ValueError(f"bench {what} runs on the CPU; leave out --device, or take bench ops")
    if what in ("models", "online") and only:
        raise ValueError(f"bench {what} measures them all; leave out --only {shown(only[0])}")
    if on_device:
        return bench_device(only, repeats, device), DEVICE_COLUMNS
    if what == "ops":
        return bench_ops(only, threads, repeats), COLUMNS
    if what == "models":
        return bench_models(repeats), COLUMNS
    if what == "generate":
        return bench_generate(only, repeats, threads), GENERATE_COLUMNS
    return (bench_online(), ONLINE_COLUMNS) if what == "online" else (bench_memory(only), MEMORY_COLUMNS)
