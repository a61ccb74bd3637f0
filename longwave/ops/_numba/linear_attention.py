# mypy: no-check-untyped-defs
"""Linear attention as the recurrence that it is, and its gradient: the same walk along time with other parts.

    y  = S q + (q k) v,    S' = a S + k v      S before the step, decayed
    dq = S dy + (v dy) k
    dk = D v + (v dy) q,   D' = a D + q dy     back in time, a of the step behind
    dv = D k + (q k) dy

The last terms are what a step does to itself. A task is a head, in the gradient a few heads of one group. It walks in
chunks of T steps, whose rows stay in the first-level cache; in each, eight vectors of the state at a time stay in
registers. No state is kept for the gradient.

Steps multiply nothing into the state: between two of them it is kept divided by A, the product of its row's decays so
far, so that what comes in is divided by A and what is read is multiplied by it. This is exact, as numbers of floating
point have no size, until A is too small: then, in any row, a new frame begins, whose first step has A = 1 and for which
the state is multiplied by all of the decays before.
"""

import math

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.blocks import fetch, padded, put
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    exp,
    floats,
    fma,
    load,
    load_first,
    load_splat,
    splat,
    store,
    store_first,
    sum_lanes,
    where_less,
    widest,
    zero,
)
from longwave.ops.linear_attention import prepare

