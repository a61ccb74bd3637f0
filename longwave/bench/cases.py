"""What the bench compares: every op beside what a peer runs on a CPU, on the same inputs.

The baselines are the formulas of the authors' repositories in plain torch, and the packages mambapy and transformers
where they are installed (``pip install -e '.[bench]'``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave import ops
from longwave.ops.weight_only_linear import packed, unpacked


@dataclass(frozen=True)
class Case:
    """An op and its baseline on the same inputs.

    Fields:
        name: of the row, the op first.
        baseline: what the other side is.
        inputs: makes the inputs of both sides for a length; those that require grad are differentiated.
        ours, theirs: map the inputs to outputs.
        lengths: L to measure at.
        layout: makes the baseline's inputs of ours, in the layout that it likes best; outside of what is timed.
        targets: of the ratios: {("forward" | "both", malloc): at least}.
        target_from: the least L that the targets are for.
        modes: what is timed: the forward pass, and both passes where the baseline's backward ends in reasonable time.
        note: what limits the ratio, told where a target is missed.
    """

    name: str
    baseline: str
    inputs: Callable[[int], list[Any]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    lengths: tuple[int, ...]
    layout: Callable[[list[Any]], list[Any]] = list
    targets: dict[tuple[str, str], float] = field(default_factory=dict)
    target_from: int = 1
    modes: tuple[str, ...] = ("forward", "both")
    note: str = ""


def randn(*shape: int) -> Tensor:
    """Normal numbers to be differentiated."""
    return torch.randn(*shape, requires_grad=True)


def rand(*shape: int) -> Tensor:
    """Uniform numbers in (0, 1) to be differentiated."""
    return torch.rand(*shape, requires_grad=True)


def time_last(inputs: list[Tensor]) -> list[Tensor]:
    """(B, L, C) as contiguous (B, C, L), the rest as it is."""
    return [t if t.ndim < 3 else t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs]


def _width(L: int) -> tuple[int, int]:
    """(B, C) that keep a convolution's work in reason."""
    return {1024: (4, 256), 4096: (4, 256), 16384: (4, 256), 65536: (1, 256), 262144: (1, 64)}.get(L, (1, 16))


def fft_conv(u: Tensor, k: Tensor, D: Tensor) -> Tensor:
    """The authors' fftconv_ref: time last, (B, C, L), zero-padded to 2L."""
    L = u.shape[-1]
    k_f = torch.fft.rfft(k, n=2 * L) / (2 * L)
    y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * k_f, n=2 * L, norm="forward")[..., :L]
    return y + u * D[:, None]


def _conv_inputs(L: int) -> list[Tensor]:
    B, C = _width(L)
    return [randn(B, L, C), randn(C, L), randn(C)]


def _gated_inputs(L: int) -> list[Tensor]:
    B, C = _width(L)
    return [*(randn(B, L, C) for _ in "qkv"), randn(C, L), randn(C)]


def naive_vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    """The naive kernel of S4D: all powers at once."""
    return 2 * (c[0, :, :, None] * torch.exp(x.log()[..., None] * torch.arange(length))).sum(1).real


def _modes(L: int) -> list[Any]:
    C = 256 if L <= 1024 else 64  # the naive form holds all of (C, 32, L)
    x = torch.exp(torch.complex(-torch.rand(C, 32) / 10, torch.rand(C, 32) * 3)).requires_grad_()
    return [x, torch.randn(1, C, 32, dtype=torch.complex64, requires_grad=True), L]


def _poles(L: int) -> list[Tensor]:
    C, N = 64, 32
    w = torch.complex(-torch.rand(C, N), 3 * torch.randn(C, N)).requires_grad_()
    roots = torch.exp(1j * torch.arange(L) * (math.pi / L))
    return [torch.randn(1, C, N, dtype=torch.complex64, requires_grad=True), 2 + roots, w]


def _structured(L: int) -> list[Tensor]:
    root = math.isqrt(L)
    w1, w2 = (randn(root, root, root) for _ in "12")
    dense = ops.monarch(torch.eye(root**2), w1, w2).detach().requires_grad_()
    return [randn(64, root**2), w1, w2, dense]


