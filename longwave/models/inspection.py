"""What the layers of a model do along time, drawn: filters in time and frequency, eigenvalues, effective memory."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import MIXERS, S5, Mamba, Mixer, S5TwoSided, mixer
from longwave.nn import Filter, StateSpace, StateSpaceFilter
from longwave.nn.module import at_least_float32

ENERGY = 0.95  # the share that the effective memory holds
LONGEST, TAPS = 2**16, 2**24  # of a filter, and of all filters of a bank together, are computed at most
SHOWN = 8  # channels
BANDS = 6  # an octave, over which a spectrum is averaged
FORMATS = (".png", ".svg", ".pdf")

WITHOUT = {
    "attention": "looks at every past token by content",
    "lstm": "its gates decide at every step how much of a cell stays; at the start about a half",
}


class Response(NamedTuple):
    """A bank of filters as it is drawn.

    Attributes:
        name: where it sits in its layer.
        channels: C.
        taps: (C, length) of a length, or ValueError where the filters are not defined at that length.
        eigenvalues: (G, N) complex, of one step of the recurrence, G dividing C, or None where there is none: channels
            g, g + G, ... share row g.
    """

    name: str
    channels: int
    taps: Callable[[int], Tensor]
    eigenvalues: Tensor | None = None


class Bank(NamedTuple):
    """A response with its taps, and what they say.

    Attributes:
        response: what was computed.
        taps: (C, L) float64.
        memory: (C,) effective memory in steps.
        complete: whether a longer look would not change the memory much.
    """

    response: Response
    taps: Tensor
    memory: Tensor
    complete: bool

    @property
    def median(self) -> int:
        """Of the memory, over channels."""
        return _quantile(self.memory, 0.5)

    @property
    def high(self) -> int:
        """The 90th percentile of the memory, over channels."""
        return _quantile(self.memory, 0.9)


class Layer(NamedTuple):
    """A part of a model that moves information along time.

    Attributes:
        name: of the mixer, or of the filter's class.
        banks: its filters, or none.
        note: what there is to say where there are none.
    """

    name: str
    banks: list[Bank]
    note: str = ""


def effective_memory(taps: Tensor) -> Tensor:
    """The smallest number of steps that holds 95 % of a filter's energy:  min n, sum_{t<n} k[t]^2 >= 0.95 sum_t k[t]^2.

    Args:
        taps: k (..., L), all of it or as much as matters.
    Returns:
        (...) int64, from 1 to L; 0 where all taps are zero.
    """
    energy = taps.double().square().cumsum(-1)
    total = energy[..., -1:]
    steps = (energy < ENERGY * total).sum(-1) + 1
    return torch.where(total[..., 0] == 0, 0, steps)


def _quantile(steps: Tensor, q: float) -> int:
    return int(steps.double().quantile(q, interpolation="lower").item())


# Which filters a module has


@functools.singledispatch
def responses_of(module: nn.Module) -> list[Response]:
    """The filters that a module itself stands for; none unless its type says so, then its parts are asked."""
    return []


@responses_of.register
def _(filter: Filter) -> list[Response]:
    modes = _eigenvalues(filter.realize()) if isinstance(filter, StateSpaceFilter) else None
    return [Response("", filter.channels, filter, modes)]


@responses_of.register
def _(layer: S5) -> list[Response]:
    return [_of_feature("feature to itself", layer.seq, layer.C)]


@responses_of.register
def _(layer: S5TwoSided) -> list[Response]:
    return [_of_feature("to itself, back", layer.seq, layer.C1), _of_feature("to itself, ahead", layer.seq, layer.C2)]


def _of_feature(name: str, seq: Any, C: Tensor) -> Response:
    """The response of S5 from each feature to itself, which is that of a diagonal state space."""
    (C,) = at_least_float32(C)
    a, driven = seq.inputs(torch.eye(len(C), dtype=C.dtype, device=C.device)[None])
    c = torch.view_as_complex(C) if seq.conj_sym else torch.view_as_complex(C) / 2
    system = StateSpace(a.expand(len(C), -1), driven[0], c)
    return Response(name, len(C), system.taps, a[None])


@responses_of.register
def _(layer: Mamba) -> list[Response]:
    """Its step sizes depend on the input; those of a silent input are taken, and of each channel the slowest mode."""
    A_log, bias = at_least_float32(layer.A_log, layer.dt_proj.bias)
    a = torch.exp(-F.softplus(bias)[:, None] * A_log.exp())
    slowest = a.amax(1, keepdim=True)

    def taps(length: int) -> Tensor:
        return slowest ** torch.arange(length, device=a.device)

    return [Response("slowest modes at x = 0", len(a), taps, torch.complex(a, torch.zeros_like(a)))]


def _eigenvalues(system: Any) -> Tensor | None:
    """Of one step of a discrete system: the diagonal, or those of its matrix."""
    a = system.matrix() if hasattr(system, "matrix") else getattr(system, "a", None)
    if a is None:
        return None
    return torch.atleast_2d(a) if a.is_complex() else torch.linalg.eigvals(a)


def _responses(module: nn.Module, name: str = "") -> Iterator[Response]:
    """All filters in a module, by the outermost parts that have any."""
    own = responses_of(module)
    for response in own:
        yield response._replace(name=f"{name} {response.name}".strip())
    if not own:
        for key, child in module.named_children():
            yield from _responses(child, f"{name}.{key}".lstrip("."))


# What they say


def look(response: Response, length: int) -> Bank:
    """The taps of a response and its memory.

    Taps are computed until 90 % of the channels have their memory within a quarter of them, so that what is left out
    does not matter, but not beyond where the filters are defined, 65,536 steps, or 16,777,216 taps altogether.

    Args:
        response: the filters.
        length: how many taps to compute at least, where the filters have so many.
    """
    asked, most = length, max(length, min(LONGEST, TAPS // response.channels))
    while True:
        taps = _as_long_as_defined(response.taps, asked).detach().double().cpu()
        bank = Bank(response, taps, effective_memory(taps), True)
        if taps.shape[1] < asked or bank.high <= asked // 4:
            return bank
        if asked >= most:
            return bank._replace(complete=False)
        asked = min(most, 2 * asked)


def _as_long_as_defined(taps: Callable[[int], Tensor], length: int) -> Tensor:
    """The first ``length`` taps, or as many as are defined."""
    try:
        return taps(length)
    except ValueError:
        low, high = 1, length  # defined at low, or nowhere; not at high
    while high - low > 1:
        middle = (low + high) // 2
        try:
            taps(middle)
            low = middle
        except ValueError:
            high = middle
    return taps(low)


@torch.no_grad()
def inspect_layer(module: nn.Module, length: int = 1024) -> Layer:
    """What one layer does along time.

    Args:
        module: a mixer, or any other module with filters inside; dropout of taps is left out.
        length: see :func:`look`.
    """
    if length < 2:
        raise ValueError(f"a filter is drawn over length >= 2 steps; got length = {length}")
    name = module.name if isinstance(module, Mixer) else type(module).__name__.lower()
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        banks = [look(response, length) for response in _responses(module)]
    finally:
        for part in training:
            part.training = True
    note = "" if banks else f"has no filter: {WITHOUT.get(name, 'there is nothing to draw')}"
    return Layer(name, banks, note)


def time_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost mixers of a model, in order, and filters outside of any."""
    if isinstance(model, Mixer | Filter):
        yield model
        return
    for child in model.children():
        yield from time_layers(child)


