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
    prefetch,
    splat,
    store,
    store_first,
    store_sums,
    sum_lanes,
    widest,
    zero,
)

BLOCK, LINE = 64, 16  # steps whose logits exist at once; numbers in a line of the cache
LEAST = 2**18  # numbers that are worth several threads a row


def why_not(q: Tensor, past: Tensor, seen: Tensor, scale: float | None) -> str | None:
    """What is not read as it is stored."""
    return None if past.dtype == torch.float32 else f"past is {past.dtype}; the kernel reads float32"


def forward(q: Tensor, past: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """y (B, 1, H, P)."""
    (B, _, H, P), (_, T, M, _) = q.shape, past.shape
    if past.stride()[2:] != (P, 1):
        past = past.contiguous()
    y, u, count = torch.empty(B, 1, H, P), q.float().contiguous(), seen.contiguous()
    threads, J = torch.get_num_threads(), M // 2
    parts = 1 if threads <= B or past.numel() < LEAST else min(J, threads)
    pool.run(
        _step, B * parts, widest, parts, u.data_ptr(), past.data_ptr(), count.data_ptr(), y.data_ptr(), T, H, J, P,
        *past.stride()[:2], P**-0.5 if scale is None else scale, scratch_size=H * (BLOCK + P + 18),
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
def _step(first, last, memory, w, parts, q, past, seen, y, T, H, J, P, row, step, scale):
    """Block by block of the past, so that its memory is read once and in order; all that came so far is shrunk where a
    block has a larger logit."""
    q, past, y, full, G = floats(q), floats(past), floats(y), lanes_of(w), H // J
    whole, rest, size = P - P % full, P % full, -(-J // parts)
    wide = whole + (full if rest else 0)
    for task in range(first, last):
        b, begin = task // parts, task % parts * size
        heads = max(0, min(J - begin, size))  # of keys
        count = heads * G
        sums, tops, totals = count * BLOCK, count * (BLOCK + wide), count * (BLOCK + wide + 1)
        for i in range(sums, tops):
            memory[i] = 0
        for h in range(count):
            memory[tops + h], memory[totals + h] = -np.inf, 0
        n, ours = min(integers(seen)[b], T), (b * H + begin * G) * P
        for start in range(T - n, T, BLOCK):
            steps = min(BLOCK, T - start)
            keys = b * row + start * step + begin * P
            values = keys + J * P
            for s in range(0, steps, 4):
                for j in range(heads):
                    k = keys + s * step + j * P
                    for h in range(j * G, (j + 1) * G):
                        _products(w, memory, h * BLOCK + s, q, ours + h * P, past, k, P, step, steps - s, J * P)
            for j in range(heads):
                for h in range(j * G, (j + 1) * G):
                    o = sums + h * wide
                    _weigh(w, memory, h * BLOCK, steps, np.float32(scale), tops + h, totals + h, o, wide)
                    _add(w, memory, o, h * BLOCK, steps, past, values + j * P, P, step)
        for h in range(count):
            share, o = splat(w, np.float32(1) / memory[totals + h]), ours + h * P
            for i in range(0, whole, full):
                store(y, o + i, load(w, memory, sums + h * wide + i) * share)
            if rest:
                store_first(y, o + whole, load(w, memory, sums + h * wide + whole) * share, rest)


@kernel
def _products(w, x, at, q, o, past, k, P, step, count, ahead):
    """x[at : at + 4] = products of a query and four keys, or of as many as there are; their values are asked for."""
    full = lanes_of(w)
    whole, rest = P - P % full, P % full
    if count < 4:
        for s in range(count):
            one = zero(w)
            for i in range(0, whole, full):
                one = fma(load(w, q, o + i), load(w, past, k + s * step + i), one)
            if rest:
                one = fma(load_first(w, q, o + whole, rest), load_first(w, past, k + s * step + whole, rest), one)
            x[at + s] = sum_lanes(one)
        return
    for s in range(0, 4 * step, step):
        for i in range(k + s, k + s + P, LINE):
            prefetch(past, i + ahead)
    one, two, three, four = zero(w), zero(w), zero(w), zero(w)
    for i in range(0, whole, full):
        u = load(w, q, o + i)
        one, two = fma(u, load(w, past, k + i), one), fma(u, load(w, past, k + step + i), two)
        three = fma(u, load(w, past, k + 2 * step + i), three)
        four = fma(u, load(w, past, k + 3 * step + i), four)
    if rest:
        u, i = load_first(w, q, o + whole, rest), k + whole
        one, two = fma(u, load_first(w, past, i, rest), one), fma(u, load_first(w, past, i + step, rest), two)
        three = fma(u, load_first(w, past, i + 2 * step, rest), three)
        four = fma(u, load_first(w, past, i + 3 * step, rest), four)
    store_sums(x, at, one, two, three, four)


@kernel
def _add(w, x, o, at, n, past, v, P, step):
    """x[o : o + P] += the sum of n values by their weights x[at : at + n]."""
    full = lanes_of(w)
    whole, rest = P - P % full, P % full
    for i in range(0, whole, full):
        one, two = load(w, x, o + i), zero(w)
        for s in range(0, n - 1, 2):
            one = fma(load_splat(w, x, at + s), load(w, past, v + s * step + i), one)
            two = fma(load_splat(w, x, at + s + 1), load(w, past, v + (s + 1) * step + i), two)
        if n % 2:
            one = fma(load_splat(w, x, at + n - 1), load(w, past, v + (n - 1) * step + i), one)
        store(x, o + i, one + two)
    if rest:
        one = load(w, x, o + whole)
        for s in range(n):
            one = fma(load_splat(w, x, at + s), load_first(w, past, v + s * step + whole, rest), one)
        store(x, o + whole, one)


@kernel
def _weigh(w, x, at, n, scale, top, total, sums, wide):
    """n logits become exp(scale x - top), behind them zeros to full lanes; what came before shrinks with the top."""
    full, factor = lanes_of(w), splat(w, scale)
    end = at + (n + full - 1) // full * full
    for i in range(at, end, full):
        store(x, i, load(w, x, i) * factor)
    for i in range(at + n, end):
        x[i] = -np.inf
    before, most = x[top], x[at]
    for i in range(at + 1, at + n):
        most = max(most, x[i])
    if most > before:
        x[top] = most
        shrunk = exp(splat(w, before) - splat(w, most))
        for i in range(sums, sums + wide, full):
            store(x, i, load(w, x, i) * shrunk)
        x[total] *= sum_lanes(shrunk) / np.float32(full)
    shift, more = splat(w, x[top]), zero(w)
    for i in range(at, end, full):
        e = exp(load(w, x, i) - shift)
        store(x, i, e)
        more = more + e
    x[total] += sum_lanes(more)
