# mypy: no-check-untyped-defs
"""RWKV-4's weighted average and its gradients: channels in the lanes, states in registers, one pass over memory.

A task is a batch row and a block of channels. It walks time in chunks, short enough that the rows of the block stay
in the first-level cache while its vectors of eight channels are worked through one after another.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    absolute,
    exp,
    fma,
    fnma,
    load,
    maximum,
    negate,
    splat,
    store,
    where_less,
    widest,
    zero,
)
from longwave.ops.wkv import nothing

R = widest  # lanes of a register
LANES = R.lanes

CHUNK = 32  # steps from one kept state to the next
WIDTH = 32  # channels of a task
STATE = 3 * LANES  # floats of the state of eight channels: numerator, denominator, exponent

_ONE, _HALF = np.float32(1.0), np.float32(0.5)


def forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, keep: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(y (B, L, C), the last state (B, 3, C)), and the state before each CHUNK steps (B, chunks, 3, C)."""
    B, L, C = k.shape
    state = nothing(k, torch.float32) if state is None else state
    y, last, starts = pool.empty(B, L, C), pool.empty(B, 3, C), pool.empty(B, -(-L // CHUNK) if keep else 0, 3, C)
    arrays = [pool.flat(x) for x in (k, v, w, u, state, y, last, starts)]
    scratch_size = WIDTH * 5 + 3 * CHUNK * LANES
    pool.run(_forward, B * -(-C // WIDTH), *arrays, L, C, CHUNK, scratch_size=scratch_size)
    return (y.to(v.dtype), last), starts


def saved(k: Tensor, *others: Tensor | None) -> Tensor:
    """Like the states before each CHUNK steps."""
    B, L, C = k.shape
    return k.new_empty(B, -(-L // CHUNK), 3, C, dtype=torch.float32)


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, k: Tensor, v: Tensor, w: Tensor, u: Tensor, saved: Tensor
) -> dict[str, Tensor]:
    """All gradients in one pass, float32."""
    B, L, C = k.shape
    dy = torch.zeros(B, L, C) if dy is None else dy
    dlast = torch.zeros(B, 3, C) if dlast is None else dlast
    dk, dv, dstate = pool.empty(B, L, C), pool.empty(B, L, C), pool.empty(B, 3, C)
    sums = np.zeros((B, 2, C))  # of w and u, float64
    arrays = [pool.flat(x) for x in (k, v, w, u, saved, dy, dlast, dk, dv, dstate)]
    scratch_size = WIDTH * 5 + 2 * STATE + 10 * CHUNK * LANES
    pool.run(_backward, B * -(-C // WIDTH), *arrays, sums.reshape(-1), L, C, CHUNK, scratch_size=scratch_size)
    dw, du = torch.from_numpy(sums.sum(0)).float()
    return {"k": dk, "v": dv, "w": dw.clone(), "u": du.clone(), "state": dstate}


@kernel
def _copy(to, i, to_step, source, j, step, rows, count):
    """Rows of at most eight floats from one place to another."""
    for r in range(rows):
        for c in range(count):
            to[i + r * to_step + c] = source[j + r * step + c]


@kernel
def _shares(old, new, one):
    """(m, e^(old - m), e^(new - m)),  m = max(old, new): one of the two is 1, or NaN where m is infinite."""
    m = maximum(old, new)
    less, most = exp(negate(absolute(old - new))), one + (m - m)
    return m, where_less(old, new, less, most), where_less(old, new, most, less)


@kernel
def _run(y, y_at, y_step, k, v, at, step, rows, w, u, state):
    """Some steps of eight channels, from the state and into it."""
    one = splat(R, _ONE)
    a, b, p = load(R, state, 0), load(R, state, LANES), load(R, state, 2 * LANES)
    for r in range(rows):
        key, value = load(R, k, at + r * step), load(R, v, at + r * step)
        _, past, now = _shares(p, key + u, one)
        store(y, y_at + r * y_step, fma(past, a, now * value) / fma(past, b, now))
        p, past, now = _shares(p + w, key, one)
        a, b = fma(past, a, now * value), fma(past, b, now)
    store(state, 0, a)
    store(state, LANES, b)
    store(state, 2 * LANES, p)


@kernel
def _forward(start, stop, scratch, k, v, w, u, state, y, end, starts, L, C, chunk):
    blocks, chunks = (C + WIDTH - 1) // WIDTH, (L + chunk - 1) // chunk
    states, weights = scratch, scratch[3 * WIDTH :]
    tiles = scratch[5 * WIDTH :]
    k_tile, v_tile, y_tile = tiles, tiles[chunk * LANES :], tiles[2 * chunk * LANES :]
    for task in range(start, stop):
        batch, channel = task // blocks, task % blocks * WIDTH
        vectors = (min(WIDTH, C - channel) + LANES - 1) // LANES
        for n in range(vectors):
            c = channel + n * LANES
            count = min(LANES, C - c)
            _copy(states, n * STATE, LANES, state, batch * 3 * C + c, C, 3, count)
            _copy(weights, n * 2 * LANES, LANES, w, c, 0, 1, count)
            _copy(weights, n * 2 * LANES + LANES, LANES, u, c, 0, 1, count)
        for i in range(chunks):
            rows = min(chunk, L - i * chunk)
            for n in range(vectors):
                c = channel + n * LANES
                count, at, held = min(LANES, C - c), (batch * L + i * chunk) * C + c, states[n * STATE :]
                if starts.size > 0:
                    _copy(starts, (batch * chunks + i) * 3 * C + c, C, held, 0, LANES, 3, count)
                decay, bonus = load(R, weights, n * 2 * LANES), load(R, weights, n * 2 * LANES + LANES)
                if count == LANES:
                    _run(y, at, C, k, v, at, C, rows, decay, bonus, held)
                else:
                    _copy(k_tile, 0, LANES, k, at, C, rows, count)
                    _copy(v_tile, 0, LANES, v, at, C, rows, count)
                    _run(y_tile, 0, LANES, k_tile, v_tile, 0, LANES, rows, decay, bonus, held)
                    _copy(y, at, C, y_tile, 0, LANES, rows, count)
        for n in range(vectors):
            c = channel + n * LANES
            _copy(end, batch * 3 * C + c, C, states, n * STATE, LANES, 3, min(LANES, C - c))


@kernel
def _remember(history, k, v, at, step, rows, w, state):
    """The states before each step, then the shares of the past and of the present in the next one: five vectors."""
    one = splat(R, _ONE)
    a, b, p = load(R, state, 0), load(R, state, LANES), load(R, state, 2 * LANES)
    for r in range(rows):
        key, value, i = load(R, k, at + r * step), load(R, v, at + r * step), r * 5 * LANES
        store(history, i, a)
        store(history, i + LANES, b)
        store(history, i + 2 * LANES, p)
        p, past, now = _shares(p + w, key, one)
        store(history, i + 3 * LANES, past)
        store(history, i + 4 * LANES, now)
        a, b = fma(past, a, now * value), fma(past, b, now)
    store(state, 0, a)
    store(state, LANES, b)
    store(state, 2 * LANES, p)


@kernel
def _run_back(history, k, v, dy, at, step, rows, u, grads, dk, dv, sums):
    """The same steps backwards. The gradients da, db of the scaled sums hold their exponent constant; what the
    exponent's own gradient dp is beyond that goes to whichever argument of the maximum was the larger, as autograd
    has it."""
    one, half = splat(R, _ONE), splat(R, _HALF)
    da, db, dp = load(R, grads, 0), load(R, grads, LANES), load(R, grads, 2 * LANES)
    dw, du = zero(R), zero(R)
    for r in range(rows - 1, -1, -1):
        i, key, value = r * 5 * LANES, load(R, k, at + r * step), load(R, v, at + r * step)
        a, b, p = load(R, history, i), load(R, history, i + LANES), load(R, history, i + 2 * LANES)
        past, now = load(R, history, i + 3 * LANES), load(R, history, i + 4 * LANES)
        _, before, here = _shares(p, key + u, one)
        denominator = fma(before, b, here)
        y = fma(before, a, here * value) / denominator
        d = load(R, dy, at + r * step) / denominator
        d_here = d * here * (value - y)
        to_key = where_less(past, one, dp, where_less(now, one, zero(R), half * dp))
        dp = dp - to_key
        store(dv, at + r * step, fma(d, here, now * da))
        store(dk, at + r * step, fma(now, fma(value, da, db), d_here + to_key))
        du = du + d_here
        dw = dw + fma(past, fma(a, da, b * db), dp)
        d = d * before
        da, db = fma(past, da, d), fnma(d, y, past * db)
    store(grads, 0, da)
    store(grads, LANES, db)
    store(grads, 2 * LANES, dp)
    store(sums, 0, dw)
    store(sums, LANES, du)


@kernel
def _backward(start, stop, scratch, k, v, w, u, starts, dy, dend, dk, dv, dstate, sums, L, C, chunk):
    blocks, chunks = (C + WIDTH - 1) // WIDTH, (L + chunk - 1) // chunk
    grads, weights, state, added = scratch, scratch[3 * WIDTH :], scratch[5 * WIDTH :], scratch[5 * WIDTH + STATE :]
    tiles = scratch[5 * WIDTH + 2 * STATE :]
    room = chunk * LANES
    k_tile, v_tile, dy_tile = tiles, tiles[room:], tiles[2 * room :]
    dk_tile, dv_tile, history = tiles[3 * room :], tiles[4 * room :], tiles[5 * room :]
    for task in range(start, stop):
        batch, channel = task // blocks, task % blocks * WIDTH
        vectors = (min(WIDTH, C - channel) + LANES - 1) // LANES
        for n in range(vectors):
            c = channel + n * LANES
            count = min(LANES, C - c)
            _copy(grads, n * STATE, LANES, dend, batch * 3 * C + c, C, 3, count)
            _copy(weights, n * 2 * LANES, LANES, w, c, 0, 1, count)
            _copy(weights, n * 2 * LANES + LANES, LANES, u, c, 0, 1, count)
        for i in range(chunks - 1, -1, -1):
            rows = min(chunk, L - i * chunk)
            for n in range(vectors):
                c = channel + n * LANES
                count, at, held = min(LANES, C - c), (batch * L + i * chunk) * C + c, grads[n * STATE :]
                decay, bonus = load(R, weights, n * 2 * LANES), load(R, weights, n * 2 * LANES + LANES)
                _copy(state, 0, LANES, starts, (batch * chunks + i) * 3 * C + c, C, 3, count)
                if count == LANES:
                    _remember(history, k, v, at, C, rows, decay, state)
                else:
                    _copy(k_tile, 0, LANES, k, at, C, rows, count)
                    _copy(v_tile, 0, LANES, v, at, C, rows, count)
                    _copy(dy_tile, 0, LANES, dy, at, C, rows, count)
                    _remember(history, k_tile, v_tile, 0, LANES, rows, decay, state)
                if i == chunks - 1:
                    dp = fnma(load(R, held, 0), load(R, state, 0), load(R, held, 2 * LANES))
                    store(held, 2 * LANES, fnma(load(R, held, LANES), load(R, state, LANES), dp))
                if count == LANES:
                    _run_back(history, k, v, dy, at, C, rows, bonus, held, dk, dv, added)
                else:
                    _run_back(history, k_tile, v_tile, dy_tile, 0, LANES, rows, bonus, held, dk_tile, dv_tile, added)
                    _copy(dk, at, C, dk_tile, 0, LANES, rows, count)
                    _copy(dv, at, C, dv_tile, 0, LANES, rows, count)
                for lane in range(count):
                    sums[batch * 2 * C + c + lane] += np.float64(added[lane])
                    sums[batch * 2 * C + C + c + lane] += np.float64(added[LANES + lane])
                if i == 0:
                    dp = fma(load(R, held, 0), load(R, history, 0), load(R, held, 2 * LANES))
                    store(held, 2 * LANES, fma(load(R, held, LANES), load(R, history, LANES), dp))
        for n in range(vectors):
            c = channel + n * LANES
            _copy(dstate, batch * 3 * C + c, C, grads, n * STATE, LANES, 3, min(LANES, C - c))
