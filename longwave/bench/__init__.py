"""Speed and memory beside named peers: rows in, a table, JSON lines and plots out."""

from longwave.bench.device import DEVICE_COLUMNS, bench_device
from longwave.bench.generate import GENERATE_COLUMNS, bench_generate
from longwave.bench.memory import MEMORY_COLUMNS, bench_memory
from longwave.bench.models import bench_models
from longwave.bench.online import ONLINE_COLUMNS, bench_online
from longwave.bench.ops import bench_ops
from longwave.bench.report import COLUMNS, lines, plot, save

__all__ = [
    "COLUMNS",
    "DEVICE_COLUMNS",
    "GENERATE_COLUMNS",
    "MEMORY_COLUMNS",
    "ONLINE_COLUMNS",
    "bench_device",
    "bench_generate",
    "bench_memory",
    "bench_models",
    "bench_online",
    "bench_ops",
    "lines",
    "plot",
    "save",
]
