"""A grid of runs in one folder, several at a time, each in a process of its own; asked for again, it goes on."""

import hashlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from longwave import own
from longwave.errors import shown
from longwave.models.runs import CONFIG, saved_steps
from longwave.train.checkpoint import write_text
from longwave.train.config import Recipe, Yaml, load_recipe
from longwave.train.loop import StopFlag, other_config
from longwave.train.monitor import read_metrics

LONGEST = 100  # characters of a folder's name


class Planned(NamedTuple):
    """A run of a grid: its folder, the changes that make it, and its recipe with them."""

    folder: Path
    changes: dict[str, str]
    recipe: Recipe

    @property
    def log(self) -> Path:
        """What its process said."""
        return self.folder.with_name(self.folder.name + ".log")


class Outcome(NamedTuple):
    """How a run of a grid ended: the task's numbers at its last evaluation, or what went wrong, or neither: not yet."""

    name: str
    changes: dict[str, str]
    metrics: dict[str, float] | None = None
    error: str | None = None


def choices(change: str) -> list[str]:
    """The changes that ``key=a,b`` stands for: a value each; ``key=[[s4d],[hyena]]``, a list of lists, is one each too.

    >>> choices("lr=1e-3,3e-3"), choices("model.pattern=[[s4d],[h3, s4d]]"), choices("model.pattern=[h3,s4d]")
    (['lr=0.001', 'lr=0.003'], ['model.pattern=[s4d]', 'model.pattern=[h3, s4d]'], ['model.pattern=[h3, s4d]'])

    Raises:
        ValueError: where it is no change, or the values are not YAML.
    """
    key, equals, text = change.partition("=")
    try:
        values = yaml.load(f"[{text}]", Yaml) if equals and key else []
    except yaml.YAMLError as error:
        raise ValueError(f"{shown(change)}: the values are not valid YAML, with commas between them") from error
    if len(values) == 1 and isinstance(values[0], list) and values[0] and all(isinstance(v, list) for v in values[0]):
        (values,) = values
    if not values:
        raise ValueError(f"{shown(change)} gives no value: write key=a,b, such as lr=1e-3,3e-3 or seed=0,1,2")
    return [f"{key}={_flow(value)}" for value in values]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def plan(source: str | Path, changes: Sequence[str], out: Path) -> list[Planned]:
    """Every combination of the values of the changes, each a run in a folder that is named after what is varied.

    Raises:
        ValueError: where a recipe is wrong, a folder holds another run, or two combinations are the same.
    """
    axes = [choices(change) for change in changes]
    planned: dict[Path, Planned] = {}
    for combination in itertools.product(*axes):
        varied = [change for change, axis in zip(combination, axes) if len(axis) > 1]
        folder = out / _name(varied or ["run"])
        if folder in planned:
            raise ValueError(f"the grid has {folder.name} twice; leave out one of the values that are the same")
        recipe = load_recipe(source, combination)
        if (folder / CONFIG).is_file() and (change := other_config(load_recipe(folder / CONFIG), recipe)):
            raise ValueError(f"{folder} is a run of another grid: {change}; choose another folder by --out")
        planned[folder] = Planned(folder, dict(change.split("=", 1) for change in combination), recipe)
    return list(planned.values())


