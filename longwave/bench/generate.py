"""What a generated token costs: every causal mixer in a small model, the demo, and Mamba-130M beside transformers."""

import copy
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from longwave.bench.ops import seconds
from longwave.errors import unknown
from longwave.mixers import MIXERS, Mixer, state_bytes
from longwave.models import LMSpec
from longwave.nn import frozen, weight_only
from longwave.train.config import load_recipe

GENERATE_COLUMNS = ("op", "against", "L", "mode", "threads", "ms", "baseline_ms", "ratio", "target", "note")
VOCAB, D, LAYERS, COUNT = 256, 128, 4, 20
SHORT, PROMPT = 32, 512  # tokens before those that are timed, and of a prompt that is
TARGETS = {"float32": 1.3, "bf16": 1.8, "int8": 3.0}
SHORT_LIMIT, LIMIT = 0.5, 0.8  # ms a token, for a constant state, and for one that grows or H3's two
MAMBA_130M: dict[str, Any] = {"vocab": 50280, "d_model": 768, "pattern": ["mamba"], "layers": 24, "channel": None}

Step = Callable[[], None]


@torch.inference_mode()
def steps(model: Any, state: Any, batch: int, count: int = COUNT) -> Step:
    """``count`` tokens from one state, greedily; as states are values, each call starts from the same."""
    keep, first = frozen(model), torch.zeros(batch, 1, dtype=torch.int64)

    @torch.inference_mode()
    def run() -> None:
        token, now = first, state
        with keep:
            for _ in range(count):
                logits, now = model(token, now)
                token = logits[:, -1].argmax(-1, keepdim=True)

    return run