R = widest  # lanes of a register
LANES = R.lanes
PAIR = 2 * LANES  # floats of the two registers that the walks take at a time
T = 32  # steps of a chunk
KEEP = 8  # chunks from one state that the decay's gradient starts from to the next
HEADS = 4  # of a group in a task of the gradient: fewer make more partial sums, more leave threads idle
ALONE = 2**18  # multiplications that are not worth a second thread
TINY = np.float32(2.0**-40)  # the least product of decays in a frame
ONE = np.float32(1.0)
NONE = np.float32(-87.33)  # what decays by less is gone


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    decay, state = prepare(q, v, decay, state)
    y, last = pool.empty(B, L, H, P), pool.empty(B, H, N, P)
    tensors = [x.float().contiguous() for x in (q, k, v, decay, state)]
    NP, PP = padded(N), padded(P)
    args = [x.data_ptr() for x in (*tensors, y, last)] + [L, G, H, N, P, NP, PP, decay.shape[3] > 1]
    size = T * (4 * NP + 2 * PP + 1) + 1 + NP * (PP + 1)
    if B * L * H * N * P < ALONE:
        _forward(0, B * H, pool.scratch(size), *args)
    else:
        pool.run(_forward, B * H, *args, scratch_size=size)
    return y.to(v.dtype), last


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
    state: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """All gradients; those of q, k and decays of channels as sums over the heads of a group."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    axes = 3 if decay is None else decay.ndim
    decay, state = prepare(q, v, decay, state)
    W, parts = decay.shape[3], -(-(H // G) // HEADS)
    dy = torch.zeros(v.shape) if dy is None else dy
    dlast = torch.zeros(B, H, N, P) if dlast is None else dlast
    dq, dk, dv = pool.empty(parts, B, L, G, N), pool.empty(parts, B, L, G, N), pool.empty(B, L, H, P)
    dstate = pool.empty(B, H, N, P)
    ddecay = torch.zeros((parts, B, L, G, N) if axes == 4 else (1, B, L, H, 1))
    tensors = [x.float().contiguous() for x in (q, k, v, decay, state, dy, dlast)]
    NP, PP = padded(N), padded(P)
    starts = -(-L // (T * KEEP))
    size = T * (7 * NP + 3 * PP + 1) + 1 + (2 + starts) * NP * (PP + 1)
    pool.run(
        _backward, B * G * parts, *(x.data_ptr() for x in (*tensors, dq, dk, dv, ddecay, dstate)),
        B, L, G, H, N, P, NP, PP, parts, W > 1, "decay" in needed, scratch_size=size,
    )  # fmt: skip
    dq, dk, ddecay = (x[0] if len(x) == 1 else x.sum(0) for x in (dq, dk, ddecay))
    ddecay = ddecay if axes == 4 else ddecay[..., 0]
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay.sum((0, 1)) if axes == 1 else ddecay, "state": dstate}


@kernel
def _transpose(target, width, source, place, N, P):
    """target[p, n] = source[place + n P + p], with zeros around: P rows, to the next multiple of four."""
    for i in range((P + 3) // 4 * 4 * width):
        target[i] = np.float32(0.0)
    for n in range(N):
        for p in range(P):
            target[p * width + n] = source[place + n * P + p]


@kernel
def _decays(target, NP, decay, place, stride, rows, N, channels):
    """target[r, :NP] = exp(decay), of each channel or of the head."""
    if channels:
        fetch(target, NP, decay, place, stride, rows, N)
        for i in range(0, rows * NP, LANES):
            store(target, i, exp(load(R, target, i)))
    else:
        for r in range(rows):
            x = decay[place + r * stride]
            a = splat(R, np.float32(0.0 if x < NONE else math.exp(np.float64(x))))  # a constant's error would add up
            for c in range(0, NP, LANES):
                store(target, r * NP + c, a)


@kernel
def _clear(x, count):
    for i in range(0, count, LANES):
        store(x, i, zero(R))


@kernel
def _itself(out, width, x, p, q, width_pq, rows, add):
    """out = x (p q)  in every row, or added to what is there."""
    for r in range(rows):
        total = zero(R)
        for c in range(r * width_pq, (r + 1) * width_pq, LANES):
            total = fma(load(R, p, c), load(R, q, c), total)
        weight = splat(R, sum_lanes(total))
        for c in range(r * width, (r + 1) * width, LANES):
            store(out, c, fma(weight, load(R, x, c), load(R, out, c) if add else zero(R)))


@kernel
def _frames(a, multiples, begins, ends, rows, NP):
    """How many frames; decays a (rows, NP) become their products A.

    Args:
        multiples: (rows, NP) by which the state is multiplied where a frame begins.
        begins: (rows + 1) the first step of every frame, and the end.
        ends: (NP) A at the last step, and before it is called that of the chunk before.
    """
    frames, one, tiny = 0, splat(R, ONE), splat(R, TINY)
    for t in range(rows):
        i, before = t * NP, zero(R)
        for c in range(0, NP, LANES):
            product = load(R, ends, c) * load(R, a, i + c)
            store(multiples, frames * NP + c, product)
            before = before + where_less(product, tiny, one, zero(R))
        fresh = t == 0 or sum_lanes(before) > 0
        for c in range(0, NP, LANES):
            product = one if fresh else load(R, multiples, frames * NP + c)
            store(a, i + c, product)
            store(ends, c, product)
        if fresh:
            begins[frames] = t
            frames += 1
    begins[frames] = rows
    return frames


@kernel
def _times(target, x, a, count):
    """target = x a."""
    for i in range(0, count, LANES):
        store(target, i, load(R, x, i) * load(R, a, i))


@kernel
def _over(target, x, a, count):
    """target = x / a."""
    for i in range(0, count, LANES):
        store(target, i, load(R, x, i) / load(R, a, i))


@kernel
def _scale(S, i, stride, a, N, P):
    """The rows (N, P) of S, which are whole registers, times a (N,)."""
    for n in range(N):
        for c in range(i + n * stride, i + n * stride + P, LANES):
            store(S, c, load(R, S, c) * load_splat(R, a, n))


@kernel
def _by_values(frames, begins, multiples, N, P, NP, PP, k, q, v, y, source, i, target, j, stride):
    """y[t, p] += sum_n q[t, n] S[n, p],  then S += k v,  from source[i] into target[j]; values in the lanes."""
    for p in range(0, P, PAIR):
        for n in range(0, N, 4):
            o = i + n * stride + p
            s00, s01 = load(R, source, o), load(R, source, o + LANES)
            s10, s11 = load(R, source, o + stride), load(R, source, o + stride + LANES)
            s20, s21 = load(R, source, o + 2 * stride), load(R, source, o + 2 * stride + LANES)
            s30, s31 = load(R, source, o + 3 * stride), load(R, source, o + 3 * stride + LANES)
            for frame in range(frames):
                m = frame * NP + n
                a0, a1 = load_splat(R, multiples, m), load_splat(R, multiples, m + 1)
                a2, a3 = load_splat(R, multiples, m + 2), load_splat(R, multiples, m + 3)
                s00, s01, s10, s11 = a0 * s00, a0 * s01, a1 * s10, a1 * s11
                s20, s21, s30, s31 = a2 * s20, a2 * s21, a3 * s30, a3 * s31
                for t in range(int(begins[frame]), int(begins[frame + 1])):
                    m, o = t * NP + n, t * PP + p
                    v0, v1, y0, y1 = load(R, v, o), load(R, v, o + LANES), load(R, y, o), load(R, y, o + LANES)
                    k_t, q_t = load_splat(R, k, m), load_splat(R, q, m)
                    y0, y1, s00, s01 = fma(q_t, s00, y0), fma(q_t, s01, y1), fma(k_t, v0, s00), fma(k_t, v1, s01)
                    k_t, q_t = load_splat(R, k, m + 1), load_splat(R, q, m + 1)
                    y0, y1, s10, s11 = fma(q_t, s10, y0), fma(q_t, s11, y1), fma(k_t, v0, s10), fma(k_t, v1, s11)
                    k_t, q_t = load_splat(R, k, m + 2), load_splat(R, q, m + 2)
                    y0, y1, s20, s21 = fma(q_t, s20, y0), fma(q_t, s21, y1), fma(k_t, v0, s20), fma(k_t, v1, s21)
                    k_t, q_t = load_splat(R, k, m + 3), load_splat(R, q, m + 3)
                    y0, y1, s30, s31 = fma(q_t, s30, y0), fma(q_t, s31, y1), fma(k_t, v0, s30), fma(k_t, v1, s31)
                    store(y, o, y0)
                    store(y, o + LANES, y1)
            o = j + n * stride + p
            store(target, o, s00)
            store(target, o + LANES, s01)
            store(target, o + stride, s10)
            store(target, o + stride + LANES, s11)
            store(target, o + 2 * stride, s20)
            store(target, o + 2 * stride + LANES, s21)
            store(target, o + 3 * stride, s30)
            store(target, o + 3 * stride + LANES, s31)


@kernel
def _by_keys(frames, begins, multiples, N, P, NP, PP, k, v, w, out, S):
    """out[t, n] += sum_p w[t, p] S[p, n],  then S += k v  in place; keys in the lanes."""
    for n in range(0, N, PAIR):
        for p in range(0, P, 4):
            o = p * NP + n
            s00, s01 = load(R, S, o), load(R, S, o + LANES)
            s10, s11 = load(R, S, o + NP), load(R, S, o + NP + LANES)
            s20, s21 = load(R, S, o + 2 * NP), load(R, S, o + 2 * NP + LANES)
            s30, s31 = load(R, S, o + 3 * NP), load(R, S, o + 3 * NP + LANES)
            for frame in range(frames):
                a0, a1 = load(R, multiples, frame * NP + n), load(R, multiples, frame * NP + n + LANES)
                s00, s10, s20, s30 = a0 * s00, a0 * s10, a0 * s20, a0 * s30
                s01, s11, s21, s31 = a1 * s01, a1 * s11, a1 * s21, a1 * s31
                for t in range(int(begins[frame]), int(begins[frame + 1])):
                    m, i = t * PP + p, t * NP + n
                    k0, k1, o0, o1 = load(R, k, i), load(R, k, i + LANES), load(R, out, i), load(R, out, i + LANES)
                    v_t, w_t = load_splat(R, v, m), load_splat(R, w, m)
                    o0, o1, s00, s01 = fma(w_t, s00, o0), fma(w_t, s01, o1), fma(v_t, k0, s00), fma(v_t, k1, s01)
                    v_t, w_t = load_splat(R, v, m + 1), load_splat(R, w, m + 1)
                    o0, o1, s10, s11 = fma(w_t, s10, o0), fma(w_t, s11, o1), fma(v_t, k0, s10), fma(v_t, k1, s11)
                    v_t, w_t = load_splat(R, v, m + 2), load_splat(R, w, m + 2)
                    o0, o1, s20, s21 = fma(w_t, s20, o0), fma(w_t, s21, o1), fma(v_t, k0, s20), fma(v_t, k1, s21)
                    v_t, w_t = load_splat(R, v, m + 3), load_splat(R, w, m + 3)
                    o0, o1, s30, s31 = fma(w_t, s30, o0), fma(w_t, s31, o1), fma(v_t, k0, s30), fma(v_t, k1, s31)
                    store(out, i, o0)
                    store(out, i + LANES, o1)
            store(S, o, s00)
            store(S, o + LANES, s01)
            store(S, o + NP, s10)
            store(S, o + NP + LANES, s11)
            store(S, o + 2 * NP, s20)
            store(S, o + 2 * NP + LANES, s21)
            store(S, o + 3 * NP, s30)
            store(S, o + 3 * NP + LANES, s31)


@kernel
def _forward(start, stop, scratch, q, k, v, decay, state, y, last, L, G, H, N, P, NP, PP, channels):
    q, k, v, decay = floats(q), floats(k), floats(v), floats(decay)
    state, y, last = floats(state), floats(y), floats(last)
    a, multiples, keys, queries = scratch, scratch[T * NP :], scratch[2 * T * NP :], scratch[3 * T * NP :]
    rest = scratch[4 * T * NP :]
    values, out, begins, ends = rest, rest[T * PP :], rest[2 * T * PP :], rest[T * (2 * PP + 1) + 1 :]
    held = ends[NP:]
    in_place = N % 4 == 0 and P % PAIR == 0
    stride = P if in_place else PP
    for task in range(start, stop):
        b, h = task // H, task % H
        g, home = h // (H // G), task * N * P
        source, i = state, home
        target, j = (last, home) if in_place else (held, 0)
        if not in_place:
            _clear(held, NP * PP)
            fetch(held, PP, state, home, P, N, P)
            source, i = held, 0
        for c in range(0, NP, LANES):
            store(ends, c, splat(R, ONE))
        for t in range(0, L, T):
            rows, row = min(T, L - t), b * L + t
            if channels:
                _decays(a, NP, decay, (row * G + g) * N, G * N, rows, N, True)
            else:
                _decays(a, NP, decay, row * H + h, H, rows, N, False)
            frames = _frames(a, multiples, begins, ends, rows, NP)
            fetch(keys, NP, k, (row * G + g) * N, G * N, rows, N)
            fetch(queries, NP, q, (row * G + g) * N, G * N, rows, N)
            fetch(values, PP, v, (row * H + h) * P, H * P, rows, P)
            _itself(out, PP, values, queries, keys, NP, rows, False)
            _times(queries, queries, a, rows * NP)
            _over(keys, keys, a, rows * NP)
            _by_values(
                frames, begins, multiples, N, P, NP, PP, keys, queries, values, out, source, i, target, j, stride
            )
            source, i = target, j
            put(y, (row * H + h) * P, H * P, out, PP, rows, P, False)
        if L > 1:
            _scale(target, j, stride, ends, N, P)
        if not in_place:
            put(last, home, P, held, PP, N, P, False)


@kernel
def _grow(ddecay, place, stride, sign, x, dx, rows, N, NP, channels):
    """Add sign x dx (N,) to the decays' gradients of rows, or its sum where a decay is of the whole head."""
    weight = splat(R, sign)
    for r in range(rows):
        i, total = place + r * stride, zero(R)
        for c in range(0, N, LANES):
            product, some = load(R, x, r * NP + c) * load(R, dx, r * NP + c), min(LANES, N - c)
            if channels:
                store_first(ddecay, i + c, fma(weight, product, load_first(R, ddecay, i + c, some)), some)
            else:
                total = total + product
        if not channels:
            ddecay[i] += sign * sum_lanes(total)


