# mypy: no-check-untyped-defs
"""Root mean square normalisation and its gradient: one pass over memory each; nothing but x is kept for the latter."""

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    floats,
    fma,
    lanes_of,
    load,
    load_first,
    splat,
    store,
    store_first,
    sum_lanes,
    widest,
    zero,
)

ROWS = 32  # of a task


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y (..., D)."""
    D, G = x.shape[-1], weight.numel() // x.shape[-1]
    y, rows = pool.empty(*x.shape), x.numel() // D
    u, weight = x.float().contiguous(), weight.float().contiguous()
    places = u.data_ptr(), weight.data_ptr(), y.data_ptr()
    pool.run_addresses(_forward, -(-rows // ROWS), *places, rows, G, D, eps)
    return y.to(x.dtype)


def backward(needed: set[str], dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> dict[str, Tensor]:
    """Both gradients; that of weight as sums over tasks, which are the same whatever the threads."""
    D, G = x.shape[-1], weight.numel() // x.shape[-1]
    dx, rows = pool.empty(*x.shape), x.numel() // D
    tasks = -(-rows // ROWS)
    sums = np.zeros((tasks, *weight.shape), np.float32)
    arrays = pool.flat(x), pool.flat(weight), pool.flat(dy), pool.flat(dx)
    pool.run(_backward, tasks, widest, *arrays, sums.reshape(-1), rows, G, D, eps)
    return {"x": dx, "weight": torch.from_numpy(sums.sum(0, dtype=np.float64))}


@kernel
def row_scale(w, x, o, D, eps):
    """1 / sqrt(mean(x^2) + eps) of a row."""
    full = lanes_of(w)
    whole = D - D % full
    total = zero(w)
    for i in range(0, whole, full):
        v = load(w, x, o + i)
        total = fma(v, v, total)
    if D % full:
        v = load_first(w, x, o + whole, D % full)
        total = fma(v, v, total)
    return np.float32(1 / np.sqrt(np.float64(sum_lanes(total)) / D + eps))


@kernel
def _forward(start, stop, x, weight, y, rows, G, D, eps):
    """On addresses: arrays would cost one token more than its arithmetic."""
    w, x, weight, y = widest, floats(x), floats(weight), floats(y)
    full = lanes_of(w)
    whole, rest = D - D % full, D % full
    for r in range(start * ROWS, min(stop * ROWS, rows)):
        o, g = r * D, r % G * D
        scale = splat(w, row_scale(w, x, o, D, eps))
        for i in range(0, whole, full):
            store(y, o + i, load(w, x, o + i) * scale * load(w, weight, g + i))
        if rest:
            v = load_first(w, x, o + whole, rest) * scale * load_first(w, weight, g + whole, rest)
            store_first(y, o + whole, v, rest)


@kernel
def _backward(start, stop, scratch, w, x, weight, dy, dx, sums, rows, G, D, eps):
    """With n = x scale:  dx = scale (weight dy - n mean(n weight dy)),  dweight = sum of n dy."""
    full = lanes_of(w)
    whole, rest = D - D % full, D % full
    for task in range(start, stop):
        for r in range(task * ROWS, min((task + 1) * ROWS, rows)):
            o, g = r * D, r % G * D
            at = task * G * D + g
            s = row_scale(w, x, o, D, eps)
            scale = splat(w, s)
            total = zero(w)
            for i in range(0, whole, full):
                p = load(w, x, o + i) * scale * load(w, dy, o + i)
                store(sums, at + i, load(w, sums, at + i) + p)
                total = fma(p, load(w, weight, g + i), total)
            if rest:
                p = load_first(w, x, o + whole, rest) * scale * load_first(w, dy, o + whole, rest)
                store_first(sums, at + whole, load_first(w, sums, at + whole, rest) + p, rest)
                total = fma(p, load_first(w, weight, g + whole, rest), total)
            back = splat(w, np.float32(-s * s * sum_lanes(total) / D))
            for i in range(0, whole, full):
                d = load(w, dy, o + i) * load(w, weight, g + i) * scale
                store(dx, o + i, fma(load(w, x, o + i), back, d))
            if rest:
                d = load_first(w, dy, o + whole, rest) * load_first(w, weight, g + whole, rest) * scale
                store_first(dx, o + whole, fma(load_first(w, x, o + whole, rest), back, d), rest)
