# mypy: no-check-untyped-defs
"""Linear attention as the recurrence that it is, and its gradient: the same walk along time with other parts.

    y  = S q + (q k) v,    S' = a S + k v      S before the step, decayed
    dq = S dy + (v dy) k
    dk = D v + (v dy) q,   D' = a D + q dy     back in time, a of the step behind
    dv = D k + (q k) dy

The last terms are what a step does to itself. A task is a head, in the gradient a few heads of one group. It walks in
chunks of T steps, whose rows stay in the first-level cache; in each, eight vectors of the state at a time stay in
registers. No decay is divided by another, so any will do, and no state is kept for the gradient.
"""

import math

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    exp,
    floats,
    fma,
    load,
    load_first,
    load_splat,
    prefetch,
    prefetch_to_write,
    splat,
    store,
    store_first,
    sum_lanes,
    widest,
    zero,
)
from longwave.ops.linear_attention import prepare

R = widest  # lanes of a register
LANES = R.lanes
PAIR = 2 * LANES  # rows are padded to pairs of registers
T = 32  # steps of a chunk
KEEP = 8  # chunks from one state that the decay's gradient starts from to the next
HEADS = 4  # of a group in a task of the gradient: fewer make more partial sums, more leave threads idle
ALONE = 2**18  # multiplications that are not worth a second thread
NONE = np.float32(-87.33)  # what decays by less is gone


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    decay, state = prepare(q, v, decay, state)
    y, last = pool.empty(B, L, H, P), pool.empty(B, H, N, P)
    tensors = [x.float().contiguous() for x in (q, k, v, decay, state)]
    NP, PP = N + -N % PAIR, P + -P % PAIR
    args = [x.data_ptr() for x in (*tensors, y, last)] + [L, G, H, N, P, NP, PP, decay.shape[3] > 1]
    size = T * (3 * NP + 2 * PP) + NP * PP
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
    NP, PP = N + -N % PAIR, P + -P % PAIR
    starts = -(-L // (T * KEEP))
    size = T * (4 * NP + 3 * PP) + 3 * NP * PP + NP + starts * NP * (PP + 1)
    pool.run(
        _backward, B * G * parts, *(x.data_ptr() for x in (*tensors, dq, dk, dv, ddecay, dstate)),
        B, L, G, H, N, P, NP, PP, parts, W > 1, "decay" in needed, scratch_size=size,
    )  # fmt: skip
    dq, dk, ddecay = (x[0] if len(x) == 1 else x.sum(0) for x in (dq, dk, ddecay))
    ddecay = ddecay if axes == 4 else ddecay[..., 0]
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay.sum((0, 1)) if axes == 1 else ddecay, "state": dstate}


@kernel
def _fetch(target, width, source, place, stride, rows, count):
    """target[r, :width] = source[place + r * stride :][:count], then zeros; width is a multiple of LANES."""
    for r in range(rows):
        for c in range(0, width, LANES):
            i, j = r * width + c, place + r * stride + c
            prefetch(source, j + rows * stride)
            if c + LANES <= count:
                store(target, i, load(R, source, j))
            else:
                store(target, i, load_first(R, source, j, max(0, count - c)))


@kernel
def _put(target, place, stride, source, width, rows, count, add):
    """The way back, or added to what is there."""
    for r in range(rows):
        for c in range(0, count, LANES):
            i, j, some = place + r * stride + c, r * width + c, min(LANES, count - c)
            prefetch_to_write(target, i + rows * stride)
            x = load(R, source, j)
            if add:
                x = x + load_first(R, target, i, some)
            if some == LANES:
                store(target, i, x)
            else:
                store_first(target, i, x, some)


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
        _fetch(target, NP, decay, place, stride, rows, N)
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
def _step(s, a, k, v, w, out):
    """The state after a step, and the result with what is left of the state before it."""
    s = a * s
    return fma(k, v, s), fma(w, s, out)