@kernel
def _backward(
    start, stop, scratch, q, k, v, decay, state, dy, dlast, dq, dk, dv, ddecay, dstate,
    B, L, G, H, N, P, NP, PP, parts, channels, with_decay,
):  # fmt: skip
    q, k, v, decay, state, dy, dlast = (
        floats(q), floats(k), floats(v), floats(decay), floats(state), floats(dy), floats(dlast),
    )  # fmt: skip
    dq, dk, dv, ddecay, dstate = floats(dq), floats(dk), floats(dv), floats(ddecay), floats(dstate)
    size, heads, chunks = NP * PP, H // G, (L + T - 1) // T
    a, multiples, keys, queries = scratch, scratch[T * NP :], scratch[2 * T * NP :], scratch[3 * T * NP :]
    coming, read, by_keys = scratch[4 * T * NP :], scratch[5 * T * NP :], scratch[6 * T * NP :]
    rest = scratch[7 * T * NP :]
    values, grads, by_values = rest, rest[T * PP :], rest[2 * T * PP :]
    rest = rest[3 * T * PP :]
    begins, ends = rest, rest[T + 1 :]
    S, S_values, firsts = ends[NP:], ends[NP + size :], ends[NP + 2 * size :]
    kept = firsts[(chunks + KEEP - 1) // KEEP * NP :]
    for task in range(start, stop):
        part, b, g = task % parts, task // parts // G, task // parts % G
        low = g * heads + part * HEADS
        high = min(low + HEADS, (g + 1) * heads)
        to_keys = ((part * B + b) * L * G + g) * N  # of the first step, in dq and dk
        for h in range(low, high):
            home, step_d = (b * H + h) * N * P, G * N if channels else H
            first_d = (b * L * G + g) * N if channels else b * L * H + h  # of the first step, in decay
            first_dd = to_keys if channels else first_d
            _transpose(S, NP, state, home, N, P)
            for i in range(0, NP, LANES):
                store(ends, i, splat(R, ONE))
            for c in range(chunks):
                t = c * T
                rows, row = min(T, L - t), b * L + t
                if with_decay and c % KEEP == 0:
                    for p in range(P):
                        _times(kept[c // KEEP * size + p * NP :], S[p * NP :], ends, NP)
                _decays(a, NP, decay, first_d + t * step_d, step_d, rows, N, channels)
                frames = _frames(a, multiples, begins, ends, rows, NP)
                fetch(keys, NP, k, (row * G + g) * N, G * N, rows, N)
                fetch(values, PP, v, (row * H + h) * P, H * P, rows, P)
                fetch(grads, PP, dy, (row * H + h) * P, H * P, rows, P)
                _over(coming, keys, a, rows * NP)
                _clear(by_keys, rows * NP)
                sizes = frames, begins, multiples, N, P, NP, PP
                _by_keys(*sizes, coming, values, grads, by_keys, S)
                _times(by_keys, by_keys, a, rows * NP)
                if with_decay:
                    fetch(queries, NP, q, (row * G + g) * N, G * N, rows, N)
                    _grow(ddecay, first_dd + t * step_d, step_d, -ONE, queries, by_keys, rows, N, NP, channels)
                _itself(by_keys, NP, keys, values, grads, PP, rows, True)
                put(dq, to_keys + t * G * N, G * N, by_keys, NP, rows, N, h > low)
            _transpose(S, NP, dlast, home, N, P)
            _clear(S_values, size)
            fetch(S_values, PP, dlast, home, P, N, P)
            for i in range(0, NP, LANES):
                store(ends, i, splat(R, ONE))
            for c in range(chunks - 1, -1, -1):
                t = min(c * T + T, L) - 1  # the last step, which comes first
                rows, row = t + 1 - c * T, b * L + t
                if t == L - 1:
                    for i in range(0, NP, LANES):
                        store(a, i, splat(R, ONE))
                    _decays(a[NP:], NP, decay, first_d + t * step_d, -step_d, rows - 1, N, channels)
                else:
                    _decays(a, NP, decay, first_d + (t + 1) * step_d, -step_d, rows, N, channels)
                frames = _frames(a, multiples, begins, ends, rows, NP)
                fetch(keys, NP, k, (row * G + g) * N, -G * N, rows, N)
                fetch(queries, NP, q, (row * G + g) * N, -G * N, rows, N)
                fetch(values, PP, v, (row * H + h) * P, -H * P, rows, P)
                fetch(grads, PP, dy, (row * H + h) * P, -H * P, rows, P)
                _over(coming, queries, a, rows * NP)
                _times(read, keys, a, rows * NP)
                _clear(by_keys, rows * NP)
                sizes = frames, begins, multiples, N, P, NP, PP
                _by_keys(*sizes, coming, grads, values, by_keys, S)
                _times(by_keys, by_keys, a, rows * NP)
                if with_decay:
                    _grow(ddecay, first_dd + t * step_d, -step_d, ONE, keys, by_keys, rows, N, NP, channels)
                _itself(by_keys, NP, queries, values, grads, PP, rows, True)
                put(dk, to_keys + t * G * N, -G * N, by_keys, NP, rows, N, h > low)
                _itself(by_values, PP, grads, queries, keys, NP, rows, False)
                _by_values(*sizes, coming, read, grads, by_values, S_values, 0, S_values, 0, PP)
                put(dv, (row * H + h) * P, -H * P, by_values, PP, rows, P, False)
                if c % KEEP == 0:  # and at the first of all
                    _decays(a, NP, decay, first_d + c * T * step_d, step_d, 1, N, channels)
                    _times(a, a, ends, NP)
                    if with_decay:
                        _start(firsts, c // KEEP * NP, a, kept, c // KEEP * size, S, P, NP, channels, h > low)
            _scale(S_values, 0, PP, a, N, P)
            put(dstate, home, P, S_values, PP, N, P, False)
            if with_decay and (h == high - 1 or not channels):
                _add_up(ddecay, first_dd, decay, first_d, step_d, firsts, a, L, N if channels else 1, NP)


@kernel
def _start(firsts, place, a, S, i, D, P, NP, channels, add):
    """The decays' gradients at the first step of a chunk, a S D, from the states before it."""
    whole = np.float32(0.0)
    for n in range(0, NP, LANES):
        total = zero(R)
        for p in range(P):
            total = fma(load(R, S, i + p * NP + n), load(R, D, p * NP + n), total)
        total = total * load(R, a, n)
        whole += sum_lanes(total)
        store(firsts, place + n, total + load(R, firsts, place + n) if channels and add else total)
    if not channels:
        firsts[place] = whole


@kernel
def _add_up(ddecay, place, decay, source, stride, firsts, carry, L, W, NP):
    """From a first gradient on, each is the one before and what it grows by; none of what decays to nothing."""
    for t in range(L):
        for n in range(W):
            if t % (T * KEEP) == 0:
                carry[n] = firsts[t // (T * KEEP) * NP + n]
            i = place + t * stride + n
            more, ddecay[i] = ddecay[i], carry[n] if decay[source + t * stride + n] >= NONE else np.float32(0.0)
            carry[n] += more
