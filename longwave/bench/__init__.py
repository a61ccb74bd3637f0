"""Speed and memory beside named peers: rows in, a table, JSON lines and plots out."""

from longwave.bench.models import bench_models
from longwave.bench.ops import bench_ops
from longwave.bench.report import lines, plot, save

__all__ = ["bench_models", "bench_ops", "lines", "plot", "save"]
