"""Rows of a bench as a table, as JSON lines with their setting, and as plots of time and memory against length."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("benchmarks/results")
COLUMNS = ("op", "against", "L", "mode", "malloc", "threads", "ms", "baseline_ms", "ratio", "target")


def lines(
    rows: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS
) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """The header (None, line), then (row, line of a table) as each row comes."""
    yield None, " ".join(f"{c:>{_width(c)}}" for c in columns)
    for row in rows:
        cells = ["" if row.get(c) is None else str(row[c]) for c in columns]
        missed = row.get("target") and not isinstance(row["target"], str) and row["ratio"] < row["target"]
        yield (
            row,
            " ".join(f"{v:>{_width(c)}}" for c, v in zip(columns, cells))
            + (f"  missed: {row.get('note', '')}" if missed else ""),
        )


def _width(column: str) -> int:
    return {"op": 18, "against": 28, "mode": 13}.get(column, 11)


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append the rows to benchmarks/results/NAME.jsonl with commit, machine and versions."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    setting = {
        "commit": git.stdout.strip() or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as stream:
        for row in rows:
            stream.write(json.dumps({**setting, **row}) + "\n")
    return path


def plot(rows: list[dict[str, Any]]) -> list[Path]:
    """For each op, time and peak memory against length on one thread, log-log, as benchmarks/results/OP.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name in dict.fromkeys(row["op"] for row in rows):
        mine = [r for r in rows if r["op"] == name and r["threads"] == 1 and r["malloc"] == "default"]
        if not mine:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for mode, style in (("forward", "--"), ("both", "-")):
            for against in dict.fromkeys(r["against"] for r in mine):
                part = sorted((r for r in mine if r["mode"] == mode and r["against"] == against), key=lambda r: r["L"])
                L = [r["L"] for r in part]
                left.plot(L, [r["ms"] for r in part], "o" + style, color="tab:blue", label=f"longwave, {mode}")
                left.plot(
                    L, [r["baseline_ms"] for r in part], "s" + style, color="tab:gray", label=f"{against}, {mode}"
                )
                if mode == "both":
                    right.plot(L, [r["peak_mb"] for r in part], "o-", color="tab:blue", label="longwave")
                    right.plot(L, [r["baseline_peak_mb"] for r in part], "s-", color="tab:gray", label=against)
        left.set(title=f"{name}: time, one thread", xlabel="L", ylabel="ms", xscale="log", yscale="log")
        right.set(title="peak memory, forward + backward", xlabel="L", ylabel="MB", xscale="log", yscale="log")
        for axis in (left, right):
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
        RESULTS.mkdir(parents=True, exist_ok=True)
        paths.append(RESULTS / f"{name.replace(' + ', '_').replace(' ', '_')}.png")
        figure.savefig(paths[-1], dpi=100)
        pyplot.close(figure)
    return paths
