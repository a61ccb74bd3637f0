"""Runs on one page: curves, tables, what each model gets right and where, samples, filters at start and end.

The page is one file without scripts that needs no network.
"""

import base64
import html
import io
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longwave.inspection import describe, inspect_layer, time_layers
from longwave.models import LM, generate
from longwave.plots import draw_figure, draw_sample
from longwave.results.table import row
from longwave.tasks import Text
from longwave.tasks.base import Task
from longwave.tasks.forms import Batch, Label, Tokens, scored
from longwave.train.config import Recipe
from longwave.train.monitor import read_metrics
from longwave.train.runs import load_run

ROWS = 256  # of the held-out data, at most, that a report looks at
ELEMENTS = 2**24  # of logits at once
BINS = 24  # of positions, and of lengths
LAYERS = 3  # whose filters are drawn: the first, the middle and the last
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: left }
img { max-width: 100% } pre { background: #f5f5f5; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1em 0 } figcaption { color: #666 } h2 { border-top: 1px solid #ccc; padding-top: 1em }
"""


class Detail(NamedTuple):
    """Where a model is right on held-out rows.

    Attributes:
        rows: how many were looked at.
        confusion: (classes, classes) counts by truth and answer, of tasks with a label a row; else None.
        positions: (first position of a bin, targets in it, right answers, nats) of tasks with a token a step.
        lengths: the same by the number of real steps of a row, where rows differ in it.
    """

    rows: int
    confusion: Tensor | None
    positions: list[tuple[int, int, int, float]]
    lengths: list[tuple[int, int, int, float]]


@torch.no_grad()
def look(model: nn.Module, task: Task, most: int = ROWS) -> Detail | None:
    """Ask a model for held-out rows; None where it tells real numbers.

    Args:
        most: rows at most.
    """
    if not isinstance(task.targets, Tokens | Label):
        return None
    count, form = min(most, task.eval_rows), task.targets
    classes = form.below
    size = max(1, min(32, ELEMENTS // (classes * (task.longest if isinstance(form, Tokens) else 1))))
    confusion = torch.zeros(classes, classes, dtype=torch.long) if isinstance(form, Label) else None
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # position, length, right, nats of every target
    model.eval()
    batches = math.ceil(count / size)
    for index in range(batches):
        batch = task.eval_batch(size, index)
        y = model(batch.inputs, mask=batch.mask)
        logits = (y[0] if isinstance(y, tuple) else y).float()
        counts = scored(batch.targets)
        targets = batch.targets[counts]
        answers = logits[counts][:, :classes]
        right = answers.argmax(-1) == targets
        nats = nn.functional.cross_entropy(answers, targets, reduction="none")
        position = torch.arange(counts[0].numel()).expand(len(counts), -1).reshape(counts.shape)[counts]
        length = _lengths(batch).repeat_interleave(counts.view(len(counts), -1).sum(1))
        found.append((position, length, right, nats))
        if confusion is not None:
            confusion += torch.bincount(targets * classes + answers.argmax(-1), minlength=classes**2).view_as(confusion)
    position, length, right, nats = (torch.cat(column) for column in zip(*found))
    positions = _binned(position, right, nats) if isinstance(form, Tokens) else []
    return Detail(
        min(size * batches, task.eval_rows),
        confusion,
        positions,
        _binned(length, right, nats) if len(length.unique()) > 1 else [],
    )


def _lengths(batch: Batch) -> Tensor:
    """Real steps of every row; of pairs those of both."""
    if batch.mask is None:
        return torch.full((len(batch.inputs),), batch.steps // len(batch.inputs))
    return batch.mask.view(len(batch.mask), -1).sum(1)


def _binned(place: Tensor, right: Tensor, nats: Tensor) -> list[tuple[int, int, int, float]]:
    """By bins that hold about as many each."""
    values = place.unique()
    edges = values[torch.linspace(0, len(values) - 1, min(BINS, len(values))).round().long()]
    bins = torch.bucketize(place, edges, right=True) - 1
    rows = []
    for i, edge in enumerate(edges.tolist()):
        inside = bins == i
        rows.append((int(edge), int(inside.sum()), int(right[inside].sum()), float(nats[inside].sum())))
    return rows


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the page.

    Args:
        runs: evaluated at least once each.
        out: the file.
    Raises:
        ValueError: where one is no run, was not evaluated, or its data are not there.
    """
    rows = [row(run) for run in runs]
    title = html.escape(", ".join(entry["run"] for entry in rows[:6]))
    parts = [f"<h1>{title}</h1>", _summary(rows), _curves(runs, rows), *map(_section, runs, rows)]
    page = "\n".join(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{page}\n</body></html>\n"
    )


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            f"<code>{html.escape(entry['command'] or entry['run'])}</code>",
            html.escape(entry["commit"] or "-"),
            "-" if entry["minutes"] is None else f"{entry['minutes']:.1f}",
            "-" if entry["parameters"] is None else f"{entry['parameters']:,}",
            f"{entry['step']:,} of {entry['steps']:,}",
            html.escape(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry["metrics"].items())),
            html.escape(entry["paper"] or "-"),
        ]
        for entry in rows
    ]
    return _table(["command", "commit", "minutes", "parameters", "steps", "held out", "the paper"], cells)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows]
    return f"<table>{''.join(lines)}</table>"


