"""Peak memory and time of every causal mixer as sequences grow, in chunks and all at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from longwave.bench.ops import peak, seconds
from longwave.errors import choose
from longwave.mixers import MIXERS, Mixer, state_bytes

MEMORY_COLUMNS = ("op", "L", "chunk", "threads", "state_bytes", "ms", "peak_mb", "parallel_ms", "parallel_mb", "note")
D, CHUNK, LENGTHS, PARALLEL = 16, 8192, (2**16, 2**18, 2**20), 2**16
PATIENCE = 30.0  # seconds


@torch.no_grad()
def run_in_chunks(layer: Mixer, length: int, chunk: int) -> Any:
    """The state after ``length`` steps of noise, of which no more than a chunk exists at a time."""
    state = layer.init_state(1)
    for start in range(0, length, chunk):
        _, state = layer(torch.randn(1, min(chunk, length - start), layer.d_model), state)
    return state


def _measured(run: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds, and MB at the peak above what is held before, of one call."""
    times: list[float] = []
    memory = peak(lambda: times.append(seconds(run)))
    return round(times[0] * 1e3, 1), round(memory, 1)


def _setting(name: str, length: int, chunk: int) -> dict[str, Any]:
    return {"op": name, "L": length, "chunk": chunk, "threads": torch.get_num_threads()}


def measure_memory(name: str, length: int, chunk: int = CHUNK, parallel: bool = True) -> dict[str, Any]:
    """One row of a mixer with its own defaults: bytes of the state at the end, time, peak memory.

    Args:
        name: of a causal mixer.
        length, chunk: steps.
        parallel: whether to run all steps at once too; their input then is held before and not counted.
    """
    options = {"max_len": length} if "max_len" in MIXERS.spec(name).model_fields else {}
    layer, states = MIXERS[name](D, **options), []
    run_in_chunks(layer, min(length, 2 * chunk), chunk)  # warm up, and compile
    ms, memory = _measured(lambda: states.append(run_in_chunks(layer, length, chunk)))
    grows = state_bytes(states) > state_bytes(layer.init_state(1))
    row = {**_setting(name, length, chunk), "state_bytes": state_bytes(states), "ms": ms, "peak_mb": memory}
    row["note"] = "state grows" if grows else None
    if parallel:
        x = torch.randn(1, length, D)
        with torch.no_grad():
            ms, memory = _measured(lambda: layer(x))
        row |= {"parallel_ms": ms, "parallel_mb": memory}
    return row


def bench_memory(names: Sequence[str], lengths: Sequence[int] = LENGTHS, chunk: int = CHUNK) -> Iterator[dict]:
    """A row for every length and causal mixer, or those named; all at once up to PARALLEL steps.

    Where the state grows, each chunk reads all of it, so that time grows with the square of the length. A length that
    would take longer than PATIENCE is left out, and its row says so.

    Raises:
        ValueError: for a name that is not that of a causal mixer.
    """
    causal = {name: cls for name, cls in MIXERS.items() if cls.causal}
    for name in names:
        choose("causal mixer", name, causal)
    return _rows(names or list(causal), lengths, chunk)


def _rows(names: Sequence[str], lengths: Sequence[int], chunk: int) -> Iterator[dict]:
    for name in names:
        expected = 0.0
        for length, following in zip(lengths, [*lengths[1:], 0]):
            if expected > PATIENCE:
                yield {**_setting(name, length, chunk), "note": f"left out: about {expected:.0f} s"}
            else:
                row = measure_memory(name, length, chunk, parallel=length <= PARALLEL)
                yield row
                expected = row["ms"] / 1e3 if row["note"] else 0.0
            expected *= (following / length) ** 2
