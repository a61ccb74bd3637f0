# mypy: no-check-untyped-defs
"""RWKV-4's average as a scan in chunks of time: sums above and below, both divided by e^p, p their largest exponent.

The gradients of the two sums follow the same recurrence backwards in time, from -m, the exponents by which the results
were divided: one scan serves both, and no exponential is above 1. The state before each tile is kept for it.
"""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import chunk_length, launch, rows, size, tuned
from longwave.ops.wkv import EMPTY, nothing

TIME = size(32, 8)  # steps of a tile
LANES = size(32, 4)  # channels of a program
NOTHING = tl.constexpr(EMPTY)


def forward(k, v, w, u, state, keep):
    """(y (B, L, C), the last state (B, 3, C)), and the state before each tile (B, tiles, 3, C)."""
    grid, tensors, sizes = _described(k, v, w, u)
    starts, last = _starts(grid, tensors, sizes, state)
    kept = saved(k, v, w, u, state) if keep else None
    y = v.new_empty(v.shape)
    launch(_forward, grid, y, kept, starts, *tensors, *sizes)
    return (y, last), kept


def saved(k, v, w, u, state):
    """Like the states before each tile."""
    return k.new_empty(k.shape[0], -(-k.shape[1] // TIME), 3, k.shape[2], dtype=torch.float32)


def backward(needed, dy, dlast, k, v, w, u, state, last, saved):
    """Where the last state matters, so does its exponent, which is one of the keys', decayed, or the first state's."""
    grid, tensors, sizes = _described(k, v, w, u)
    (B, L, C), chunk = k.shape, sizes[-3]
    dy = v.new_zeros(1, 1, 1).expand(v.shape) if dy is None else dy
    dy, chunks = dy.contiguous(), triton.cdiv(L, chunk)
    ends = nothing(k, torch.float32)
    if dlast is not None:
        ends = torch.stack([dlast[:, 0], dlast[:, 1], -last[:, 2]], dim=1)
    sums = k.new_empty(B, chunks, 2, C, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if chunks > 1:
        parts = k.new_empty(B, chunks, 3, C, dtype=torch.float32)
        launch(_backward, grid, None, None, None, dy, saved, parts, None, *tensors, *sizes)
        before = torch.empty_like(ends)
        launch(_join, triton.cdiv(B * C, 256), parts, ends, before, tensors[2], B * C, C, L, chunk, True, 256)
        ends = parts
    first = k.new_empty(B, 3, C, dtype=torch.float32)
    launch(_backward, grid, dk, dv, sums, dy, saved, ends, first, *tensors, *sizes)
    dw, du = sums.sum((0, 1))
    scale = torch.exp(first[:, 2] + saved[:, 0, 2])
    da, db = first[:, 0] * scale, first[:, 1] * scale
    dp = da * saved[:, 0, 0] + db * saved[:, 0, 1]
    if dlast is not None:
        share = dlast[:, 2] - dlast[:, 0] * last[:, 0] - dlast[:, 1] * last[:, 1]
        steps = torch.arange(L - 1, -1, -1, device=k.device)
        largest, place = (k + steps[:, None] * w.double()).max(1)
        old = saved[:, 0, 2] + L * w.double() > largest
        dk.scatter_add_(1, place[:, None], share.masked_fill(old, 0.0).to(dk.dtype)[:, None])
        dw = dw + (torch.where(old, L, steps[place]) * share).sum(0)
        dp = dp + share.masked_fill(~old, 0.0)
    return {"k": dk, "v": dv, "w": dw, "u": du, "state": torch.stack([da, db, dp], dim=1)}


def _described(k, v, w, u):
    """Programs, tensors and sizes, which the kernels take in this order."""
    B, L, C = k.shape
    blocks = triton.cdiv(C, LANES)
    chunk = chunk_length(L, B * blocks, TIME)
    k, v = rows(k), rows(v)
    sizes = *k.stride()[:2], *v.stride()[:2], L, C, chunk, TIME, LANES
    return B * triton.cdiv(L, chunk) * blocks, (k, v, w.contiguous(), u.contiguous()), sizes


def _starts(grid, tensors, sizes, state):
    """States before each chunk (B, chunks, 3, C), and the one behind all."""
    k, _, w, _ = tensors
    (B, L, C), chunk = k.shape, sizes[-3]
    state = nothing(k, torch.float32) if state is None else state.float().contiguous()
    starts, last = state.new_empty(B, triton.cdiv(L, chunk), 3, C), torch.empty_like(state)
    launch(_ends, grid, starts, *tensors, *sizes)
    launch(_join, triton.cdiv(B * C, 256), starts, state, last, w, B * C, C, L, chunk, False, 256)
    return starts, last


@triton.jit
def _two(d, p, a, b, d_later, p_later, a_later, b_later):
    """Decays and sums of two spans of time as those of one."""
    largest = tl.maximum(p + d_later, p_later)
    past, now = tl.exp(p + d_later - largest), tl.exp(p_later - largest)
    return d + d_later, largest, past * a + now * a_later, past * b + now * b_later


@triton.jit
def _row(x, rows, wanted):
    return tl.sum(tl.where(rows == wanted, x, 0.0), 0)


@triton.jit
def _where(L, C, chunk, BC: tl.constexpr):
    """Batch, chunk, chunks, channels, and which of them there are."""
    blocks, chunks = tl.cdiv(C, BC), tl.cdiv(L, chunk)
    row = tl.program_id(0).to(tl.int64)
    c = (row % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    return row // blocks // chunks, row // blocks % chunks, chunks, c, c < C


@triton.jit
def _tile(x, t, stride, c, mask):
    return tl.load(x + t[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_state(x, at, C, inside):
    a, b = tl.load(x + at, mask=inside, other=0.0), tl.load(x + at + C, mask=inside, other=0.0)
    return a, b, tl.load(x + at + 2 * C, mask=inside, other=NOTHING)


@triton.jit
def _store_state(x, at, C, inside, a, b, p):
    tl.store(x + at, a, mask=inside)
    tl.store(x + at + C, b, mask=inside)
    tl.store(x + at + 2 * C, p, mask=inside)


@triton.jit
def _ends(
    ends, k, v, w, u, k_b, k_t, v_b, v_t, L, C, chunk, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The state behind a chunk that has nothing before it."""
    batch, part, chunks, c, inside = _where(L, C, chunk, BC)
    t = tl.arange(0, BT)
    decay = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    p = tl.full((BC,), NOTHING, tl.float32)
    stop = tl.minimum(part * chunk + chunk, L)
    for first in range(part * chunk, stop, BT):
        mask = (t < stop - first)[:, None] & inside[None, :]
        key = _tile(k + batch * k_b + first * k_t, t, k_t, c, mask)
        value = _tile(v + batch * v_b + first * v_t, t, v_t, c, mask)
        later = (stop - first - 1 - t)[:, None] * decay[None, :]
        exponent = tl.where(mask, key + tl.minimum(later, 0.0), NOTHING)  # at the end of the chunk
        largest = tl.maximum(tl.max(exponent, 0), p)
        weight = tl.where(mask, tl.exp(exponent - largest[None, :]), 0.0)
        past = tl.exp(p - largest)
        a, b, p = past * a + tl.sum(weight * value, 0), past * b + tl.sum(weight, 0), largest
    _store_state(ends, (batch * chunks + part) * 3 * C + c, C, inside, a, b, p)


@triton.jit
def _join(ends, state, last, w, count, C, L, chunk, back: tl.constexpr, BLOCK: tl.constexpr):
    """The ends of chunks become the states before them, or, backwards, behind them."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, chunks = n < count, tl.cdiv(L, chunk)
    c, batch = n % C, n // C
    decay = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
    a, b, p = _load_state(state, batch * 3 * C + c, C, inside)
    for i in range(chunks):
        part = chunks - 1 - i if back else i
        at = (batch * chunks + part) * 3 * C + c
        end_a, end_b, end_p = _load_state(ends, at, C, inside)
        _store_state(ends, at, C, inside, a, b, p)
        over = tl.minimum(chunk, L - part * chunk) * decay
        _, p, a, b = _two(over, p, a, b, over, end_p, end_a, end_b)
    _store_state(last, batch * 3 * C + c, C, inside, a, b, p)


@triton.jit
def _before(k, v, t, k_t, v_t, c, mask, decay, a, b, p):
    """The states before each step of a tile, of which the first is given: exponents and both sums."""
    earlier = mask & (t > 0)[:, None]
    key, value = _tile(k - k_t, t, k_t, c, earlier), _tile(v - v_t, t, v_t, c, earlier)
    start = (t == 0)[:, None]
    d = tl.where(earlier, decay[None, :], 0.0)
    exponent = tl.where(start, p[None, :], tl.where(earlier, key, NOTHING))
    above = tl.where(start, a[None, :], value)
    below = tl.where(start, b[None, :], tl.where(earlier, 1.0, 0.0))
    _, exponent, above, below = tl.associative_scan((d, exponent, above, below), 0, _two)
    return exponent, above, below


@triton.jit
def _result(key, value, bonus, exponent, above, below):
    """y, its denominator, the exponent that both were divided by, and the weight of the present."""
    m = tl.maximum(exponent, key + bonus)
    past, now = tl.exp(exponent - m), tl.exp(key + bonus - m)
    denominator = past * below + now
    return (past * above + now * value) / denominator, denominator, m, now


@tuned(["C"], {"num_warps": 4}, {"num_warps": 1}, {"num_warps": 2})
def _forward(
    y, kept, starts, k, v, w, u, k_b, k_t, v_b, v_t, L, C, chunk, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    batch, part, chunks, c, inside = _where(L, C, chunk, BC)
    t = tl.arange(0, BT)
    decay = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + c, mask=inside, other=0.0).to(tl.float32)
    a, b, p = _load_state(starts, (batch * chunks + part) * 3 * C + c, C, inside)
    stop = tl.minimum(part * chunk + chunk, L)
    for first in range(part * chunk, stop, BT):
        if kept is not None:
            _store_state(kept, (batch * tl.cdiv(L, BT) + first // BT) * 3 * C + c, C, inside, a, b, p)
        mask = (t < stop - first)[:, None] & inside[None, :]
        k_, v_ = k + batch * k_b + first * k_t, v + batch * v_b + first * v_t
        exponent, above, below = _before(k_, v_, t, k_t, v_t, c, mask, decay, a, b, p)
        key, value = _tile(k_, t, k_t, c, mask), _tile(v_, t, v_t, c, mask)
        result, _, _, _ = _result(key, value, bonus[None, :], exponent, above, below)
        tl.store(y + (batch * L + first) * C + (t[:, None] * C + c[None, :]), result, mask=mask)
        _, exponent, above, below = _two(0.0, exponent, above, below, decay[None, :], key, value, 1.0)
        last = t[:, None]
        a, b, p = _row(above, last, BT - 1), _row(below, last, BT - 1), _row(exponent, last, BT - 1)


@tuned(["C"], {"num_warps": 4}, {"num_warps": 2}, {"num_warps": 8})
def _backward(
    dk, dv, sums, dy, kept, ends, start, k, v, w, u, k_b, k_t, v_b, v_t, L, C, chunk, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """All steps of a chunk, given the gradients of the state behind it; without dk what those before it are, from
    nothing behind. The first chunk's are those of the first state."""
    batch, part, chunks, c, inside = _where(L, C, chunk, BC)
    t = tl.arange(0, BT)
    row = t[:, None]
    decay = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
    bonus = tl.load(u + c, mask=inside, other=0.0).to(tl.float32)
    ga, gb, gp = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.full((BC,), NOTHING, tl.float32)
    at_state = (batch * chunks + part) * 3 * C + c
    if dk is not None:
        ga, gb, gp = _load_state(ends, at_state, C, inside)
    dw, du = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    begin, stop = part * chunk, tl.minimum(part * chunk + chunk, L)
    for i in range(tl.cdiv(stop - begin, BT)):
        first = begin + (tl.cdiv(stop - begin, BT) - 1 - i) * BT
        count = tl.minimum(stop - first, BT)
        mask = (t < count)[:, None] & inside[None, :]
        k_, v_ = k + batch * k_b + first * k_t, v + batch * v_b + first * v_t
        at = (batch * L + first) * C
        a, b, p = _load_state(kept, (batch * tl.cdiv(L, BT) + first // BT) * 3 * C + c, C, inside)
        exponent, above, below = _before(k_, v_, t, k_t, v_t, c, mask, decay, a, b, p)
        key, value = _tile(k_, t, k_t, c, mask), _tile(v_, t, v_t, c, mask)
        # what the next step gives to the state before it, and behind the last step of the tile what is known
        ahead = (t < count - 1)[:, None] & inside[None, :]
        _, p_next, a_next, b_next = _two(0.0, exponent, above, below, decay[None, :], key, value, 1.0)
        key_next, value_next = _tile(k_ + k_t, t, k_t, c, ahead), _tile(v_ + v_t, t, v_t, c, ahead)
        y, denominator, m, _ = _result(key_next, value_next, bonus[None, :], p_next, a_next, b_next)
        g = _tile(dy + at + C, t, C, c, ahead) / denominator
        end = (row == count - 1) & inside[None, :]
        sum_d = tl.where(ahead, decay[None, :], 0.0)
        sum_p = tl.where(ahead, -m, tl.where(end, gp[None, :], NOTHING))
        sum_a = tl.where(ahead, g, tl.where(end, ga[None, :], 0.0))
        sum_b = tl.where(ahead, -g * y, tl.where(end, gb[None, :], 0.0))
        _, sum_p, sum_a, sum_b = tl.associative_scan((sum_d, sum_p, sum_a, sum_b), 0, _two, reverse=True)
        y, denominator, m, now = _result(key, value, bonus[None, :], exponent, above, below)
        g = _tile(dy + at, t, C, c, mask) / denominator
        if dk is not None:
            to_value = tl.exp(key + sum_p)
            direct = g * now * (value - y)
            tile = t[:, None] * C + c[None, :]
            tl.store(dk + at + tile, direct + to_value * (value * sum_a + sum_b), mask=mask)
            tl.store(dv + at + tile, g * now + to_value * sum_a, mask=mask)
            du += tl.sum(tl.where(mask, direct, 0.0), 0)
            to_decay = tl.exp(decay[None, :] + exponent + sum_p) * (above * sum_a + below * sum_b)
            dw += tl.sum(tl.where(mask, to_decay, 0.0), 0)
        _, p_all, a_all, b_all = _two(0.0, sum_p, sum_a, sum_b, decay[None, :], -m, g, -g * y)
        ga, gb, gp = _row(a_all, row, 0), _row(b_all, row, 0), _row(p_all, row, 0)
    if dk is None:
        _store_state(ends, at_state, C, inside, ga, gb, gp)
    else:
        tl.store(sums + (batch * chunks + part) * 2 * C + c, dw, mask=inside)
        tl.store(sums + (batch * chunks + part) * 2 * C + C + c, du, mask=inside)
        if part == 0:
            _store_state(start, batch * 3 * C + c, C, inside, ga, gb, gp)
