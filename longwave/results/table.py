"""Runs as rows: JSON lines that are committed, and tables of pages that are made of nothing else.

A page names the table and its file, ``<!-- table: runs docs/results.jsonl -->``, above what is made of them, down to
``<!-- end of table -->``.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longwave.errors import choose
from longwave.models.runs import CONFIG, read_record
from longwave.train.checkpoint import write_text
from longwave.train.config import load_recipe
from longwave.train.monitor import read_metrics

PAGES = ("README.md", "docs/*.md")
MARKED = re.compile(r"(<!-- table: (\w+) (\S+\.jsonl?) -->\n)(.*?)(\n<!-- end of table -->)", re.S)


def row(run: Path) -> dict[str, Any]:
    """What a run came to at its last evaluation, as JSON holds it.

    Raises:
        ValueError: where it is no run, or has not been evaluated.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run: it has no {CONFIG}")
    recipe, lines = load_recipe(run / CONFIG), read_metrics(run)
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        raise ValueError(f"{run} has not been evaluated yet; go on with longwave train --resume {run}")
    last = evaluated[-1]
    record = read_record(run)
    return {
        "command": record.get("command"),
        "run": run.name,
        "commit": ", ".join(record.get("commits", [])) or None,
        **{key: record.get(key) for key in ("date", "machine", "torch", "parameters")},
        "minutes": round(last["seconds"] / 60, 2) if "seconds" in last else None,
        "task": recipe.task.kind,
        "mixers": [mixer.kind for mixer in recipe.model.pattern],
        "seed": recipe.seed,
        "step": last["step"],
        "steps": recipe.steps,
        "metric": recipe.task.metric,
        "higher_is_better": recipe.task.higher_is_better,
        "metrics": {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")},
        "paper": recipe.paper,
    }


def save(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Put rows into a file of JSON lines; one of the same command takes the place of the one that is there."""
    held = {_key(entry): entry for entry in [*read(file), *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(entry) + "\n" for entry in held.values()))


def _key(entry: dict[str, Any]) -> tuple:
    return entry["command"] or entry["run"], entry["seed"]


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Runs as a table; those that differ in their seed alone are one row, with mean and deviation of a sample."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in rows:
        command = re.sub(r" seed=\d+", "", entry["command"] or entry["run"])
        groups.setdefault(command, []).append(entry)
    lines = ["| command | commit | minutes | parameters | what it reaches | the paper |", "|---|---|---|---|---|---|"]
    for command, group in groups.items():
        first = group[0]
        minutes = [entry["minutes"] for entry in group if entry["minutes"] is not None]
        cells = [
            f"`{command}`",
            ", ".join(dict.fromkeys(entry["commit"] or "-" for entry in group)),
            f"{statistics.fmean(minutes):.1f}" if minutes else "-",
            "-" if first["parameters"] is None else f"{first['parameters']:,}",
            _reached(group, first["metric"]) + (f", {len(group)} seeds" if len(group) > 1 else "") + _unfinished(group),
            first["paper"] or "-",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _reached(group: list[dict[str, Any]], metric: str) -> str:
    values = [entry["metrics"][metric] for entry in group]
    factor, unit, digits = (100, " %", 1) if metric == "accuracy" else (1, "", 3)
    spread = f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{metric.replace('_', ' ')} {factor * statistics.fmean(values):.{digits}f}{spread}{unit}"


def _unfinished(group: list[dict[str, Any]]) -> str:
    early = [entry for entry in group if entry["step"] < entry["steps"]]
    return f" (after {early[0]['step']:,} of {early[0]['steps']:,} steps)" if early else ""


def tokens(rows: Sequence[dict[str, Any]]) -> str:
    """What a token costs, from the newest of the rows that ``longwave bench generate --save`` has written."""
    found = {(row["op"], row["mode"], row["L"], row["threads"]): row for row in rows}
    short = {op: row for (op, mode, L, _), row in found.items() if (mode, L) == ("a token", 16)}
    lines = ["| four layers of width 128, a token | behind 16 tokens | behind 1,000 | aimed for |", "|---|---|---|---|"]
    for op, row in sorted(short.items(), key=lambda item: item[1]["ms"]):
        long = found[op, "a token", 1000, row["threads"]]
        lines.append(f"| `{op}` | {row['ms']:.2f} ms | {long['ms']:.2f} ms | {row['target']} |")
    head = "| Mamba-130M | threads | a token | of `transformers` | times as fast | aimed for | beside |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for (op, mode, _, threads), row in found.items():
        if "against" in row:
            cells = [f"{op.split()[-1]}, {mode}", threads, f"{row['ms']:.1f} ms", f"{row['baseline_ms']:.1f} ms"]
            cells += [f"{row['ratio']:.2f}x", f"{row['target']}x", row.get("note") or ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def learning(rows: Sequence[dict[str, Any]]) -> str:
    """What every mixer reaches, from the rows that benchmarks/learning.py has written."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["mixer"], {})[row["recipe"]] = row
    recipes = ("recall", "induction", "selective_copying")
    lines = [f"| mixer | {' | '.join(recipes)} | minutes | argument |", "|---|---|---|---|---|---|"]
    best = sorted(found.items(), key=lambda item: (-sum(row["accuracy"] for row in item[1].values()), item[0]))
    for name, reached in best:
        cells = [f"{reached[recipe]['accuracy']:.1%}" if recipe in reached else "-" for recipe in recipes]
        minutes = " + ".join(f"{reached[recipe]['minutes']:.1f}" for recipe in recipes if recipe in reached)
        change = next(iter(reached.values()))["change"]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {minutes} | `'{change}'` |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "runs": markdown,
    "tokens": tokens,
    "learning": learning,
}


def derived(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Every page of a checkout that has tables: its file, its text, and its text with the tables made anew.

    Raises:
        ValueError: where a page names a table or a file that there is not.
    """
    for page in (page for pattern in PAGES for page in sorted(root.glob(pattern))):
        text = page.read_text()

        def made(found: re.Match, page: Path = page) -> str:
            file = root / found[3]
            if not file.is_file():
                raise ValueError(f"{page}: its table {found[2]} is of {found[3]}, which is not there")
            return f"{found[1]}{choose('table', found[2], TABLES)(read(file))}{found[5]}"

        if MARKED.search(text):
            yield page, text, MARKED.sub(made, text)
