"""Layers drawn: filters in time and frequency, eigenvalues, effective memory. And what a task asks."""

import math
from pathlib import Path
from typing import Any

import torch

from longwave.inspection import Bank, Layer
from longwave.tasks.base import Task
from longwave.tasks.forms import IGNORE, Batch, Future, Label, Tokens, Values

SHOWN = 8  # channels
BANDS = 6  # an octave, over which a spectrum is averaged
FORMATS = (".png", ".svg", ".pdf")


def draw(layers: list[Layer], out: Path, title: str) -> list[Path]:
    """The filters of some layers as pictures; layers without filters are left out.

    Args:
        layers: what :func:`inspect_layer` returned.
        out: a file that ends in .png, .svg or .pdf, for one figure of all; else a folder, for one figure a layer.
        title: of the figures.
    Returns:
        The files, none where no layer has filters.
    Raises:
        OSError: where they cannot be written.
    """
    numbered = [(i, layer) for i, layer in enumerate(layers) if layer.banks]
    if not numbered:
        return []
    if out.suffix in FORMATS:
        out.parent.mkdir(parents=True, exist_ok=True)
        one = len(layers) == 1
        draw_figure({layer.name if one else f"layer {i}, {layer.name}": layer for i, layer in numbered}, out, title)
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, layer in numbered:
        files.append(out / f"layer-{i:02}-{layer.name}.png")
        draw_figure({layer.name: layer}, files[-1], f"{title}, layer {i}")
    return files


