# mypy: no-check-untyped-defs
"""The short depthwise convolution, its activation and their gradients: channels in the lanes, one pass over memory.

A task is a segment of time of one batch row and one block of channels. It walks the segment in steps that fit the
first-level cache: copies the rows it needs into a tile (so tails, strides and the past are dealt with in one place),
computes there, and copies the result out. The backward pass walks backwards and keeps the K-1 rows of the later
gradients that the earlier inputs still need.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    floats,
    fma,
    load,
    load_first,
    prefetch,
    prefetch_to_write,
    sigmoid,
    splat,
    store,
    store_first,
    widest,
    zero,
)
from longwave.ops.short_conv import last_inputs

R = widest  # lanes of a register
LANES = R.lanes


STEPS = 64  # rows of a tile
WIDTH = 64  # channels of a tile: 64 rows of 64 floats are 16 KB
SEGMENT = 1024  # rows of a task
LINE = 16  # floats of a cache line

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def forward(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, C) and the last inputs."""
    (B, L, C), K = u.shape, weight.shape[1]
    if L == 1:
        return _single(u, weight, bias, state, silu)
    y = pool.empty(B, L, C)
    segment = _segment(K)
    tasks = B * -(-L // segment) * -(-C // WIDTH)
    arrays = (*_strided(u), pool.flat(state), pool.flat(weight), pool.flat(bias), pool.flat(y))
    pool.run(_forward, tasks, *arrays, L, C, K, segment, silu, scratch_size=_tile_rows(K) * 4 * WIDTH)
    return y.to(u.dtype), last_inputs(u, state, K)


def _single(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One step, on addresses: nothing but the arithmetic is worth a microsecond here."""
    (B, _, C), K = u.shape, weight.shape[1]
    x = u if u.dtype == torch.float32 and u.stride(2) == 1 else u.float().contiguous()
    given = [t if t is None else t.float().contiguous() for t in (weight, bias, state)]
    y, last = torch.empty(B, 1, C), torch.empty(B, K - 1, C)
    places = [0 if t is None else t.data_ptr() for t in given]
    _step(x.data_ptr(), x.stride(0), *places, y.data_ptr(), last.data_ptr(), B, C, K, silu)
    return y.to(u.dtype), last.to(u.dtype)


@kernel
def _step(u, u_row, weight, bias, past, y, last, B, C, K, silu):
    with_bias, with_past = bias != 0, past != 0
    u, weight, bias, past, y, last = floats(u), floats(weight), floats(bias), floats(past), floats(y), floats(last)
    for b in range(B):
        o = b * (K - 1) * C
        for c in range(C):
            total = weight[c * K + K - 1] * u[b * u_row + c]
            if with_bias:
                total += bias[c]
            if with_past:
                for j in range(K - 1):
                    total += weight[c * K + j] * past[o + j * C + c]
            y[b * C + c] = total
        for j in range(K - 2):
            for c in range(C):
                last[o + j * C + c] = past[o + (j + 1) * C + c] if with_past else _ZERO
        if K > 1:
            for c in range(C):
                last[o + (K - 2) * C + c] = u[b * u_row + c]
        if silu:
            for c in range(0, C, LANES):
                width = min(LANES, C - c)
                x = load_first(R, y, b * C + c, width)
                store_first(y, b * C + c, x * sigmoid(x), width)


def backward(
    needed: set[str],
    dy: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
) -> dict[str, Tensor]:
    """All gradients in one pass, float32."""
    (B, L, C), K = u.shape, weight.shape[1]
    du, dstate = pool.empty(B, L, C), pool.empty(B, K - 1, C)
    segment = _segment(K)
    segments = -(-L // segment)
    sums = np.zeros((B * segments, K + 1, C))  # of weight and bias; float64, and as many whatever the threads
    dy = torch.zeros_like(u) if dy is None else dy
    arrays = (*_strided(u), pool.flat(state), pool.flat(weight), pool.flat(bias), *_strided(dy))
    pool.run(
        _backward,
        B * segments * -(-C // WIDTH),
        *arrays,
        pool.flat(du),
        pool.flat(dstate),
        sums.reshape(-1),
        L,
        C,
        K,
        segment,
        silu,
        scratch_size=_tile_rows(K) * 6 * WIDTH,
    )
    if dlast is not None:
        fresh = min(L, K - 1)  # of the last K - 1 inputs, the others are the state's
        du[:, L - fresh :] += dlast[:, K - 1 - fresh :]
        dstate[:, L:] += dlast[:, : max(0, K - 1 - L)]
    total = torch.from_numpy(sums.sum(0)).float()
    return {"u": du, "weight": total[:K].T, "bias": total[K].clone(), "state": dstate}


def _segment(K: int) -> int:
    """Rows of a task, a multiple of STEPS and long beside the K-1 rows that two tasks both compute."""
    return max(SEGMENT, -(-8 * K // STEPS) * STEPS)


def _tile_rows(K: int) -> int:
    """Rows that every tile in scratch may have: four taps and four rows at a time run over the end a little."""
    return STEPS + K + 4


def _strided(x: Tensor) -> tuple[np.ndarray, int, int]:
    """(B, L, C) as a flat array, and the distances of batch rows and of steps in it; a copy only where it must be."""
    B, L, C = x.shape
    if x.dtype == torch.float32 and x.stride(2) == 1 and x.numel() and min(x.stride()) > 0:
        batch, step, _ = x.stride()
        return pool.memory(x, (B - 1) * batch + (L - 1) * step + C), batch, step
    return pool.flat(x), L * C, C


@kernel
def _copy_row(to, i, source, j, width):
    whole = width - width % LANES
    for c in range(0, whole, LANES):
        store(to, i + c, load(R, source, j + c))
    for c in range(whole, width):
        to[i + c] = source[j + c]


@kernel
def _rows_in(tile, first, count, x, at, step, L, width, ahead):
    """Rows first .. first + count of x into the tile; zeros from L on.

    Those of the next tile, ``ahead`` rows on, are prefetched: a row of a tile is too short for the hardware to do it.
    """
    for r in range(count):
        if first + r < L:
            for c in range(0, width, LINE):
                prefetch(x, at + (first + r + ahead) * step + c)
            _copy_row(tile, r * WIDTH, x, at + (first + r) * step, width)
        else:
            _clear(tile, r, r + 1)


@kernel
def _rows_out(y, at, step, tile, count, width, ahead):
    for r in range(count):
        for c in range(0, width, LINE):
            prefetch_to_write(y, at + (r + ahead) * step + c)
        _copy_row(y, at + r * step, tile, r * WIDTH, width)


@kernel
def _inputs_in(tile, first, count, u, at, step, past, past_at, L, C, K, width, ahead):
    """Rows first .. first + count of the inputs: those before 0 are the past's, or zero without one."""
    r = 0
    while r < count and first + r < 0:
        before = first + r + K - 1
        if past.size > 0 and before >= 0:
            _copy_row(tile, r * WIDTH, past, past_at + before * C, width)
        else:
            _clear(tile, r, r + 1)
        r += 1
    _rows_in(tile[r * WIDTH :], first + r, count - r, u, at, step, L, width, ahead)


@kernel
def _clear(tile, first, stop):
    for i in range(first * WIDTH, stop * WIDTH, LANES):
        store(tile, i, zero(R))


@kernel
def _taps_in(tile, weight, channel, width, K, reverse):
    """The taps of a block of channels as K rows, the latest first if ``reverse``."""
    for k in range(K):
        for c in range(width):
            tile[k * WIDTH + c] = weight[(channel + c) * K + (K - 1 - k if reverse else k)]


@kernel
def _bias_in(tile, bias, channel, width):
    _clear(tile, 0, 1)
    if bias.size > 0:
        _copy_row(tile, 0, bias, channel, width)


@kernel
def _correlate(out, rows, x, taps, bias, K, width):
    """out[r] = bias + sum_k taps[k] x[r + k],  four rows and where possible four taps at a time, to load each once."""
    for r in range(0, rows, 4):
        for c in range(0, width, LANES):
            y0 = load(R, bias, c)
            y1 = y0
            y2 = y0
            y3 = y0
            i, j = r * WIDTH + c, c
            x0, x1, x2 = load(R, x, i), load(R, x, i + WIDTH), load(R, x, i + 2 * WIDTH)
            for _ in range(K // 4):
                x3, tap = load(R, x, i + 3 * WIDTH), load(R, taps, j)
                y0, y1, y2, y3 = fma(x0, tap, y0), fma(x1, tap, y1), fma(x2, tap, y2), fma(x3, tap, y3)
                x4, tap = load(R, x, i + 4 * WIDTH), load(R, taps, j + WIDTH)
                y0, y1, y2, y3 = fma(x1, tap, y0), fma(x2, tap, y1), fma(x3, tap, y2), fma(x4, tap, y3)
                x5, tap = load(R, x, i + 5 * WIDTH), load(R, taps, j + 2 * WIDTH)
                y0, y1, y2, y3 = fma(x2, tap, y0), fma(x3, tap, y1), fma(x4, tap, y2), fma(x5, tap, y3)
                x6, tap = load(R, x, i + 6 * WIDTH), load(R, taps, j + 3 * WIDTH)
                y0, y1, y2, y3 = fma(x3, tap, y0), fma(x4, tap, y1), fma(x5, tap, y2), fma(x6, tap, y3)
                x0, x1, x2 = x4, x5, x6
                i, j = i + 4 * WIDTH, j + 4 * WIDTH
            for _ in range(K % 4):
                x3, tap = load(R, x, i + 3 * WIDTH), load(R, taps, j)
                y0, y1, y2, y3 = fma(x0, tap, y0), fma(x1, tap, y1), fma(x2, tap, y2), fma(x3, tap, y3)
                x0, x1, x2 = x1, x2, x3
                i, j = i + WIDTH, j + WIDTH
            i = r * WIDTH + c
            store(out, i, y0)
            store(out, i + WIDTH, y1)
            store(out, i + 2 * WIDTH, y2)
            store(out, i + 3 * WIDTH, y3)


@kernel
def _forward(start, stop, scratch, u, u_batch, u_step, past, weight, bias, y, L, C, K, segment, silu):
    blocks, segments, room = (C + WIDTH - 1) // WIDTH, (L + segment - 1) // segment, (STEPS + K + 4) * WIDTH
    x, out, taps, shift = scratch[:room], scratch[room:], scratch[2 * room :], scratch[3 * room :]
    for task in range(start, stop):
        b, channel = task // (segments * blocks), task % blocks * WIDTH
        begin = task // blocks % segments * segment
        width = min(WIDTH, C - channel)
        _taps_in(taps, weight, channel, width, K, False)
        _bias_in(shift, bias, channel, width)
        for t in range(begin, min(begin + segment, L), STEPS):
            n = min(STEPS, L - t)
            at, past_at = b * u_batch + channel, b * (K - 1) * C + channel
            _inputs_in(x, t - K + 1, n + K - 1, u, at, u_step, past, past_at, L, C, K, width, STEPS)
            _correlate(out, n, x, taps, shift, K, width)
            if silu:
                for i in range(0, n * WIDTH, LANES):
                    v = load(R, out, i)
                    store(out, i, v * sigmoid(v))
            _rows_out(y, (b * L + t) * C + channel, C, out, n, width, STEPS)


@kernel
def _add_sums(sums, at, lanes, width, c):
    for i in range(min(LANES, width - c)):
        sums[at + c + i] += np.float64(lanes[i])


@kernel
def _parameter_sums(sums, at, lanes, x, g, rows, C, K, width):
    """Adds sum_t g[t] x[t + k] for the taps, then sum_t g[t] for the bias; four taps share the loads."""
    for c in range(0, width, LANES):
        for k in range(0, K, 4):
            total = zero(R)
            s0 = zero(R)
            s1 = zero(R)
            s2 = zero(R)
            s3 = zero(R)
            i = k * WIDTH + c
            x0, x1, x2 = load(R, x, i), load(R, x, i + WIDTH), load(R, x, i + 2 * WIDTH)
            for t in range(rows):
                d, x3 = load(R, g, t * WIDTH + c), load(R, x, i + (t + 3) * WIDTH)
                total = total + d
                s0, s1, s2, s3 = fma(d, x0, s0), fma(d, x1, s1), fma(d, x2, s2), fma(d, x3, s3)
                x0, x1, x2 = x1, x2, x3
            store(lanes, 0, s0)
            store(lanes, LANES, s1)
            store(lanes, 2 * LANES, s2)
            store(lanes, 3 * LANES, s3)
            for more in range(min(4, K - k)):
                _add_sums(sums, at + (k + more) * C, lanes[more * LANES :], width, c)
        store(lanes, 0, total)
        _add_sums(sums, at + K * C, lanes, width, c)


@kernel
def _backward(
    start, stop, scratch, u, u_batch, u_step, past, weight, bias, dy, dy_batch, dy_step, du, dpast, sums,
    L, C, K, segment, silu,
):  # fmt: skip
    blocks, segments, room = (C + WIDTH - 1) // WIDTH, (L + segment - 1) // segment, (STEPS + K + 4) * WIDTH
    x, g, out = scratch[:room], scratch[room:], scratch[2 * room :]
    taps, flipped, shift = scratch[3 * room :], scratch[4 * room :], scratch[5 * room :]
    none, lanes = scratch[5 * room + WIDTH :], scratch[5 * room + 2 * WIDTH :]
    for task in range(start, stop):
        b, channel = task // (segments * blocks), task % blocks * WIDTH
        begin = task // blocks % segments * segment
        width, end = min(WIDTH, C - channel), min(begin + segment, L)
        _taps_in(taps, weight, channel, width, K, False)
        _taps_in(flipped, weight, channel, width, K, True)
        _bias_in(shift, bias, channel, width)
        _clear(none, 0, 1)
        _clear(g, 0, STEPS + K + 4)
        reach = min(end + K - 1, L)  # the last inputs of the segment act on the first outputs of the next
        for t in range(begin + (reach - 1 - begin) // STEPS * STEPS, begin - 1, -STEPS):
            n = min(STEPS, reach - t)
            for r in range(K - 2, -1, -1):
                _copy_row(g, (STEPS + r) * WIDTH, g, r * WIDTH, WIDTH)
            _rows_in(g, t, STEPS, dy, b * dy_batch + channel, dy_step, reach, width, -STEPS)
            at, past_at = b * u_batch + channel, b * (K - 1) * C + channel
            _inputs_in(x, t - K + 1, n + K - 1, u, at, u_step, past, past_at, L, C, K, width, -STEPS)
            if silu:
                _correlate(out, n, x, taps, shift, K, width)
                one = splat(R, _ONE)
                for i in range(0, n * WIDTH, LANES):
                    v = load(R, out, i)
                    s = sigmoid(v)
                    store(g, i, load(R, g, i) * s * fma(v, one - s, one))
            if t < end:
                _parameter_sums(
                    sums, (b * segments + begin // segment) * (K + 1) * C + channel, lanes, x, g, n, C, K, width
                )
                _correlate(out, n, g, flipped, none, K, width)
                _rows_out(du, (b * L + t) * C + channel, C, out, n, width, -STEPS)
        if begin == 0:
            for r in range(K - 1):  # dpast[r] = sum_k flipped[k] g[r + k - (K - 1)] over the rows that there are
                skip = K - 1 - r
                for c in range(0, width, LANES):
                    d = zero(R)
                    for k in range(skip, K):
                        d = fma(load(R, g, (k - skip) * WIDTH + c), load(R, flipped, k * WIDTH + c), d)
                    store(out, c, d)
                _copy_row(dpast, (b * (K - 1) + r) * C + channel, out, 0, width)
