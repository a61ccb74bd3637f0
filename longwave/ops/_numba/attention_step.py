# mypy: no-check-untyped-defs
"""One step of attention, the numbers of a head in the lanes, on addresses: a past that grows is read where it lies."""

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    exp,
    floats,
    fma,
    integers,
    lanes_of,
    load,
    load_first,
    load_splat,
    maximum,
    splat,
    store,
    store_first,
    store_sums,
    sum_lanes,
    widest,
    zero,
)

ROOM = 256  # steps by which the scratch grows
LEAST = 2**17  # numbers that a task reads, where there are so many: fewer are not worth a thread


def why_not(q: Tensor, past: Tensor, seen: Tensor, scale: float | None) -> str | None:
    """What is not read as it is stored."""
    return None if past.dtype == torch.float32 else f"past is {past.dtype}; the kernel reads float32"


def forward(q: Tensor, past: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """y (B, 1, H, P)."""
    (B, _, H, P), (_, T, M, _) = q.shape, past.shape
    if past.stride()[2:] != (P, 1):
        past = past.contiguous()
    y, u, count = torch.empty(B, 1, H, P), q.float().contiguous(), seen.contiguous()
    tasks, room = B * M // 2, -(-T // ROOM) * ROOM
    size = min(tasks, -(-LEAST // (2 * T * P)))
    pool.run(
        _step, -(-tasks // size), widest, size, tasks, u.data_ptr(), past.data_ptr(), count.data_ptr(), y.data_ptr(),
        T, H, M // 2, P, *past.stride()[:2], P**-0.5 if scale is None else scale, scratch_size=room + 16,
    )  # fmt: skip
    return y.to(q.dtype)


def backward(
    needed: set[str], dy: Tensor, q: Tensor, past: Tensor, seen: Tensor, scale: float | None
) -> dict[str, Tensor]:
    """All gradients, by torch: a step that is trained is one of few."""
    P, T, J = q.shape[3], past.shape[1], past.shape[2] // 2
    factor = P**-0.5 if scale is None else scale
    q, dy = (t[:, 0].float().unflatten(1, (J, -1)) for t in (q, dy))  # (B, J, G, P)
    k, v = past.transpose(1, 2).chunk(2, dim=1)  # (B, J, T, P)
    hidden = torch.arange(T) < (T - seen)[:, None, None, None]
    p = (factor * q @ k.transpose(2, 3)).masked_fill(hidden, float("-inf")).softmax(-1)
    dp = dy @ v.transpose(2, 3)
    ds = factor * p * (dp - (p * dp).sum(-1, keepdim=True))  # (B, J, G, T)
    dpast = torch.cat([ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dy], dim=1)
    return {"q": (ds @ k).flatten(1, 2)[:, None], "past": dpast.transpose(1, 2)}


@kernel
def _step(first, last, logits, w, size, tasks, q, past, seen, y, T, H, J, P, row, step, scale):
    q, past, y, full, G = floats(q), floats(past), floats(y), lanes_of(w), H // J
    whole, rest = P - P % full, P % full
    for task in range(first * size, min(last * size, tasks)):
        b, j = task // J, task % J
        n = min(integers(seen)[b], T)
        keys = b * row + (T - n) * step + j * P
        values = keys + J * P
        for o in range((b * H + j * G) * P, (b * H + (j + 1) * G) * P, P):
            for s in range(0, n - n % 4, 4):
                k = keys + s * step
                one, two, three, four = zero(w), zero(w), zero(w), zero(w)
                for i in range(0, whole, full):
                    u = load(w, q, o + i)
                    one, two = fma(u, load(w, past, k + i), one), fma(u, load(w, past, k + step + i), two)
                    three = fma(u, load(w, past, k + 2 * step + i), three)
                    four = fma(u, load(w, past, k + 3 * step + i), four)
                if rest:
                    u, i = load_first(w, q, o + whole, rest), k + whole
                    one = fma(u, load_first(w, past, i, rest), one)
                    two = fma(u, load_first(w, past, i + step, rest), two)
                    three = fma(u, load_first(w, past, i + 2 * step, rest), three)
                    four = fma(u, load_first(w, past, i + 3 * step, rest), four)
                store_sums(logits, s, one, two, three, four)
            for s in range(n - n % 4, n):
                k, one = keys + s * step, zero(w)
                for i in range(0, whole, full):
                    one = fma(load(w, q, o + i), load(w, past, k + i), one)
                if rest:
                    one = fma(load_first(w, q, o + whole, rest), load_first(w, past, k + whole, rest), one)
                logits[s] = sum_lanes(one)
            _softmax(w, logits, n, np.float32(scale))
            for i in range(0, whole, full):
                one, two = zero(w), zero(w)
                for s in range(0, n - 1, 2):
                    v = values + s * step + i
                    one = fma(load_splat(w, logits, s), load(w, past, v), one)
                    two = fma(load_splat(w, logits, s + 1), load(w, past, v + step), two)
                if n % 2:
                    one = fma(load_splat(w, logits, n - 1), load(w, past, values + (n - 1) * step + i), one)
                store(y, o + i, one + two)
            if rest:
                one = zero(w)
                for s in range(n):
                    one = fma(load_splat(w, logits, s), load_first(w, past, values + s * step + whole, rest), one)
                store_first(y, o + whole, one, rest)


@kernel
def _softmax(w, x, n, scale):
    """x[:n] becomes softmax(scale x[:n]); room behind it, to full lanes, is overwritten."""
    full, factor = lanes_of(w), splat(w, scale)
    end = (n + full - 1) // full * full
    for i in range(0, end, full):
        store(x, i, load(w, x, i) * factor)
    for i in range(n, end):
        x[i] = -np.inf
    most = load(w, x, 0)
    for i in range(full, end, full):
        most = maximum(load(w, x, i), most)
    store(x, end, most)
    top = x[end]
    for i in range(end + 1, end + full):
        top = max(top, x[i])
    shift, total = splat(w, top), zero(w)
    for i in range(0, end, full):
        e = exp(load(w, x, i) - shift)
        store(x, i, e)
        total = total + e
    share = splat(w, np.float32(1) / sum_lanes(total))
    for i in range(0, end, full):
        store(x, i, load(w, x, i) * share)
