# mypy: no-check-untyped-defs
"""The gated activation and its gradient: one pass over memory each; nothing but x is kept for the backward pass."""

import numpy as np
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import floats, fma, lanes_of, load, load_first, sigmoid, splat, store, store_first, widest

ROWS = 16  # of a task


def forward(x: Tensor) -> Tensor:
    """y (..., H)."""
    *front, _, H = x.shape
    y = pool.empty(*front, H)
    rows = y.numel() // H
    u = x.float().contiguous()
    pool.run_addresses(_forward, -(-rows // ROWS), u.data_ptr(), y.data_ptr(), rows, H)
    return y.to(x.dtype)


def backward(needed: set[str], dy: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The gradient of both factors, as one tensor."""
    rows, H = dy.numel() // dy.shape[-1], dy.shape[-1]
    dx = pool.empty(*x.shape)
    pool.run(_backward, -(-rows // ROWS), widest, pool.flat(x), pool.flat(dy), pool.flat(dx), rows, H)
    return {"x": dx}


@kernel
def gated(gate, value):
    return gate * sigmoid(gate) * value


@kernel
def _forward(start, stop, x, y, rows, H):
    """On addresses: arrays would cost one token more than its arithmetic."""
    w, x, y = widest, floats(x), floats(y)
    full = lanes_of(w)
    whole, rest = H - H % full, H % full
    for r in range(start * ROWS, min(stop * ROWS, rows)):
        gate, value, out = 2 * r * H, (2 * r + 1) * H, r * H
        for i in range(0, whole, full):
            store(y, out + i, gated(load(w, x, gate + i), load(w, x, value + i)))
        if rest:
            a, b = load_first(w, x, gate + whole, rest), load_first(w, x, value + whole, rest)
            store_first(y, out + whole, gated(a, b), rest)


@kernel
def _slopes(w, gate, value, d):
    """Gradients of gate and value:  s (1 + gate (1 - s)) value d  and  gate s d,  s = sigmoid(gate)."""
    one = splat(w, np.float32(1))
    s = sigmoid(gate)
    return d * value * s * fma(gate, one - s, one), d * gate * s


@kernel
def _backward(start, stop, scratch, w, x, dy, dx, rows, H):
    full = lanes_of(w)
    whole, rest = H - H % full, H % full
    for r in range(start * ROWS, min(stop * ROWS, rows)):
        gate, value, out = 2 * r * H, (2 * r + 1) * H, r * H
        for i in range(0, whole, full):
            a, b = _slopes(w, load(w, x, gate + i), load(w, x, value + i), load(w, dy, out + i))
            store(dx, gate + i, a)
            store(dx, value + i, b)
        if rest:
            a, b = load_first(w, x, gate + whole, rest), load_first(w, x, value + whole, rest)
            a, b = _slopes(w, a, b, load_first(w, dy, out + whole, rest))
            store_first(dx, gate + whole, a, rest)
            store_first(dx, value + whole, b, rest)
