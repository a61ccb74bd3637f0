"""What a run tells: a progress bar, metrics.jsonl, TensorBoard events and a plot of the loss."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longwave.train.checkpoint import write_text

METRICS = "metrics.jsonl"
WARM_UP, MEASURED = 1, 3  # steps: those that compile, and those that tell how long all will take


class Monitor:
    """Follows the main process of a run; ``with Monitor(...)`` shows the bar.

    Args:
        run: the run's folder.
        steps: how many there will be.
        start: steps done before; of what was logged later than that, nothing stays.
        metric: of the task, shown beside the loss.
    """

    def __init__(self, run: Path, steps: int, start: int, metric: str):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.metric, self.console = run, metric, Console(stderr=True)
        self.file = run / METRICS
        kept = [line for line in read_metrics(run) if line["step"] <= start]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self.before, self.begun = kept[-1].get("seconds", 0.0) if kept else 0.0, time.monotonic()
        self.evaluated = {line["step"] for line in kept if "eval_loss" in line}
        self.board = SummaryWriter(str(run), purge_step=start + 1)
        self.start, self.steps = start, steps
        self.clock, self.last_said = time.monotonic(), start
        columns = [
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        room = self.console.width - 64  # what the numbers leave
        self.progress = Progress(
            *([BarColumn(min(40, room))] if room >= 8 else []),
            *columns,
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=4,
        )
        self.bar = self.progress.add_task("training", total=steps, completed=start, numbers="")

    def __enter__(self) -> "Monitor":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.progress.stop()
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):  # the first error counts
            self.board.close()

    def step(self, step: int) -> None:
        """After every step: the bar moves; soon after the start, how long all of it will take here."""
        self.progress.update(self.bar, completed=step)
        if step == self.start + WARM_UP:
            self.warm = time.monotonic()
        if step == self.start + WARM_UP + MEASURED and step < self.steps:
            left = self.steps - step
            seconds = (time.monotonic() - self.warm) / MEASURED * left
            self.say(f"about {duration(seconds)} on this machine for the {left:,} steps left, evaluations apart")

    def train(self, step: int, loss: float, lr: float, norm: float, tokens: int) -> None:
        """After ``step`` steps, ``tokens`` inputs after the last call: loss in nats a scored token, tokens a second."""
        now = time.monotonic()
        rate = tokens / max(now - self.clock, 1e-9)
        self.clock = now
        self._write(step, {"loss": loss, "lr": lr, "gradient_norm": norm, "tokens_per_second": round(rate)})
        self.progress.update(self.bar, numbers=f"loss {loss:.3f}  {rate:,.0f} tokens/s")
        if not self.console.is_terminal and step - self.last_said >= self.steps / 20:
            self.last_said = step
            self.say(f"step {step}/{self.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """After ``step`` steps: the task's numbers on held-out data; recorded once."""
        if step not in self.evaluated:
            self._write(step, {f"eval_{name}": value for name, value in metrics.items()})
        self.say(f"step {step}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self.clock = time.monotonic()  # an evaluation is no training time

    @property
    def seconds(self) -> float:
        """That training and its evaluations have taken up to now, over all resumptions."""
        return self.before + time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """A line above the bar; a terminal that is gone stops no run."""
        with contextlib.suppress(OSError):
            self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": step, **numbers, "seconds": round(self.seconds, 3)}) + "\n")
        except OSError as error:
            raise OSError(f"{self.file} cannot be written: {error.strerror}") from error
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)


def duration(seconds: float) -> str:
    """40 s, 4 min or 3.5 h: what an estimate is good for."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off does not count.

    Raises:
        ValueError: for a line that is no such line, by its number.
    """
    file, read = run / METRICS, []
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line.decode())
            entry["step"] = int(entry["step"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            shown = repr(line[:40])[1:]
            raise ValueError(f"{file}, line {number}, is not JSON with a step: {shown}; mend or delete it") from None
        read.append(entry)
    return read


def plot_loss(run: Path, metric: str) -> Path:
    """Draw loss.png: the loss in training and held out, and the metric where it is another quantity, against steps."""
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    unit, name = (math.log(2), "bits per byte") if metric == "bits_per_byte" else (1.0, "loss (nats per token)")
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    train = [(line["step"], line["loss"] / unit) for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    if train:
        steps, losses = zip(*train)
        smooth, average, weight = [], losses[0], min(1.0, 40 / len(losses))  # over a fortieth of the run
        for loss in losses:
            average += weight * (loss - average)
            smooth.append(average)
        left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        left.plot(steps, smooth, color="tab:blue", label="training (smoothed)")
    evaluated = [line["step"] for line in held_out]
    left.plot(evaluated, [line["eval_loss"] / unit for line in held_out], "o-", color="black", label="held out")
    title = f"{run.resolve().name}, step {lines[-1]['step']}" if lines else run.resolve().name
    left.set(xlabel="step", ylabel=name, title=title)
    left.grid(alpha=0.3)
    if metric not in ("loss", "bits_per_byte") and held_out:
        right = left.twinx()
        values, shown = [line[f"eval_{metric}"] for line in held_out], metric.replace("_", " ")
        right.plot(evaluated, values, "s--", color="tab:red", label=f"held-out {shown}")
        right.set_ylabel(shown, color="tab:red")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"
