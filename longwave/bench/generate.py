"""What a generated token costs: every causal mixer in a small model, the demo, and Mamba-130M beside transformers."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from longwave.bench.ops import seconds
from longwave.mixers import MIXERS, Mixer
from longwave.models import LMSpec
from longwave.nn import frozen
from longwave.train.config import load_recipe

GENERATE_COLUMNS = ("op", "against", "L", "mode", "threads", "ms", "baseline_ms", "ratio", "target", "note")
VOCAB, D, LAYERS, COUNT = 256, 128, 4, 20
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


def is_constant(mixer: Mixer) -> bool:
    """Whether the state has one size for ever."""
    with torch.no_grad():
        one, two = (after_steps(mixer, n) for n in (1, 2))
    return one == two


def after_steps(mixer: Mixer, length: int) -> int:
    """Bytes of state behind some steps."""
    from longwave.mixers import state_bytes

    return state_bytes(mixer(torch.zeros(1, length, mixer.d_model), mixer.init_state(1))[1])


def bench_mixers(names: Sequence[str], repeats: int, lengths: Sequence[int] = (16, 1000)) -> Iterator[dict[str, Any]]:
    """A token of every causal mixer behind short and long texts, the mixers in turn."""
    for L in lengths:
        models = {name: small_model(name, 2 * max(lengths)) for name in names}
        runs = {name: steps(model, after(model, L), 1) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                took = seconds(run) / COUNT
                times[name] += [took] if turn else []
        for name, column in times.items():
            ms = statistics.median(column) * 1e3
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


@torch.inference_mode()
def _transformers(batch: int, length: int) -> tuple[Step, Step]:
    """Prefill of ``length`` tokens, and COUNT tokens behind them."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=MAMBA_130M["vocab"], hidden_size=768, num_hidden_layers=24)
    model: Any = MambaForCausalLM(config).eval()
    ids = torch.randint(0, 50280, (batch, length))

    @torch.inference_mode()
    def prefill() -> Any:
        return model(ids, use_cache=True)

    cache = prefill().cache_params

    @torch.inference_mode()
    def run() -> None:
        token = ids[:, :1]
        for i in range(COUNT):
            place = torch.tensor([length + i])
            logits = model(token, cache_params=cache, use_cache=True, cache_position=place).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return prefill, run


def bench_mamba(repeats: int, threads: int, batch: int = 1) -> Iterator[dict[str, Any]]:
    """Mamba-130M, drawn and not trained: a token, and a prompt of 512, beside transformers."""
    torch.set_num_threads(threads)
    model: Any = LMSpec(**MAMBA_130M).build().eval()
    ids, start = torch.randint(0, 50280, (batch, 512)), model.init_state(batch)
    _, theirs = _transformers(batch, 32)

    @torch.inference_mode()
    def prefill() -> None:
        model(ids, start, last=True)

    ours = steps(model, after(model, 32, batch), batch)
    for name, mine, other, L, per in (("mamba-130m", ours, theirs, 32, COUNT),):
        for run in (mine, other):
            run()
        pairs = [(seconds(mine), seconds(other)) for _ in range(repeats)]
        a, b = (statistics.median(column) / per * 1e3 for column in zip(*pairs))
        ratio = round(statistics.median(theirs / ours for ours, theirs in pairs), 2)
        yield _row(name, f"a token, batch {batch}", L, against="transformers", ms=round(a, 2), baseline_ms=round(b, 2),
                   ratio=ratio, target=1.3 if batch == 1 else 5)  # fmt: skip
