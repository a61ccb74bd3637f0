# mypy: no-check-untyped-defs
"""Mamba's selective scan in chunks of time at once: the end of each from nothing, the states between them, all steps.

A decay is exp(A dt) with A constant, so the end of a chunk is a sum weighted by exponentials of sums of dt, no scan. A
tile of time and channels goes through the state's entries one after another, with softplus, gate and skip around
them; no (B, L, E, N) tensor exists. For the backward pass the state before each tile is kept, and the rest made again.
"""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import chunk_length, launch, rows, size, tuned

TIME = size(32, 8)  # steps of a tile, and of the states that are kept
LANES = size(32, 2)  # channels of a program
LARGEST = 256  # entries of the state, which is held in registers


def why_not(u, dt, A, B, C, D, state, z, dt_bias, softplus):
    """The reason, or None."""
    if any(x is not None and x.is_complex() for x in (A, B, C, state)):
        return "A, B, C or the state is complex; the kernel's are real"
    return f"the state has N = {A.shape[1]} entries; at most {LARGEST} are held" if A.shape[1] > LARGEST else None


def forward(u, dt, A, B, C, D, state, z, dt_bias, softplus, keep):
    """(y (B, L, E), the last state (B, E, N)), and the state before each tile (B, tiles, E, N)."""
    grid, sizes, tensors, strides = _described(u, dt, A, B, C, D, z, dt_bias, softplus)
    batch, (E, N) = len(u), A.shape
    starts, state = _starts(grid, sizes, tensors, strides, state, None)
    kept = saved(u, dt, A, B, C, D, state, z, dt_bias, softplus) if keep else None
    y, last = u.new_empty(u.shape), u.new_empty(batch, E, N, dtype=torch.float32)
    launch(_forward, grid, y, last, kept, *tensors, starts, *strides, *sizes)
    return (y, last), kept