def _figure(draw: Any, caption: str, width: float = 10, height: float = 3.6, columns: int = 1) -> str:
    """What ``draw(axes)`` draws, as part of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    draw(axes)
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return _image(data.getvalue(), "svg+xml", caption)


def _image(data: bytes, kind: str, caption: str) -> str:
    text = html.escape(caption)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _picture(draw: Callable[[Path], None], caption: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        draw(file := Path(folder) / "picture.png")
        return _image(file.read_bytes(), "png", caption)


def _curves(runs: Sequence[Path], rows: Sequence[dict[str, Any]]) -> str:
    """The loss of all runs in training, and the metric that they have in common held out, or else their loss."""
    metrics = {entry["metric"] for entry in rows}
    shown = metrics.pop() if len(metrics) == 1 else "loss"

    def draw(axes: Any) -> None:
        for run, entry in zip(runs, rows):
            lines = read_metrics(run)
            train = [line for line in lines if "loss" in line]
            held_out = [line for line in lines if "eval_loss" in line]
            label, metric = entry["run"], f"eval_{shown}"
            axes[0].plot([line["step"] for line in train], [line["loss"] for line in train], linewidth=0.8, label=label)
            axes[1].plot([line["step"] for line in held_out], [line[metric] for line in held_out], "o-", label=label)
            timed = [line for line in held_out if "seconds" in line]
            axes[2].plot([line["seconds"] / 60 for line in timed], [line[metric] for line in timed], "o-", label=label)
        held = f"held out: {shown.replace('_', ' ')}"
        axes[0].set(title="training loss", xlabel="step", ylabel="nats a target")
        axes[1].set(title=held, xlabel="step")
        axes[2].set(title=held, xlabel="minutes")
        for axis in axes:
            axis.grid(alpha=0.3)
        if len(runs) <= 12:
            axes[0].legend(fontsize=7)

    return _figure(draw, "Training and evaluation of all runs", 13, 3.8, 3)


def _section(run: Path, entry: dict[str, Any]) -> str:
    recipe, model = load_run(run, ["devices=1", "nodes=1", "strategy=auto"])
    assert recipe is not None, "row() has seen that it is a run"
    recipe.task.prepare()
    model.eval()
    parts = [f"<h2>{html.escape(entry['run'])}</h2>"]
    mixers = ", ".join(dict.fromkeys(entry["mixers"]))
    parts.append(f"<p>{html.escape(f'{recipe.task.kind}, {recipe.model.kind} of {mixers}; seed {recipe.seed}')}</p>")
    detail = look(model, recipe.task)
    if detail is not None:
        parts += _detail(detail, recipe.task)
    parts.append(_samples(model, recipe))
    parts.append(_filters(model, recipe))
    return "\n".join(part for part in parts if part)


def _detail(detail: Detail, task: Task) -> list[str]:
    parts = []
    told = f"of {detail.rows:,} held-out rows"
    if (counts := detail.confusion) is not None:
        names = [str(name) for name in getattr(task, "classes", range(len(counts)))]

        def matrix(axes: Any) -> None:
            share = counts / counts.sum(1, keepdim=True).clamp(min=1)
            axes[0].imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
            axes[0].set(xlabel="answer", ylabel="truth")
            if len(counts) <= 40:
                axes[0].set_xticks(range(len(counts)), names, rotation=90, fontsize=7)
                axes[0].set_yticks(range(len(counts)), names, fontsize=7)
            if len(counts) <= 20:
                for truth, line in enumerate(counts.tolist()):
                    for answer, count in enumerate(line):
                        colour = "white" if share[truth, answer] > 0.5 else "black"
                        axes[0].text(answer, truth, str(count), ha="center", va="center", fontsize=6, color=colour)

        parts.append(_figure(matrix, f"Confusion matrix {told}", 5.5, 5))
    for title, bins in (("position in the row", detail.positions), ("length of the row", detail.lengths)):
        bins = [entry for entry in bins if entry[1]]
        if len(bins) < 2:
            continue

        def against(axes: Any, bins: Any = bins, title: str = title) -> None:
            places = [place for place, *_ in bins]
            axes[0].plot(places, [right / count for _, count, right, _ in bins], "o-")
            axes[1].plot(places, [nats / count / math.log(2) for _, count, _, nats in bins], "o-", color="tab:red")
            axes[0].set(xlabel=title, ylabel="accuracy", ylim=(-0.02, 1.02))
            axes[1].set(xlabel=title, ylabel="bits a target")
            for axis in axes:
                axis.grid(alpha=0.3)

        parts.append(_figure(against, f"Accuracy and bits against {title}, {told}", 10, 3.2, 2))
    return parts


def _samples(model: nn.Module, recipe: Recipe) -> str:
    """Of a model of text what it writes on from a held-out beginning; else rows of the task, drawn."""
    task = recipe.task
    if isinstance(task, Text) and isinstance(model, LM):
        ids = torch.as_tensor(task.eval_row(0).inputs).long().tolist()[:64]
        (new,) = generate(model, [ids], 300, temperature=0.8, seed=0)
        text, more = (bytes(part).decode("utf-8", "replace") for part in (ids, new))
        return f"<h3>Sample</h3><pre><b>{html.escape(text)}</b>{html.escape(more)}</pre>"
    return _picture(lambda file: draw_sample(task, file, 3), "Rows of the task")


def _filters(model: nn.Module, recipe: Recipe) -> str:
    """Of the first, the middle and the last layer with filters, drawn at the start and now."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # as the run began
        start = recipe.model.build()
    layers = enumerate(zip(time_layers(start), time_layers(model)))
    pairs = [(i, inspect_layer(a), inspect_layer(b)) for i, (a, b) in layers]
    drawn = [(i, a, b) for i, a, b in pairs if a.banks and b.banks]
    parts = [f"<h3>Along time</h3><pre>{html.escape(describe([b for _, _, b in pairs]))}</pre>"]
    places = sorted({round(k * (len(drawn) - 1) / (LAYERS - 1)) for k in range(LAYERS)}) if drawn else []
    for i, a, b in (drawn[place] for place in places):
        both = {f"{a.name}, start": a, f"{b.name}, end": b}
        draw = partial(draw_figure, both, title=f"layer {i}", dpi=80)
        parts.append(_picture(draw, f"Filters of layer {i}, {a.name}: at the start and at the end"))
    return "\n".join(parts)