def draw_figure(layers: dict[str, Layer], file: Path, title: str, dpi: int = 100) -> None:
    """One figure of all filters of some layers, by what they are called: in time, in frequency, memory, eigenvalues."""
    from matplotlib.figure import Figure

    rows = [(name, bank) for name, layer in layers.items() for bank in layer.banks]
    columns = 4 if any(bank.response.eigenvalues is not None for _, bank in rows) else 3
    figure = Figure(figsize=(3.5 * columns, 3 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for (name, bank), (time, frequency, memory, *rest) in zip(rows, axes):
        colours = _colours(bank)
        _draw_time(time, bank, colours, f"{name}: {bank.response.name}" if bank.response.name else name)
        _draw_frequency(frequency, bank, colours)
        _draw_memory(memory, bank)
        if rest:
            _draw_eigenvalues(rest[0], bank, colours)
    for axis in axes.flat:
        axis.title.set_fontsize(9)
    figure.savefig(file, dpi=dpi)


def _colours(bank: Bank) -> dict[int, Any]:
    """The channels that are shown, evenly spaced, and a colour each."""
    from matplotlib import colormaps

    C = bank.response.channels
    count = min(SHOWN, C)
    shown = [round(i * (C - 1) / max(1, count - 1)) for i in range(count)]
    return {c: colormaps["viridis"](0.9 * i / max(1, count - 1)) for i, c in enumerate(shown)}


def _draw_time(axis: Any, bank: Bank, colours: dict[int, Any], title: str) -> None:
    """One line above the other, each scaled to its peak, over the time in which most of them have their memory."""
    until = min(bank.taps.shape[1], max(16, math.ceil(1.25 * bank.high)))
    for height, (c, colour) in enumerate(colours.items()):
        k = bank.taps[c, :until]
        k = k / k.abs().max().clamp(min=1e-300)
        axis.axhline(height, color="0.85", linewidth=0.6)
        if until <= 64:
            axis.vlines(range(len(k)), height, height + 0.48 * k, color=colour, linewidth=1.2)
        else:
            axis.plot(height + 0.48 * k, color=colour, linewidth=0.8)
    axis.set(title=title, xlabel="lag (steps)", ylabel="channel, scaled to its peak")
    axis.set_yticks(range(len(colours)), list(map(str, colours)))


def _draw_frequency(axis: Any, bank: Bank, colours: dict[int, Any]) -> None:
    points = max(64, bank.taps.shape[1])
    octaves = torch.arange(math.floor(math.log2(points // 2) * BANDS)) / BANDS
    edges = (2**octaves).round().long().unique()  # where the bands of the spectrum start; the last goes to its end
    band = torch.bucketize(torch.arange(1, points // 2 + 1), edges, right=True) - 1
    count = band.bincount()
    centre = torch.bincount(band, torch.arange(1, points // 2 + 1).double()) / count / points
    for c, colour in colours.items():
        power = torch.fft.rfft(bank.taps[c], points).abs().square()[1 : points // 2 + 1]
        gain = (torch.bincount(band, power) / count).sqrt()
        if gain.max() > 0:
            axis.plot(centre, gain, color=colour, linewidth=1)
    axis.set(title="in frequency", xlabel="frequency (cycles a step)", ylabel="gain |K|", xscale="log", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(max(min(low, high / 100), high / 1e5), high)
    _decades(axis.xaxis)
    _decades(axis.yaxis)


def _decades(axis: Any) -> None:
    """Numbers at powers of ten alone: those between them would overlap."""
    from matplotlib.ticker import NullFormatter

    axis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)


def _draw_memory(axis: Any, bank: Bank) -> None:
    steps = bank.memory.clamp(min=1).sort().values
    dot = "o" if len(steps) == 1 else None  # a single step has no line
    axis.step(steps, torch.arange(1, len(steps) + 1) / len(steps), where="post", color="tab:blue", marker=dot)
    bound = "" if bank.complete else "≥ "
    axis.axvline(max(1, bank.median), color="tab:orange", linestyle="--", label=f"median: {bound}{bank.median:,}")
    axis.axvline(max(1, bank.high), color="tab:red", linestyle="--", label=f"90 %: {bound}{bank.high:,}")
    low, high = math.floor(math.log10(steps[0])), math.floor(math.log10(steps[-1])) + 1
    axis.set(title="effective memory", xlabel="memory (steps)", ylabel="share of channels", xscale="log")
    axis.set(xlim=(10**low / 1.2, 10**high * 1.2), ylim=(0, 1.03))
    axis.legend(fontsize=8, loc="best")
    _decades(axis.xaxis)
    axis.yaxis.grid(alpha=0.3)


def _draw_eigenvalues(axis: Any, bank: Bank, colours: dict[int, Any]) -> None:
    a = bank.response.eigenvalues
    if a is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "no recurrence,\nso no eigenvalues", ha="center", va="center", color="0.5")
        return
    circle = torch.linspace(0, 2 * math.pi, 200)
    axis.plot(circle.cos(), circle.sin(), color="0.7", linewidth=0.8)
    shared = len(a) == 1 and bank.response.channels > 1
    for c, colour in list(colours.items())[: 1 if shared else None]:
        row = a[c % len(a)].detach().cpu()
        axis.scatter(row.real, row.imag, s=7, color="tab:blue" if shared else colour, linewidths=0, alpha=0.8)
    axis.set(title="eigenvalues" + (", shared" if shared else ""), xlabel="Re a", ylabel="Im a", aspect="equal")
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    axis.grid(alpha=0.3)


def draw_sample(task: Task, file: Path, rows: int = 6) -> None:
    """The first rows of a task's training as a person would want to see them: pictures, waves, or tokens over targets.

    Args:
        task: prepared.
        file: ends in .png, .svg or .pdf.
        rows: how many.
    Raises:
        ValueError: for another ending.
        OSError: where the file cannot be written.
    """
    from matplotlib.figure import Figure

    if file.suffix not in FORMATS:
        raise ValueError(f"{file}: a picture ends in {', '.join(FORMATS)}")
    batch = task.train_batch(rows, 0, 0)
    pictures = [task.image(inputs) for inputs in batch.inputs]
    seen = pictures[0] is not None
    columns = min(rows, 6) if seen else 1
    high = 2.2 if seen else 1.2 if batch.inputs.is_floating_point() else 0.65
    figure = Figure(figsize=(10, high * math.ceil(rows / columns) + 0.4), layout="constrained")
    figure.suptitle(f"{task.kind}: {task.inputs} → {task.targets}", fontsize=10)
    for row, axis in enumerate(figure.subplots(math.ceil(rows / columns), columns, squeeze=False).flat):
        if row >= rows:
            axis.axis("off")
            continue
        if (picture := pictures[row]) is not None:
            picture = picture if picture.shape[2] == 3 else picture.mean(2, keepdim=True)
            low, top = picture.min(), picture.max()
            axis.imshow(((picture - low) / (top - low).clamp(min=1e-9)).squeeze(-1).numpy(), cmap="gray")
            axis.axis("off")
        elif batch.inputs.is_floating_point():
            _draw_waves(axis, task, batch, row)
        else:
            _draw_tokens(axis, task, batch, row)
        if isinstance(task.targets, Label):
            label, names = int(batch.targets[row]), getattr(task, "classes", None)
            axis.set_title(f"label {label}" if names is None else f"label {label}, {names[label]}", fontsize=8)
        if isinstance(task.targets, Values):
            axis.set_title(", ".join(f"{value:.3g}" for value in batch.targets[row].tolist()), fontsize=8)
    figure.savefig(file, dpi=100)


def _draw_waves(axis: Any, task: Task, batch: Batch, row: int) -> None:
    """Inputs as lines, over their steps; the future that is asked for dashed."""
    x = batch.inputs[row] if batch.mask is None else batch.inputs[row][batch.mask[row]]
    x = x.flatten(0, -2)  # of a pair, one behind the other
    axis.plot(x[:, :SHOWN].numpy(), linewidth=0.7)
    if isinstance(task.targets, Future):
        axis.set_prop_cycle(None)
        steps = range(len(x) - task.targets.steps, len(x))
        axis.plot(steps, batch.targets[row][:, :SHOWN].numpy(), "--", linewidth=1)
    axis.margins(x=0)
    axis.tick_params(labelsize=6)


def _draw_tokens(axis: Any, task: Task, batch: Batch, row: int) -> None:
    """A line of cells for each sequence and for targets at its steps; what they stand for is written where it fits."""
    lines = [*batch.inputs[row].view(-1, batch.inputs.shape[-1])]
    told = isinstance(task.targets, Tokens)
    if told:
        lines.append(batch.targets[row])
    cells = torch.stack(lines).double()
    if batch.mask is not None:
        cells[: len(lines) - told][~batch.mask[row].view(-1, cells.shape[1])] = math.nan
    cells[cells == IGNORE] = math.nan
    axis.imshow(cells.numpy(), aspect="auto", cmap="viridis", interpolation="nearest", alpha=0.6)
    axis.set_yticks(range(len(lines)), ["inputs"] * (len(lines) - told) + ["targets"] * told)
    axis.tick_params(labelsize=6)
    if cells.shape[1] <= 128:
        for y, line in enumerate(cells.tolist()):
            for step, token in enumerate(line):
                if not math.isnan(token):
                    name = str(int(token)) if task.names is None else task.names[int(token)]
                    axis.text(step, y, name, ha="center", va="center", fontsize=4 if len(line) > 64 else 6)