def drawn(name: str, options: dict[str, Any], d_model: int = 64, length: int = 1024) -> Mixer:
    """A mixer freshly drawn with seed 0.

    Args:
        name: of the mixer.
        options: its options, where they are not the defaults.
        d_model: D.
        length: is ``max_len``, where the mixer needs one and the options do not say it.
    Raises:
        ValueError: for an unknown mixer or option, with the nearest, or a value that the mixer refuses.
    """
    if name in MIXERS and (need := MIXERS.spec(name).model_fields.get("max_len")) is not None and need.is_required():
        options = {"max_len": length, **options}
    spec = mixer(name, **options)
    if not isinstance(d_model, int) or d_model < 1:
        raise ValueError(f"d_model is a whole number >= 1; got {d_model!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build(d_model)


# Tables and pictures


def describe(layers: list[Layer]) -> str:
    """The effective memory of every bank of filters, as a table."""
    rows = [
        "effective memory: the fewest steps that hold 95 % of a filter's energy; median and 90 % quantile of channels",
        f"{'layer':20}{'filter':28}{'channels':>10}{'median':>12}{'90 %':>12}",
    ]
    for i, layer in enumerate(layers):
        label = f"{i:3} {layer.name}"
        if layer.note:
            rows.append(f"{label:20}{layer.note}")
        for bank in layer.banks:
            least = "" if bank.complete else ">= "
            memory = f"{f'{least}{bank.median:,}':>12}{f'{least}{bank.high:,}':>12}"
            rows.append(f"{label:20}{bank.response.name:28}{bank.response.channels:>10}{memory}")
    return "\n".join(rows)


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
        draw_figure([layer for _, layer in numbered], out, title)
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, layer in numbered:
        files.append(out / f"layer-{i:02}-{layer.name}.png")
        draw_figure([layer], files[-1], f"{title}, layer {i}")
    return files


def draw_figure(layers: list[Layer], file: Path, title: str, dpi: int = 100) -> None:
    """One figure of all filters of some layers, a row each: in time, in frequency, memory, eigenvalues."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(layer, bank) for layer in layers for bank in layer.banks]
    columns = 4 if any(bank.response.eigenvalues is not None for _, bank in rows) else 3
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(3.5 * columns, 3 * len(rows) + 0.3), layout="constrained", squeeze=False
    )
    try:
        figure.suptitle(title, fontsize=11)
        for (layer, bank), (time, frequency, memory, *rest) in zip(rows, axes):
            colours = _colours(bank)
            _draw_time(time, bank, colours, f"{layer.name}: {bank.response.name}" if bank.response.name else layer.name)
            _draw_frequency(frequency, bank, colours)
            _draw_memory(memory, bank)
            if rest:
                _draw_eigenvalues(rest[0], bank, colours)
        for axis in axes.flat:
            axis.title.set_fontsize(9)
        figure.savefig(file, dpi=dpi)
    finally:
        pyplot.close(figure)


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
