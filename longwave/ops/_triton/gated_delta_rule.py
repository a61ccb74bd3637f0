# mypy: no-check-untyped-defs
"""The gated delta rule in chunks of time, as matrix products: the Triton form of ``_torch/gated_delta_rule.py``.

Of all chunks at once, with I + A the triangular system of what its steps do to each other: U and E, so that what the
steps change is W = U - E S whatever the state S before the chunk. One walk along the chunks then gives W and the
states, another one back their gradients; results and the other gradients are again of all chunks at once.

Letters: T steps of a chunk.
"""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import launch, precision, rows, size, tuned
from longwave.ops._triton.linear_attention import CHOICES, NOTHING, _between, _load, _outputs, _total

CHUNK = size(32, 8)  # steps
LARGEST = 256  # keys of a head, whose states are held in registers


def why_not(q, k, v, decay, beta, state):
    """The reason, or None."""
    N = q.shape[3]
    return f"heads have N = {N} keys; at most {LARGEST} are held in registers" if N > LARGEST else None


def forward(q, k, v, decay, beta, state):
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    given, strides, sizes = _described(q, k, v, decay, beta)
    L, G, H, N, P, T, BN, BP, precise = sizes
    _, _, W, states, last = _changes(given, strides, sizes, state)
    y = v.new_empty(v.shape)
    grid = len(q) * triton.cdiv(L, T) * H * triton.cdiv(P, BP)
    launch(
        _outputs, grid, y, given[0], given[1], W, given[3], states, *strides[:6], *W.stride()[:3], *given[3].stride(),
        L, G, H, N, P, T, min(BN, 64), BP, False, precise, False,
    )  # fmt: skip
    return y, last


def backward(needed, dy, dlast, q, k, v, decay, beta, state):
    """As in the portable form; the changes and the states are made again."""
    given, strides, sizes = _described(q, k, v, decay, beta)
    L, G, H, N, P, T, _, BP, _ = sizes
    inverse, E, W, states, _ = _changes(given, strides, sizes, state)
    batch, chunks = len(q), triton.cdiv(L, T)
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.float().contiguous()
    dstates, dW = W.new_empty(batch, chunks + 1, H, N, P), torch.empty_like(W)
    grid = batch * H * triton.cdiv(P, BP)
    launch(_walk_back, grid, dstates, dW, dy, given[0], given[1], E, given[3], dlast, *strides[:6], *sizes)
    dq, dk = (x.new_empty(batch, L, H, N, dtype=x.dtype if G == H else torch.float32) for x in (q, k))
    dv, ddecay, dbeta = (x.new_empty(x.shape) for x in (v, decay, beta))
    outs = dq, dk, dv, ddecay, dbeta
    launch(_gradients, batch * chunks * H, *outs, dy, W, dW, inverse, states, dstates, *given, *strides, *sizes)
    dq, dk = (x if G == H else x.view(batch, L, G, -1, N).sum(3) for x in (dq, dk))
    ddecay = ddecay.masked_fill(decay < NOTHING.value, 0.0)
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay, "beta": dbeta, "state": dstates[:, 0]}


def _described(q, k, v, decay, beta):
    """Tensors, strides and sizes, which the kernels take in this order."""
    (_, L, G, N), (H, P) = q.shape, v.shape[2:]
    BN, BP = (size(max(16, width), width) for width in map(triton.next_power_of_2, (N, P)))
    precise = precision(q, k, v)
    given = rows(q), rows(k), rows(v), decay.contiguous(), beta.contiguous()
    strides = [stride for x in given[:3] for stride in x.stride()[:3]]
    return given, strides, (L, G, H, N, P, CHUNK, BN, min(BP, size(32, 4)), precise)


def _changes(given, strides, sizes, state):
    """The inverses of I + A, E, W, the states before all chunks, and the one behind them."""
    _, k, v, decay, beta = given
    L, _, H, N, P, T, _, BP, _ = sizes
    batch, chunks = len(k), triton.cdiv(L, T)
    room = lambda *shape: k.new_empty(batch, *shape, dtype=torch.float32)  # noqa: E731
    inverse, U, E, W = room(chunks, H, T, T), room(L, H, P), room(L, H, N), room(L, H, P)
    states, last = room(chunks, H, N, P), room(H, N, P)
    launch(_within, batch * chunks * H, inverse, U, E, k, v, decay, beta, *strides[3:], *sizes)
    state = None if state is None else state.float().contiguous()
    grid = batch * H * triton.cdiv(P, BP)
    launch(_walk, grid, states, last, W, U, E, k, decay, state, *strides[3:6], *sizes)
    return inverse, E, W, states, last


