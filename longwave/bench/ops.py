"""Every op beside the formula that the authors' repositories run in plain torch, interleaved in one process."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longwave import ops

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """An op and its baseline on the same inputs.

    Fields:
        op: name in :data:`longwave.ops.OPS`.
        baseline: what the other side is.
        inputs: makes the inputs of both for a length.
        ours, theirs: map the inputs to outputs.
        lengths: L to measure at.
    """

    op: str
    baseline: str
    inputs: Callable[[int], list[Tensor]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    lengths: tuple[int, ...] = (1024, 16384)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _fft_conv(u: Tensor, k: Tensor) -> Tensor:
    """The authors' fftconv_ref: time last, zero-padded to 2L."""
    u, L = u.transpose(1, 2), u.shape[1]
    y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(k, n=2 * L), n=2 * L)[..., :L]
    return y.transpose(1, 2)


def _vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    """The naive kernel of S4D: all powers at once."""
    return 2 * (c[0, :, :, None] * torch.exp(x.log()[..., None] * torch.arange(length))).sum(1).real


def _conv1d(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The depthwise conv1d of the authors' Mamba and Hyena."""
    K = weight.shape[1]
    y = F.conv1d(u.transpose(1, 2), weight[:, None], bias, padding=K - 1, groups=len(weight))[..., : u.shape[1]]
    return y.transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, backend="reference")


def _scan_inputs(L: int) -> list[Tensor]:
    E, N = 768, 16
    A = (-torch.rand(E, N)).requires_grad_()
    return [_draw(1, L, E), torch.rand(1, L, E, requires_grad=True), A, _draw(1, L, N), _draw(1, L, N)]


def _stable_modes(L: int) -> list[Tensor]:
    x = torch.exp(torch.complex(-torch.rand(256, 32) / 10, torch.rand(256, 32) * 3)).requires_grad_()
    return [x, torch.randn(1, 256, 32, dtype=torch.complex64, requires_grad=True)]


CASES = (
    Case("causal_conv", "torch.fft at 2L", lambda L: [_draw(4, L, 256), _draw(256, L)], ops.causal_conv, _fft_conv),
    Case(
        "short_conv",
        "torch conv1d",
        lambda L: [_draw(4, L, 256), _draw(256, 4), _draw(256)],
        lambda *t: ops.short_conv(*t)[0],
        _conv1d,
    ),
    Case(
        "linear_scan",
        "sequential loop",
        lambda L: [torch.rand(1, L, 1024, requires_grad=True), _draw(1, L, 1024), _draw(1, 1024)],
        ops.linear_scan,
        lambda *t: ops.linear_scan(*t, backend="reference"),
        (1024,),
    ),
    Case(
        "selective_scan",
        "sequential reference",
        _scan_inputs,
        lambda *t: ops.selective_scan(*t)[0],
        lambda *t: ops.selective_scan(*t, backend="reference")[0],
        (1024,),
    ),
    Case(
        "attention",
        "softmax of all L x L",
        lambda L: [_draw(1, L, 8, 64) for _ in "qkv"],
        ops.attention,
        _softmax_attention,
        (1024, 4096),
    ),
)
VANDERMONDE = Case("vandermonde", "naive powers", _stable_modes, ops.vandermonde, _vandermonde, (1024, 16384))


def _both(case: Case, L: int) -> tuple[Callable[[], Any], Callable[[], Any], list[Tensor]]:
    inputs = case.inputs(L)
    extra = [L] if case is VANDERMONDE else []
    return (lambda: case.ours(*inputs, *extra)), (lambda: case.theirs(*inputs, *extra)), inputs


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, L: int, repeats: int = 7) -> dict[str, Any]:
    """Median milliseconds of both sides, forward and forward + backward, taken in turn, and their ratios."""
    ours, theirs, inputs = _both(case, L)

    def with_backward(run: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> None:
            loss = sum(t.abs().sum() if t.is_complex() else t.sum() for t in tree_leaves(run()))
            torch.autograd.grad(loss, inputs)

        return step

    result: dict[str, Any] = {"op": case.op, "against": case.baseline, "L": L}
    for name, wrap in (("forward", lambda run: run), ("both", with_backward)):
        pair = [wrap(ours), wrap(theirs)]
        times: list[list[float]] = [[], []]
        for turn in range(repeats + 1):
            for side, run in enumerate(pair):
                taken = _timed(run)
                if turn:  # the first turn warms up
                    times[side].append(taken)
        a, b = (statistics.median(t) * 1e3 for t in times)
        result |= {f"{name}_ms": round(a, 3), f"{name}_baseline_ms": round(b, 3), f"{name}_ratio": round(b / a, 2)}
    return result


def record(rows: list[dict[str, Any]]) -> Path:
    """Append the rows to benchmarks/results/ops.jsonl with commit, machine and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    setting = {
        "commit": commit or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "malloc": "default",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "ops.jsonl").open("a") as stream:
        for row in rows:
            stream.write(json.dumps({**setting, **row}) + "\n")
    return RESULTS / "ops.jsonl"
