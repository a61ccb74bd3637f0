# mypy: no-check-untyped-defs
"""Rotary positions, pairs in the lanes, forward and back: the gradient is turned the other way."""

import math

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    doubles,
    floats,
    fma,
    fnma,
    integers,
    lanes_of,
    load,
    load_first,
    store,
    store_first,
    widest,
)

STEPS = 64  # of a task: from one to the next the turn is multiplied on, in float64, where they begin it is exact


def forward(x: Tensor, start: Tensor | None, frequency: Tensor, heads: int) -> Tensor:
    """y (B, L, H, P)."""
    return _turned(x, start, frequency, heads, 1.0).to(x.dtype)


def backward(
    needed: set[str], dy: Tensor, y: Tensor, start: Tensor | None, frequency: Tensor, heads: int
) -> dict[str, Tensor]:
    """dx = dy turned back, and the gradient of the frequencies by torch."""
    grads = {"x": _turned(dy, start, frequency, heads, -1.0)} if "x" in needed else {}
    if "frequency" in needed:
        R = len(frequency)
        a, b, da, db = (t[:, :, :heads, i : i + R].double() for t in (y, dy) for i in (0, R))
        moved = (a * db - b * da).sum(2)  # what a radian more at each step brings
        position = torch.arange(y.shape[1]) if start is None else start[:, None] + torch.arange(y.shape[1])
        grads["frequency"] = (moved * position[..., None]).sum((0, 1))
    return grads


def _turned(x: Tensor, start: Tensor | None, frequency: Tensor, heads: int, sign: float) -> Tensor:
    (B, L, H, P), R = x.shape, frequency.shape[0]
    y, u, turns = pool.empty(B, L, H, P), x.float().contiguous(), frequency.double().contiguous()
    begin = None if start is None else start.contiguous()
    pool.run(
        _turn, B * -(-L // STEPS), widest, u.data_ptr(), 0 if begin is None else begin.data_ptr(), turns.data_ptr(),
        y.data_ptr(), sign, L, H, P, R, heads, scratch_size=2 * STEPS * R,
    )  # fmt: skip
    return y


@kernel
def _turn(first, last, table, w, x, start, frequency, y, sign, L, H, P, R, heads):
    x, y, full = floats(x), floats(y), lanes_of(w)
    pieces = -(-L // STEPS)
    for task in range(first, last):
        b, begin = task // pieces, task % pieces * STEPS
        count = min(STEPS, L - begin)
        where = begin + (integers(start)[b] if start != 0 else 0)
        for i in range(R):
            f = sign * doubles(frequency)[i]
            c, s = math.cos(where * f), math.sin(where * f)
            table[i], table[R + i] = np.float32(c), np.float32(s)
            if count > 1:
                cf, sf = math.cos(f), math.sin(f)
                for at in range(2 * R + i, 2 * R * count, 2 * R):
                    c, s = c * cf - s * sf, s * cf + c * sf
                    table[at], table[at + R] = np.float32(c), np.float32(s)
        for t in range(count):
            o, at = (b * L + begin + t) * H * P, 2 * R * t
            for h in range(heads):
                p = o + h * P
                for i in range(0, R - R % full, full):
                    c, s, left, right = (
                        load(w, table, at + i),
                        load(w, table, at + R + i),
                        load(w, x, p + i),
                        load(w, x, p + R + i),
                    )
                    store(y, p + i, fnma(right, s, left * c))
                    store(y, p + R + i, fma(left, s, right * c))
                if R % full:
                    i, n = R - R % full, R % full
                    c, s = load_first(w, table, at + i, n), load_first(w, table, at + R + i, n)
                    left, right = load_first(w, x, p + i, n), load_first(w, x, p + R + i, n)
                    store_first(y, p + i, fnma(right, s, left * c), n)
                    store_first(y, p + R + i, fma(left, s, right * c), n)
                for i in range(p + 2 * R, p + P):
                    y[i] = x[i]
            for i in range(o + heads * P, o + H * P):
                y[i] = x[i]