@triton.jit
def _where(L, H, G, T: tl.constexpr):
    """Batch, chunk, chunks, head, group, first step, and the number of the first row of numbers of a head."""
    row, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(L, T)
    batch, chunk, head = row // H // chunks, row // H % chunks, row % H
    return batch, chunk, chunks, head, head // (H // G), chunk * T, (batch * L + chunk * T) * H + head


@tuned(["N", "P"], *CHOICES)
def _within(
    inverse, U, E, k, v, decay, beta, k_b, k_t, k_h, v_b, v_t, v_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    batch, chunk, chunks, head, group, first, here = _where(L, H, G, T)
    t, n = tl.arange(0, T), tl.arange(0, BN)
    ok, square = t < L - first, t[:, None] * T + t[None, :]
    key = _load(k + batch * k_b + group * k_h + first * k_t, t, n, k_t, ok, N)
    b = tl.load(beta + here + t * H, mask=ok, other=0.0).to(tl.float32)[:, None]
    total, _over = _total(decay + here, t, t, H, ok, N, False)
    system = tl.dot(key, tl.trans(key), input_precision=precise) * _between(total, t, True, False) * b
    inverted = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    for i in range(1, T):  # row by row: powers of the system would cancel each other
        above = tl.sum(tl.where(t[:, None] == i, system, 0.0), 0)
        change = tl.sum(above[:, None] * inverted, 0)
        inverted = tl.where(t[:, None] == i, inverted - change[None, :], inverted)
    tl.store(inverse + ((batch * chunks + chunk) * H + head) * T * T + square, inverted)
    e = tl.dot(inverted, key * tl.exp(total.to(tl.float32)) * b, input_precision=precise)
    tl.store(E + here * N + t[:, None] * (H * N) + n[None, :], e, mask=ok[:, None] & (n < N)[None, :])
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        value = _load(v + batch * v_b + head * v_h + first * v_t, t, p, v_t, ok, P)
        u = tl.dot(inverted, value * b, input_precision=precise)
        tl.store(U + here * P + t[:, None] * (H * P) + p[None, :], u, mask=ok[:, None] & (p < P)[None, :])


@tuned(["N", "P"], *CHOICES)
def _walk(
    states, last, W, U, E, k, decay, state, k_b, k_t, k_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    """The states of a head and what changes them, for a block of values."""
    ps, chunks = tl.cdiv(P, BP), tl.cdiv(L, T)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // ps // H, row // ps % H
    t, n, p = tl.arange(0, T), tl.arange(0, BN), (row % ps).to(tl.int32) * BP + tl.arange(0, BP)
    inside, tile = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
    k += batch * k_b + head // (H // G) * k_h
    S = tl.zeros((BN, BP), tl.float32)
    if state is not None:
        S = tl.load(state + (batch * H + head) * N * P + tile, mask=inside, other=0.0)
    for chunk in range(chunks):
        first = tl.cast(chunk, tl.int64) * T
        ok, here = t < L - first, (batch * L + first) * H + head
        tl.store(states + ((batch * chunks + chunk) * H + head) * N * P + tile, S, mask=inside)
        key, e = _load(k + first * k_t, t, n, k_t, ok, N), _load(E + here * N, t, n, H * N, ok, N)
        w = _load(U + here * P, t, p, H * P, ok, P) - tl.dot(e, S, input_precision=precise)
        tl.store(W + here * P + t[:, None] * (H * P) + p[None, :], w, mask=ok[:, None] & (p < P)[None, :])
        total, over = _total(decay + here, t, t, H, ok, N, False)
        key *= tl.exp((over - total).to(tl.float32))
        S = tl.dot(tl.trans(key), w, S * tl.exp(over.to(tl.float32)), input_precision=precise)
    tl.store(last + (batch * H + head) * N * P + tile, S, mask=inside)


@tuned(["N", "P"], *CHOICES)
def _walk_back(
    dstates, dW, dy, q, k, E, decay, dlast, q_b, q_t, q_h, k_b, k_t, k_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    """The gradients of the states before all chunks, and behind the last, and of W."""
    ps, chunks = tl.cdiv(P, BP), tl.cdiv(L, T)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // ps // H, row // ps % H
    t, n, p = tl.arange(0, T), tl.arange(0, BN), (row % ps).to(tl.int32) * BP + tl.arange(0, BP)
    inside, tile = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
    q += batch * q_b + head // (H // G) * q_h
    k += batch * k_b + head // (H // G) * k_h
    dS = tl.zeros((BN, BP), tl.float32)
    if dlast is not None:
        dS = tl.load(dlast + (batch * H + head) * N * P + tile, mask=inside, other=0.0)
    at = dstates + (batch * (chunks + 1) * H + head) * N * P + tile
    for i in range(chunks):
        chunk = tl.cast(chunks - 1 - i, tl.int64)
        tl.store(at + (chunk + 1) * H * N * P, dS, mask=inside)
        first = chunk * T
        ok, here = t < L - first, (batch * L + first) * H + head
        query, key = _load(q + first * q_t, t, n, q_t, ok, N), _load(k + first * k_t, t, n, k_t, ok, N)
        grad = _load(dy + here * P, t, p, H * P, ok, P)
        total, over = _total(decay + here, t, t, H, ok, N, False)
        scores = tl.dot(query, tl.trans(key), input_precision=precise) * _between(total, t, False, False)
        dw = tl.dot(tl.trans(scores), grad, input_precision=precise)
        dw = tl.dot(key * tl.exp((over - total).to(tl.float32)), dS, dw, input_precision=precise)
        tl.store(dW + here * P + t[:, None] * (H * P) + p[None, :], dw, mask=ok[:, None] & (p < P)[None, :])
        dS *= tl.exp(over.to(tl.float32))
        dS = tl.dot(tl.trans(query * tl.exp(total.to(tl.float32))), grad, dS, input_precision=precise)
        dS -= tl.dot(tl.trans(_load(E + here * N, t, n, H * N, ok, N)), dw, input_precision=precise)
    tl.store(at, dS, mask=inside)


@tuned(["N", "P"], *CHOICES)
def _gradients(
    dq, dk, dv, ddecay, dbeta, dy, W, dW, inverse, states, dstates, q, k, v, decay, beta,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    batch, chunk, chunks, head, group, first, here = _where(L, H, G, T)
    t, n = tl.arange(0, T), tl.arange(0, BN)
    ok = t < L - first
    at, square = (batch * chunks + chunk) * H + head, t[:, None] * T + t[None, :]
    transposed = tl.trans(tl.load(inverse + at * T * T + square))
    b = tl.load(beta + here + t * H, mask=ok, other=0.0).to(tl.float32)[:, None]
    of_scores, of_system = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)
    to_query, read = tl.zeros((T, BN), tl.float32), tl.zeros((T, BN), tl.float32)
    to_key = tl.zeros((T, BN), tl.float32)
    to_beta, both = tl.zeros((T,), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        inside, tile = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
        S = tl.load(states + at * N * P + tile, mask=inside, other=0.0)
        dstart = dstates + ((batch * (chunks + 1) + chunk) * H + head) * N * P + tile
        dend = tl.load(dstart + H * N * P, mask=inside, other=0.0)
        both += tl.sum(S * tl.load(dstart, mask=inside, other=0.0), 1)
        grad, w = _load(dy + here * P, t, p, H * P, ok, P), _load(W + here * P, t, p, H * P, ok, P)
        value = _load(v + batch * v_b + head * v_h + first * v_t, t, p, v_t, ok, P)
        dU = tl.dot(transposed, _load(dW + here * P, t, p, H * P, ok, P), input_precision=precise)
        tl.store(dv + here * P + t[:, None] * (H * P) + p[None, :], dU * b, mask=ok[:, None] & (p < P)[None, :])
        to_beta += tl.sum(dU * value, 1)
        of_scores = tl.dot(grad, tl.trans(w), of_scores, input_precision=precise)
        of_system = tl.dot(dU, tl.trans(w), of_system, input_precision=precise)
        to_query = tl.dot(grad, tl.trans(S), to_query, input_precision=precise)
        read = tl.dot(dU, tl.trans(S), read, input_precision=precise)
        to_key = tl.dot(w, tl.trans(dend), to_key, input_precision=precise)
    query = _load(q + batch * q_b + group * q_h + first * q_t, t, n, q_t, ok, N)
    key = _load(k + batch * k_b + group * k_h + first * k_t, t, n, k_t, ok, N)
    total, over = _total(decay + here, t, t, H, ok, N, False)
    before, so_far = _between(total, t, True, False), tl.exp(total.to(tl.float32))
    itself = tl.sum(tl.where(t[:, None] == t[None, :], of_scores, 0.0), 1)[:, None]
    of_scores *= before
    of_system *= before
    to_query = tl.dot(of_scores, key, to_query * so_far, input_precision=precise)
    read = tl.dot(of_system, key, read * so_far, input_precision=precise)
    tl.store(dbeta + here + t * H, to_beta - tl.sum(key * read, 1), mask=ok)
    read *= b
    to_key *= tl.exp((over - total).to(tl.float32))
    to_key = tl.dot(tl.trans(of_scores), query, to_key, input_precision=precise)
    to_key -= tl.dot(tl.trans(of_system * b), key, input_precision=precise)
    change = tl.sum(key * (to_key + read) - query * to_query, 1)
    tl.store(ddecay + here + t * H, tl.sum(both) + tl.cumsum(change, 0) - change, mask=ok)
    out, mask = here * N + t[:, None] * (H * N) + n[None, :], ok[:, None] & (n < N)[None, :]
    tl.store(dq + out, to_query + itself * key, mask=mask)
    tl.store(dk + out, to_key - read + itself * query, mask=mask)