def _name(changes: list[str]) -> str:
    name = re.sub(r"[\[\]{}\"'\s]", "", ",".join(changes))
    name = re.sub(r"[^\w.,=:+-]", "_", name)
    digest = hashlib.sha256("\n".join(changes).encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{digest}"


def sweep(
    source: str | Path, runs: Sequence[Planned], jobs: int, say: Callable[[str], None] = print
) -> tuple[list[Outcome], int]:
    """Train the runs of a plan that are not done, ``jobs`` at a time; one that fails ends none of the others.

    Args:
        source: of the plan.
        runs: of :func:`plan`, into a folder, which then also has sweep.json: all outcomes.
        say: is told when a run ends.
    Returns:
        outcomes: one a run.
        number: of the signal that stopped it, by which the runs that were under way are saved; 0 when it came to its
            end.
    """
    found = {run.folder: outcome for run in runs if (outcome := _finished(run)) is not None}
    waiting = [run for run in runs if run.folder not in found]
    if found:
        say(f"{len(found)} of {len(runs)} runs are done already")
    running: list[tuple[Planned, subprocess.Popen, IO[bytes]]] = []
    told = False
    try:
        with StopFlag(tell=True) as stop:
            while running or (waiting and not stop.number):
                while waiting and len(running) < jobs and not stop.number:
                    running.append(_start(source, waiting.pop(0), jobs))
                if stop.number and not told:
                    told = True
                    for _, process, _ in running:
                        process.send_signal(signal.SIGINT)
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    entry[2].close()
                    run = entry[0]
                    outcome = _finished(run) if entry[1].returncode == 0 else None
                    if outcome is None and not told:
                        outcome = Outcome(run.folder.name, run.changes, error=_last_words(run.log, entry[1].returncode))
                    if outcome is not None:
                        found[run.folder] = outcome
                        say(f"{len(found)}/{len(runs)} {run.folder.name}: {_verdict(outcome, run.recipe.task.metric)}")
                time.sleep(0.05)
    finally:
        for _, process, log in running:  # a second signal
            process.kill()
            process.wait()
            log.close()
    outcomes = [found.get(run.folder) or Outcome(run.folder.name, run.changes) for run in runs]
    if runs and runs[0].folder.parent.is_dir():
        made = {"recipe": str(source), "metric": runs[0].recipe.task.metric, "runs": [o._asdict() for o in outcomes]}
        write_text(runs[0].folder.parent / "sweep.json", json.dumps(made, indent=2) + "\n")
    return outcomes, stop.number


def _start(source: str | Path, run: Planned, jobs: int) -> tuple[Planned, subprocess.Popen, IO[bytes]]:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    trust = [word for file in own.trusted() for word in ("--trust", str(file))]
    where = ["--resume" if (run.folder / CONFIG).is_file() else "--out", str(run.folder)]
    changes = [f"{key}={value}" for key, value in run.changes.items()]
    command = [sys.executable, "-m", "longwave.cli", *trust, "train", str(source), *changes, *where]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    log = run.log.open("wb")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={"OMP_NUM_THREADS": threads, **os.environ},
        start_new_session=True,  # Ctrl-C comes to this process alone, which tells the others once
    )
    return run, process, log


def _finished(run: Planned) -> Outcome | None:
    """What a run that has done all its steps came to."""
    if not (run.folder / CONFIG).is_file() or run.recipe.steps not in saved_steps(run.folder):
        return None
    last = [line for line in read_metrics(run.folder) if line["step"] == run.recipe.steps and "eval_loss" in line]
    if not last:
        return None
    named = {key.removeprefix("eval_"): value for key, value in last[-1].items() if key.startswith("eval_")}
    return Outcome(run.folder.name, run.changes, named)


def _last_words(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
    return said[-1].removeprefix("error: ") if said and code > 0 else how


def _verdict(outcome: Outcome, metric: str) -> str:
    if outcome.metrics is None:
        return f"failed: {outcome.error}"
    return f"{metric.replace('_', ' ')} {outcome.metrics[metric]:.4f}"


def describe(outcomes: Sequence[Outcome], metric: str, higher_is_better: bool) -> str:
    """Mean and standard deviation over the seeds of every combination, the best first; the best run; what failed.

    The deviation is that of a sample, by n - 1; of one run there is none.
    """
    groups: dict[tuple, list[float]] = {}
    for outcome in outcomes:
        if outcome.metrics is not None:
            key = tuple((name, value) for name, value in outcome.changes.items() if name != "seed")
            groups.setdefault(key, []).append(outcome.metrics[metric])
    several = [name for name in outcomes[0].changes if len({outcome.changes[name] for outcome in outcomes}) > 1]
    columns = [name for name in several if name != "seed"]
    rows = [[*columns, metric.replace("_", " "), "runs"]]
    for key, values in sorted(groups.items(), key=lambda item: statistics.fmean(item[1]), reverse=higher_is_better):
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells = [value for name, value in key if name in columns]
        rows.append([*cells, f"{statistics.fmean(values):.4f}{spread}", str(len(values))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows if len(rows) > 1]
    done = [outcome for outcome in outcomes if outcome.metrics is not None]
    if done:
        best = (max if higher_is_better else min)(done, key=lambda outcome: (outcome.metrics or {})[metric])
        lines.append(f"best: {best.name}, {_verdict(best, metric)}")
    lines += [f"failed: {outcome.name}: {outcome.error}" for outcome in outcomes if outcome.error is not None]
    left = sum(outcome.metrics is None and outcome.error is None for outcome in outcomes)
    return "\n".join([*lines, *([f"not done: {left} runs"] if left else [])])