@torch.inference_mode()
def after(model: Any, length: int, batch: int = 1) -> Any:
    """The state behind ``length`` random tokens."""
    ids = torch.randint(0, model.vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    return model(ids, model.init_state(batch), last=True)[1]


def _row(name: str, mode: str, L: int, **values: Any) -> dict[str, Any]:
    return {"op": name, "mode": mode, "L": L, "malloc": "default", "threads": torch.get_num_threads(), **values}


def small_model(name: str, length: int) -> Any:
    """Four layers of a mixer with its defaults, width 128, on bytes."""
    entry = {"kind": name, **({"max_len": length} if "max_len" in MIXERS.spec(name).model_fields else {})}
    return LMSpec(vocab=VOCAB, d_model=D, pattern=[entry], layers=LAYERS).build().eval()


@torch.no_grad()
def is_constant(mixer: Mixer) -> bool:
    """Whether the state has one size for ever."""
    one, two = (mixer(torch.zeros(1, n, mixer.d_model), mixer.init_state(1))[1] for n in (1, 2))
    return state_bytes(one) == state_bytes(two)


def bench_mixers(names: Sequence[str], repeats: int, lengths: Sequence[int] = (16, 1000)) -> Iterator[dict[str, Any]]:
    """A token of every causal mixer behind short and long texts, the mixers in turn."""
    for L in lengths:
        models = {name: small_model(name, 2 * max(lengths)) for name in names}
        runs = {name: steps(model, after(model, L), 1) for name, model in models.items()}
        times = _in_turn(runs, repeats)
        for name, column in times.items():
            ms = statistics.median(column) / COUNT * 1e3
            limit = SHORT_LIMIT if name != "h3" and is_constant(models[name].backbone.mixers[0]) else LIMIT
            yield _row(
                name, "a token", L, ms=round(ms, 3), target=f"<= {limit} ms", note="missed" if ms > limit else ""
            )


def bench_demo(repeats: int) -> Iterator[dict[str, Any]]:
    """Bytes a second of the demo's model."""
    model: Any = load_recipe("demo").model.build().eval()
    run = steps(model, after(model, 256), 1)
    run()
    ms = statistics.median(seconds(run) for _ in range(repeats)) / COUNT * 1e3
    yield _row("demo", "a token", 256, ms=round(ms, 3), target="<= 1.67 ms", note=f"{1e3 / ms:.0f} bytes a second")


def _transformers(batch: int) -> tuple[Step, Step]:
    """A prompt of PROMPT tokens, and COUNT tokens behind a short one."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": MAMBA_130M["vocab"], "hidden_size": 768, "num_hidden_layers": 24}
    model: Any = MambaForCausalLM(MambaConfig(**sizes)).eval()
    ids = torch.randint(0, MAMBA_130M["vocab"], (batch, PROMPT))

    @torch.inference_mode()
    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        cache = model(ids[:, :SHORT], use_cache=True).cache_params

    @torch.inference_mode()
    def run() -> None:
        token = ids[:, :1]
        for i in range(COUNT):
            place = torch.tensor([SHORT + i])
            logits = model(token, cache_params=cache, use_cache=True, cache_position=place).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return read, run


def read_seconds(model: nn.Module) -> float:
    """How long this many threads take to read as many bytes as the weights have, by the best of some plain sums."""
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    ones = torch.ones(size // 4)
    return min(seconds(lambda: ones.sum()) for _ in range(5))


def bench_mamba(repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """Mamba-130M, drawn and not trained, beside transformers' on as many threads: tokens and a prompt."""
    torch.set_num_threads(threads)
    base: Any = LMSpec(**MAMBA_130M).build().eval()
    forms = {"float32": base, **{form: weight_only(copy.deepcopy(base), form) for form in ("bf16", "int8")}}
    floors = {form: read_seconds(model) for form, model in forms.items()}
    per_batch: dict[tuple[str, int], float] = {}
    for batch in (1, 32):
        _, theirs = _transformers(batch)
        ours = {form: steps(model, after(model, SHORT, batch), batch) for form, model in forms.items()}
        times = _in_turn({"transformers": theirs, **ours}, repeats)
        peer = times.pop("transformers")
        for form, column in times.items():
            ms, other = (statistics.median(c) / COUNT * 1e3 for c in (column, peer))
            per_batch[form, batch] = batch / ms
            ratio = statistics.median(b / a for a, b in zip(column, peer))
            note = f"reading the weights: {floors[form] * 1e3:.1f} ms" if batch == 1 else (
                f"{per_batch[form, 32] / per_batch[form, 1]:.1f}x the tokens a second of batch 1")  # fmt: skip
            yield _row(f"mamba-130m {form}", f"a token, batch {batch}", SHORT, against="transformers",
                       ms=round(ms, 2), baseline_ms=round(other, 2), ratio=round(ratio, 2),
                       target=TARGETS[form] if batch == 1 else 5, note=note)  # fmt: skip
    theirs, _ = _transformers(1)
    ids, start = torch.randint(0, base.vocab, (1, PROMPT)), base.init_state(1)

    @torch.inference_mode()
    def read() -> None:
        base(ids, start, last=True)

    times = _in_turn({"ours": read, "theirs": theirs}, min(repeats, 3))
    ratio = statistics.median(b / a for a, b in zip(*times.values()))
    ms, other = (statistics.median(column) * 1e3 for column in times.values())
    yield _row("mamba-130m float32", "a prompt", PROMPT, against="transformers", ms=round(ms, 1),
               baseline_ms=round(other, 1), ratio=round(ratio, 2), target=6)  # fmt: skip


def _in_turn(runs: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, turn by turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            took = seconds(run)
            times[name] += [took] if turn else []
    return times


def bench_generate(names: Sequence[str], repeats: int, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every causal mixer, or those named, and without names the demo and Mamba-130M, too.

    Raises:
        ValueError: for a name that is not that of a causal mixer.
    """
    causal = [name for name, cls in MIXERS.items() if cls.causal]
    for name in names:
        if name not in causal:
            raise ValueError(unknown("causal mixer", name, causal))
    torch.set_num_threads(1)
    yield from bench_mixers(names or causal, repeats)
    if names:
        return
    yield from bench_demo(repeats)
    if importlib.util.find_spec("transformers") is not None:
        for count in threads:
            yield from bench_mamba(repeats, count)
