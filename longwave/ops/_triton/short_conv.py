# mypy: no-check-untyped-defs
"""Short depthwise convolution: a tile of time and channels reads its inputs K times, K - 1 of these from the cache."""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import launch, rows, size, tuned
from longwave.ops.short_conv import last_inputs

TAPS = 32  # the loop over taps is unrolled
TIME = size(32, 8)  # steps of a tile in the backward pass, whose sums over tiles are added up afterwards


def why_not(u, weight, bias, state, silu):
    """The reason, or None."""
    K = weight.shape[1]
    return f"weight has K = {K} taps; at most {TAPS} are unrolled" if K > TAPS else None


def forward(u, weight, bias, state, silu):
    """y (B, L, C), and the last K - 1 inputs."""
    (B, L, C), K = u.shape, weight.shape[1]
    x, past, y = rows(u), None if state is None else rows(state), u.new_empty(u.shape)
    launch(
        _forward,
        lambda meta: B * triton.cdiv(L, meta["BT"]) * triton.cdiv(C, meta["BC"]),
        y, x, weight.contiguous(), bias, past, L, C, *_strides(x), *_strides(past), K, silu,
    )  # fmt: skip
    return y, last_inputs(u, state, K)


def backward(needed, dy, dlast, u, weight, bias, state, silu):
    """What is before the first step has gradients as u has, so time starts at -(K - 1) where they are wanted.

    The pre-activation is made again, at each tap, which costs no memory.
    """
    (B, L, C), K = u.shape, weight.shape[1]
    early = K - 1 if "state" in needed else 0
    dy = u.new_zeros(1, 1, 1).expand(B, L, C) if dy is None else dy
    x, dy, past = rows(u), dy.contiguous(), None if state is None else rows(state)
    tiles = B * triton.cdiv(L + early, TIME)
    sums = u.new_empty(tiles, K + 1, C, dtype=torch.float32)
    du, dstate = u.new_empty(u.shape), u.new_empty((B, early, C), dtype=(u if state is None else state).dtype)
    launch(
        _backward,
        lambda meta: tiles * triton.cdiv(C, meta["BC"]),
        du, dstate, sums, dy, None if dlast is None else dlast.contiguous(), x, weight.contiguous(), bias, past, L, C,
        *_strides(x), *_strides(past), K, silu, early, TIME,
    )  # fmt: skip
    sums = sums.sum(0)
    return {"u": du, "weight": sums[:K].T, "bias": sums[K], "state": dstate}


def _strides(x):
    return (0, 0) if x is None else x.stride()[:2]


@triton.jit
def _inputs(u, state, first, s, c, C, L, u_t, state_t, K: tl.constexpr):
    """Those at steps first + s, from -(K - 1) on, 0 beyond, where u points at step first: so offsets have 32 bits."""
    t = first + s
    x = tl.load(u + s * u_t + c, mask=(t >= 0) & (t < L) & (c < C), other=0.0).to(tl.float32)
    if state is not None:
        early = (t < 0) & (t > -K) & (c < C)
        x += tl.load(state + (t + K - 1) * state_t + c, mask=early, other=0.0).to(tl.float32)
    return x


@triton.jit
def _convolved(u, weight, bias, state, first, s, c, C, L, u_t, state_t, K: tl.constexpr):
    w_at = weight + c * K + K - 1
    y = tl.load(w_at, mask=c < C, other=0.0).to(tl.float32) * _inputs(u, state, first, s, c, C, L, u_t, state_t, K)
    for j in tl.static_range(1, K):
        w = tl.load(w_at - j, mask=c < C, other=0.0).to(tl.float32)
        y += w * _inputs(u, state, first, s - j, c, C, L, u_t, state_t, K)
    if bias is not None:
        y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return y


@tuned(
    ["C", "K"],
    {"BT": size(32, 8), "BC": size(128, 4), "num_warps": 4},
    {"BT": 16, "BC": 256, "num_warps": 4},
    {"BT": 64, "BC": 64, "num_warps": 4},
    {"BT": 16, "BC": 128, "num_warps": 2},
    {"BT": 64, "BC": 128, "num_warps": 8},
)
def _forward(
    y, u, weight, bias, state, L, C, u_b, u_t, state_b, state_t, K: tl.constexpr, silu: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(C, BC), tl.cdiv(L, BT)
    row = tl.program_id(0).to(tl.int64)
    batch, tile, block = row // blocks // tiles, row // blocks % tiles, row % blocks
    s, first = tl.arange(0, BT)[:, None], (tile * BT).to(tl.int32)
    c = (block * BC).to(tl.int32) + tl.arange(0, BC)[None, :]
    if state is not None:
        state += batch * state_b
    p = _convolved(u + batch * u_b + tile * BT * u_t, weight, bias, state, first, s, c, C, L, u_t, state_t, K)
    if silu:
        p = p / (1 + tl.exp(-p))
    tl.store(y + (batch * L + tile * BT) * C + (s * C + c), p, mask=(s < L - first) & (c < C))


@tuned(
    ["C", "K"],
    {"BC": size(64, 4), "num_warps": 8},
    {"BC": 64, "num_warps": 4},
    {"BC": 128, "num_warps": 8},
    {"BC": 32, "num_warps": 4},
)
def _backward(
    du, dstate, sums, dy, dlast, u, weight, bias, state, L, C, u_b, u_t, state_b, state_t, K: tl.constexpr,
    silu: tl.constexpr, early: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(C, BC), tl.cdiv(L + early, BT)
    row = tl.program_id(0).to(tl.int64)
    batch, tile, block = row // blocks // tiles, row // blocks % tiles, row % blocks
    start = tile * BT - early
    s, first = tl.arange(0, BT)[:, None], start.to(tl.int32)
    c = (block * BC).to(tl.int32) + tl.arange(0, BC)[None, :]
    t, here = first + s, (batch * L + start) * C
    u += batch * u_b + start * u_t
    if state is not None:
        state += batch * state_b
    grad = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(K):
        there = (t >= -j) & (t < L - j) & (c < C)
        g = tl.load(dy + here + ((s + j) * C + c), mask=there, other=0.0).to(tl.float32)
        if silu:
            p = _convolved(u, weight, bias, state, first, s + j, c, C, L, u_t, state_t, K)
            share = 1 / (1 + tl.exp(-p))
            g *= share * (1 + p * (1 - share))
        grad += tl.load(weight + c * K + K - 1 - j, mask=c < C, other=0.0).to(tl.float32) * g
        if j == 0:
            at = sums + (batch * tiles + tile) * (K + 1) * C + c
            for i in tl.static_range(K):
                x = _inputs(u, state, first, s - i, c, C, L, u_t, state_t, K)
                tl.store(at + (K - 1 - i) * C, tl.sum(g * x, 0)[None, :], mask=c < C)
            tl.store(at + K * C, tl.sum(g, 0)[None, :], mask=c < C)
    if dlast is not None:
        kept = t - L + K - 1
        inside = (kept >= 0) & (kept < K - 1) & (c < C)
        grad += tl.load(dlast + batch * (K - 1) * C + (kept * C + c), mask=inside, other=0.0).to(tl.float32)
    tl.store(du + here + (s * C + c), grad, mask=(t >= 0) & (t < L) & (c < C))
    if early > 0:
        tl.store(dstate + batch * early * C + ((t + early) * C + c), grad, mask=(t < 0) & (c < C))
