"""What a run tells: a progress bar, metrics.jsonl, TensorBoard events and a plot of the loss."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longwave.train.checkpoint import write_text

METRICS = "metrics.jsonl"


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
        )
        self.bar = self.progress.add_task("training", total=steps, completed=start, numbers="")

    def __enter__(self) -> "Monitor":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.progress.stop()
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):  # the first error counts
            self.board.close()

    def train(self, step: int, loss: float, lr: float, norm: float, tokens: int) -> None:
        """After ``step`` steps, ``tokens`` inputs after the last call: loss in nats a scored token, tokens a second."""
        now = time.monotonic()
        rate = tokens / max(now - self.clock, 1e-9)
        self.clock = now
        self._write(step, {"loss": loss, "lr": lr, "gradient_norm": norm, "tokens_per_second": round(rate)})
        self.progress.update(self.bar, completed=step, numbers=f"loss {loss:.3f}  {rate:,.0f} tokens/s")
        if not self.console.is_terminal and step - self.last_said >= self.steps / 20:
            self.last_said = step
            self.say(f"step {step}/{self.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """After ``step`` steps: the task's numbers on held-out data."""
        self._write(step, {f"eval_{name}": value for name, value in metrics.items()})
        self.say(f"step {step}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self.clock = time.monotonic()  # an evaluation is no training time

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise OSError(f"{self.file} cannot be written: {error.strerror}") from error
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off does not count."""
    lines = []
    if (run / METRICS).is_file():
        for line in (run / METRICS).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def plot_loss(run: Path, metric: str) -> Path:
    """Draw loss.png: training loss, and the held-out loss and metric, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run)
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    if train:
        steps, losses = zip(*train)
        smooth, average, weight = [], losses[0], min(1.0, 40 / len(losses))  # over a fortieth of the run
        for loss in losses:
            average += weight * (loss - average)
            smooth.append(average)
        left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        left.plot(steps, smooth, color="tab:blue", label="training (smoothed)")
    left.plot([e["step"] for e in held_out], [e["eval_loss"] for e in held_out], "o-", color="black", label="held out")
    left.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    left.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    if metric != "loss" and held_out:
        right = left.twinx()
        values = [e[f"eval_{metric}"] for e in held_out]
        right.plot([e["step"] for e in held_out], values, "s--", color="tab:red", label=metric.replace("_", " "))
        right.set_ylabel(metric.replace("_", " "), color="tab:red")
        handles, labels = handles + right.get_legend_handles_labels()[0], labels + right.get_legend_handles_labels()[1]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(run / "loss.png", dpi=120)
    pyplot.close(figure)
    return run / "loss.png"
