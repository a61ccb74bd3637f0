"""Rows of a bench as a table, as JSON lines with their setting, and as plots of time and memory against length."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longwave.machine import setting

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
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    about = setting()
    with path.open("a") as stream:
        for row in rows:
            stream.write(json.dumps({**about, **row}) + "\n")
    return path


def plot(rows: list[dict[str, Any]]) -> list[Path]:
    """For each op on one thread, nanoseconds and bytes an element of the result against length, as
    benchmarks/results/OP.png; the floor is the time in which memory moves what must be read and written.
    """
    from matplotlib.figure import Figure

    paths = []
    for name in dict.fromkeys(row["op"] for row in rows):
        mine = [r for r in rows if r["op"] == name and r["threads"] == 1 and r["malloc"] == "default"]
        if not mine:
            continue
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for mode, style in (("forward", "--"), ("both", "-")):
            for against in dict.fromkeys(r["against"] for r in mine):
                part = sorted((r for r in mine if r["mode"] == mode and r["against"] == against), key=lambda r: r["L"])
                L = [r["L"] for r in part]
                for side, label, color in (("ms", "longwave", "tab:blue"), ("baseline_ms", against, "tab:gray")):
                    ns = [r[side] * 1e6 / r["elements"] for r in part]
                    left.plot(L, ns, "o" + style, color=color, label=f"{label}, {mode}")
                if mode == "both":
                    for side, label, color in (
                        ("peak_mb", "longwave", "tab:blue"),
                        ("baseline_peak_mb", against, "tab:gray"),
                    ):
                        held = [r[side] * 2**20 / r["elements"] for r in part]
                        right.plot(L, held, "o-", color=color, label=label)
            floor = sorted((r["L"], r["bytes"] / r["gb_per_second"] / r["elements"]) for r in mine if r["mode"] == mode)
            left.plot(*zip(*floor), style, color="tab:red", linewidth=1, label=f"floor: bandwidth of memory, {mode}")
        left.set(title=f"{name}: time, one thread", xlabel="L", ylabel="ns an element", xscale="log", yscale="log")
        right.set(
            title="peak memory, forward + backward", xlabel="L", ylabel="bytes an element", xscale="log", yscale="log"
        )
        for axis in (left, right):
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        RESULTS.mkdir(parents=True, exist_ok=True)
        paths.append(RESULTS / f"{name.replace(' + ', '_').replace(' ', '_')}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths
