# mypy: no-check-untyped-defs
"""The gated delta rule in chunks of T steps as small matrix products in the cache; one step alone value by value.

What the steps of a chunk change, W, depends on the state S before it by a triangular system; a is the decay from the
start of the chunk to a step, z that from a step to its end, d that between two, and all of it diagonal or (T, T):

    (I + A) W = b V - b a K S,   A[t, s] = b[t] d[t, s] k[t] k[s]  for s < t
    Y = a Q S + C W,             C[t, s] = d[t, s] q[t] k[s]       for s <= t
    S' = a[T] S + (z K)^T W

and back, with D the gradient of S:

    (I + A)^T U = C^T dY + z K D',   D = a[T] D' + (a Q)^T dY - (b a K)^T U,   dV = b U

A task is a head. For its gradient W is kept, and the state before each span of KEEP chunks, from which those before
chunks are made again. The gradient of a decay is S D at the start of a chunk, and from each step to the next it grows
by what is written, k dk, and shrinks by what is read, k dk and q dq; what a step does to itself cancels there.
"""

import math

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.blocks import LANES, ROWS, R, fetch, padded, product, put, transposed
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    eight,
    exp,
    floats,
    fma,
    fnma,
    load,
    load_first,
    load_splat,
    splat,
    store,
    store_first,
    sum_lanes,
    zero,
)
from longwave.ops.gated_delta_rule import prepare

