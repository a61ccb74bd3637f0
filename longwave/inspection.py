"""What can be said of layers from outside: their filters and effective memory, their states, whether they are exact."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers import MIXERS, Mixer, mixer, state_bytes
from longwave.nn import Filter, Response, responses

ENERGY = 0.95  # the share that the effective memory holds
LONGEST, TAPS = 2**16, 2**24  # of a filter, and of all filters of a bank together, are computed at most


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
        banks = [look(response, length) for response in responses(module)]
    finally:
        for part in training:
            part.training = True
    without = module.without_filter if isinstance(module, Mixer) else Mixer.without_filter
    note = "" if banks else f"has no filter: {without}"
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


def describe(layers: list[Layer]) -> str:
    """The effective memory of every bank of filters, as a table."""
    rows = [
        "effective memory: the fewest steps that hold 95 % of a filter's energy; median and 90 % quantile of channels",
        f"{'layer':24} {'filter':28}{'channels':>10}{'median':>12}{'90 %':>12}",
    ]
    for i, layer in enumerate(layers):
        label = f"{i:3} {layer.name}"
        if layer.note:
            rows.append(f"{label:24} {layer.note}")
        for bank in layer.banks:
            least = "" if bank.complete else ">= "
            memory = f"{f'{least}{bank.median:,}':>12}{f'{least}{bank.high:,}':>12}"
            rows.append(f"{label:24} {bank.response.name:28}{bank.response.channels:>10}{memory}")
    return "\n".join(rows)


def state_growth(layer: Mixer, tokens: int = 1_000_000) -> tuple[int, int, int]:
    """Bytes of state after one token, growth a token, and bytes after ``tokens``, of a layer on the meta device."""
    x = torch.zeros(1, 1, layer.d_model, device="meta")
    _, one = layer(x, layer.init_state(1))
    _, two = layer(x, one)
    growth = state_bytes(two) - state_bytes(one)
    most = tokens - 1 if layer.window is None else min(tokens - 1, max(0, layer.window - 2))  # for which it grows
    return state_bytes(one), growth, state_bytes(one) + growth * most


def describe_growth(layers: list[Mixer]) -> str:
    """:func:`state_growth` of some layers on the meta device, as a table."""
    rows = [(f"{i:3} {layer.name}", *state_growth(layer)) for i, layer in enumerate(layers)]
    one, growth, million = (sum(column) for column in list(zip(*rows))[1:])
    head = f"{'layer':24}{'state, bytes':>16}{'growth a token':>16}{'at 1M tokens':>18}"
    lines = [f"{name:24}{a:>16,}{b:>16,}{c:>18,}" for name, a, b, c in [*rows, ("all", one, growth, million)]]
    return "\n".join([head, *lines])


def describe_states(layers: list[Mixer], begin: Any, end: Any) -> str:
    """How many bytes the states of some layers take at the beginning and at the end of a text."""
    sizes = [(layer.name, state_bytes(a), state_bytes(b)) for layer, a, b in zip(layers, begin, end)]
    fixed, grown = ([row for row in sizes if (row[1] == row[2]) == same] for same in (True, False))
    lines = []
    if fixed:
        lines.append(
            f"recurrent state of {_layers(fixed)}: {sum(a for _, a, _ in fixed):,} bytes after the prompt and as many "
            "at the end: it did not grow"
        )
    if grown:
        lines.append(
            f"cache of {_layers(grown)}: {sum(a for _, a, _ in grown):,} bytes after the prompt, "
            f"{sum(b for *_, b in grown):,} at the end: it grows with the text"
        )
    return "\n".join(lines)


def _layers(rows: list[tuple[str, int, int]]) -> str:
    return f"{len(rows)} layers ({', '.join(sorted({name for name, *_ in rows}))})"


class Check(NamedTuple):
    """A layer in float64, freshly drawn, on noise.

    Attributes:
        name, options: which.
        leak: how much a change of the future changes outputs of the past.
        gap: how much the outputs of one step at a time differ from those in parallel; None where there are no steps.
    """

    name: str
    options: dict[str, Any]
    leak: float
    gap: float | None

    @property
    def good(self) -> bool:
        """Whether it is exact, and as causal as it says."""
        return (self.gap or 0.0) <= 1e-8 and (self.leak <= 1e-8) == MIXERS[self.name].causal


def self_check() -> Iterator[Check]:
    """Every example of every mixer, checked for causality and for parallel = recurrent."""
    for name, cls in MIXERS.items():
        for options in cls.examples:
            yield Check(name, options, *_measured(drawn(name, options, 16).double()))


@torch.no_grad()
def _measured(layer: Mixer) -> tuple[float, float | None]:
    x, other = torch.randn(2, 2, 13, layer.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    future = torch.cat([x[:, :6], other[:, 6:]], dim=1)
    whole = layer(x)[0]
    leak = (layer(future)[0] - whole)[:, :6].abs().max().item()
    if not layer.causal:
        return leak, None
    state, gap = layer.init_state(len(x)), 0.0
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state)
        gap = max(gap, (y[:, 0] - whole[:, t]).abs().max().item())
    return leak, gap
