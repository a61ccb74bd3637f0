"""Ops on a GPU in bfloat16: what auto chooses beside torch's operations, and beside the floor of its memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longwave import ops
from longwave.bench.cases import Case
from longwave.bench.ops import runner, traffic
from longwave.errors import choose

DEVICE_COLUMNS = (
    "op", "backend", "against", "L", "batch", "mode", "ms", "baseline_ms", "ratio", "floor_ms", "of_floor", "peak_mb"
)  # fmt: skip
ELEMENTS = 2**19  # batch times length; a batch is no more than 64


def _low(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)


def _batch(L: int) -> int:
    return max(1, min(64, ELEMENTS // L))


def _conv(L: int) -> list[Any]:
    B, D = _batch(L), 768
    k = (torch.randn(D, L) / L**0.5).requires_grad_()
    return [_low(B, L, D), k, _low(D), _low(B, L, D), _low(B, L, D)]


def _gated(backend: str) -> Callable[..., Tensor]:
    return lambda u, k, skip, a, b: ops.causal_conv(u, k, skip=skip, gate_in=a, gate_out=b, backend=backend)


def _short(L: int) -> list[Any]:
    return [_low(_batch(L), L, 1536), _low(1536, 4), _low(1536)]


def _silu(backend: str) -> Callable[..., Any]:
    return lambda u, weight, bias: ops.short_conv(u, weight, bias, None, silu=True, backend=backend)[0]


def _s6(L: int) -> list[Any]:
    B, E, N = max(1, _batch(L) // 8), 2048, 16
    A = (-torch.rand(E, N)).requires_grad_()
    return [_low(B, L, E), _low(B, L, E), A, _low(B, L, N), _low(B, L, N), _low(E), _low(B, L, E), _low(E)]


def _mamba(backend: str) -> Callable[..., Any]:
    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return ops.selective_scan(u, dt, A, B, C, D, z=z, dt_bias=bias, softplus=True, backend=backend)[0]

    return run


def _attention(u: Tensor, *others: Tensor) -> Tensor:
    """Causal attention of the same width, 64 a head, on inputs that are there."""
    q = u.unflatten(2, (-1, 64))
    return ops.attention(q, q, q).flatten(2)


def _scan(L: int) -> list[Any]:
    B, C = max(1, _batch(L) // 4), 1024
    return [torch.rand(B, L, C, requires_grad=True), torch.randn(B, L, C, requires_grad=True), torch.zeros(B, C)]


def _heads(L: int) -> list[Any]:
    B, H, N = max(1, _batch(L) // 8), 16, 64
    decay = (-torch.rand(B, L, H)).requires_grad_()
    return [_low(B, L, H, N), _low(B, L, H, N), _low(B, L, H, N), decay]


def _delta(L: int) -> list[Any]:
    q, k, v, decay = _heads(L)
    beta = torch.rand_like(decay).requires_grad_()
    k = torch.nn.functional.normalize(k.detach().float(), dim=-1).bfloat16().requires_grad_()
    return [q, k, v, decay.detach().requires_grad_(), beta]


def _average(L: int) -> list[Any]:
    B, C = max(1, _batch(L) // 4), 1024
    return [_low(B, L, C), _low(B, L, C), (-torch.rand(C)).requires_grad_(), torch.zeros(C, requires_grad=True)]


def _rows(L: int) -> list[Any]:
    return [_low(_batch(L), L, 1024), _low(1024)]


def _first(op: Any) -> Callable[[str], Callable[..., Any]]:
    """The first result alone, as in a training without states."""
    return lambda backend: lambda *inputs: op(*inputs, backend=backend)[0]


def _all(op: Any) -> Callable[[str], Callable[..., Any]]:
    return lambda backend: lambda *inputs: op(*inputs, backend=backend)


OPS: dict[str, tuple[Callable[[int], list[Any]], Callable[[str], Callable[..., Any]], tuple[int, ...]]] = {
    "short_conv": (_short, _silu, (2048, 16384)),
    "selective_scan": (_s6, _mamba, (2048, 16384, 65536)),
    "linear_scan": (_scan, _all(ops.linear_scan), (2048, 65536)),
    "wkv": (_average, _first(ops.wkv), (2048, 16384)),
    "linear_attention": (_heads, _first(ops.linear_attention), (2048, 16384)),
    "gated_delta_rule": (_delta, _first(ops.gated_delta_rule), (2048, 16384)),
    "rms_norm": (_rows, _all(ops.rms_norm), (2048,)),
    "causal_conv": (_conv, _gated, (1024, 4096, 8192, 16384)),
}
CASES = [
    *(Case(name, "torch", inputs, run("auto"), run("torch"), lengths) for name, (inputs, run, lengths) in OPS.items()),
    Case("selective_scan", "attention", _s6, _mamba("auto"), _attention, (1024, 2048, 4096), modes=("forward",)),
]


def bench_device(names: list[str], repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """A row for each case, length and pass.

    Raises:
        ValueError: for a name that no measured op has, or where there is no such device.
    """
    for name in names:
        choose("op in the bench", name, OPS)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench --device cuda: torch finds no such device; `longwave doctor` says why")
    return _measured([case for case in CASES if case.name in (names or OPS)], repeats, device)


def _measured(cases: list[Case], repeats: int, device: str) -> Iterator[dict[str, Any]]:
    with torch.device(device):
        moved = bandwidth(device)
        for case in cases:
            for L in case.lengths:
                for mode in case.modes:
                    yield measure_on(case, L, mode, device, moved, repeats)


def measure_on(case: Case, L: int, mode: str, device: str, moved: float, repeats: int) -> dict[str, Any]:
    """One row: medians of both sides in turn, after two calls of each that tune and warm up.

    Args:
        case, L, mode: what.
        moved: bytes a nanosecond that the device's memory moves.
        repeats: pairs.
    """
    with torch.device(device):
        inputs = case.inputs(L)
        sides = [runner(run, inputs, mode) for run in (case.ours, case.theirs)]
        peaks = [_peak(side, device) for side in sides for _ in "12"][1::2]
        pairs = [[milliseconds(side, device) for side in sides] for _ in range(repeats)]
        ours, theirs = (statistics.median(column) for column in zip(*pairs))
        _, needed = traffic(case, L, mode)
    floor = needed / moved / 1e6
    backends = ops.OPS[case.name].refusals(device)
    return {
        "op": case.name,
        "backend": next(name for name, why in backends.items() if why is None),
        "against": case.baseline,
        "L": L,
        "batch": len(inputs[0]),
        "mode": mode,
        "ms": round(ours, 4),
        "baseline_ms": round(theirs, 4),
        "ratio": round(theirs / ours, 2),
        "floor_ms": round(floor, 4),
        "of_floor": round(ours / floor, 2),
        "peak_mb": round(peaks[0], 1),
        "baseline_peak_mb": round(peaks[1], 1),
        "gb_per_second": round(moved, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """How long a call takes on the device: by its own events on an accelerator."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in "12")
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def bandwidth(device: str) -> float:
    """Bytes read and written a nanosecond by a copy that no cache holds: the best of nine."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(milliseconds(lambda: target.copy_(source), device) for _ in range(9)) / 1e6


def _peak(run: Callable[[], Any], device: str) -> float:
    """MB that a call holds at its peak above what is held before; nan on a CPU."""
    if device == "cpu":
        run()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