@kernel
def _by_values(rows, N, NP, PP, a, k, q, v, y, source, i, target, j, stride):
    """y[t, p] += sum_n q[t, n] a[t, n] S[n, p],  S = a S + k v  from source[i] into target[j]; values in the lanes."""
    for p in range(0, PP, PAIR):
        for n in range(0, N, 4):
            o = i + n * stride + p
            s00, s01 = load(R, source, o), load(R, source, o + LANES)
            s10, s11 = load(R, source, o + stride), load(R, source, o + stride + LANES)
            s20, s21 = load(R, source, o + 2 * stride), load(R, source, o + 2 * stride + LANES)
            s30, s31 = load(R, source, o + 3 * stride), load(R, source, o + 3 * stride + LANES)
            for t in range(rows):
                m, o = t * NP + n, t * PP + p
                v0, v1, y0, y1 = load(R, v, o), load(R, v, o + LANES), load(R, y, o), load(R, y, o + LANES)
                a_t, k_t, q_t = load_splat(R, a, m), load_splat(R, k, m), load_splat(R, q, m)
                s00, y0 = _step(s00, a_t, k_t, v0, q_t, y0)
                s01, y1 = _step(s01, a_t, k_t, v1, q_t, y1)
                a_t, k_t, q_t = load_splat(R, a, m + 1), load_splat(R, k, m + 1), load_splat(R, q, m + 1)
                s10, y0 = _step(s10, a_t, k_t, v0, q_t, y0)
                s11, y1 = _step(s11, a_t, k_t, v1, q_t, y1)
                a_t, k_t, q_t = load_splat(R, a, m + 2), load_splat(R, k, m + 2), load_splat(R, q, m + 2)
                s20, y0 = _step(s20, a_t, k_t, v0, q_t, y0)
                s21, y1 = _step(s21, a_t, k_t, v1, q_t, y1)
                a_t, k_t, q_t = load_splat(R, a, m + 3), load_splat(R, k, m + 3), load_splat(R, q, m + 3)
                s30, y0 = _step(s30, a_t, k_t, v0, q_t, y0)
                s31, y1 = _step(s31, a_t, k_t, v1, q_t, y1)
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
def _by_keys(rows, P, NP, PP, a, k, v, w, out, S):
    """out[t, n] += sum_p w[t, p] a[t, n] S[p, n],  S = a S + k v  in place; keys in the lanes."""
    for n in range(0, NP, PAIR):
        for p in range(0, P, 4):
            o = p * NP + n
            s00, s01 = load(R, S, o), load(R, S, o + LANES)
            s10, s11 = load(R, S, o + NP), load(R, S, o + NP + LANES)
            s20, s21 = load(R, S, o + 2 * NP), load(R, S, o + 2 * NP + LANES)
            s30, s31 = load(R, S, o + 3 * NP), load(R, S, o + 3 * NP + LANES)
            for t in range(rows):
                m, i = t * PP + p, t * NP + n
                a0, a1, k0, k1 = load(R, a, i), load(R, a, i + LANES), load(R, k, i), load(R, k, i + LANES)
                o0, o1 = load(R, out, i), load(R, out, i + LANES)
                v_t, w_t = load_splat(R, v, m), load_splat(R, w, m)
                s00, o0 = _step(s00, a0, k0, v_t, w_t, o0)
                s01, o1 = _step(s01, a1, k1, v_t, w_t, o1)
                v_t, w_t = load_splat(R, v, m + 1), load_splat(R, w, m + 1)
                s10, o0 = _step(s10, a0, k0, v_t, w_t, o0)
                s11, o1 = _step(s11, a1, k1, v_t, w_t, o1)
                v_t, w_t = load_splat(R, v, m + 2), load_splat(R, w, m + 2)
                s20, o0 = _step(s20, a0, k0, v_t, w_t, o0)
                s21, o1 = _step(s21, a1, k1, v_t, w_t, o1)
                v_t, w_t = load_splat(R, v, m + 3), load_splat(R, w, m + 3)
                s30, o0 = _step(s30, a0, k0, v_t, w_t, o0)
                s31, o1 = _step(s31, a1, k1, v_t, w_t, o1)
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
    a, keys, queries = scratch, scratch[T * NP :], scratch[2 * T * NP :]
    values, out, held = scratch[3 * T * NP :], scratch[T * (3 * NP + PP) :], scratch[T * (3 * NP + 2 * PP) :]
    in_place = N % 4 == 0 and PP == P
    for task in range(start, stop):
        b, h = task // H, task % H
        g, home = h // (H // G), task * N * P
        if not in_place:
            _clear(held, NP * PP)
            _fetch(held, PP, state, home, P, N, P)
        for t in range(0, L, T):
            rows, row = min(T, L - t), b * L + t
            if channels:
                _decays(a, NP, decay, (row * G + g) * N, G * N, rows, N, True)
            else:
                _decays(a, NP, decay, row * H + h, H, rows, N, False)
            _fetch(keys, NP, k, (row * G + g) * N, G * N, rows, N)
            _fetch(queries, NP, q, (row * G + g) * N, G * N, rows, N)
            _fetch(values, PP, v, (row * H + h) * P, H * P, rows, P)
            _itself(out, PP, values, queries, keys, NP, rows, False)
            if in_place:
                source = state if t == 0 else last
                _by_values(rows, N, NP, PP, a, keys, queries, values, out, source, home, last, home, P)
            else:
                _by_values(rows, N, NP, PP, a, keys, queries, values, out, held, 0, held, 0, PP)
            _put(y, (row * H + h) * P, H * P, out, PP, rows, P, False)
        if not in_place:
            _put(last, home, P, held, PP, N, P, False)


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
    a, keys, queries, by_keys = scratch, scratch[T * NP :], scratch[2 * T * NP :], scratch[3 * T * NP :]
    rest = scratch[4 * T * NP :]
    values, grads, by_values = rest, rest[T * PP :], rest[2 * T * PP :]
    rest = rest[3 * T * PP :]
    S, D, D_values, carry = rest, rest[size:], rest[2 * size :], rest[3 * size :]
    firsts, kept = carry[NP:], carry[NP + (chunks + KEEP - 1) // KEEP * NP :]
    one = np.float32(1.0)
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
            for c in range(chunks):
                t = c * T
                rows, row = min(T, L - t), b * L + t
                if with_decay and c % KEEP == 0:
                    for i in range(0, size, LANES):
                        store(kept, c // KEEP * size + i, load(R, S, i))
                _decays(a, NP, decay, first_d + t * step_d, step_d, rows, N, channels)
                _fetch(keys, NP, k, (row * G + g) * N, G * N, rows, N)
                _fetch(values, PP, v, (row * H + h) * P, H * P, rows, P)
                _fetch(grads, PP, dy, (row * H + h) * P, H * P, rows, P)
                _clear(by_keys, rows * NP)
                _by_keys(rows, P, NP, PP, a, keys, values, grads, by_keys, S)
                if with_decay:
                    _fetch(queries, NP, q, (row * G + g) * N, G * N, rows, N)
                    _grow(ddecay, first_dd + t * step_d, step_d, -one, queries, by_keys, rows, N, NP, channels)
                _itself(by_keys, NP, keys, values, grads, PP, rows, True)
                _put(dq, to_keys + t * G * N, G * N, by_keys, NP, rows, N, h > low)
            _transpose(D, NP, dlast, home, N, P)
            _clear(D_values, size)
            _fetch(D_values, PP, dlast, home, P, N, P)
            for c in range(chunks - 1, -1, -1):
                t = min(c * T + T, L) - 1  # the last step, which comes first
                rows, row = t + 1 - c * T, b * L + t
                if t == L - 1:
                    for i in range(0, NP, LANES):
                        store(a, i, splat(R, one))
                    _decays(a[NP:], NP, decay, first_d + t * step_d, -step_d, rows - 1, N, channels)
                else:
                    _decays(a, NP, decay, first_d + (t + 1) * step_d, -step_d, rows, N, channels)
                _fetch(keys, NP, k, (row * G + g) * N, -G * N, rows, N)
                _fetch(queries, NP, q, (row * G + g) * N, -G * N, rows, N)
                _fetch(values, PP, v, (row * H + h) * P, -H * P, rows, P)
                _fetch(grads, PP, dy, (row * H + h) * P, -H * P, rows, P)
                _clear(by_keys, rows * NP)
                _by_keys(rows, P, NP, PP, a, queries, grads, values, by_keys, D)
                if with_decay:
                    _grow(ddecay, first_dd + t * step_d, -step_d, one, keys, by_keys, rows, N, NP, channels)
                _itself(by_keys, NP, queries, values, grads, PP, rows, True)
                _put(dk, to_keys + t * G * N, -G * N, by_keys, NP, rows, N, h > low)
                _itself(by_values, PP, grads, queries, keys, NP, rows, False)
                _by_values(rows, N, NP, PP, a, queries, keys, grads, by_values, D_values, 0, D_values, 0, PP)
                _put(dv, (row * H + h) * P, -H * P, by_values, PP, rows, P, False)
                if with_decay and c % KEEP == 0:
                    _decays(a, NP, decay, first_d + c * T * step_d, step_d, 1, N, channels)
                    _start(firsts, c // KEEP * NP, a, kept, c // KEEP * size, D, P, NP, channels, h > low)
            _decays(a, NP, decay, first_d, step_d, 1, N, channels)
            for n in range(N):
                for i in range(n * PP, (n + 1) * PP, LANES):
                    store(D_values, i, load(R, D_values, i) * load_splat(R, a, n))
            _put(dstate, home, P, D_values, PP, N, P, False)
            if with_decay and (h == high - 1 or not channels):
                _add_up(ddecay, first_dd, decay, first_d, step_d, firsts, carry, L, N if channels else 1, NP)


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