def conv1d_silu(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The depthwise conv1d and silu of the authors' Mamba, (B, C, L)."""
    K = weight.shape[1]
    return F.silu(F.conv1d(u, weight[:, None], bias, padding=K - 1, groups=len(weight))[..., : u.shape[-1]])


def _scan_inputs(L: int) -> list[Tensor]:
    E, N = 768, 16
    A = (-torch.arange(1.0, N + 1).expand(E, N)).clone().requires_grad_()
    return [randn(1, L, E), rand(1, L, E), A, randn(1, L, N), randn(1, L, N), randn(E)]


def mambapy_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba's scan as mambapy runs it: all of (B, L, E, N), a parallel scan of Blelloch's."""
    from mambapy.pscan import pscan

    h = pscan(torch.exp(dt[..., None] * A), dt[..., None] * B[:, :, None] * u[..., None])
    return (h @ C[..., None]).squeeze(3) + D * u


def wkv_loop(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """transformers' rwkv_linear_attention_cpu."""
    num, den, top = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e38)
    ys = []
    for t in range(k.shape[1]):
        best = torch.maximum(top, k[:, t] + u)
        e1, e2 = torch.exp(top - best), torch.exp(k[:, t] + u - best)
        ys.append((e1 * num + e2 * v[:, t]) / (e1 * den + e2))
        best = torch.maximum(top + w, k[:, t])
        e1, e2 = torch.exp(top + w - best), torch.exp(k[:, t] - best)
        num, den, top = e1 * num + e2 * v[:, t], e1 * den + e2, best
    return torch.stack(ys, dim=1)


def parallel_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The quadratic form of linear attention: all L x L products, masked by their decay."""
    total = decay.cumsum(1).transpose(1, 2)  # (B, H, L)
    mask = (total[..., None] - total[:, :, None]).tril().exp().tril()
    scores = torch.einsum("blhn,bshn->bhls", q, k) * mask
    return torch.einsum("bhls,bshp->blhp", scores, v)


def chunked_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, chunk: int = 64) -> Tensor:
    """The chunkwise form of the GLA paper (its listing 1): keys are divided by their decays, which overflows for strong
    ones; those here are weak. Of chunks of 32 to 128 steps 64 is the fastest here."""
    (B, L, H, N), P = q.shape, v.shape[3]
    q, k, v, decay = (F.pad(x, (0, 0, 0, 0, 0, -L % chunk)) for x in (q, k, v, decay))
    q, k, v, decay = (x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in (q, k, v, decay))
    total = decay.cumsum(3)  # (B, chunks, H, chunk, N)
    so_far, last = total.exp(), total[..., -1:, :]
    inner = ((q * so_far) @ (k * (-total).exp()).mT).tril() @ v
    kv, over_all = (k * (last - total).exp()).mT @ v, last.exp().mT
    state, states = q.new_zeros(B, H, N, P), []
    for i in range(kv.shape[1]):
        states.append(state)
        state = state * over_all[:, i] + kv[:, i]
    y = inner + (q * so_far) @ torch.stack(states, dim=1)
    return y.transpose(2, 3).flatten(1, 2)[:, :L]


def _heads_of(N: int, P: int) -> Callable[[int], list[Tensor]]:
    """Queries, keys and values of four heads."""
    return lambda L: [N**-0.5 * torch.randn(1, L, 4, N), torch.randn(1, L, 4, N), torch.randn(1, L, 4, P)]


def _retnet_inputs(L: int) -> list[Tensor]:
    """A layer of width 512 as RetNet's defaults have it; its decays are constant."""
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(4.0))))
    return [*(x.requires_grad_() for x in _heads_of(128, 256)(L)), decay]


def _gla_inputs(L: int) -> list[Tensor]:
    """A layer of width 512 as GLA's defaults have it."""
    decay = F.logsigmoid(torch.randn(1, L, 4, 64)) / 16
    return [x.requires_grad_() for x in (*_heads_of(64, 128)(L), decay)]


def _retention_inputs(L: int) -> list[Tensor]:
    H = 4 if L <= 2048 else 1  # the parallel form holds all of (H, L, L), several times
    return [*(randn(1, L, H, 64) for _ in "qkv"), (-torch.rand(1, L, H) / 10).requires_grad_()]


def _ssd_inputs(L: int) -> list[Tensor]:
    H, P, N = 8, 64, 128
    A = (-1 - 15 * torch.rand(H)).requires_grad_()
    dt = (torch.rand(1, L, H) / 10).requires_grad_()
    return [randn(1, L, H, P), dt, A, randn(1, L, 1, N), randn(1, L, 1, N), randn(H)]


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba-2's recurrence with its step sizes and its skip."""
    return ops.linear_attention(C, B, x * dt[..., None], dt * A)[0] + D[:, None] * x


def transformers_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same in the chunks of transformers' Mamba2Mixer."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D)


