"""Training steps of whole models: tokens a second beside a peer, and the cost of a token as sequences grow."""

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from longwave.bench.ops import seconds
from longwave.mixers import mixer
from longwave.models import LMSpec
from longwave.ops.dispatch import use_backend

VOCAB = 256


def _step(model: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], L: int) -> Callable[[], None]:
    """One training step (forward, backward, AdamW) on a sequence of L random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, VOCAB, (1, L + 1))

    def run() -> None:
        optimizer.zero_grad()
        loss(ids).backward()
        optimizer.step()

    return run


def _ours(pattern: list[Any], L: int, d_model: int, layers: int, channel: str | None = None) -> Callable[[], None]:
    model: Any = LMSpec(vocab=VOCAB, d_model=d_model, pattern=pattern, layers=layers, channel=channel).build()
    return _step(model, lambda ids: model.score(ids[:, :-1], ids[:, 1:]).loss / L, L)


def _transformers_mamba(L: int, d_model: int, layers: int) -> Callable[[], None]:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=d_model, num_hidden_layers=layers, use_mambapy=True)
    model = MambaForCausalLM(config)
    return _step(model, lambda ids: model(ids[:, :-1], labels=ids[:, :-1]).loss, L)


def _layer(layer: Callable[[torch.Tensor], torch.Tensor], L: int, d_model: int) -> Callable[[], None]:
    """Both passes of a layer on L steps."""
    x, dy = torch.randn(1, L, d_model, requires_grad=True), torch.randn(1, L, d_model)
    return lambda: layer(x).backward(dy)


def _mamba2_layers(d_model: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], nn.Module]:
    """Ours, and transformers' of the same sizes."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = mixer("mamba2").build(d_model)
    config = Mamba2Config(hidden_size=d_model, num_heads=d_model // 32, head_dim=64, n_groups=1, num_hidden_layers=1)
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    return lambda x: ours(x)[0], theirs


def _rwkv4_layers(d_model: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Our time mix, and transformers' with the same weights."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    ours = mixer("rwkv4").build(d_model)
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=d_model, num_hidden_layers=1))
    words = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
    theirs.load_state_dict({words.get(name, name): t for name, t in ours.state_dict().items()})
    return [lambda x: ours(x)[0], lambda x: theirs(x)[0]]


def _on(backend: str, run: Callable[[], None]) -> Callable[[], None]:
    def forced() -> None:
        with use_backend(backend):
            run()

    return forced


def _compare(
    name: str,
    against: str,
    L: int,
    ours: Callable,
    theirs: Callable,
    target: float,
    n: int,
    mode: str = "training step",
) -> dict[str, Any]:
    for run in (ours, theirs):
        run()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(n)]
    a, b = (statistics.median(column) for column in zip(*pairs))
    return {
        "op": name,
        "against": against,
        "L": L,
        "mode": mode,
        "malloc": "default",
        "threads": torch.get_num_threads(),
        "ms": round(a * 1e3, 2),
        "baseline_ms": round(b * 1e3, 2),
        "ratio": round(statistics.median(theirs / ours for ours, theirs in pairs), 2),
        "target": target,
        "tokens_per_second": round(L / a),
        "note": "over half of the step is matrix products, the same on both sides",
    }


PATTERNS: dict[str, Callable[[int], list[Any]]] = {
    "mamba": lambda L: ["mamba"],
    "mamba2": lambda L: ["mamba2"],
    "hyena": lambda L: [{"kind": "hyena", "max_len": L}],
    "h3": lambda L: ["h3"],
    "rwkv4": lambda L: ["rwkv4", "rwkv4_channel"],
    "s4d": lambda L: ["s4d"],
    "mega": lambda L: ["mega"],
    "gated_deltanet": lambda L: ["gated_deltanet"],
    "retnet": lambda L: ["retnet"],
    "gla": lambda L: ["gla"],
}


def bench_models(repeats: int) -> Iterator[dict[str, Any]]:
    """Our Mamba, and layers of Mamba-2 and RWKV-4, beside transformers'; our Hyena and H3 beside themselves on plain
    torch; a token at 64k beside 1k."""
    for L in (1024, 8192):
        if importlib.util.find_spec("transformers") is not None:
            sides = [partial(make, L, 256, 4) for make in (partial(_ours, ["mamba"]), _transformers_mamba)]
            n = repeats if L == 1024 else 3
            yield _compare("mamba", "transformers", L, sides[0](), sides[1](), 10, n)
            layers = [_layer(layer, L, 256) for layer in _mamba2_layers(256)]
            yield _compare("mamba2", "transformers' layer", L, layers[0], layers[1], 5, n, "both")
            if L == 1024:  # the backward pass of their loop is quadratic: at 8k a layer takes minutes
                layers = [_layer(layer, L, 256) for layer in _rwkv4_layers(256)]
                yield _compare("rwkv4", "transformers' layer", L, layers[0], layers[1], 50, 3, "both")
        for name in ("hyena", "h3"):
            run = _ours(PATTERNS[name](L), L, 256, 4)
            yield _compare(name, "torch backend", L, run, _on("torch", run), 2, repeats)
    for name, pattern in PATTERNS.items():
        short, long = (_ours(pattern(L), L, 64, 2) for L in (1024, 65536))
        short()
        long()
        times = [(seconds(short) / 1024, seconds(long) / 65536) for _ in range(max(3, repeats // 2))]
        yield {
            "op": name,
            "against": "a token at 1k",
            "L": 65536,
            "mode": "cost a token",
            "malloc": "default",
            "threads": torch.get_num_threads(),
            "ms": round(statistics.median(long for _, long in times) * 1e3, 5),
            "baseline_ms": round(statistics.median(short for short, _ in times) * 1e3, 5),
            "ratio": round(statistics.median(long / short for short, long in times), 2),
            "target": "<= 1.3",
        }
