# mypy: no-check-untyped-defs
"""Linear attention in chunks of time, as matrix products on tensor cores.

One kernel walks along the chunks and leaves the state before each, or, backwards, the gradient of the state behind it.
The others take all chunks at once: a result is what its own chunk gives, by scores of steps with steps, and what the
state gives. What decays between two steps is the exponential of a difference of sums in float64, never a quotient.
Where every key channel has decays of its own, scores are sums of elementwise products, in chunks of 16.

Letters: T steps of a chunk, W decays of a head: 1 or a block of N.
"""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import launch, precision, rows, size, tuned

CHUNK, CHUNK_OF_CHANNELS = size(64, 8), size(16, 8)  # steps
BLOCK, BLOCK_OF_CHANNELS = size(64, 4), size(16, 4)  # most keys or values of a tile
CHOICES = (  # the first fits the 99 KB of shared memory that small GPUs have, and the registers in 16 bits
    {"num_warps": 8, "num_stages": 1},
    {"num_warps": 8, "num_stages": 2},
    {"num_warps": 4, "num_stages": 1},
)
NOTHING = tl.constexpr(-1000.0)  # exp of it is 0: the least exponent that is summed, so that -inf is allowed


def forward(q, k, v, decay, state):
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    sizes, tensors, strides = _described(q, k, v, decay)
    states, last = _states(sizes, strides, k, v, tensors, state, False)
    y = v.new_empty(v.shape)
    _results(y, tensors, v, states, sizes, strides, False)
    return y, last


def backward(needed, dy, dlast, q, k, v, decay, state, last):
    """The states are made again, then their gradients, then all chunks at once those of their inputs.

    The gradient of a decay follows from the others, as in the portable kernel: it is S dS at the start of a chunk, and
    from each step to the next it grows by k dk - q dq, where what a step does to itself is left out.
    """
    sizes, tensors, strides = _described(q, k, v, decay)
    (B, L, G, N), H = q.shape, v.shape[2]
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    states, _ = _states(sizes, strides, k, v, tensors, state, False)
    dstates, dstate = _states(sizes, strides, q, dy, tensors, dlast, True)
    dv = v.new_empty(v.shape)
    _results(dv, tensors, dy, dstates, sizes, strides, True)
    T, BN, _, channels = sizes[-5:-1]
    blocks = triton.cdiv(N, BN)
    dq, dk = (q.new_empty(B, L, H, N, dtype=x.dtype if G == H else torch.float32) for x in (q, k))
    ddecay = q.new_empty(B, L, H, N if channels else blocks, dtype=torch.float32)
    launch(
        _gradients, B * triton.cdiv(L, T) * H * blocks, dq, dk, ddecay, dy, states, dstates, *tensors, *strides, *sizes
    )  # fmt: skip
    dq, dk = (x if G == H else x.view(B, L, G, -1, N).sum(3) for x in (dq, dk))
    grads = {"q": dq, "k": dk, "v": dv, "state": dstate}
    if decay is not None:
        ddecay = ddecay.view(B, L, G, -1, N).sum(3) if channels else ddecay.sum(3)
        ddecay = ddecay.masked_fill(decay.expand_as(ddecay) < NOTHING.value, 0.0)
        grads["decay"] = ddecay.sum((0, 1)) if decay.ndim == 1 else ddecay
    return grads


def _described(q, k, v, decay):
    """Sizes, tensors and strides, which the kernels take in this order."""
    (_, L, G, N), (H, P) = q.shape, v.shape[2:]
    channels = decay is not None and decay.ndim == 4
    T, most = (CHUNK_OF_CHANNELS, BLOCK_OF_CHANNELS) if channels else (CHUNK, BLOCK)
    BN, BP = (min(size(max(16, width), width), most) for width in map(triton.next_power_of_2, (N, P)))
    q, k, v = rows(q), rows(k), rows(v)
    decay_strides = 0, 0, 0
    if decay is not None:
        decay = rows(decay) if channels else decay
        decay_strides = (0, 0, decay.stride(0)) if decay.ndim == 1 else decay.stride()[:3]
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *decay_strides
    return (L, G, H, N, P, T, BN, BP, channels, precision(q, k, v)), (q, k, v, decay), strides


def _states(sizes, strides, left, right, tensors, state, back):
    """The states before all chunks (B, chunks, H, N, P) and behind them; back in time their gradients."""
    L, _, H, N, P, T, BN, BP, *_ = sizes
    batch = len(left)
    states = left.new_empty(batch, triton.cdiv(L, T), H, N, P, dtype=torch.float32)
    last = torch.empty_like(states[:, 0])
    state = None if state is None else state.float().contiguous()
    grid = batch * H * triton.cdiv(N, BN) * triton.cdiv(P, BP)
    left, right = rows(left), rows(right)
    spaces = *left.stride()[:3], *right.stride()[:3], *strides[-3:]
    launch(_walk, grid, states, last, left, right, tensors[3], state, *spaces, *sizes, back)
    return states, last


