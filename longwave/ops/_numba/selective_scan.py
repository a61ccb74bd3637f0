# mypy: no-check-untyped-defs
"""The selective scan in one pass over time, and its gradient from a state kept every T steps.

The lanes are neighbouring channels. A task is a strip of up to STRIP blocks of LANES channels in one group, for which a
row of B and C is read once. It walks through time in chunks of T steps, and in each from block to block: what a block
needs of a chunk, (T, LANES) an array, stays in the L1 cache. Its states are taken four at a time (N is a multiple of
four) and stay in registers for the whole chunk. States and A come with the channel last, (N, E), as everything does.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.pool import empty, flat, memory, run
from longwave.ops._numba.simd import (
    exp2,
    floats,
    fma,
    load,
    load_first,
    load_splat,
    sigmoid,
    softplus,
    splat,
    store,
    store_first,
    store_sums,
    sum_lanes,
    widest,
    zero,
)

R = widest  # lanes of a register
LANES = R.lanes
T = 32  # steps between two kept states
STRIP = 8  # fewer blocks a task make more partial sums of dB and dC, more leave threads idle
ROW = T * LANES
LOG2_E, LN_2, ONE = np.float32(1.4426950408889634), np.float32(0.6931471805599453), np.float32(1.0)


@kernel
def _fetch(target, source, place, stride, rows, width):
    """target[r, lane] = source[place + r * stride + lane], and zero from lane ``width`` on."""
    if width == LANES:
        for r in range(rows):
            store(target, r * LANES, load(R, source, place + r * stride))
    else:
        for r in range(rows):
            store(target, r * LANES, load_first(R, source, place + r * stride, width))


@kernel
def _put(target, place, stride, source, rows, width):
    """The way back: target[place + r * stride + lane] = source[r, lane]  for lane < width."""
    if width == LANES:
        for r in range(rows):
            store(target, place + r * stride, load(R, source, r * LANES))
    else:
        for r in range(rows):
            store_first(target, place + r * stride, load(R, source, r * LANES), width)


@kernel
def _add(target, place, source, width):
    """target[place + lane] += source[lane] in float64: the sums over time of the gradients of parameters."""
    for lane in range(width):
        target[place + lane] += source[lane]


@kernel
def _store_sums(target, place, source, i):
    """target[place + k] = the sum of the lanes of the k-th vector behind source[i], k < 4."""
    a, b = load(R, source, i), load(R, source, i + LANES)
    store_sums(target, place, a, b, load(R, source, i + 2 * LANES), load(R, source, i + 3 * LANES))


@kernel
def _strip(task, parts, E, G):
    """The batch, the group and the channels from ``low`` to ``high`` of a task."""
    group = task // parts % G
    low = group * (E // G) + task % parts * (STRIP * LANES)
    return task // parts // G, group, low, min(low + STRIP * LANES, (group + 1) * (E // G))


@kernel
def _scale(x, count, factor):
    for i in range(0, count, LANES):
        store(x, i, load(R, x, i) * splat(R, factor))


@kernel
def _forward(
    start, stop, scratch,
    u, dt, A, B, C, D, state, z, dt_bias, y, last, kept,
    L, E, N, G, parts, z_stride, with_softplus, with_gate, keep,
):  # fmt: skip
    size = N * LANES  # of the states of a block
    decays, states = scratch[: STRIP * size], scratch[STRIP * size : 2 * STRIP * size]
    rest = scratch[2 * STRIP * size :]
    step, drive, out, gate = rest[:ROW], rest[ROW : 2 * ROW], rest[2 * ROW : 3 * ROW], rest[3 * ROW : 4 * ROW]
    skip, bias = rest[4 * ROW : 5 * ROW], rest[5 * ROW : 6 * ROW]
    chunks = (L + T - 1) // T
    for task in range(start, stop):
        batch, group, low, high = _strip(task, parts, E, G)
        blocks = (high - low + LANES - 1) // LANES
        for k in range(blocks):
            e = low + k * LANES
            width = min(LANES, high - e)
            _fetch(decays[k * size :], A, e, E, N, width)
            _fetch(states[k * size :], state, batch * N * E + e, E, N, width)
            _fetch(skip[k * LANES :], D, e, 0, 1, width)
            _fetch(bias[k * LANES :], dt_bias, e, 0, 1, width)
        _scale(decays, blocks * size, LOG2_E)
        for chunk in range(chunks):
            first = batch * L + chunk * T  # row of (B L)
            rows = min(T, L - chunk * T)
            for k in range(blocks):
                e = low + k * LANES
                width = min(LANES, high - e)
                if keep:
                    _put(kept, (batch * chunks + chunk) * N * E + e, E, states[k * size :], N, width)
                _fetch(step, dt, first * E + e, E, rows, width)
                _fetch(drive, u, first * E + e, E, rows, width)
                for t in range(0, rows * LANES, LANES):
                    dt_t = load(R, step, t) + load(R, bias, k * LANES)
                    if with_softplus:
                        dt_t = softplus(dt_t)
                    u_t = load(R, drive, t)
                    store(step, t, dt_t)
                    store(drive, t, dt_t * u_t)
                    store(out, t, load(R, skip, k * LANES) * u_t)
                for n in range(0, N, 4):
                    i = k * size + n * LANES
                    A0, A1 = load(R, decays, i), load(R, decays, i + LANES)
                    A2, A3 = load(R, decays, i + 2 * LANES), load(R, decays, i + 3 * LANES)
                    h0, h1 = load(R, states, i), load(R, states, i + LANES)
                    h2, h3 = load(R, states, i + 2 * LANES), load(R, states, i + 3 * LANES)
                    m = (first * G + group) * N + n
                    for t in range(0, rows * LANES, LANES):
                        dt_t, drive_t = load(R, step, t), load(R, drive, t)
                        h0 = fma(exp2(dt_t * A0), h0, drive_t * load_splat(R, B, m))
                        h1 = fma(exp2(dt_t * A1), h1, drive_t * load_splat(R, B, m + 1))
                        h2 = fma(exp2(dt_t * A2), h2, drive_t * load_splat(R, B, m + 2))
                        h3 = fma(exp2(dt_t * A3), h3, drive_t * load_splat(R, B, m + 3))
                        y_t = fma(h0, load_splat(R, C, m), load(R, out, t))
                        y_t = fma(h1, load_splat(R, C, m + 1), y_t)
                        y_t = fma(h2, load_splat(R, C, m + 2), y_t)
                        store(out, t, fma(h3, load_splat(R, C, m + 3), y_t))
                        m += G * N
                    store(states, i, h0)
                    store(states, i + LANES, h1)
                    store(states, i + 2 * LANES, h2)
                    store(states, i + 3 * LANES, h3)
                if with_gate:
                    _fetch(gate, z, first * z_stride + e, z_stride, rows, width)
                    for t in range(0, rows * LANES, LANES):
                        z_t = load(R, gate, t)
                        store(out, t, load(R, out, t) * (z_t * sigmoid(z_t)))
                _put(y, first * E + e, E, out, rows, width)
        for k in range(blocks):
            e = low + k * LANES
            _put(last, batch * N * E + e, E, states[k * size :], N, min(LANES, high - e))


@kernel
def _backward(
    start, stop, scratch,
    u, dt, A, B, C, D, z, dt_bias, kept, dy, dlast,
    du, ddt, dA, dB, dC, dD, dstate, dz, ddt_bias,
    L, E, N, G, parts, z_stride, with_softplus, with_gate,
):  # fmt: skip
    size = N * LANES
    decays, carries = scratch[: STRIP * size], scratch[STRIP * size : 2 * STRIP * size]
    rest = scratch[2 * STRIP * size :]
    sum_B, sum_C = rest[: T * size], rest[T * size : 2 * T * size]  # (T, N, LANES) over the blocks
    rest = rest[2 * T * size :]
    step, slope, value, drive = rest[:ROW], rest[ROW : 2 * ROW], rest[2 * ROW : 3 * ROW], rest[3 * ROW : 4 * ROW]
    out, grad, gate = rest[4 * ROW : 5 * ROW], rest[5 * ROW : 6 * ROW], rest[6 * ROW : 7 * ROW]
    d_step, d_drive = rest[7 * ROW : 8 * ROW], rest[8 * ROW : 9 * ROW]
    factors, before = rest[9 * ROW : 13 * ROW], rest[13 * ROW : 17 * ROW]  # (T, 4, LANES): four states' decays, h[t-1]
    skip, bias, sums = rest[17 * ROW : 18 * ROW], rest[18 * ROW : 19 * ROW], rest[19 * ROW : 20 * ROW]
    chunks = (L + T - 1) // T
    one = splat(R, ONE)
    for task in range(start, stop):
        batch, group, low, high = _strip(task, parts, E, G)
        blocks = (high - low + LANES - 1) // LANES
        for k in range(blocks):
            e = low + k * LANES
            width = min(LANES, high - e)
            _fetch(decays[k * size :], A, e, E, N, width)
            _fetch(carries[k * size :], dlast, batch * N * E + e, E, N, width)
            _fetch(skip[k * LANES :], D, e, 0, 1, width)
            _fetch(bias[k * LANES :], dt_bias, e, 0, 1, width)
        _scale(decays, blocks * size, LOG2_E)
        for chunk in range(chunks - 1, -1, -1):
            first = batch * L + chunk * T
            rows = min(T, L - chunk * T)
            for i in range(0, rows * size, LANES):
                store(sum_B, i, zero(R))
                store(sum_C, i, zero(R))
            for k in range(blocks):
                e = low + k * LANES
                width = min(LANES, high - e)
                _fetch(step, dt, first * E + e, E, rows, width)
                _fetch(value, u, first * E + e, E, rows, width)
                _fetch(grad, dy, first * E + e, E, rows, width)
                if with_gate:
                    _fetch(gate, z, first * z_stride + e, z_stride, rows, width)
                    for t in range(0, rows * LANES, LANES):
                        z_t, dy_t = load(R, gate, t), load(R, grad, t)
                        s = sigmoid(z_t)
                        store(grad, t, dy_t * (z_t * s))
                        store(gate, t, dy_t * (s * fma(z_t, one - s, one)))  # times y before the gate it is dz
                for t in range(0, rows * LANES, LANES):
                    dt_t = load(R, step, t) + load(R, bias, k * LANES)
                    if with_softplus:
                        store(slope, t, sigmoid(dt_t))
                        dt_t = softplus(dt_t)
                    else:
                        store(slope, t, one)
                    u_t = load(R, value, t)
                    store(step, t, dt_t)
                    store(drive, t, dt_t * u_t)
                    store(out, t, load(R, skip, k * LANES) * u_t)
                    store(d_step, t, zero(R))
                    store(d_drive, t, zero(R))
                for n in range(0, N, 4):
                    i = k * size + n * LANES
                    A0, A1 = load(R, decays, i), load(R, decays, i + LANES)
                    A2, A3 = load(R, decays, i + 2 * LANES), load(R, decays, i + 3 * LANES)
                    _fetch(sums, kept, ((batch * chunks + chunk) * N + n) * E + e, E, 4, width)
                    h0, h1, h2, h3 = (
                        load(R, sums, 0),
                        load(R, sums, LANES),
                        load(R, sums, 2 * LANES),
                        load(R, sums, 3 * LANES),
                    )
                    m = (first * G + group) * N + n
                    for t in range(0, rows * LANES, LANES):
                        dt_t, drive_t = load(R, step, t), load(R, drive, t)
                        store(before, 4 * t, h0)
                        store(before, 4 * t + LANES, h1)
                        store(before, 4 * t + 2 * LANES, h2)
                        store(before, 4 * t + 3 * LANES, h3)
                        a0, a1, a2, a3 = exp2(dt_t * A0), exp2(dt_t * A1), exp2(dt_t * A2), exp2(dt_t * A3)
                        store(factors, 4 * t, a0)
                        store(factors, 4 * t + LANES, a1)
                        store(factors, 4 * t + 2 * LANES, a2)
                        store(factors, 4 * t + 3 * LANES, a3)
                        h0 = fma(a0, h0, drive_t * load_splat(R, B, m))
                        h1 = fma(a1, h1, drive_t * load_splat(R, B, m + 1))
                        h2 = fma(a2, h2, drive_t * load_splat(R, B, m + 2))
                        h3 = fma(a3, h3, drive_t * load_splat(R, B, m + 3))
                        y_t = fma(h0, load_splat(R, C, m), load(R, out, t))
                        y_t = fma(h1, load_splat(R, C, m + 1), y_t)
                        y_t = fma(h2, load_splat(R, C, m + 2), y_t)
                        store(out, t, fma(h3, load_splat(R, C, m + 3), y_t))
                        m += G * N
                    g0, g1 = load(R, carries, i), load(R, carries, i + LANES)
                    g2, g3 = load(R, carries, i + 2 * LANES), load(R, carries, i + 3 * LANES)
                    dA0, dA1, dA2, dA3 = zero(R), zero(R), zero(R), zero(R)
                    for t in range((rows - 1) * LANES, -1, -LANES):
                        m -= G * N
                        dt_t, drive_t, dy_t = load(R, step, t), load(R, drive, t), load(R, grad, t)
                        g0 = fma(dy_t, load_splat(R, C, m), g0)  # of h[t]
                        g1 = fma(dy_t, load_splat(R, C, m + 1), g1)
                        g2 = fma(dy_t, load_splat(R, C, m + 2), g2)
                        g3 = fma(dy_t, load_splat(R, C, m + 3), g3)
                        j = t * N + n * LANES
                        store(sum_C, j, fma(dy_t, h0, load(R, sum_C, j)))
                        store(sum_C, j + LANES, fma(dy_t, h1, load(R, sum_C, j + LANES)))
                        store(sum_C, j + 2 * LANES, fma(dy_t, h2, load(R, sum_C, j + 2 * LANES)))
                        store(sum_C, j + 3 * LANES, fma(dy_t, h3, load(R, sum_C, j + 3 * LANES)))
                        store(sum_B, j, fma(g0, drive_t, load(R, sum_B, j)))
                        store(sum_B, j + LANES, fma(g1, drive_t, load(R, sum_B, j + LANES)))
                        store(sum_B, j + 2 * LANES, fma(g2, drive_t, load(R, sum_B, j + 2 * LANES)))
                        store(sum_B, j + 3 * LANES, fma(g3, drive_t, load(R, sum_B, j + 3 * LANES)))
                        x = fma(g0, load_splat(R, B, m), load(R, d_drive, t))
                        x = fma(g1, load_splat(R, B, m + 1), x)
                        x = fma(g2, load_splat(R, B, m + 2), x)
                        store(d_drive, t, fma(g3, load_splat(R, B, m + 3), x))
                        h0, h1 = load(R, before, 4 * t), load(R, before, 4 * t + LANES)
                        h2, h3 = load(R, before, 4 * t + 2 * LANES), load(R, before, 4 * t + 3 * LANES)
                        g0, g1 = (
                            g0 * load(R, factors, 4 * t),
                            g1 * load(R, factors, 4 * t + LANES),
                        )  # of h[t-1], so far
                        g2, g3 = (
                            g2 * load(R, factors, 4 * t + 2 * LANES),
                            g3 * load(R, factors, 4 * t + 3 * LANES),
                        )
                        x0, x1, x2, x3 = g0 * h0, g1 * h1, g2 * h2, g3 * h3  # of dt A
                        dA0, dA1, dA2, dA3 = (
                            fma(x0, dt_t, dA0),
                            fma(x1, dt_t, dA1),
                            fma(x2, dt_t, dA2),
                            fma(x3, dt_t, dA3),
                        )
                        x = fma(x1, A1, fma(x0, A0, load(R, d_step, t)))
                        store(d_step, t, fma(x3, A3, fma(x2, A2, x)))
                    store(carries, i, g0)
                    store(carries, i + LANES, g1)
                    store(carries, i + 2 * LANES, g2)
                    store(carries, i + 3 * LANES, g3)
                    store(sums, 0, dA0)
                    store(sums, LANES, dA1)
                    store(sums, 2 * LANES, dA2)
                    store(sums, 3 * LANES, dA3)
                    for j in range(4):
                        _add(dA, (batch * N + n + j) * E + e, sums[j * LANES :], width)
                sum_D, sum_bias = zero(R), zero(R)
                for t in range(0, rows * LANES, LANES):
                    dy_t, u_t, d_drive_t = load(R, grad, t), load(R, value, t), load(R, d_drive, t)
                    x = fma(load(R, d_step, t), splat(R, LN_2), d_drive_t * u_t) * load(R, slope, t)
                    sum_D, sum_bias = fma(dy_t, u_t, sum_D), sum_bias + x
                    store(d_step, t, x)
                    store(d_drive, t, fma(d_drive_t, load(R, step, t), dy_t * load(R, skip, k * LANES)))
                    store(gate, t, load(R, gate, t) * load(R, out, t))
                _put(ddt, first * E + e, E, d_step, rows, width)
                _put(du, first * E + e, E, d_drive, rows, width)
                if with_gate:
                    _put(dz, first * E + e, E, gate, rows, width)
                store(sums, 0, sum_D)
                store(sums, LANES, sum_bias)
                _add(dD, batch * E + e, sums, width)
                _add(ddt_bias, batch * E + e, sums[LANES:], width)
            part = task % parts * (len(dB) // parts)
            for t in range(rows):
                m = part + ((first + t) * G + group) * N
                for n in range(0, N, 4):
                    j = t * size + n * LANES
                    _store_sums(dB, m + n, sum_B, j)
                    _store_sums(dC, m + n, sum_C, j)
        for k in range(blocks):
            e = low + k * LANES
            _put(dstate, batch * N * E + e, E, carries[k * size :], N, min(LANES, high - e))


def _channel_last(x: Tensor) -> np.ndarray:
    """(..., E, N) as flat (..., N, E)."""
    return flat(x.detach().transpose(-1, -2))


def _rows(x: Tensor | None) -> tuple[np.ndarray, int]:
    """x (B, L, E) and the distance of its rows; one half of a wider tensor, as a gate often is, is not copied."""
    if x is None:
        return flat(None), 0
    B, L, E = x.shape
    stride = x.stride(1)
    regular = x.numel() > 0 and x.stride(2) == 1 and stride >= E and (B == 1 or x.stride(0) == L * stride)
    if regular and x.dtype == torch.float32:
        return memory(x, (B * L - 1) * stride + E), stride
    return flat(x), E


def _sizes(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    """L, E, N, G and the strips in a group."""
    E, N = A.shape
    G = B.shape[2] if B.ndim == 4 else 1
    return u.shape[1], E, N, G, -(-E // (G * STRIP * LANES))


def _fours(N: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """States up to a multiple of four, as the kernel takes them four at a time."""
    return [x if x is None or N % 4 == 0 else F.pad(x, (0, -N % 4)) for x in tensors]


def why_not(*inputs):
    """The kernel is one of real numbers."""
    if any(isinstance(x, Tensor) and x.is_complex() for x in inputs):
        return "a tensor is complex; the kernel computes in real numbers"
    return None


def _one_row(x: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """x (B, 1, ...) as float32, its address and the distance of its rows; ``like`` and 0 stand for None."""
    if x is None:
        return like, 0, 0
    x = x if x.dtype == torch.float32 and x.stride(-1) == 1 else x.float().contiguous()
    return x, x.data_ptr(), x.stride(0)


def _single(u, dt, A, B, C, D, state, z, dt_bias, softplus) -> tuple[Tensor, Tensor]:
    """One step, states in the lanes, on addresses: nothing but the arithmetic is worth a microsecond here."""
    (E, N), batch = A.shape, len(u)
    A, state, D, dt_bias = (x if x is None else x.float().contiguous() for x in (A, state, D, dt_bias))
    y, new = torch.empty(batch, 1, E), torch.empty(batch, E, N)
    rows = [_one_row(x, u) for x in (u, dt, B, C, z)]
    given = [place for _, *pair in rows for place in pair]
    whole = [0 if x is None else x.data_ptr() for x in (A, D, dt_bias, state)]
    _step(*given, *whole, y.data_ptr(), new.data_ptr(), batch, E, N, softplus)
    return y.to(u.dtype), new


@kernel
def _step(
    u, u_row, dt, dt_row, B, B_row, C, C_row, z, z_row, A, D, bias, state, y, new, batch, E, N, with_softplus,
):  # fmt: skip
    with_gate, with_skip, with_bias, with_state = z != 0, D != 0, bias != 0, state != 0
    u, dt, B, C, z, A = floats(u), floats(dt), floats(B), floats(C), floats(z), floats(A)
    D, bias, state, y, new = floats(D), floats(bias), floats(state), floats(y), floats(new)
    for b in range(batch):
        for e in range(0, E, LANES):
            width = min(LANES, E - e)
            step = load_first(R, dt, b * dt_row + e, width)
            if with_bias:
                step = step + load_first(R, bias, e, width)
            if with_softplus:
                step = softplus(step)
            store_first(y, b * E + e, step, width)
        for e in range(E):
            step = y[b * E + e]
            by, drive, total = splat(R, step * LOG2_E), splat(R, step * u[b * u_row + e]), zero(R)
            for n in range(0, N, LANES):
                i, width = (b * E + e) * N + n, min(LANES, N - n)
                now = drive * load_first(R, B, b * B_row + n, width)
                if with_state:
                    now = fma(exp2(by * load_first(R, A, e * N + n, width)), load_first(R, state, i, width), now)
                store_first(new, i, now, width)
                total = fma(now, load_first(R, C, b * C_row + n, width), total)
            y[b * E + e] = sum_lanes(total) + (D[e] * u[b * u_row + e] if with_skip else np.float32(0))
        if with_gate:
            for e in range(0, E, LANES):
                width = min(LANES, E - e)
                gate = load_first(R, z, b * z_row + e, width)
                store_first(y, b * E + e, load_first(R, y, b * E + e, width) * gate * sigmoid(gate), width)


def forward(u, dt, A, B, C, D, state, z, dt_bias, softplus, keep):
    """(y (B, L, E), the last state (B, E, N)), and the state before each T steps (B, chunks, N, E)."""
    if u.shape[1] == 1 and B.ndim == 3 and not keep:
        return _single(u, dt, A, B, C, D, state, z, dt_bias, softplus), None
    states = A.shape[1]
    A, B, C, state = _fours(states, A, B, C, state)
    L, E, N, G, parts = _sizes(u, A, B)
    batch = len(u)
    y = empty(*u.shape)
    last = empty(batch, N, E)
    kept = empty(batch, -(-L // T) if keep else 0, N, E)
    state = torch.zeros(batch, E, N) if state is None else state
    D, dt_bias = (torch.zeros(E) if x is None else x for x in (D, dt_bias))
    z_rows, z_stride = _rows(z)
    inputs = (*map(flat, (u, dt)), _channel_last(A), *map(flat, (B, C, D)), _channel_last(state), z_rows, flat(dt_bias))
    sizes = (L, E, N, G, parts, z_stride, softplus, z is not None, keep)
    space = 2 * STRIP * N * LANES + 6 * ROW
    run(_forward, batch * G * parts, *inputs, *map(flat, (y, last, kept)), *sizes, scratch_size=space)
    return (y.to(u.dtype), last[:, :states].transpose(1, 2).contiguous()), kept


def saved(u, dt, A, *others):
    """Like the states before each T steps."""
    return u.new_empty(u.shape[0], -(-u.shape[1] // T), A.shape[1] + -A.shape[1] % 4, len(A), dtype=torch.float32)


def backward(needed, dy, dlast, u, dt, A, B, C, D, z, dt_bias, softplus, saved):
    """All gradients in one pass, float32."""
    states = A.shape[1]
    dy = torch.zeros_like(u) if dy is None else dy
    dlast = torch.zeros(len(u), *A.shape) if dlast is None else dlast
    A, B, C, dlast = _fours(states, A, B, C, dlast)
    L, E, N, G, parts = _sizes(u, A, B)
    batch = len(u)
    du, ddt = (empty(*u.shape) for _ in "ud")
    dz = empty(*u.shape) if z is not None else empty(0)
    dA, dD, ddt_bias = (torch.zeros(batch, *size, E, dtype=torch.float64) for size in ((N,), (), ()))
    dB, dC = (empty(parts, *B.shape) for _ in "BC")
    dstate = empty(batch, N, E)
    D, bias = (torch.zeros(E) if x is None else x for x in (D, dt_bias))
    z_rows, z_stride = _rows(z)
    inputs = (*map(flat, (u, dt)), _channel_last(A), *map(flat, (B, C, D)), z_rows, *map(flat, (bias, saved, dy)))
    grads = (du, ddt, dA, dB, dC, dD, dstate, dz, ddt_bias)
    arrays = (memory(grad, grad.numel()) for grad in grads)
    sizes = (L, E, N, G, parts, z_stride, softplus, z is not None)
    space = 2 * (STRIP + T) * N * LANES + 20 * ROW
    run(_backward, batch * G * parts, *inputs, _channel_last(dlast), *arrays, *sizes, scratch_size=space)
    return {
        "u": du,
        "dt": ddt,
        "A": dA.sum(0).T[:, :states],
        "B": (dB[0] if parts == 1 else dB.sum(0))[..., :states],
        "C": (dC[0] if parts == 1 else dC.sum(0))[..., :states],
        "D": dD.sum(0),
        "state": dstate[:, :states].transpose(1, 2),
        "z": dz,
        "dt_bias": ddt_bias.sum(0),
    }