def _delta_rule_inputs(L: int) -> list[Tensor]:
    H, N = 4, 128
    q, k = (F.normalize(torch.randn(1, L, H, N), dim=-1).requires_grad_() for _ in "qk")
    return [q, k, randn(1, L, H, N), (-torch.rand(1, L, H)).requires_grad_(), rand(1, L, H)]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule of queries that are scaled as in attention."""
    return ops.gated_delta_rule(q * q.shape[3] ** -0.5, k, v, decay, beta)[0]


def transformers_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The same in the chunks of transformers' Qwen3-Next."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, decay, beta)[0]


def transformers_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """RetNet's recurrence as what it is to transformers' Mamba2Mixer: steps of 1, and no skip."""
    return transformers_ssd(v, torch.ones(v.shape[:3]), decay, k, q, torch.zeros(v.shape[2]))


def _head(form: str) -> Callable[[int], list[Any]]:
    """A head of 16,384 tokens on so many rows: as it is stored, and the same weights in float32."""

    def make(rows: int) -> list[Any]:
        x, weight = torch.randn(rows, 768), 768**-0.5 * torch.randn(16384, 768)
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16}.get(form)
        stored, scale = packed(weight) if dtype is None else (weight.to(dtype), None)
        return [x, unpacked(stored, scale, torch.float32), stored, scale]

    return make


CASES = (
    Case(
        "causal_conv",
        "torch.fft at 2L",
        _conv_inputs,
        lambda u, k, D: ops.causal_conv(u, k, skip=D),
        fft_conv,
        (1024, 4096, 16384, 65536, 262144, 1048576),
        time_last,
        targets={("forward", "default"): 5, ("forward", "tuned"): 4, ("both", "default"): 8, ("both", "tuned"): 6},
        note="up to 4k the calls around the kernels, from 16k on the bandwidth of the L3 cache and page faults",
    ),
    Case(
        "causal_conv gated",
        "torch.fft at 2L, gates apart",
        _gated_inputs,
        lambda q, k, v, h, D: ops.causal_conv(v, h, skip=D, gate_in=k, gate_out=q),
        lambda q, k, v, h, D: q * fft_conv(k * v, h, D),
        (1024, 4096, 16384),
        time_last,
        targets={("both", "default"): 7, ("both", "tuned"): 5},
        note="as causal_conv, and five gradients to write",
    ),
    Case(
        "selective_scan",
        "sequential reference",
        _scan_inputs,
        lambda *t: ops.selective_scan(*t)[0],
        lambda *t: ops.selective_scan(*t, backend="reference")[0],
        (1024,),
        targets={("forward", "default"): 50, ("forward", "tuned"): 30},
        modes=("forward",),  # backwards, each of the L slices makes a gradient of the whole: a minute a call
        note="exponentials: one a channel, state and step",
    ),
    Case(
        "selective_scan",
        "mambapy pscan",
        _scan_inputs,
        lambda *t: ops.selective_scan(*t)[0],
        mambapy_scan,
        (1024, 4096),
        targets={("both", "default"): 58, ("both", "tuned"): 50},
        note="exponentials, made again in the backward pass, and stores to the L1 cache: two a state and step",
    ),
    Case(
        "linear_scan",
        "sequential loop",
        lambda L: [rand(1, L, 1024), randn(1, L, 1024), randn(1, 1024)],
        ops.linear_scan,
        lambda *t: ops.linear_scan(*t, backend="reference"),
        (1024, 4096),
    ),
    Case(
        "vandermonde",
        "naive powers",
        _modes,
        ops.vandermonde,
        naive_vandermonde,
        (1024, 16384),
        targets={("both", "default"): 100, ("both", "tuned"): 100},
        note="at 1k the tables of powers, in complex128, are as long as the products",
    ),
    Case(
        "cauchy",
        "all of (C, N, L)",
        _poles,
        ops.cauchy,
        lambda *t: ops.cauchy(*t, backend="reference"),
        (1024, 16384),
    ),
    Case(
        "monarch",
        "dense matrix",
        _structured,
        lambda x, w1, w2, dense: ops.monarch(x, w1, w2),
        lambda x, w1, w2, dense: x @ dense,
        (1024, 4096),
    ),
    Case(
        "short_conv + silu",
        "torch conv1d + silu",
        lambda L: [randn(2, L, 1536), randn(1536, 4), randn(1536)],
        lambda *t: ops.short_conv(*t, silu=True)[0],
        conv1d_silu,
        (1024, 4096),
        time_last,
        targets={("both", "default"): 2.7, ("both", "tuned"): 2.5},
    ),
    Case(
        "wkv",
        "transformers' loop",
        lambda L: [randn(2, L, 768), randn(2, L, 768), (-torch.rand(768)).requires_grad_(), randn(768)],
        lambda *t: ops.wkv(*t)[0],
        wkv_loop,
        (1024,),
        targets={("both", "default"): 50, ("both", "tuned"): 30},
    ),
    Case(
        "wkv",
        "transformers' loop",
        lambda L: [randn(1, L, 768), randn(1, L, 768), (-torch.rand(768)).requires_grad_(), randn(768)],
        lambda *t: ops.wkv(*t)[0],
        wkv_loop,
        (8192,),
        modes=("forward",),  # backwards, each of the L slices makes a gradient of the whole: minutes a call
    ),
    Case(
        "linear_attention",
        "parallel form",
        _retention_inputs,
        lambda *t: ops.linear_attention(*t)[0],
        parallel_retention,
        (2048, 8192),
        targets={("both", "default"): 60, ("both", "tuned"): 40},
        target_from=8192,
    ),
    Case(
        "linear_attention of mamba2",
        "transformers' chunks",
        _ssd_inputs,
        ssd,
        transformers_ssd,
        (1024, 8192),
        targets={("both", "default"): 5, ("both", "tuned"): 5},
        note="products and sums: two a number of the state and step, and walk along time, of which there are four",
    ),
    Case(
        "linear_attention of retnet",
        "transformers' chunks",
        _retnet_inputs,
        lambda *t: ops.linear_attention(*t)[0],
        transformers_retention,
        (1024, 8192),
        targets={("both", "default"): 5},
        note="products and sums: two a number of the state and step, and walk along time, of which there are four",
    ),
    Case(
        "linear_attention of gla",
        "the paper's chunks",
        _gla_inputs,
        lambda *t: ops.linear_attention(*t)[0],
        chunked_gla,
        (1024, 8192),
        targets={("both", "default"): 5},
        note="products and sums: two a number of the state and step, and walk along time, of which there are four",
    ),
    Case(
        "gated_delta_rule",
        "transformers' chunks",
        _delta_rule_inputs,
        delta_rule,
        transformers_delta_rule,
        (1024, 8192),
        targets={("both", "default"): 5, ("both", "tuned"): 5},
        note="matrix products of 32 steps in the cache; theirs have 64, and grow as L^2 backwards",
    ),
    Case(
        "attention",
        "softmax of all L x L",
        lambda L: [randn(1, L, 8, 64) for _ in "qkv"],
        ops.attention,
        lambda *t: ops.attention(*t, backend="reference"),
        (1024, 4096),
    ),
    Case(
        "attention, window 128",
        "torch attention of all",
        lambda L: [randn(1, L, 8, 64) for _ in "qkv"],
        lambda *t: ops.attention(*t, window=128),
        ops.attention,
        (1024, 8192),
    ),
    Case(
        "attention_step",
        "torch attention",
        lambda T: [randn(1, 1, 8, 64), randn(1, T, 16, 64), torch.tensor([T])],
        ops.attention_step,
        lambda *t: ops.attention_step(*t, backend="torch"),
        (100, 8000),  # keys
        modes=("forward",),
        note="the bandwidth of memory",
    ),
    Case(
        "rotary",
        "torch, angles in float64",
        lambda L: [randn(1, L, 24, 64), 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)],
        lambda x, frequency: ops.rotary(x, None, frequency, 16),
        lambda x, frequency: ops.rotary(x, None, frequency, 16, backend="reference"),
        (1, 2048),
    ),
    Case(
        "rms_norm",
        "torch rms_norm",
        lambda L: [randn(1, L, 768), randn(768)],
        lambda x, weight: ops.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
        (1, 2048),
        note="of one row the call, else the bandwidth of memory",
    ),
    Case(
        "swiglu",
        "torch silu and a product",
        lambda L: [randn(1, L, 2, 2048)],
        ops.swiglu,
        lambda x: F.silu(x[..., 0, :]) * x[..., 1, :],
        (1, 2048),
        note="of one row the call, else the bandwidth of memory",
    ),
    *(
        Case(
            f"weight_only_linear {form}",
            "torch linear, float32",
            _head(form),
            lambda x, weight, stored, scale: ops.weight_only_linear(x, stored, None, scale),
            lambda x, weight, stored, scale: F.linear(x, weight),
            (1, 4, 32),  # rows
            modes=("forward",),
            note="the bandwidth of memory; of 32 rows, multiplications",
        )
        for form in ("float32", "bf16", "int8")
    ),
)