def saved(u, dt, A, B, C, D, state, z, dt_bias, softplus):
    """Like the states before each tile."""
    return u.new_empty(u.shape[0], -(-u.shape[1] // TIME), *A.shape, dtype=torch.float32)


def backward(needed, dy, dlast, u, dt, A, B, C, D, z, dt_bias, softplus, saved):
    """Chunks as in the forward pass, their tiles from the last to the first.

    B and C get a share from every block of channels, A, D and the bias of dt one from every chunk.
    """
    grid, sizes, tensors, strides = _described(u, dt, A, B, C, D, z, dt_bias, softplus)
    (batch, L, E), N, G = u.shape, A.shape[1], B.shape[2] if B.ndim == 4 else 1
    dy = u.new_zeros(1, 1, 1).expand(u.shape) if dy is None else dy
    dy = dy.contiguous()
    ends, dstate = _starts(grid, sizes, tensors, strides, dlast, dy)
    chunks = grid // batch // G // triton.cdiv(E // G, LANES)
    du, ddt, dz = (None if x is None else x.new_empty(x.shape) for x in (u, dt, z))
    dA, dD, dbias = (u.new_empty(batch, chunks, *s, dtype=torch.float32) for s in (A.shape, (E,), (E,)))
    dB, dC = (u.new_empty(batch, L, G, triton.cdiv(E // G, LANES), N, dtype=torch.float32) for _ in "BC")
    launch(_backward, grid, du, ddt, dz, dA, dB, dC, dD, dbias, dy, saved, ends, *tensors, *strides, *sizes)
    sums = {"A": dA, "D": dD, "dt_bias": dbias}
    maps = {"B": dB.sum(3).view(B.shape), "C": dC.sum(3).view(C.shape)}
    return {"u": du, "dt": ddt, "z": dz, "state": dstate, **maps, **{n: x.sum((0, 1)) for n, x in sums.items()}}


def _described(u, dt, A, B, C, D, z, dt_bias, softplus):
    """Programs, sizes, tensors and strides, which all kernels take in this order."""
    (batch, L, E), N, G = u.shape, A.shape[1], B.shape[2] if B.ndim == 4 else 1
    blocks = G * triton.cdiv(E // G, LANES)
    chunk = chunk_length(L, batch * blocks, TIME)
    B, C = (x.contiguous() for x in (B, C))
    u, dt, z = rows(u), rows(dt), None if z is None else rows(z)
    tensors = u, dt, A.contiguous(), B, C, D, z, dt_bias
    strides = *u.stride()[:2], *dt.stride()[:2], *((0, 0) if z is None else z.stride()[:2])
    sizes = L, E, N, G, chunk, softplus, triton.next_power_of_2(N), TIME, LANES
    return batch * triton.cdiv(L, chunk) * blocks, sizes, tensors, strides


def _starts(grid, sizes, tensors, strides, state, dy):
    """States before each chunk (B, chunks, E, N), and the one behind all; given dy their gradients, from the end."""
    u, A = tensors[0], tensors[2]
    batch, L, chunk = len(u), sizes[0], sizes[4]
    state = u.new_zeros(batch, *A.shape, dtype=torch.float32) if state is None else state.float().contiguous()
    chunks = triton.cdiv(L, chunk)
    if chunks == 1 and dy is None:
        return state, state
    starts, decays = (u.new_empty(batch, chunks, *A.shape, dtype=torch.float32) for _ in "sd")
    launch(_ends, grid, starts, decays, dy, *tensors, *strides, *sizes)
    last = torch.empty_like(state)
    count = state.numel()
    launch(_join, triton.cdiv(count, 256), starts, decays, state, last, count, A.numel(), chunks, dy is not None, 256)
    return starts, last


@triton.jit
def _tile(x, t, stride, e, mask):
    """Steps t and channels e, 0 outside of the mask."""
    return tl.load(x + t[:, None] * stride + e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _steps(dt, dt_bias, t, stride, e, mask, inside, softplus: tl.constexpr):
    """Step sizes, 0 outside of the mask, and what they are the softplus of."""
    raw = _tile(dt, t, stride, e, mask)
    if dt_bias is not None:
        raw += tl.load(dt_bias + e, mask=inside, other=0.0).to(tl.float32)[None, :]
    step = raw
    if softplus:
        small = tl.exp(-tl.abs(raw))
        one = 1 + small  # log(1 + small) without what 1 + small has lost
        step = tl.maximum(raw, 0.0) + tl.where(one == 1, small, tl.log(one) * small / tl.where(one == 1, 1.0, one - 1))
    return tl.where(mask, step, 0.0), raw


@triton.jit
def _two(a, b, a_later, b_later):
    return a * a_later, a_later * b + b_later


@triton.jit
def _where(L, E, G, chunk, BE: tl.constexpr):
    """Batch, chunk, chunks, group, its block of channels, blocks, these channels, and which of them there are.

    What is counted from the start of a tile has 32 bits, and its address 64: addresses of numbers cost two registers.
    """
    width = E // G
    blocks, chunks = tl.cdiv(width, BE), tl.cdiv(L, chunk)
    row = tl.program_id(0).to(tl.int64)
    batch, part, group, block = (
        row // blocks // G // chunks, row // blocks // G % chunks, row // blocks % G, row % blocks,
    )  # fmt: skip
    e = block.to(tl.int32) * BE + tl.arange(0, BE)
    return batch, part, chunks, group, block, blocks, group.to(tl.int32) * width + e, e < width


@tuned(["E", "N"], {"num_warps": 1}, {"num_warps": 2}, {"num_warps": 4})
def _ends(
    ends, decays, dy, u, dt, A, B, C, D, z, dt_bias, u_b, u_t, dt_b, dt_t, z_b, z_t, L, E, N, G, chunk,
    softplus: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The state behind a chunk that has none before it, and what it leaves of one; given dy, of the gradients."""
    batch, part, chunks, group, _block, _blocks, e, inside = _where(L, E, G, chunk, BE)
    n, t_ = tl.arange(0, BN)[:, None], tl.arange(0, BT)
    h, total = tl.zeros((BN, BE), tl.float32), tl.zeros((BE,), tl.float32)
    start = part * chunk
    for i in range(0, chunk, BT):
        first = start + i
        if dy is not None:
            first = start + chunk - BT - i
        ok = t_ < L - first
        mask = ok[:, None] & inside[None, :]
        step, _raw = _steps(dt + batch * dt_b + first * dt_t, dt_bias, t_, dt_t, e, mask, inside, softplus)
        if dy is None:
            value = _tile(u + batch * u_b + first * u_t, t_, u_t, e, mask) * step
            span = tl.cumsum(step, 0, reverse=True) - step  # to the end of the tile
        else:
            value = _tile(dy + (batch * L + first) * E, t_, E, e, mask)
            if z is not None:
                gate = _tile(z + batch * z_b + first * z_t, t_, z_t, e, mask)
                value *= gate / (1 + tl.exp(-gate))
            span = tl.cumsum(step, 0)  # from before the tile
        over, here = tl.sum(step, 0), ((batch * L + first) * G + group) * N
        for k in range(N):
            a = tl.load(A + e * N + k, mask=inside, other=0.0).to(tl.float32)
            if dy is None:
                weight = tl.load(B + here + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)
            else:
                weight = tl.load(C + here + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)
            added = tl.sum(tl.exp(a[None, :] * span) * value * weight[:, None], 0)
            h = tl.where(n == k, tl.exp(a * over)[None, :] * h + added[None, :], h)
        total += over
    at = ((batch * chunks + part) * E + e[None, :]) * N + n
    mask = (n < N) & inside[None, :]
    a = tl.load(A + e[None, :] * N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(ends + at, h, mask=mask)
    tl.store(decays + at, tl.exp(a * total[None, :]), mask=mask)


@triton.jit
def _join(ends, decays, state, last, count, each, chunks, back: tl.constexpr, BLOCK: tl.constexpr):
    """The ends of chunks become the states before them, or, backwards, behind them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    h = tl.load(state + i, mask=inside, other=0.0)
    at = i // each * chunks * each + i % each
    for chunk in range(chunks):
        here = at + (chunks - 1 - chunk if back else chunk) * each
        end, decay = tl.load(ends + here, mask=inside, other=0.0), tl.load(decays + here, mask=inside, other=0.0)
        tl.store(ends + here, h, mask=inside)
        h = decay * h + end
    tl.store(last + i, h, mask=inside)


@tuned(["E", "N"], {"num_warps": 4}, {"num_warps": 2}, {"num_warps": 8})
def _forward(
    y, last, kept, u, dt, A, B, C, D, z, dt_bias, starts, u_b, u_t, dt_b, dt_t, z_b, z_t, L, E, N, G, chunk,
    softplus: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    batch, part, chunks, group, _block, _blocks, e, inside = _where(L, E, G, chunk, BE)
    n, t_ = tl.arange(0, BN)[:, None], tl.arange(0, BT)
    states = (n < N) & inside[None, :]
    entries = e[None, :] * N + n
    h = tl.load(starts + (batch * chunks + part) * E * N + entries, mask=states, other=0.0)
    stop = tl.minimum(part * chunk + chunk, L)
    for first in range(part * chunk, stop, BT):
        if kept is not None:
            tl.store(kept + (batch * tl.cdiv(L, BT) + first // BT) * E * N + entries, h, mask=states)
        ok = t_ < L - first
        mask = ok[:, None] & inside[None, :]
        step, _raw = _steps(dt + batch * dt_b + first * dt_t, dt_bias, t_, dt_t, e, mask, inside, softplus)
        x = _tile(u + batch * u_b + first * u_t, t_, u_t, e, mask)
        value, out = step * x, tl.zeros((BT, BE), tl.float32)
        here = ((batch * L + first) * G + group) * N
        for k in range(N):
            a = tl.load(A + e * N + k, mask=inside, other=0.0).to(tl.float32)
            into = tl.load(B + here + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)[:, None]
            decay, state = tl.associative_scan((tl.exp(a[None, :] * step), value * into), 0, _two)
            state += decay * tl.sum(tl.where(n == k, h, 0.0), 0)[None, :]
            out += state * tl.load(C + here + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)[:, None]
            end = tl.sum(tl.where(t_[:, None] == BT - 1, state, 0.0), 0)
            h = tl.where(n == k, end[None, :], h)
        if D is not None:
            out += tl.load(D + e, mask=inside, other=0.0).to(tl.float32)[None, :] * x
        if z is not None:
            gate = _tile(z + batch * z_b + first * z_t, t_, z_t, e, mask)
            out *= gate / (1 + tl.exp(-gate))
        tl.store(y + (batch * L + first) * E + (t_[:, None] * E + e[None, :]), out, mask=mask)
    if part == chunks - 1:
        tl.store(last + batch * E * N + entries, h, mask=states)


@tuned(["E", "N"], {"num_warps": 4}, {"num_warps": 2}, {"num_warps": 8})
def _backward(
    du, ddt, dz, dA, dB, dC, dD, dbias, dy, kept, ends, u, dt, A, B, C, D, z, dt_bias,
    u_b, u_t, dt_b, dt_t, z_b, z_t, L, E, N, G, chunk,
    softplus: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """g, the gradient of a state, is that of the next one times the next decay, plus what y gives."""
    batch, part, chunks, group, block, blocks, e, inside = _where(L, E, G, chunk, BE)
    n, t_ = tl.arange(0, BN)[:, None], tl.arange(0, BT)
    states = (n < N) & inside[None, :]
    entries = e[None, :] * N + n
    carry = tl.load(ends + (batch * chunks + part) * E * N + entries, mask=states, other=0.0)
    sum_A, sum_D, sum_bias = tl.zeros((BN, BE), tl.float32), tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    skip = tl.zeros((BE,), tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    start, stop = part * chunk, tl.minimum(part * chunk + chunk, L)
    for i in range(tl.cdiv(stop - start, BT)):
        first = start + (tl.cdiv(stop - start, BT) - 1 - i) * BT
        ok = t_ < L - first
        mask = ok[:, None] & inside[None, :]
        dt_here = dt + batch * dt_b + first * dt_t
        step, raw = _steps(dt_here, dt_bias, t_, dt_t, e, mask, inside, softplus)
        next_mask = ((t_ < L - first - 1) & (t_ < BT - 1))[:, None] & inside[None, :]
        next_step, _raw = _steps(dt_here + dt_t, dt_bias, t_, dt_t, e, next_mask, inside, softplus)
        x = _tile(u + batch * u_b + first * u_t, t_, u_t, e, mask)
        at_y, tile = (batch * L + first) * E, t_[:, None] * E + e[None, :]
        grad = tl.load(dy + at_y + tile, mask=mask, other=0.0).to(tl.float32)
        through = grad
        if z is not None:
            gate = _tile(z + batch * z_b + first * z_t, t_, z_t, e, mask)
            through = grad * gate / (1 + tl.exp(-gate))
        value, out = step * x, skip[None, :] * x
        d_value, d_step = tl.zeros((BT, BE), tl.float32), tl.zeros((BT, BE), tl.float32)
        here = (batch * L + first) * G + group
        for k in range(N):
            a = tl.load(A + e * N + k, mask=inside, other=0.0).to(tl.float32)
            into = tl.load(B + here * N + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)[:, None]
            from_ = tl.load(C + here * N + t_ * (G * N) + k, mask=ok, other=0.0).to(tl.float32)[:, None]
            before = tl.load(kept + (batch * tl.cdiv(L, BT) + first // BT) * E * N + e * N + k, mask=inside, other=0.0)
            decay, state = tl.associative_scan((tl.exp(a[None, :] * step), value * into), 0, _two)
            state += decay * before[None, :]
            out += state * from_
            decay, g = tl.associative_scan((tl.exp(a[None, :] * next_step), through * from_), 0, _two, reverse=True)
            g += decay * tl.sum(tl.where(n == k, carry, 0.0), 0)[None, :]
            share = (here * blocks + block) * N + t_ * (G * N) * blocks + k
            tl.store(dB + share, tl.sum(g * value, 1), mask=ok)
            tl.store(dC + share, tl.sum(through * state, 1), mask=ok)
            d_value += g * into
            d_exponent = g * (state - value * into)
            d_step += d_exponent * a[None, :]
            sum_A += tl.where(n == k, tl.sum(d_exponent * step, 0)[None, :], 0.0)
            early = tl.sum(tl.where(t_[:, None] == 0, tl.exp(a[None, :] * step) * g, 0.0), 0)
            carry = tl.where(n == k, early[None, :], carry)
        if z is not None:
            open_ = 1 / (1 + tl.exp(-gate))
            tl.store(dz + at_y + tile, grad * out * open_ * (1 + gate * (1 - open_)), mask=mask)
        tl.store(du + at_y + tile, d_value * step + through * skip[None, :], mask=mask)
        d_step += d_value * x
        if softplus:
            d_step = d_step / (1 + tl.exp(-raw))
        d_step = tl.where(mask, d_step, 0.0)
        tl.store(ddt + at_y + tile, d_step, mask=mask)
        sum_bias += tl.sum(d_step, 0)
        sum_D += tl.sum(through * x, 0)
    at = batch * chunks + part
    tl.store(dA + at * E * N + entries, sum_A, mask=states)
    tl.store(dD + at * E + e, sum_D, mask=inside)
    tl.store(dbias + at * E + e, sum_bias, mask=inside)