def _results(out, tensors, values, states, sizes, strides, back):
    L, _, H, _, P, T, _, BP, *_ = sizes
    q, k, _, decay = tensors
    values = rows(values)
    grid = len(q) * triton.cdiv(L, T) * H * triton.cdiv(P, BP)
    launch(
        _outputs, grid, out, q, k, values, decay, states, *strides[:6], *values.stride()[:3], *strides[9:], *sizes, back
    )


@triton.jit
def _load(x, t, n, t_stride, ok, N):
    return tl.load(x + t[:, None] * t_stride + n[None, :], mask=ok[:, None] & (n < N)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _total(decay, t, n, t_stride, ok, N, channels: tl.constexpr):
    """(T, W) sums of decays from the start of the chunk, and (1, W) that of all."""
    if channels:
        each = tl.maximum(_load(decay, t, n, t_stride, ok, N).to(tl.float64), NOTHING)
        return tl.cumsum(each, 0), tl.sum(each, 0)[None, :]
    else:
        each = tl.zeros((t.shape[0],), tl.float64)
        if decay is not None:
            each = tl.maximum(tl.load(decay + t * t_stride, mask=ok, other=0.0).to(tl.float64), NOTHING)
        return tl.cumsum(each, 0)[:, None], tl.sum(each[:, None], 0)[None, :]  # of one axis: Triton 3.6 scans no (T, 1)


@triton.jit
def _between(total, t, strict: tl.constexpr, channels: tl.constexpr):
    """(T, T), or (T, T, W), decay after step s up to step t, for s <= t, or s < t, else 0."""
    below = t[:, None] > t[None, :] if strict else t[:, None] >= t[None, :]
    if channels:
        return tl.where(below[:, :, None], tl.exp((total[:, None, :] - total[None, :, :]).to(tl.float32)), 0.0)
    else:
        return tl.where(below, tl.exp((total - tl.trans(total)).to(tl.float32)), 0.0)


@tuned(["N", "P", "T", "channels"], *CHOICES)
def _walk(
    states, last, left, right, decay, state,
    left_b, left_t, left_h, right_b, right_t, right_h, decay_b, decay_t, decay_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, channels: tl.constexpr,
    precise: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    """A block of the states of a head: S = exp(decays of a chunk) S + left^T right, with left k, or back in time q."""
    ps, ns, chunks = tl.cdiv(P, BP), tl.cdiv(N, BN), tl.cdiv(L, T)
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // ps // ns // H, row // ps // ns % H
    group = head // (H // G)
    n = (row // ps % ns).to(tl.int32) * BN + tl.arange(0, BN)
    p = (row % ps).to(tl.int32) * BP + tl.arange(0, BP)
    inside, tile, t = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :], tl.arange(0, T)
    left += batch * left_b + group * left_h
    right += batch * right_b + head * right_h
    if decay is not None:
        decay += batch * decay_b + (group if channels else head) * decay_h
    S = tl.zeros((BN, BP), tl.float32)
    if state is not None:
        S = tl.load(state + (batch * H + head) * N * P + tile, mask=inside, other=0.0)
    for i in range(chunks):
        chunk = tl.cast(chunks - 1 - i if back else i, tl.int64)
        first = chunk * T
        ok = t < L - first
        tl.store(states + ((batch * chunks + chunk) * H + head) * N * P + tile, S, mask=inside)
        x, y = _load(left + first * left_t, t, n, left_t, ok, N), _load(right + first * right_t, t, p, right_t, ok, P)
        if decay is None:
            S = tl.dot(tl.trans(x), y, S, input_precision=precise)
        else:
            total, over = _total(decay + first * decay_t, t, n, decay_t, ok, N, channels)
            weight = tl.exp((total if back else over - total).to(tl.float32))
            S = tl.dot(tl.trans(x * weight), y, S * tl.exp(tl.trans(over).to(tl.float32)), input_precision=precise)
    tl.store(last + (batch * H + head) * N * P + tile, S, mask=inside)


@tuned(["N", "P", "T", "channels"], *CHOICES)
def _outputs(
    out, q, k, v, decay, states, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, decay_b, decay_t, decay_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, channels: tl.constexpr,
    precise: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    """y of values v; back in time, with dy as values and the gradients of states, the gradient of the values."""
    ps, chunks = tl.cdiv(P, BP), tl.cdiv(L, T)
    row = tl.program_id(0).to(tl.int64)
    batch, chunk, head = row // ps // H // chunks, row // ps // H % chunks, row // ps % H
    group, first, t = head // (H // G), chunk * T, tl.arange(0, T)
    p = (row % ps).to(tl.int32) * BP + tl.arange(0, BP)
    ok = t < L - first
    q += batch * q_b + group * q_h + first * q_t
    k += batch * k_b + group * k_h + first * k_t
    if decay is not None:
        decay += batch * decay_b + (group if channels else head) * decay_h + first * decay_t
    states += ((batch * chunks + chunk) * H + head) * N * P
    scores, y = tl.zeros((T, T), tl.float32), tl.zeros((T, BP), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        query, key = _load(q, t, n, q_t, ok, N), _load(k, t, n, k_t, ok, N)
        S = tl.load(states + n[:, None] * P + p[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
        total, over = _total(decay, t, n, decay_t, ok, N, channels)
        if channels:
            scores += tl.sum(query[:, None, :] * key[None, :, :] * _between(total, t, False, channels), 2)
        else:
            scores = tl.dot(query, tl.trans(key), scores, input_precision=precise)
        if back:
            y = tl.dot(key * tl.exp((over - total).to(tl.float32)), S, y, input_precision=precise)
        else:
            y = tl.dot(query * tl.exp(total.to(tl.float32)), S, y, input_precision=precise)
    if not channels:
        total, over = _total(decay, t, t, decay_t, ok, N, channels)
        scores *= _between(total, t, False, channels)
    if back:
        scores = tl.trans(scores)
    value = _load(v + batch * v_b + head * v_h + first * v_t, t, p, v_t, ok, P)
    y = tl.dot(scores, value, y, input_precision=precise)
    out += ((batch * L + first) * H + head) * P
    tl.store(out + t[:, None] * (H * P) + p[None, :], y, mask=ok[:, None] & (p < P)[None, :])


@tuned(["N", "P", "T", "channels"], *CHOICES)
def _gradients(
    dq, dk, ddecay, dy, states, dstates, q, k, v, decay,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, decay_b, decay_t, decay_h,
    L, G, H, N, P, T: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, channels: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    ns, chunks = tl.cdiv(N, BN), tl.cdiv(L, T)
    row = tl.program_id(0).to(tl.int64)
    batch, chunk, head, block = row // ns // H // chunks, row // ns // H % chunks, row // ns % H, row % ns
    group, first, t = head // (H // G), chunk * T, tl.arange(0, T)
    n = block.to(tl.int32) * BN + tl.arange(0, BN)
    ok = t < L - first
    if decay is not None:
        decay += batch * decay_b + (group if channels else head) * decay_h + first * decay_t
    v += batch * v_b + head * v_h + first * v_t
    dy += ((batch * L + first) * H + head) * P
    at = ((batch * chunks + chunk) * H + head) * N * P
    A, from_start = tl.zeros((T, T), tl.float32), tl.zeros((T, BN), tl.float32)
    from_end, both = tl.zeros((T, BN), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        grad, value = _load(dy, t, p, H * P, ok, P), _load(v, t, p, v_t, ok, P)
        inside, tile = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
        S, dS = (
            tl.load(states + at + tile, mask=inside, other=0.0),
            tl.load(dstates + at + tile, mask=inside, other=0.0),
        )
        A = tl.dot(grad, tl.trans(value), A, input_precision=precise)
        from_start = tl.dot(grad, tl.trans(S), from_start, input_precision=precise)
        from_end = tl.dot(value, tl.trans(dS), from_end, input_precision=precise)
        both += tl.sum(S * dS, 1)
    query = _load(q + batch * q_b + group * q_h + first * q_t, t, n, q_t, ok, N)
    key = _load(k + batch * k_b + group * k_h + first * k_t, t, n, k_t, ok, N)
    total, over = _total(decay, t, n, decay_t, ok, N, channels)
    to_query = from_start * tl.exp(total.to(tl.float32))
    to_key = from_end * tl.exp((over - total).to(tl.float32))
    start_gradient = both[None, :] * tl.exp(over.to(tl.float32)) + tl.sum(query * to_query, 0)[None, :]
    if channels:
        weights = A[:, :, None] * _between(total, t, True, channels)
        to_query += tl.sum(weights * key[None, :, :], 1)
        to_key += tl.sum(weights * query[:, None, :], 0)
    else:
        weights = A * _between(total, t, True, channels)
        to_query = tl.dot(weights, key, to_query, input_precision=precise)
        to_key = tl.dot(tl.trans(weights), query, to_key, input_precision=precise)
    if decay is not None:
        change = key * to_key - query * to_query
        here = (batch * L + first) * H + head
        if channels:
            each = start_gradient + tl.cumsum(change, 0) - change
            tl.store(ddecay + here * N + t[:, None] * (H * N) + n[None, :], each, mask=ok[:, None] & (n < N)[None, :])
        else:
            change = tl.sum(change, 1)
            each = tl.sum(start_gradient) + tl.cumsum(change, 0) - change
            tl.store(ddecay + (here + t * H) * ns + block, each, mask=ok)
    itself = tl.sum(tl.where(t[:, None] == t[None, :], A, 0.0), 1)[:, None]
    out = ((batch * L + first) * H + head) * N + t[:, None] * (H * N) + n[None, :]
    tl.store(dq + out, to_query + itself * key, mask=ok[:, None] & (n < N)[None, :])
    tl.store(dk + out, to_key + itself * query, mask=ok[:, None] & (n < N)[None, :])