T, KEEP = 32, 8  # steps of a chunk, and chunks of a span
TT = padded(T)  # from a row of (T, T) to the next
NONE, ONE = np.float32(0.0), np.float32(1.0)
NOTHING = -1000.0  # exp of it is 0: the least exponent that is summed, so that -inf is allowed
FEW = 8  # values that one step alone takes at a time


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(y (B, L, H, P), the last state (B, H, N, P)), and what is kept."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    state = prepare(q, v, state)
    y, last = pool.empty(B, L, H, P), pool.empty(B, H, N, P)
    kept = pool.empty(*_kept(v, N)) if keep else y.new_empty(0)
    tensors = [t.float().contiguous() for t in (q, k, v, decay, beta, state)]
    args = [t.data_ptr() for t in (*tensors, y, last)]
    if L == 1 and not keep:
        _step(*args, B * H, H // G, N, P)
    else:
        NP, PP = padded(N), padded(P)
        size = 5 * T * NP + 2 * T * PP + NP * (TT + PP) + 3 * T * TT + 4 * T
        pool.run(_forward, B * H, *args, kept.data_ptr(), keep, L, G, H, N, P, NP, PP, scratch_size=size)
    return (y.to(v.dtype), last), kept


def saved(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None) -> Tensor:
    """Of each head the states (N, P) before spans, and the changes (L, P)."""
    return v.new_empty(_kept(v, q.shape[3]), dtype=torch.float32)


def _kept(v: Tensor, N: int) -> tuple[int, int, int, int]:
    B, L, H, P = v.shape
    return B, H, _spans(L) * N + L, P


def _spans(L: int) -> int:
    return -(-L // (T * KEEP))


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor,
    beta: Tensor, saved: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """All gradients."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    dy = torch.zeros(v.shape) if dy is None else dy
    dlast = torch.zeros(B, H, N, P) if dlast is None else dlast
    dq, dk, dv = pool.empty(B, L, H, N), pool.empty(B, L, H, N), pool.empty(B, L, H, P)
    ddecay, dbeta, dstate = torch.empty(B, L, H), torch.empty(B, L, H), pool.empty(B, H, N, P)
    tensors = [t.float().contiguous() for t in (q, k, v, decay, beta, dy, dlast)]
    args = [t.data_ptr() for t in (*tensors, saved, dq, dk, dv, ddecay, dbeta, dstate)]
    NP, PP = padded(N), padded(P)
    size = 8 * T * NP + 4 * T * PP + NP * TT + PP * TT + NP * PP * (KEEP + 3) + 5 * T * TT + 4 * T
    pool.run(_backward, B * H, *args, L, G, H, N, P, NP, PP, _spans(L), scratch_size=size)
    if G != H:
        dq, dk = (t.unflatten(2, (G, -1)).sum(3) for t in (dq, dk))
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay, "beta": dbeta, "state": dstate}


@kernel
def _decays(decay, beta, place, stride, rows, n, rates, so_far, to_end, between):
    """beta, and decays of a chunk; steps behind the rows decay and change nothing. The decay over all of it."""
    total = 0.0
    for t in range(n):
        there = t < rows
        total += max(np.float64(decay[place + t * stride]), NOTHING) if there else 0.0
        rates[t] = beta[place + t * stride] if there else NONE
        so_far[t] = np.float32(math.exp(total))
        rest = 0.0
        for s in range(t, -1, -1):  # sums of few terms in float64: differences of long ones would lose digits
            between[t * TT + s] = np.float32(rest)
            rest += max(np.float64(decay[place + s * stride]), NOTHING) if s < rows else 0.0
        for s in range(0, t + 1, LANES):
            i = t * TT + s
            store(between, i, exp(load_first(R, between, i, min(LANES, t + 1 - s))))
    for t in range(n):
        to_end[t] = between[(n - 1) * TT + t]
    return np.float32(math.exp(total))


@kernel
def _triangle(scores, between, n, shift):
    """scores[t, s] between[t, s]  for s < t + shift, and 0 for other s."""
    for t in range(n):
        for s in range(0, n, LANES):
            i, some = t * TT + s, max(0, min(LANES, t + shift - s))
            store(scores, i, load_first(R, scores, i, some) * load_first(R, between, i, some))


@kernel
def _scaled(target, x, width, factors, sign, rows):
    """target[r] = sign factors[r] x[r]."""
    for r in range(rows):
        factor = splat(R, sign * factors[r])
        for i in range(r * width, (r + 1) * width, LANES):
            store(target, i, factor * load(R, x, i))


@kernel
def _solve(A, a, a_row, a_col, W, w, w_row, rows, width):
    """(I - A) X = W  in place, A a strictly lower triangle."""
    for i in range(0, rows, ROWS):
        o = w + i * w_row
        if i:
            product(ONE, W, o, w_row, A, a + i * a_row, a_row, a_col, W, w, w_row, ROWS, width, i, False)
        for c in range(0, width, LANES):
            for r in range(i + 1, i + ROWS):
                x = load(R, W, w + r * w_row + c)
                for s in range(i, r):
                    x = fma(load_splat(R, A, a + r * a_row + s * a_col), load(R, W, w + s * w_row + c), x)
                store(W, w + r * w_row + c, x)


@kernel
def _dot(x, i, y, j, width):
    """sum of x y, over as many elements."""
    total = zero(R)
    for c in range(0, width, LANES):
        total = fma(load(R, x, i + c), load(R, y, j + c), total)
    return sum_lanes(total)


@kernel
def _clear(x, start, stop):
    for i in range(start, stop):
        x[i] = NONE


@kernel
def _rows(target, width, source, place, stride, rows, n, count, ahead):
    """Rows of a tensor, and zeros up to n."""
    fetch(target, width, source, place, stride, rows, count, ahead)
    _clear(target, rows * width, n * width)


@kernel
def _forward(start, stop, scratch, q, k, v, decay, beta, state, y, last, kept, keep, L, G, H, N, P, NP, PP):
    q, k, v, decay, beta = floats(q), floats(k), floats(v), floats(decay), floats(beta)
    state, y, last, kept = floats(state), floats(y), floats(last), floats(kept)
    keys, queries, learned = scratch, scratch[T * NP :], scratch[2 * T * NP :]
    reading, writing = scratch[3 * T * NP :], scratch[4 * T * NP :]
    rest = scratch[5 * T * NP :]
    W, out, S, across = rest, rest[T * PP :], rest[2 * T * PP :], rest[2 * T * PP + NP * PP :]
    rest = across[NP * TT :]
    A, C, between = rest, rest[T * TT :], rest[2 * T * TT :]
    rest = rest[3 * T * TT :]
    rates, so_far, to_end, factor = rest, rest[T:], rest[2 * T :], rest[3 * T :]
    spans = (L + T * KEEP - 1) // (T * KEEP)
    for task in range(start, stop):
        b, h = task // H, task % H
        g, home = h // (H // G), task * (spans * N + L) * P
        fetch(S, PP, state, task * N * P, P, N, P)
        for t in range(0, L, T):
            rows, row = min(T, L - t), b * L + t
            n = (rows + 7) // 8 * 8
            if keep and t % (T * KEEP) == 0:
                put(kept, home + t // (T * KEEP) * N * P, P, S, PP, N, P, False)
            over_all = _decays(decay, beta, row * H + h, H, rows, n, rates, so_far, to_end, between)
            _rows(keys, NP, k, (row * G + g) * N, G * N, rows, n, N, 1)
            _rows(queries, NP, q, (row * G + g) * N, G * N, rows, n, N, 1)
            _rows(W, PP, v, (row * H + h) * P, H * P, rows, n, P, 1)
            transposed(across, TT, keys, NP, n, N)
            product(NONE, A, 0, TT, keys, 0, NP, 1, across, 0, TT, n, n, N, False)
            product(NONE, C, 0, TT, queries, 0, NP, 1, across, 0, TT, n, n, N, False)
            _triangle(A, between, n, 0)
            _triangle(C, between, n, 1)
            _scaled(A, A, TT, rates, -ONE, n)
            _scaled(W, W, PP, rates, ONE, n)
            for i in range(n):
                factor[i] = rates[i] * so_far[i]
            _scaled(learned, keys, NP, factor, -ONE, n)
            _scaled(reading, queries, NP, so_far, ONE, n)
            _scaled(writing, keys, NP, to_end, ONE, n)
            product(ONE, W, 0, PP, learned, 0, NP, 1, S, 0, PP, n, P, N, False)
            _solve(A, 0, TT, 1, W, 0, PP, n, P)
            product(NONE, out, 0, PP, reading, 0, NP, 1, S, 0, PP, n, P, N, False)
            product(ONE, out, 0, PP, C, 0, TT, 1, W, 0, PP, n, P, n, True)
            product(over_all, S, 0, PP, writing, 0, 1, NP, W, 0, PP, N, P, n, False)
            put(y, (row * H + h) * P, H * P, out, PP, rows, P, False)
            if keep:
                put(kept, home + (spans * N + t) * P, P, W, PP, rows, P, False)
        put(last, task * N * P, P, S, PP, N, P, False)


@kernel
def _backward(
    start, stop, scratch, q, k, v, decay, beta, dy, dlast, kept, dq, dk, dv, ddecay, dbeta, dstate,
    L, G, H, N, P, NP, PP, spans,
):  # fmt: skip
    q, k, v, decay, beta = floats(q), floats(k), floats(v), floats(decay), floats(beta)
    dy, dlast, kept, dq, dk, dv = floats(dy), floats(dlast), floats(kept), floats(dq), floats(dk), floats(dv)
    ddecay, dbeta, dstate = floats(ddecay), floats(dbeta), floats(dstate)
    keys, queries, learned = scratch, scratch[T * NP :], scratch[2 * T * NP :]
    reading, writing = scratch[3 * T * NP :], scratch[4 * T * NP :]
    to_queries, to_keys, read = scratch[5 * T * NP :], scratch[6 * T * NP :], scratch[7 * T * NP :]
    rest = scratch[8 * T * NP :]
    values, W, grads, U = rest, rest[T * PP :], rest[2 * T * PP :], rest[3 * T * PP :]
    rest = rest[4 * T * PP :]
    keys_across, W_across = rest, rest[NP * TT :]
    rest = rest[(NP + PP) * TT :]
    D, D_across, states = rest, rest[NP * PP :], rest[2 * NP * PP :]  # the states across, (P, N)
    rest = rest[(KEEP + 3) * NP * PP :]
    A, C, between, by_queries, by_keys = (
        rest, rest[T * TT :], rest[2 * T * TT :], rest[3 * T * TT :], rest[4 * T * TT :],
    )  # fmt: skip
    rest = rest[5 * T * TT :]
    rates, so_far, to_end, factor = rest, rest[T:], rest[2 * T :], rest[3 * T :]
    for task in range(start, stop):
        b, h = task // H, task % H
        g, home = h // (H // G), task * (spans * N + L) * P
        fetch(D, PP, dlast, task * N * P, P, N, P)
        _clear(D, N * PP, (N + 7) // 8 * 8 * PP)
        _clear(states, 0, NP * PP)  # and zeros behind their rows
        _clear(D_across, 0, NP * PP)
        transposed(D_across, NP, D, PP, N, P)
        for span in range(spans - 1, -1, -1):
            first, end = span * T * KEEP, min(L, (span + 1) * T * KEEP)
            # the state as it is, in the room of the last but one, and then each from the one before
            S = states[KEEP * NP * PP :]
            fetch(S, PP, kept, home + span * N * P, P, N, P)
            _clear(S, N * PP, (N + 7) // 8 * 8 * PP)
            transposed(states, NP, S, PP, N, P)
            for t in range(first, end - T, T):
                row, old, new = b * L + t, (t - first) // T * NP * PP, ((t - first) // T + 1) * NP * PP
                over_all = _decays(decay, beta, row * H + h, H, T, T, rates, so_far, to_end, between)
                fetch(keys, NP, k, (row * G + g) * N, G * N, T, N)
                fetch(W, PP, kept, home + (spans * N + t) * P, P, T, P)
                _scaled(writing, keys, NP, to_end, ONE, T)
                for i in range(0, P * NP, LANES):
                    store(states, new + i, splat(R, over_all) * load(R, states, old + i))
                product(ONE, states, new, NP, W, 0, 1, PP, writing, 0, NP, P, N, T, False)
            for t in range(first + (end - first - 1) // T * T, first - 1, -T):
                rows, row, before = min(T, L - t), b * L + t, (t - first) // T * NP * PP
                n = (rows + 7) // 8 * 8
                over_all = _decays(decay, beta, row * H + h, H, rows, n, rates, so_far, to_end, between)
                _rows(keys, NP, k, (row * G + g) * N, G * N, rows, n, N, -1)
                _rows(queries, NP, q, (row * G + g) * N, G * N, rows, n, N, -1)
                _rows(values, PP, v, (row * H + h) * P, H * P, rows, n, P, -1)
                _rows(grads, PP, dy, (row * H + h) * P, H * P, rows, n, P, -1)
                _rows(W, PP, kept, home + (spans * N + t) * P, P, rows, n, P, -1)
                transposed(keys_across, TT, keys, NP, n, N)
                transposed(W_across, TT, W, PP, n, P)
                product(NONE, A, 0, TT, keys, 0, NP, 1, keys_across, 0, TT, n, n, N, False)
                product(NONE, C, 0, TT, queries, 0, NP, 1, keys_across, 0, TT, n, n, N, False)
                _triangle(A, between, n, 0)
                _triangle(C, between, n, 1)
                _scaled(A, A, TT, rates, -ONE, n)
                for i in range(n):
                    factor[i] = rates[i] * so_far[i]
                _scaled(learned, keys, NP, factor, -ONE, n)
                _scaled(reading, queries, NP, so_far, ONE, n)
                _scaled(writing, keys, NP, to_end, ONE, n)
                # transposes of triangles are triangles, seen from their ends
                end_TT, end_NP, end_PP = (n - 1) * (TT + 1), (n - 1) * NP, (n - 1) * PP
                product(NONE, U, 0, PP, writing, 0, NP, 1, D, 0, PP, n, P, N, False)
                product(ONE, U, end_PP, -PP, C, end_TT, -1, -TT, grads, end_PP, -PP, n, P, n, True)
                _solve(A, end_TT, -1, -TT, U, end_PP, -PP, n, P)
                product(NONE, to_keys, 0, NP, W, 0, PP, 1, D_across, 0, NP, n, N, P, False)
                product(over_all, D, 0, PP, reading, 0, 1, NP, grads, 0, PP, N, P, n, False)
                product(ONE, D, 0, PP, learned, 0, 1, NP, U, 0, PP, N, P, n, False)
                product(NONE, by_queries, 0, TT, grads, 0, PP, 1, W_across, 0, TT, n, n, P, False)
                product(NONE, by_keys, 0, TT, U, 0, PP, 1, W_across, 0, TT, n, n, P, False)
                for i in range(n):
                    factor[i] = by_queries[i * (TT + 1)]  # what a step reads of what it writes
                _triangle(by_queries, between, n, 0)
                _triangle(by_keys, between, n, 0)
                product(NONE, to_queries, 0, NP, grads, 0, PP, 1, states, before, NP, n, N, P, False)
                _scaled(to_queries, to_queries, NP, so_far, ONE, n)
                product(ONE, to_queries, 0, NP, by_queries, 0, TT, 1, keys, 0, NP, n, N, n, True)
                product(NONE, read, 0, NP, U, 0, PP, 1, states, before, NP, n, N, P, False)
                _scaled(read, read, NP, so_far, ONE, n)
                product(ONE, read, 0, NP, by_keys, 0, TT, 1, keys, 0, NP, n, N, n, True)
                _scaled(by_keys, by_keys, TT, rates, -ONE, n)
                _scaled(to_keys, to_keys, NP, to_end, ONE, n)
                product(ONE, to_keys, end_NP, -NP, by_queries, end_TT, -1, -TT, queries, end_NP, -NP, n, N, n, True)
                product(ONE, to_keys, end_NP, -NP, by_keys, end_TT, -1, -TT, keys, end_NP, -NP, n, N, n, True)
                transposed(D_across, NP, D, PP, N, P)
                total = np.float64(0.0)
                for p in range(P):
                    total += _dot(states, before + p * NP, D_across, p * NP, N)
                for i in range(rows):
                    o, place = i * NP, (row + i) * H + h
                    of_itself, rate = splat(R, factor[i]), splat(R, rates[i])
                    ddecay[place] = np.float32(total) if decay[place] >= NOTHING else NONE
                    dbeta[place] = _dot(U, i * PP, values, i * PP, P) - _dot(keys, o, read, o, N)
                    change = zero(R)
                    for c in range(o, o + N, LANES):
                        key, query = load(R, keys, c), load(R, queries, c)
                        dkey, dquery, known = load(R, to_keys, c), load(R, to_queries, c), rate * load(R, read, c)
                        change = change + fnma(query, dquery, key * (dkey + known))
                        store(to_queries, c, fma(of_itself, key, dquery))
                        store(to_keys, c, fma(of_itself, query, dkey - known))
                    total += sum_lanes(change)
                _scaled(U, U, PP, rates, ONE, rows)
                put(dq, (row * H + h) * N, H * N, to_queries, NP, rows, N, False, -1)
                put(dk, (row * H + h) * N, H * N, to_keys, NP, rows, N, False, -1)
                put(dv, (row * H + h) * P, H * P, U, PP, rows, P, False, -1)
        put(dstate, task * N * P, P, D, PP, N, P, False)


@kernel
def _some(array, i, count):
    """array[i : i + count], count <= FEW."""
    return load(eight, array, i) if count == FEW else load_first(eight, array, i, count)


@kernel
def _put(array, i, x, count):
    if count == FEW:
        store(array, i, x)
    else:
        store_first(array, i, x, count)


@kernel
def _step(q, k, v, decay, beta, state, y, new, heads, share, N, P):
    """Of every head a few values after the other, which the state keeps apart; neighbours share queries and keys."""
    q, k, v, decay, beta = floats(q), floats(k), floats(v), floats(decay), floats(beta)
    state, y, new = floats(state), floats(y), floats(new)
    for head in range(heads):
        kept, rate = splat(eight, np.float32(math.exp(decay[head]))), splat(eight, beta[head])
        key, row = head // share * N, head * N
        for p in range(0, P, FEW):
            count, known, out = min(FEW, P - p), zero(eight), zero(eight)
            for n in range(N):
                known = fma(load_splat(eight, k, key + n), _some(state, (row + n) * P + p, count), known)
            change = rate * fnma(kept, known, _some(v, head * P + p, count))
            for n in range(N):
                i = (row + n) * P + p
                now = fma(load_splat(eight, k, key + n), change, kept * _some(state, i, count))
                _put(new, i, now, count)
                out = fma(load_splat(eight, q, key + n), now, out)
            _put(y, head * P + p, out, count)
